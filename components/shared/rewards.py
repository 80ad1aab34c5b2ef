"""Rewards of samples for reinforcement learning: verifiers, code that is run, a judge, and shaping.

Each kind gives a value in [0, 1], of which `length` is the exception: it only takes away. What a sample earns is the
weighted sum. A sample that was cut at the token limit did not end by itself and earns nothing from any verifier, and a
verifier reads strictly: an answer that names two numbers, repeats a key or adds a field has not answered.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..contracts.errors import DataError, RecipeError, TrainingError
from ..contracts.recipe import (
    ExactReward,
    FieldsReward,
    JudgeReward,
    LengthReward,
    NumericReward,
    RegexReward,
    Reward,
    SchemaReward,
    TaskReward,
    TestsReward,
)
from ..runtime.context import cpus
from . import judging, sandbox
from .metrics import exact_match, field_accuracy, normalise
from .strict_json import read_value, same
from .tasks.task import Task

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w]|\.\d)")
LONGEST = 20_000
"""Characters of an answer that a pattern is held against: what is longer does not match."""


PROBED = 16
"""Prompts that probes are tried on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, and what is known of its prompt."""

    prompt: str
    """The last user turn."""
    response: str
    reference: str
    finished: bool
    """It ended by itself."""


Score = Callable[[Sequence[Sample]], list[float]]


def open_rewards(settings: Sequence[Reward], task: Task) -> Score:
    """Return what scores samples by the recipe's rewards; without any, by the task's verifier.

    Args:
        settings: Of the recipe.
        task: Its verifier is the reward of kind `task`.

    Raises:
        RecipeError: A pattern or a schema is none, or a judge cannot be reached by what is given.
        TrainingError: Code is to be run, and cannot be confined here.
    """
    parts = [(one.weight, _open(one, task)) for one in settings or [TaskReward()]]

    def score(samples: Sequence[Sample]) -> list[float]:
        columns = [[weight * value for value in part(samples)] for weight, part in parts]
        return [sum(values) for values in zip(*columns, strict=True)]

    return score


def probe(score: Score, asked: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return what answers earn that answer nothing, and what the references earn, as means over some prompts.

    A policy finds the cheapest way to a reward; these are the first that it would find.

    Args:
        score: Of `open_rewards`.
        asked: Prompt and reference.
    """
    common = Counter(reference for _, reference in asked).most_common(1)[0][0]
    some = asked[:PROBED]
    answers = {
        "reference": [reference for _, reference in some],
        "empty": [""] * len(some),
        "echo": [prompt for prompt, _ in some],
        "constant": [common] * len(some),
        "rambling": [f"{common} " * 50] * len(some),
    }
    earned = {}
    for name, texts in answers.items():
        samples = [Sample(prompt, text, reference, True) for (prompt, reference), text in zip(some, texts, strict=True)]
        earned[name] = sum(score(samples)) / len(some)
    return earned


def check_probes(earned: Mapping[str, float]) -> None:
    """Refuse a reward that pays for nothing as well as for the reference.

    Raises:
        TrainingError: It does. Where the references themselves earn nothing, as tests do that are not code, there is no
            telling.
    """
    best = max((name for name in earned if name != "reference"), key=earned.__getitem__)
    if 0 < earned["reference"] <= earned[best]:
        raise TrainingError(
            f"the reward can be had without answering: the probe {best!r} earns {earned[best]:.3g}, "
            f"the reference {earned['reference']:.3g}",
            where="rl.rewards",
            fix="weigh the verifier more, or the shaping less",
        )


def _open(settings: Reward, task: Task) -> Score:
    match settings:
        case TaskReward():
            return _each(lambda one: task.reward(one.response, one.reference, finished=one.finished), cut=True)
        case ExactReward():
            return _each(lambda one: exact_match(one.response, one.reference))
        case NumericReward():
            return _each(partial(numeric, settings=settings))
        case RegexReward():
            return _each(partial(regex, pattern=_pattern(settings.pattern)))
        case SchemaReward():
            return _each(_schema(settings))
        case FieldsReward():
            return _each(lambda one: field_accuracy(one.response, one.reference))
        case TestsReward():
            sandbox.check()
            return partial(tests, settings=settings)
        case LengthReward():
            return _each(lambda one: length(len(one.response), settings), cut=True)
        case JudgeReward():
            return _judge(settings)


