"""What the pairs are like: the figures that show a bias before a model learns it."""

from collections import Counter
from math import ceil
from statistics import correlation
from typing import Any

from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import PairSettings
from .pairs import Built

BINS = 10
ADVICE = {
    "tie": "raise preference.temperature or preference.samples, so that the answers to a prompt differ",
    "margin below min_margin": "lower preference.min_margin",
    "chosen answer too long": "raise preference.max_length_ratio",
    "no finished answer to choose": "raise preference.max_new_tokens, or train SFT longer",
    "single answer": "raise preference.temperature or preference.samples, so that the answers to a prompt differ",
    "over max_pairs": "raise preference.max_pairs",
}
"""Reason of a drop to what would make it rarer."""


def check_enough(built: Built, settings: PairSettings) -> None:
    """Stop where there is nothing to learn from.

    Raises:
        DataError: There are fewer than `min_pairs` pairs.
    """
    if len(built.pairs) >= settings.min_pairs:
        return
    reasons = reasons_of(built)
    common = next(iter(sorted(reasons, key=lambda reason: (-reasons[reason], reason))), "")
    raise DataError(
        f"{len(built.pairs)} pairs; {settings.min_pairs} are needed. Dropped: {reasons or 'nothing'}",
        where="preference.min_pairs",
        fix=f"{ADVICE.get(common, 'correct the candidates')}; or raise preference.prompts, or leave the stage out "
        "(`preference: null`)",
    )


def reasons_of(built: Built) -> dict[str, int]:
    """Return the number of drops by reason."""
    return dict(sorted(Counter(reason for _, reason in built.dropped).items()))


def summarise(built: Built) -> Summary:
    """Return the summary of the step."""
    pairs = built.pairs
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / max(1, len(pairs))
    gaps = [float(len(pair.chosen) - len(pair.rejected)) for pair in pairs]
    margins = [pair.margin for pair in pairs]
    sources = dict(sorted(Counter(pair.source for pair in pairs).items()))
    prompts = len({pair.prompt_id for pair in pairs})
    length_bias = correlate(margins, gaps)
    return Summary(
        step="build_preferences",
        headline=f"{len(pairs):,} pairs from {prompts:,} prompts; the chosen answer is the longer one in {longer:.0%}; "
        f"{len(built.dropped):,} drops, each with a reason.",
        metrics={
            "pairs": float(len(pairs)),
            "dropped": float(len(built.dropped)),
            "margin_mean": sum(margins) / max(1, len(margins)),
            "chosen_longer_share": longer,
            "length_correlation": length_bias,
        },
        details={
            "pairs": len(pairs),
            "prompts": prompts,
            "dropped": reasons_of(built),
            "chosen_longer_share": longer,
            "length_correlation": length_bias,
            "margin_histogram": histogram(margins),
            "sources": sources,
        },
    )


def histogram(margins: list[float]) -> dict[str, list[Any]]:
    """Return ten equal bins from 0 to the next whole number above the largest margin; the last includes its edge."""
    top = max(1, ceil(max(margins, default=1)))
    counts = [0] * BINS
    for margin in margins:
        counts[min(BINS - 1, int(margin * BINS / top))] += 1
    return {"edges": [top * edge / BINS for edge in range(BINS + 1)], "counts": counts}


def correlate(one: list[float], other: list[float]) -> float:
    """Return Pearson's correlation; 0 where a side does not vary."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return correlation(one, other)
