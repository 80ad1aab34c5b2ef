"""Every metric by name: its unit, its range and which way is better."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Metric(BaseModel):
    """A measured quantity on one example; its mean over examples is what a table shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    better: Literal["higher", "lower"]
    unit: Literal["share", "points", "tokens"] = "share"
    low: float = 0.0
    high: float = 1.0
    definition: str
    slice: str = ""
    """Label of the examples to which it applies, for a task whose verifier does not see that; empty for no limit."""


class Summary(BaseModel):
    """`summary.json` of a step's `summary` artifact: what the report shows of it. Deterministic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    headline: str
    """One sentence for the report and the run's last lines."""
    metrics: dict[str, float] = {}
    """Scalars, also logged to the tracking server."""
    details: dict[str, object] = {}
    """Tables and series by name, as JSON."""
