"""Every way of searching on the same held-out questions, and what a reader makes of what was found.

The reader is the base model in every arm, with the same worked examples: what differs is only the passages it is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..contracts.errors import DataError
from ..contracts.recipe import EvaluateSettings
from ..contracts.rows import Example, Message, Result, read_rows
from ..runtime.context import progress
from ..shared.chat import few_shot_prompt, prompt_ids
from ..shared.embed import Encoding, embed, read_encoding
from ..shared.generate import greedy_responses
from ..shared.measure import BASELINE, choose_shots, first_rows
from ..shared.metrics import recall_at, reciprocal_rank
from ..shared.models import load_tokenizer
from ..shared.retrieval import Scores, bm25, nearest, passage, places, question, read_corpus
from ..shared.tasks.task import Task

CANDIDATE, LEXICAL, GOLD = "candidate", "lexical", "gold"
LISTED = 10
"""Passages of a search that are looked at."""


@dataclass(frozen=True)
class Asked:
    """Held-out questions, the corpus that answers them, and worked examples for the reader."""

    examples: list[Example]
    corpus: list[str]
    shots: list[Example]

    @classmethod
    def read(cls, splits: str | Path, settings: EvaluateSettings) -> Self:
        """Read them from a `splits` artifact.

        Raises:
            DataError: Nothing is held out, or there are fewer groups than worked examples.
        """
        examples = first_rows(read_rows(Path(splits) / "test.parquet", Example), settings.max_rows)
        if not examples:
            raise DataError("the test split is empty", where="test.parquet", fix="raise its share in data.shares")
        shots = choose_shots(read_rows(Path(splits) / "sft.parquet", Example), settings.few_shot)
        return cls(examples, read_corpus(splits), shots)

    @property
    def right(self) -> NDArray[np.int64]:
        """Place of each question's passage in the corpus."""
        return np.array(places(map(passage, self.examples), self.corpus))


def measure_arms(
    models: Mapping[str, str | Path], task: Task, asked: Asked, settings: EvaluateSettings
) -> list[Result]:
    """Return one result per arm and question, arm by arm.

    Args:
        models: Folder by arm: `baseline` and `candidate`, `champion` where there is one. The baseline is pooled and
            prompted as the candidate says, having no word of its own on that.
        task: Scores the answers.
        asked: Questions, corpus, worked examples.
        settings: How many passages the reader gets, and its limits.
    """
    found = {arm: nearest(scores, LISTED) for arm, scores in search(models, asked).items()}
    # The ceiling: what the reader makes of the right passage, with the others behind it where it is given several.
    found[GOLD] = np.array([[r, *row[row != r]][:LISTED] for r, row in zip(asked.right, found[CANDIDATE], strict=True)])
    prompts = {arm: reader_prompts(asked, listed[:, : settings.read_passages]) for arm, listed in found.items()}
    tokenizer = load_tokenizer(models[BASELINE])
    ids = {arm: [tuple(prompt_ids(tokenizer, prompt)) for prompt in some] for arm, some in prompts.items()}
    unique = list(dict.fromkeys(one for some in ids.values() for one in some))
    answers = greedy_responses(
        models[BASELINE],
        [list(one) for one in unique],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=lambda done, total: progress(done, total, "answers"),
    )
    said = {one: answer.text for one, answer in zip(unique, answers, strict=True)}
    return [
        _result(arm, example, task, said[one], [asked.corpus[place] for place in listed], int(right), listed)
        for arm in found
        for example, one, right, listed in zip(asked.examples, ids[arm], asked.right, found[arm], strict=True)
    ]


def search(models: Mapping[str, str | Path], asked: Asked) -> dict[str, Scores]:
    """Return how near every passage is to every question, by arm: BM25, then the models as encoders."""
    questions = [question(example) for example in asked.examples]
    own = read_encoding(models[CANDIDATE])
    scores = {LEXICAL: bm25(questions, asked.corpus)}
    for arm, folder in models.items():
        encoding = own if arm == BASELINE else read_encoding(folder)
        scores[arm] = _cosines(folder, encoding, questions, asked.corpus, arm)
    return scores


def _cosines(
    folder: str | Path, encoding: Encoding, questions: Sequence[str], corpus: Sequence[str], arm: str
) -> Scores:
    texts = [*(encoding.query_prefix + text for text in questions), *corpus]
    vectors = embed(folder, texts, encoding, lambda done, total: progress(done, total, f"vectors of {arm}"))
    scores: Scores = vectors[: len(questions)] @ vectors[len(questions) :].T
    return scores


def reader_prompts(asked: Asked, found: NDArray[np.int64]) -> list[list[Message]]:
    """Return the reader's conversations: worked examples, each with its right passage, then what was found.

    Args:
        asked: Questions, corpus, worked examples.
        found: [questions, passages], places in the corpus, best first.
    """
    shots = [shot.model_copy(update={"prompt": [_turn([passage(shot)], question(shot))]}) for shot in asked.shots]
    return [
        few_shot_prompt([_turn([asked.corpus[place] for place in listed], question(example))], shots)
        for example, listed in zip(asked.examples, found, strict=True)
    ]


def _turn(passages: Sequence[str], text: str) -> Message:
    return Message(role="user", content="\n".join(passages) + "\n\n" + text)


def _result(
    arm: str, example: Example, task: Task, answer: str, found: Sequence[str], right: int, listed: NDArray[np.int64]
) -> Result:
    """Return a result; its response is the answer and, for the people who look at it, the passage found first."""
    hits = np.flatnonzero(listed == right)
    rank = int(hits[0]) + 1 if len(hits) else None
    scores = {
        "recall_1": recall_at(rank, 1),
        "recall_5": recall_at(rank, 5),
        "mrr_10": reciprocal_rank(rank),
    }
    return Result(
        arm=arm,
        example_id=example.id,
        group=example.group,
        response=f"{answer}\n[{found[0]}]",
        slices=example.slices,
        scores=task.score(answer, example.reference) | scores,
    )
