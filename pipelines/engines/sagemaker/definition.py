"""The steps of a pipeline definition, those inside of branches and loops too."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..local.events import Planned

NESTED = ("IfSteps", "ElseSteps", "ForEachBody")
"""Arguments that hold steps."""


def walk(steps: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every step, those inside of branches and loops too."""
    for step in steps:
        yield step
        for name in NESTED:
            yield from walk(step.get("Arguments", {}).get(name) or [])


def planned(definition: Mapping[str, Any]) -> tuple[Planned, ...]:
    """Return the steps of a definition as they are known before the run."""
    return tuple(
        Planned(step["Name"], step.get("DisplayName") or step["Name"], _kind(step))
        for step in walk(definition["Steps"])
    )


def _kind(step: Mapping[str, Any]) -> Literal["container", "dag"]:
    return "container" if step["Type"] in ("Processing", "Training") else "dag"
