"""What a verifiable task provides: prompts, a verifier, metrics, and where it can, a generator of truth."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ...contracts.errors import RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message


class Task(Protocol):
    """A task whose answers can be checked without a person."""

    name: str
    metrics: Sequence[Metric]
    """The first one is the primary metric."""

    def prompt(self, text: str) -> list[Message]:
        """Return the conversation that asks for the answer to `text` (system and user turn)."""

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the key that equal questions share, however they are written."""

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return `name=value` labels of an example."""

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric on one example; None where it does not apply."""

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return the reward in [0, 1] that RL maximises; 1 only for a right answer that ended by itself."""

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield raw rows (`{"messages": [...]}`), deterministic in the seed and stable in a prefix of `rows`.

        Raises:
            RecipeError: The task has no generator: rows must be given.
        """


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        RecipeError: There is none of that name.
    """
    # Named, not computed: the digest of a step's code follows the imports it can read.
    from . import (
        direction_judge,
        engineering_qa,
        exact_match,
        medication_directions,
        pharmacy_retrieval,
        product_content,
        retrieval,
        tool_calls,
    )

    modules = (
        direction_judge,
        engineering_qa,
        exact_match,
        medication_directions,
        pharmacy_retrieval,
        product_content,
        retrieval,
        tool_calls,
    )
    known: dict[str, Task] = {module.TASK.name: module.TASK for module in modules}
    if name not in known:
        raise RecipeError(f"there is no task {name!r}", where="task", fix=f"choose one of {sorted(known)}")
    return known[name]
