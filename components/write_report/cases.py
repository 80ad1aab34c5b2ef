"""Held-out examples on which the candidate and another arm differ: what the numbers look like."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..contracts.metrics import Metric
from ..contracts.rows import Example, Result

SHOWN = 8
"""Examples of each kind, at most."""
LONGEST = 1200
"""Characters of a text that are shown."""


class Case(NamedTuple):
    """One example with the answers of two arms."""

    prompt: str
    label: str
    """Its slices."""
    reference: list[dict[str, str]]
    candidate: list[dict[str, str]]
    other: list[dict[str, str]]
    severe: bool
    """The arm that was wrong also failed the metric that lower is better of: say, missed an unsafe direction."""


def compare(
    results: Mapping[str, Mapping[str, Result]],
    examples: Mapping[str, Example],
    other: str,
    title: str,
    primary: Metric,
    harm: Metric | None,
) -> dict[str, Any]:
    """Return the examples won and lost by the candidate against another arm, the severe ones first.

    Args:
        results: By arm and example.
        examples: By id.
        other: The other arm.
        title: What it is called.
        primary: Decides who is better on an example.
        harm: A metric of which lower is better; None where the task has none.
    """
    pairs = [
        (examples[key], mine, results[other][key])
        for key, mine in results["candidate"].items()
        if key in results[other] and key in examples
    ]
    won = [(example, mine, its) for example, mine, its in pairs if _better(primary, mine, its)]
    lost = [(example, mine, its) for example, mine, its in pairs if _better(primary, its, mine)]
    return {
        "other": title,
        "same": len(pairs) - len(won) - len(lost),
        "groups": [
            {"name": "lost", "count": len(lost), "cases": _pick(lost, harm, worse=1)},
            {"name": "won", "count": len(won), "cases": _pick(won, harm, worse=2)},
        ],
    }


def missed(
    results: Mapping[str, Mapping[str, Result]], examples: Mapping[str, Example], other: str, title: str, harm: Metric
) -> dict[str, Any]:
    """Return the examples on which the candidate failed the metric that lower is better of, whoever else did.

    A model that shares every miss with the one before it wins and loses nothing, and these must be seen all the same.

    Args:
        results: By arm and example.
        examples: By id.
        other: The arm whose answer stands beside the candidate's.
        title: What it is called.
        harm: Above its lowest value the answer did harm.
    """
    measured = {key: one for key, one in results["candidate"].items() if one.scores.get(harm.name) is not None}
    found = sorted(key for key, one in measured.items() if (one.scores[harm.name] or 0) > harm.low and key in examples)
    return {
        "other": title,
        "metric": harm,
        "count": len(found),
        "of": len(measured),
        "cases": [
            _case(examples[key], measured[key], results[other][key], severe=True)
            for key in found[:SHOWN]
            if key in results[other]
        ],
    }


def _pick(triples: Sequence[tuple[Example, Result, Result]], harm: Metric | None, worse: int) -> list[Case]:
    """Return the first cases, severe ones before the others, then by id."""

    def severe(triple: tuple[Example, Result, Result]) -> bool:
        wrong, right = (triple[1], triple[2]) if worse == 1 else (triple[2], triple[1])
        return harm is not None and _better(harm, right, wrong)

    ordered = sorted(triples, key=lambda triple: (not severe(triple), triple[0].id))[:SHOWN]
    return [_case(*triple, severe(triple)) for triple in ordered]


def _case(example: Example, mine: Result, its: Result, severe: bool) -> Case:
    asked = "\n".join(message.content for message in example.prompt if message.role != "system")
    return Case(
        prompt=_short(asked),
        label=", ".join(example.slices),
        reference=marked(example.reference, example.reference),
        candidate=marked(mine.response, example.reference),
        other=marked(its.response, example.reference),
        severe=severe,
    )


def _better(metric: Metric, one: Result, other: Result) -> bool:
    first, second = one.scores.get(metric.name), other.scores.get(metric.name)
    if first is None or second is None:
        return False
    return first > second if metric.better == "higher" else first < second


def marked(answer: str, reference: str) -> list[dict[str, str]]:
    """Split an answer into its fields, each marked `same`, `wrong`, `extra` or `missing` against the reference.

    An answer that is no JSON object is one field without a name, `same` or `wrong` as a whole.
    """
    fields, wanted = _fields(answer), _fields(reference)
    if fields is None or wanted is None:
        state = "same" if answer.strip() == reference.strip() else "wrong"
        return [{"name": "", "value": _short(answer) or "(no answer)", "state": state}]
    chips = []
    for name in [*wanted, *(name for name in fields if name not in wanted)]:
        if name not in fields:
            state, value = "missing", wanted[name]
        elif name not in wanted:
            state, value = "extra", fields[name]
        else:
            state, value = "same" if fields[name] == wanted[name] else "wrong", fields[name]
        chips.append({"name": _short(name), "value": _short(value), "state": state})
    return chips


def _fields(text: str) -> dict[str, str] | None:
    """Return the fields of a JSON object as JSON texts (so that 1 and "1" differ), or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return {str(name): json.dumps(one, ensure_ascii=False) for name, one in value.items()}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
