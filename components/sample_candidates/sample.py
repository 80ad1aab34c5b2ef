"""Answers of a model to the preference split, scored by the task's verifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import PairSettings
from ..contracts.rows import Candidate, Example
from ..shared.chat import prompt_ids
from ..shared.generate import Generation, Generator, kept_responses
from ..shared.tasks.task import Task

BATCH = 64
"""Samples computed together."""


def sample_candidates(
    generator: Generator, task: Task, examples: Sequence[Example], settings: PairSettings, seed: int, work: Path
) -> list[Candidate]:
    """Return the candidates of the first `settings.prompts` examples, prompt by prompt.

    Args:
        generator: Of the model to sample from.
        task: Scores an answer by `reward`.
        examples: The preference split.
        settings: How many prompts and samples, how warm, how long.
        seed: Of the samples.
        work: Each finished batch is kept here; a second call with the same arguments goes on from there.

    Raises:
        DataError: There is no example.
    """
    chosen = examples[: settings.prompts]
    if not chosen:
        raise DataError(
            "the preference split is empty", where="preference.parquet", fix="raise its share in data.shares"
        )
    prompts = [prompt_ids(generator.tokenizer, example.prompt) for example in chosen]
    sampled = kept_responses(
        generator,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        samples=settings.samples,
        seed=seed,
        work=work,
        batch_size=BATCH,
    )
    return [
        candidate
        for example, answers in zip(chosen, sampled, strict=True)
        for candidate in _candidates(task, example, answers, settings.include_reference)
    ]


def _candidates(task: Task, example: Example, answers: list[Generation], with_reference: bool) -> list[Candidate]:
    about: dict[str, Any] = {"prompt_id": example.id, "group": example.group, "prompt": example.prompt}
    rows = [
        Candidate(
            **about,
            response=answer.text,
            score=task.reward(answer.text, example.reference, answer.finished),
            source="sampled",
            finished=answer.finished,
        )
        for answer in answers
    ]
    if with_reference:
        score = task.reward(example.reference, example.reference, True)
        rows.append(Candidate(**about, response=example.reference, score=score, source="reference"))
    return rows


def summarise(candidates: Sequence[Candidate]) -> Summary:
    """Return how often and how well the model answered, over the sampled candidates."""
    sampled = [candidate for candidate in candidates if candidate.source == "sampled"]
    prompts = len({candidate.prompt_id for candidate in candidates})
    right = sum(candidate.score >= 1 for candidate in sampled) / len(sampled)
    metrics = {
        "right_share": right,
        "mean_score": sum(candidate.score for candidate in sampled) / len(sampled),
        "finished_share": sum(candidate.finished for candidate in sampled) / len(sampled),
    }
    return Summary(
        step="sample_candidates",
        headline=f"{len(candidates)} candidates for {prompts} prompts; {right:.0%} of the sampled ones are right",
        metrics=metrics,
        details={"prompts": prompts, "candidates": len(candidates), "right_share": right},
    )
