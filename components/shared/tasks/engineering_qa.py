"""Questions that a building firm's engineers answer, and the answers they gave.

The rows are those of the package zaragoza-construction-faq (503 questions on building in Sweden, in English; Zaragoza
AB, CC BY 4.0, doi:10.5281/zenodo.19630803), read from where it is installed; nothing of it is copied into this package.

An answer is measured by its nearness to the expert's. The expert feedback is simulated: how good a sampled answer is
follows from the expert's own answer to that question (`reward`), and no person has rated anything.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from ...contracts.errors import RecipeError
from ...contracts.metrics import Metric
from ...contracts.packages import package_folder
from ...contracts.rows import Message
from ..metrics import token_f1, words
from ..similarity import similarity

SYSTEM = "Answer the question about building and renovation in two or three plain sentences."
"""Of four that were tried on the base model the one under which it does best: a weak prompt makes any training shine.
Similarity on 16 questions: this 0.34, "a helpful assistant" 0.33, none 0.25, "a building engineer in Sweden" 0.16."""
PACKAGE, FILE = "zaragoza_construction_faq", "data/faq-en.jsonl"
LENGTH = 2.0
"""An answer is of the right length if it is at most so many times as long as the expert's, and as short."""
CUT = 0.5
"""What is left of the reward of an answer that was cut at the token limit."""


class EngineeringQA:
    """The task of this module."""

    name = "engineering_qa"
    metrics: Sequence[Metric] = (
        Metric(
            name="similarity",
            title="Similarity",
            better="higher",
            definition="Cosine of the mean word vectors of the answer and of the expert's; below 0 it counts as 0.",
        ),
        Metric(
            name="overlap",
            title="Word overlap",
            better="higher",
            definition="F1 of the answer's words against the expert's, each word as often as it stands there. It knows "
            "nothing of the encoder, so that what only pleases the encoder shows.",
        ),
        Metric(
            name="length",
            title="Right length",
            better="higher",
            definition=f"The answer has at most {LENGTH:g} times the expert's characters, and at least 1/{LENGTH:g}.",
        ),
    )

    def prompt(self, text: str) -> list[Message]:
        """Return the conversation that asks a question."""
        return [Message(role="system", content=SYSTEM), Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the words of the last user turn, in lower case."""
        return " ".join(words(next(turn.content for turn in reversed(prompt) if turn.role == "user")))

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return how long the expert's answer is."""
        size = len(reference)
        return [f"answer={'short' if size < 200 else 'medium' if size < 300 else 'long'}"]

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric.

        Raises:
            RecipeError: The encoder's package is not installed.
        """
        ratio = length_ratio(response, reference)
        return {
            "similarity": min(1.0, similarity(response, reference)),
            "overlap": overlap(response, reference),
            "length": float(1 / LENGTH <= ratio <= LENGTH),
        }

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return the simulated expert's opinion.

        It is 1 for the expert's own words, else the mean of similarity and overlap, less for an answer that is longer
        or shorter than the expert's, and for one that was cut.

        Raises:
            RecipeError: The encoder's package is not installed.
        """
        if finished and words(response) == words(reference):
            return 1.0
        ratio = length_ratio(response, reference)
        fit = math.sqrt(min(ratio, 1 / ratio)) if ratio else 0.0
        near = (similarity(response, reference) + overlap(response, reference)) / 2
        return min(0.99, near * fit) * (1.0 if finished else CUT)

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield questions and the expert's answers, in an order of the seed.

        Raises:
            RecipeError: The package is not installed, or has fewer rows.
        """
        path = package_folder(PACKAGE) / FILE
        known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if rows > len(known):
            raise RecipeError(f"there are {len(known)} questions, not {rows}", where="data.rows", fix="lower it")
        random.Random(seed).shuffle(known)
        for row in known[:rows]:
            turns = [*self.prompt(row["q"]), Message(role="assistant", content=row["a"])]
            yield {"messages": [turn.model_dump() for turn in turns]}


TASK = EngineeringQA()


def overlap(one: str, other: str) -> float:
    """Return the F1 of two texts' words; 0 where either has none."""
    return token_f1(one, other, words) if words(one) else 0.0


def length_ratio(response: str, reference: str) -> float:
    """Return the characters of a response per character of the reference, outer white space aside."""
    return len(response.strip()) / len(reference.strip())
