"""Answers of a model to the preference split, scored by the task's verifier."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..contracts.artifacts import digest_of, write_atomically
from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import PairSettings
from ..contracts.rows import Candidate, Example
from ..runtime.context import progress
from ..shared.chat import prompt_ids
from ..shared.generate import Generation, Generator, plan_batches
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
    sampled = _sample(generator, prompts, settings, seed, work)
    return [
        candidate
        for example, answers in zip(chosen, sampled, strict=True)
        for candidate in _candidates(task, example, answers, settings.include_reference)
    ]


def _sample(
    generator: Generator, prompts: list[list[int]], settings: PairSettings, seed: int, work: Path
) -> list[list[Generation]]:
    """Sample batch by batch. A prompt's random numbers are its own, so a batch taken from disk changes no other."""
    wanted: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "samples": settings.samples}
    found: dict[int, list[Generation]] = {}
    for batch in plan_batches(prompts, **wanted, batch_size=BATCH):
        key = digest_of([batch, settings.model_dump(mode="json"), seed, [prompts[index] for index in batch]])
        path = work / f"samples-{key[:16]}.json"
        if path.is_file():
            made = [(index, [Generation(**one) for one in answers]) for index, answers in json.loads(path.read_bytes())]
        else:
            made = generator.run(prompts, batch, **wanted, temperature=settings.temperature, seed=seed)
            write_atomically(path, json.dumps([(index, [asdict(one) for one in answers]) for index, answers in made]))
        found |= dict(made)
        progress(len(found), len(prompts), "prompts")
    return [found[index] for index in range(len(prompts))]


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
