"""Questions that a passage answers: rows for an encoder that finds the passage, and a reader that answers from it.

A row is a conversation in which the passage is the system turn, the question the user's, and a short answer that stands
in the passage the assistant's; any form that the door accepts can say so:

    {"messages": [{"role": "system", "content": "Store Velmorin (Axilto) below 25 °C."},
                  {"role": "user", "content": "how warm may axilto get?"},
                  {"role": "assistant", "content": "25 °C"}], "group": "velmorin"}

The corpus that is searched is the passages of all rows, of every split. Rows with equal passages have one group, so
that no passage of a test question was trained on; `group` joins more of them, say all of one medicine.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...contracts.errors import DataError, RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from .. import metrics

QUANTITY = re.compile(r"\b(\d+(?:\.\d+)?) ?(%|°c|[a-z]+)")
"""A number and its unit in a normalised text."""


class Retrieval:
    """The task of this module. It has no generator: rows come from a file."""

    name = "retrieval"
    metrics: Sequence[Metric] = (
        Metric(
            name="recall_1",
            title="Recall at 1",
            better="higher",
            definition="The passage that was found first is the one that answers the question.",
        ),
        Metric(
            name="recall_5",
            title="Recall at 5",
            better="higher",
            definition="The passage that answers the question is among the first five.",
        ),
        Metric(
            name="mrr_10",
            title="Reciprocal rank",
            better="higher",
            definition="1 / rank of the passage that answers the question; 0 where it is not among the first ten.",
        ),
        Metric(
            name="answer",
            title="Right answers",
            better="higher",
            definition="What the base model reads off the passages found first holds the reference, in whole words, "
            "and no other quantity of the reference's unit.",
        ),
    )

    def prompt(self, text: str) -> list[Message]:
        """Return a question without its passage; `slices` refuses such a row."""
        return [Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the passage in normal form."""
        return normalise(prompt[0].content)

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return no labels; the rows may carry their own.

        Raises:
            DataError: The row has no passage, or more than one question.
        """
        if [turn.role for turn in prompt] != ["system", "user"]:
            raise DataError(
                f"a row of this task has the turns {[turn.role for turn in prompt]} before its answer",
                where="messages",
                fix="give each row a system turn, the passage, and one user turn, the question",
            )
        return []

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return `answer`: 1 or 0. The metrics of the search are None: a text does not say how it was found."""
        return {"recall_1": None, "recall_5": None, "mrr_10": None, "answer": float(answers(response, reference))}

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 1 for a right answer that ended by itself, else 0."""
        return float(finished and answers(response, reference))

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is known of the passages.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            f"the task {self.name} has no generator",
            where="task",
            fix="give the rows as a file: `assay run NAME --data FILE`",
        )


TASK = Retrieval()


def answers(response: str, reference: str) -> bool:
    """Return whether a response states the reference: its words in their order, and no other quantity of its unit.

    A reader that copies the passage has not answered: where the passage holds two doses, it must say which.
    """
    said, wanted = normalise(response), normalise(reference)
    if not re.search(rf"(?<![\w.]){re.escape(wanted)}(?!\w|\.\d)", said):
        return False
    units = {unit for _, unit in QUANTITY.findall(wanted)}
    return {found for found in QUANTITY.findall(said) if found[1] in units} <= set(QUANTITY.findall(wanted))


def normalise(text: str) -> str:
    """Return the text with Unicode width (NFKC), case and runs of white space folded, and without thousands' commas."""
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", metrics.normalise(text))
