"""A definition's steps as the engine's events know them."""

from collections.abc import Mapping
from typing import Any, Literal

from assay.pipelines.engines.local.events import Planned

from .validate import walk


def planned(definition: Mapping[str, Any]) -> tuple[Planned, ...]:
    """Return the steps of a definition as they are known before the run."""
    return tuple(
        Planned(step["Name"], step.get("DisplayName") or step["Name"], _kind(step))
        for step in walk(definition["Steps"])
    )


def _kind(step: Mapping[str, Any]) -> Literal["container", "dag"]:
    return "container" if step["Type"] in ("Processing", "Training") else "dag"
