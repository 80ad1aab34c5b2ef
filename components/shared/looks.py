"""Looks: what it costs to ask the same held-out examples about one model again and again.

Of twenty retrains that change nothing, each tested at α = 0.05 against one held-out set of 200, at least one is
promoted in 43 of 100 cases (`tests/benchmarks/gate_error_rates.py`). So α is for all decisions on one held-out set
together, and each spends a part of it:

* without a plan the k-th look gets α · 6/(π²k²): the parts sum to α however many there are (α spending, Foster and
  Stine 2008), and the first one gets 0.61 α;
* a policy that plans for n looks gives each α/n, and after the last one nothing is promoted without fresh examples;
* the level of a look that promoted passes on to the next (online fallback, Tian and Ramdas 2021, arXiv:1910.04900):
  what was rejected rightly cost nothing, and after a false promotion the harm is done. So a model that gets better
  again and again does not run out.

The bound holds while the decision alone is what a team learns from the held-out set: to tune the next retrain on the
held-out examples that went wrong is to train on them.

The same question again (candidate, champion, policy, measurement and examples) is no new look, and gets the level that
it had. A look counts where it saw at least half of today's examples: a split by hash keeps its old rows when the data
grow, so a digest of the whole would call nearly the same examples fresh. Of two runs at once that saw the same earlier
looks, the registry lets one promote and tells the other to decide anew (`registry.require_turn`).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import pi
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..contracts.recipe import GateSettings

SAMPLE = 256
"""Ids that stand for a held-out set: an overlap of one half is told with a standard error of 0.03."""
SHARED = 0.5
"""Share of today's examples from which on an earlier look counts."""


class HeldOut(BaseModel):
    """Which examples a decision rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    sample: list[str]
    """The smallest ids. An id is a hash, so these are a random sample, and those of two sets can be compared."""

    @classmethod
    def of(cls, ids: Iterable[str]) -> "HeldOut":
        """Return what stands for these examples."""
        ordered = sorted(ids)
        return cls(examples=len(ordered), sample=ordered[:SAMPLE])

    def share_in(self, other: "HeldOut") -> float:
        """Return the share of these examples that are among the other ones; exact while both are small."""
        ends = [side.sample[-1] for side in (self, other) if side.examples > len(side.sample)]
        mine = [one for one in self.sample if not ends or one <= min(ends)]
        return len(set(mine) & set(other.sample)) / len(mine) if mine else 0.0


class Look(BaseModel):
    """A decision on record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    """Content digest."""
    promoted: bool


class Looks(BaseModel):
    """`looks.json`: what was asked of these examples before, oldest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    held_out: HeldOut
    measurement: str
    """`Recipe.measurement`."""
    earlier: list[Look]


def count(
    records: Sequence[Mapping[str, Any]],
    candidate: str,
    champion: str | None,
    policy: GateSettings,
    measurement: str,
    held_out: HeldOut,
) -> Looks:
    """Return the looks before this question was first asked.

    Args:
        records: Decision records of the model's name, oldest first.
        candidate: Content digest of what is to be decided on.
        champion: Of what it is compared with.
        policy: The gate's.
        measurement: `Recipe.measurement`.
        held_out: The examples.
    """
    question = {
        "candidate": candidate,
        "champion": champion,
        "policy": policy.model_dump(mode="json"),
        "measurement": measurement,
        "held_out": held_out.model_dump(mode="json"),
    }
    earlier = []
    for record in records:
        if question == {part: record.get(part) for part in question}:
            break
        if "held_out" not in record or not _could_promote(record):
            continue  # without the first it is of a version that did not count
        if held_out.share_in(HeldOut.model_validate(record["held_out"])) >= SHARED:
            earlier.append(Look(candidate=record["candidate"], promoted=record["decision"] == "promote"))
    return Looks(held_out=held_out, measurement=measurement, earlier=earlier)


def _could_promote(record: Mapping[str, Any]) -> bool:
    """Return whether the scores had a say; bytes that are there already, and too few examples, decide without them."""
    known = record["candidate"] in (record["champion"], record["baseline"])
    return not known and record["examples"] >= record["policy"]["min_examples"]


def level(alpha: float, planned: int, promoted: Sequence[bool]) -> float:
    """Return the α of the look that follows these.

    Args:
        alpha: Of all looks together.
        planned: Looks that α is shared between; 0 for an open end.
        promoted: Of each earlier look, whether it promoted.

    Returns:
        0 when the planned looks are used up.
    """

    def part(k: int) -> float:
        return 6 / (pi * k) ** 2 if not planned else float(k <= planned) / planned

    carried = 0.0
    for k, won in enumerate(promoted, 1):
        carried = carried + alpha * part(k) if won else 0.0
    return carried + alpha * part(len(promoted) + 1)
