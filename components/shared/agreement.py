"""Does a judge say the same of two answers, whichever stands first? A property of both rows of a pair, not of one."""

from collections import defaultdict
from collections.abc import Sequence

from ..contracts.metrics import Metric
from ..contracts.rows import Result
from .statistics import Interval, proportion

CONSISTENCY = Metric(
    name="consistency",
    title="Swap consistency",
    better="higher",
    definition="Both orders of a pair have a readable verdict, and it names the same answer. Of a table, not of an "
    "example: a group is a pair.",
)


def swap_consistency(results: Sequence[Result], primary: str, level: float) -> Interval | None:
    """Return the share of pairs whose two orders have one verdict, or None where no group has two rows.

    The orders of a pair have opposite labels, so that one verdict on both is right in both or wrong in both.

    Args:
        results: Of one arm; the scores have `valid`.
        primary: The metric that says whether the verdict is right, 0 or 1.
        level: Of the interval, two-sided.
    """
    pairs: defaultdict[str, list[Result]] = defaultdict(list)
    for row in results:
        pairs[row.group].append(row)
    both = [rows for rows in pairs.values() if len(rows) == 2]
    if not both:
        return None
    same = sum(a.scores[primary] == b.scores[primary] and a.scores["valid"] == b.scores["valid"] == 1 for a, b in both)
    return proportion(same, len(both), level)
