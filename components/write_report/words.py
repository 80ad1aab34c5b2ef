"""Numbers and names as a reader wants them."""

from collections.abc import Callable, Mapping
from typing import Any

from ..contracts.metrics import Metric

BEFORE = {"lexical": "Keyword search", "baseline": "Base model", "few_shot": "Few-shot"}
AFTER = {"candidate": "Candidate", "champion": "Champion", "gold": "Right passage"}
"""Arm to its title; the recipe's stages stand between them."""
NOTHING = "–"


def number(metric: Metric) -> Callable[[float], str]:
    """Return what writes a value of a metric: a share as per cent, else the number."""
    if metric.unit == "share":
        return percent
    return tokens if metric.unit == "tokens" else points


def percent(value: float) -> str:
    """Write a share: one decimal, none where it is 0."""
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{'0' if text == '-0' else text}%"


def points(value: float) -> str:
    """Write a plain number."""
    return f"{value:.3g}"


def tokens(value: float) -> str:
    """Write a count of tokens that is a mean."""
    return f"{value:,.1f}".removesuffix(".0")


def gain(metric: Metric, value: float | None) -> str:
    """Write a difference with its sign; of shares in percentage points."""
    if value is None:
        return NOTHING
    if metric.unit == "share":
        return signed(f"{100 * value:+.1f}")
    return signed(f"{value:+.3g}")


def signed(text: str) -> str:
    """Write a sign as typographers do; zero has none."""
    return text.lstrip("+-") if not text.strip("+-0.") else text.replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """Write a p-value: three decimals, and nothing beyond them."""
    if value is None:
        return NOTHING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Write seconds as a clock would."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def plain(name: str) -> str:
    """Write an identifier as words."""
    return name.replace("_", " ")


def cell(table: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """Return mean, interval and n of a metric as text and numbers; `text` is a dash where it does not apply."""
    found = table.get(metric.name) or {}
    show, mean, low, high = number(metric), found.get("mean"), found.get("low"), found.get("high")
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "n": found.get("n", 0),
        "text": NOTHING if mean is None else show(mean),
        "interval": "" if low is None or high is None else f"{show(low)} to {show(high)}",
    }