def _judge(settings: JudgeReward) -> Score:
    key = os.environ.get(settings.key_variable, "")
    rater = judging.Rater(judging.OpenAIJudge(settings.url, settings.model, key), settings.rubric)
    return lambda samples: [(grade - 1) / 4 for grade in rater.grade([(one.prompt, one.response) for one in samples])]


def _each(value: Callable[[Sample], float], cut: bool = False) -> Score:
    """Score one sample at a time; one that was cut earns 0 unless the reward itself looks at that."""
    return lambda samples: [value(one) if one.finished or cut else 0.0 for one in samples]


def numeric(sample: Sample, settings: NumericReward) -> float:
    """Return 1 if the answer names one number, and it is the reference's within the tolerance.

    With a marker the number stands after it, and the marker stands once; what comes before it is free.

    Raises:
        DataError: The reference names no number, or several.
    """
    text = sample.response
    if settings.marker:
        before, found, text = text.partition(settings.marker)
        if not found or settings.marker in text:
            return 0.0
    got, wanted = numbers(text), numbers(sample.reference.rpartition(settings.marker or "\0")[2])
    if len(wanted) != 1:
        raise DataError(
            f"the reference {sample.reference[:40]!r} does not name one number",
            where="rl split",
            fix="give the number alone, or another kind of reward",
        )
    if len(got) != 1:
        return 0.0
    (value,), (right,) = got, wanted
    return float(abs(value - right) <= max(settings.tolerance * abs(right), settings.absolute))


def numbers(text: str) -> set[float]:
    """Return the different numbers that a text names; `1,234.5` is one."""
    found = (match.group() for match in NUMBER.finditer(text))
    return {float(one.replace(",", "")) for one in found if any(sign.isdigit() for sign in one)}


def regex(sample: Sample, pattern: "re.Pattern[str]") -> float:
    """Return 1 if the whole answer matches and its group `answer`, where there is one, is the reference."""
    found = pattern.fullmatch(sample.response.strip()) if len(sample.response) <= LONGEST else None
    if not found:
        return 0.0
    named = found.groupdict().get("answer")
    return 1.0 if "answer" not in pattern.groupindex else float(normalise(named or "") == normalise(sample.reference))


def length(characters: int, settings: LengthReward) -> float:
    """Return 0 up to the limit, and −1 from limit + span on; linear between."""
    return -min(1.0, max(0.0, (characters - settings.limit) / settings.span))


def tests(samples: Sequence[Sample], settings: TestsReward) -> list[float]:
    """Return for each answer, which is Python code, the share of the reference's calls that give what they should.

    A reference is a JSON list of `{"call": "add(2, 3)", "expect": 5}`. What is expected stays outside of the process in
    which the code runs.

    Raises:
        DataError: A reference is not such a list.
    """

    def one(sample: Sample) -> float:
        cases = read_value(sample.reference)
        if not isinstance(cases, list) or not cases or not all(_is_case(case) for case in cases):
            raise DataError(
                f"the reference {sample.reference[:40]!r} is no list of tests",
                where="rl split",
                fix='write [{"call": "add(2, 3)", "expect": 5}, ...]',
            )
        if not sample.finished:
            return 0.0
        calls = [case["call"] for case in cases]
        found = sandbox.run(code_of(sample.response), calls, settings.seconds, settings.memory_mb)
        right = [same(value, case["expect"]) for value, case in zip(found or [], cases, strict=False)]
        return float(len(right) == len(cases) and all(right)) if settings.all_or_none else sum(right) / len(cases)

    with ThreadPoolExecutor(cpus()) as pool:
        return list(pool.map(one, samples))


def code_of(response: str) -> str:
    """Return the answer's only fenced block, or all of it where nothing is fenced."""
    blocks = re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", response, re.DOTALL | re.MULTILINE)
    return str(blocks[0]) if len(blocks) == 1 else response


def _is_case(case: Any) -> bool:
    # None is what a call gives that failed, so it cannot be what is wanted.
    return isinstance(case, dict) and isinstance(case.get("call"), str) and case.get("expect") is not None


def _pattern(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{text!r} is no pattern: {error}", where="rl.rewards", fix="correct it") from error


def _schema(settings: SchemaReward) -> Callable[[Sample], float]:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(settings.schema_)
    except SchemaError as error:
        raise RecipeError(f"this is no JSON schema: {error.message}", where="rl.rewards", fix="correct it") from error
    validator = Draft202012Validator(settings.schema_)

    def value(sample: Sample) -> float:
        got = read_value(sample.response)
        return float(got is not None and validator.is_valid(got))

    return value
