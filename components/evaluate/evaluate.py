"""Every arm on the same held-out examples: what the gate compares."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..contracts.errors import DataError
from ..contracts.recipe import EvaluateSettings
from ..contracts.rows import Example, Message, Result
from ..runtime.context import progress
from ..shared.chat import few_shot_prompt
from ..shared.endpoint import Endpoint
from ..shared.measure import BASELINE, FEW_SHOT, measure, score_answers
from ..shared.tasks.task import Task


def measure_arms(
    models: Mapping[str, str | Path],
    task: Task,
    examples: Sequence[Example],
    shots: Sequence[Example],
    settings: EvaluateSettings,
) -> list[Result]:
    """Return one result per arm and example, arm by arm; the few-shot arm follows the baseline.

    Args:
        models: Model folder by arm, the baseline among them.
        task: Scores the answers.
        examples: Held out.
        shots: Worked examples for the few-shot arm; none leaves the arm out.
        settings: Limits of tokens and of the batch.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError("the test split is empty", where="test.parquet", fix="raise its share in data.shares")
    arms: list[tuple[str, str | Path, list[list[Message]] | None]] = []
    for arm, folder in models.items():
        arms.append((arm, folder, None))
        if arm == BASELINE and shots:
            arms.append((FEW_SHOT, folder, [few_shot_prompt(example.prompt, shots) for example in examples]))
    results: list[Result] = []
    for arm, folder, prompts in arms:

        def report(done: int, total: int, before: int = len(results)) -> None:
            progress(before + done, total * len(arms), "answers")

        results += measure(arm, folder, task, examples, settings, prompts=prompts, progress=report)
    return results


def measure_endpoints(
    task: Task, examples: Sequence[Example], shots: Sequence[Example], settings: EvaluateSettings
) -> tuple[list[Result], dict[str, dict[str, str | int]]]:
    """Return one result per endpoint and example, and what each endpoint is and took.

    Args:
        task: Scores the answers.
        examples: Held out.
        shots: Worked examples, for endpoints that want them.
        settings: The endpoints, and the limit of tokens.

    Returns:
        The results; by arm `model`, `digest` (of address and request) and `tokens`.

    Raises:
        ModelError: A server refuses or does not answer, or a budget is spent.
    """
    results: list[Result] = []
    told: dict[str, dict[str, str | int]] = {}
    for one in settings.endpoints:
        endpoint = Endpoint(one, settings.max_new_tokens)
        prompts = [few_shot_prompt(example.prompt, shots) if one.few_shot else example.prompt for example in examples]
        replies = endpoint.ask(prompts)
        results += score_answers(one.name, task, examples, [(reply.text, None) for reply in replies])
        tokens = sum(reply.tokens for reply in replies)
        told[one.name] = {"model": one.model, "digest": endpoint.digest, "tokens": tokens}
    return results, told
