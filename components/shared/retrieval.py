"""What training, evaluation and deployment of an encoder agree on.

What a row's question and its passage are, which passages make the corpus, and how they are ranked.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..contracts.rows import Example, read_rows
from .tasks.retrieval import normalise

Scores = NDArray[np.float32]
"""[questions, passages]; more is nearer."""

BM25_K1, BM25_B = 1.5, 0.75


def question(example: Example) -> str:
    """Return what is asked: the user's turn."""
    return example.prompt[-1].content


def passage(example: Example) -> str:
    """Return the passage that answers it: the system's turn."""
    return example.prompt[0].content


def read_corpus(splits: str | Path) -> list[str]:
    """Return the passages of all rows of a `splits` artifact in alphabetical order; equal ones (folded) once."""
    texts: dict[str, str] = {}
    for text in sorted({passage(row) for path in Path(splits).glob("*.parquet") for row in read_rows(path, Example)}):
        texts.setdefault(normalise(text), text)
    return list(texts.values())


def places(passages: Iterable[str], corpus: Sequence[str]) -> list[int]:
    """Return where each passage stands in the corpus."""
    where = {normalise(text): place for place, text in enumerate(corpus)}
    return [where[normalise(text)] for text in passages]


def nearest(scores: Scores, count: int) -> NDArray[np.int64]:
    """Return the places of the best passages of each question [questions, count], best first, equals by place."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def bm25(questions: Sequence[str], corpus: Sequence[str]) -> Scores:
    """Return Okapi BM25 scores (Robertson et al. 1994, TREC-3), with the logarithm that is never negative (Lucene's).

    Words are runs of letters and digits, folded; a question's repeated word counts as often as it stands there.
    """
    documents = [Counter(_words(text)) for text in corpus]
    length = np.array([document.total() for document in documents], dtype=np.float64)
    relative = BM25_K1 * (1 - BM25_B + BM25_B * length / max(float(length.mean()), 1.0))
    holders: dict[str, list[int]] = {}
    for place, document in enumerate(documents):
        for word in document:
            holders.setdefault(word, []).append(place)
    scores = np.zeros((len(questions), len(corpus)))
    for row, text in enumerate(questions):
        for word in _words(text):
            if found := holders.get(word):
                rare = math.log(1 + (len(corpus) - len(found) + 0.5) / (len(found) + 0.5))
                times = np.array([documents[place][word] for place in found])
                scores[row, found] += rare * times * (BM25_K1 + 1) / (times + relative[found])
    return scores.astype(np.float32)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise(text))
