"""A user's own questions with one right answer each: an answer is right if it equals the reference in normal form."""

from collections.abc import Iterator, Sequence
from typing import Any

from ...contracts.errors import RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from ..metrics import exact_match, normalise


class ExactMatch:
    """The task of this module. It has no generator: rows come from a file."""

    name = "exact_match"
    metrics: Sequence[Metric] = (
        Metric(
            name="exact",
            title="Exact",
            better="higher",
            definition="The answer equals the reference, apart from case, white space and Unicode width.",
        ),
    )

    def prompt(self, text: str) -> list[Message]:
        """Return the question as a single user turn."""
        return [Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the last user turn in normal form: earlier turns may differ within a group."""
        return normalise(next(turn.content for turn in reversed(prompt) if turn.role == "user"))

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return no labels: nothing is known of the rows."""
        return []

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return `exact`: 1 or 0."""
        return {"exact": exact_match(response, reference)}

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 1 for a right answer that ended by itself, else 0."""
        return exact_match(response, reference) if finished else 0.0

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is known of the questions.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            "the task exact_match has no generator",
            where="task",
            fix="give the rows as a file: `assay run NAME --data FILE`",
        )


TASK = ExactMatch()
