"""What keeps a pipeline from running on an engine as it is written."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that an engine cannot do, does otherwise, or does with a caveat."""

    level: Literal["error", "warning", "note"]
    where: str
    """Place in the graph, for example `root/condition-branches-1/condition-2/deploy-model: env`."""
    what: str
    fix: str
