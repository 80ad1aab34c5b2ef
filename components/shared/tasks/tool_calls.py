r"""A user's own requests, each answered by the right calls of tools: names and arguments, as JSON.

    {"prompt": "30 more days of metformin, please",
     "answer": "{\"name\": \"refill\", \"arguments\": {\"drug\": \"metformin\", \"days\": 30}}"}

Several calls are a list; `[]` is the answer to a request that needs none. The order of calls counts, that of keys does
not. `shared/metrics.py` says which forms are read.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ...contracts.errors import DataError, RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from ..metrics import Call, calls_exact, normalise, read_calls
from ..strict_json import equal_share


class ToolCalls:
    """The task of this module. It has no generator: rows come from a file."""

    name = "tool_calls"
    metrics: Sequence[Metric] = (
        Metric(
            name="exact",
            title="Exact calls",
            better="higher",
            definition="The answer makes the reference's calls, in order: equal names, arguments equal in value and "
            "type, none more and none less.",
        ),
        Metric(
            name="tool",
            title="Right tools",
            better="higher",
            definition="The answer calls the reference's tools, in order, whatever their arguments.",
        ),
        Metric(
            name="arguments",
            title="Arguments right",
            better="higher",
            definition="Equal arguments as a share of all in the reference's or the answer's calls, call by call; one "
            "of another tool has none right. Requests with calls that have arguments only.",
        ),
        Metric(
            name="needless",
            title="Needless calls",
            better="lower",
            definition="A request that needs no call is answered by one, or by what is no JSON. Such requests only.",
        ),
        Metric(
            name="valid", title="Valid calls", better="higher", definition="The answer is nothing but calls, as JSON."
        ),
    )

    def prompt(self, text: str) -> list[Message]:
        """Return the request as a single user turn; rows name the tools in a system turn of their own."""
        return [Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the last user turn in normal form."""
        return normalise(next(turn.content for turn in reversed(prompt) if turn.role == "user"))

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return how many calls are right, and the first one's tool.

        Raises:
            DataError: The reference cannot be read as calls.
        """
        calls = _reference(reference)
        return [
            f"calls={min(len(calls), 3)}{'+' if len(calls) > 3 else ''}",
            *(f"tool={call.name}" for call in calls[:1]),
        ]

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric; None where it does not apply.

        Raises:
            DataError: The reference cannot be read as calls.
        """
        wanted, got = _reference(reference), read_calls(response)
        exact = calls_exact(response, reference)
        return {
            "exact": exact,
            "tool": float(got is not None and [call.name for call in got] == [call.name for call in wanted]),
            "arguments": _arguments(got or [], wanted),
            "needless": None if wanted else 1 - exact,
            "valid": float(got is not None),
        }

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 0.1 for readable calls, 0.2 for the right tools, up to 0.2 for arguments, 0.5 if all is right."""
        scores = self.score(response, reference)
        if not finished or not scores["valid"]:
            return 0.0
        arguments = scores["exact"] if scores["arguments"] is None else scores["arguments"]
        return 0.1 + 0.2 * (scores["tool"] or 0) + 0.2 * (arguments or 0) + 0.5 * (scores["exact"] or 0)

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Refuse: nothing is known of the tools.

        Raises:
            RecipeError: Always.
        """
        raise RecipeError(
            "the task tool_calls has no generator",
            where="task",
            fix="give the rows as a file: `assay run NAME --data FILE`",
        )


TASK = ToolCalls()


def _reference(text: str) -> list[Call]:
    calls = read_calls(text)
    if calls is None:
        raise DataError(
            f"the reference {text[:40]!r} is no call of a tool",
            where="reference",
            fix='write {"name": "…", "arguments": {…}}, or a list of these',
        )
    return calls


def _arguments(got: Sequence[Call], wanted: Sequence[Call]) -> float | None:
    right, every = 0.0, 0
    for place in range(max(len(got), len(wanted))):
        one = got[place] if place < len(got) else None
        other = wanted[place] if place < len(wanted) else None
        names = (one.arguments.keys() if one else set()) | (other.arguments.keys() if other else set())
        every += len(names)
        if one and other and one.name == other.name:
            right += equal_share(one.arguments, other.arguments) * len(names)
    return right / every if every and any(call.arguments for call in wanted) else None
