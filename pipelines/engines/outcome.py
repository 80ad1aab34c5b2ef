"""How a run on a distributed engine ended, or that it was only submitted."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """What an engine's `run` returns."""

    engine: str
    run: str
    """The engine's id of the run."""
    state: Literal["SUBMITTED", "SUCCEEDED", "FAILED", "CANCELLED"]
    url: str = ""
    """Where a person can look at it."""
    decision: str = ""
    """`promote`, `hold` or `inconclusive`; empty while it is not known."""
    message: str = ""
    """One sentence: the gate's reason, or why the run failed."""
