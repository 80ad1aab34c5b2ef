"""Figures as inline SVG, by hand: no library draws them and no request fetches them.

Colours come from the page's CSS classes, so that light, dark and print need no second drawing; a state is told by a
shape as well as by a colour. Every figure has a title for a screen reader, and the numbers stand in the page's tables.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

Format = Callable[[float], str]
LABEL = 24
"""Letters of an arm's name that a dot plot has room for."""


class Dot(NamedTuple):
    """A value with its interval, in one row of a dot plot."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    strong: bool = False
    """The one the reader looks for."""


class Scale(NamedTuple):
    """A linear map from `low…high` to pixels."""

    low: float
    high: float
    left: float
    right: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; beyond the ends it stays at the end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)


def dot_plot(title: str, dots: Sequence[Dot], show: Format, most: float) -> Markup:
    """Draw one row per arm: a dot for the mean and a whisker for the interval, on an axis that starts at 0.

    Args:
        title: Spoken by a screen reader.
        dots: From top to bottom.
        show: Writes a value.
        most: The largest value that the metric can take.
    """
    top, step, width = 8, 25, 340
    known = [value for dot in dots for value in (dot.value, dot.high) if value is not None]
    most = max(most, 1e-9)
    labels = [dot.label if len(dot.label) <= LABEL else f"{dot.label[: LABEL - 1]}…" for dot in dots]
    left = max(100.0, 14 + 6.2 * max(map(len, labels)))  # a letter is about 6 pixels wide
    # No axis ends below a tenth of the range: a metric that is 0 everywhere must not look like one that spreads.
    scale = Scale(0, min(round_up(max(*known, most / 10, 0)), most), left, 276)
    bottom = top + step * len(dots)
    parts = [_grid(scale, top, bottom, show)]
    for row, (label, dot) in enumerate(zip(labels, dots, strict=True)):
        y = top + step * (row + 0.5)
        name = "strong" if dot.strong else "plain"
        parts.append(_text(left - 14, y + 4, label, f"{name} end"))
        if dot.value is None:
            parts.append(_text(scale.left + 4, y + 4, "does not apply", "faint"))
            continue
        parts.append(_whisker(scale, y, dot.low, dot.high, name))
        parts.append(
            Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"/>').format(
                name, _n(scale(dot.value)), _n(y), 5.5 if dot.strong else 4.5
            )
        )
        parts.append(_text(334, y + 4, show(dot.value), f"{name} end num"))
    return _svg(title, width, bottom + 20, parts)


def strip(title: str, dot: Dot, scale: Scale, threshold: float, state: str) -> Markup:
    """Draw one row of a forest plot: the interval against the line it must clear.

    Args:
        title: Spoken by a screen reader.
        dot: Gain and interval.
        scale: Shared by all rows.
        threshold: Where the interval's lower end must lie to pass.
        state: `pass`, `fail` or `open`; chooses colour and shape.
    """
    middle, height = 15.0, 30
    parts = []
    if scale.low <= 0 <= scale.high:
        parts.append(_line(scale(0), 0, scale(0), height, "zero"))
    parts.append(_line(scale(threshold), 0, scale(threshold), height, "threshold"))
    parts.append(_whisker(scale, middle, dot.low, dot.high, state))
    if dot.value is not None:
        parts.append(_mark(scale(dot.value), middle, state))
    return _svg(title, scale.right + 6, height, parts, "strip")


def strip_axis(scale: Scale, show: Format) -> Markup:
    """Draw the axis under a column of strips."""
    parts = []
    for tick in ticks(scale.low, scale.high, 4):
        parts.append(_line(scale(tick), 0, scale(tick), 4, "axis"))
        parts.append(_text(scale(tick), 16, show(tick), "faint middle"))
    return _svg("axis", scale.right + 6, 20, parts, "strip")


def line_chart(title: str, points: Sequence[tuple[float, float]], show: Format) -> Markup:
    """Draw a series over optimizer steps, with its first and last value written."""
    width, left, right, top, bottom = 300, 44, 288, 14, 112
    values = [value for _, value in points]
    marks = _around(min(values), max(values), 3)
    across = Scale(points[0][0], max(points[-1][0], points[0][0] + 1), left, right)
    up = Scale(marks[0], marks[-1], bottom, top)
    parts = _levels(up, marks, left, right, show)
    path = " ".join(f"{_n(across(step))},{_n(up(value))}" for step, value in points)
    parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
    last_step, last = points[-1]
    parts.append(
        Markup('<circle class="dot strong" cx="{}" cy="{}" r="3.5"/>').format(_n(across(last_step)), _n(up(last)))
    )
    parts.append(_text(left, bottom + 17, f"step {points[0][0]:g}", "faint"))
    parts.append(_text(right, bottom + 17, f"{last_step:g}", "faint end"))
    return _svg(title, width, bottom + 22, parts)


def curves(
    title: str, across: Sequence[float], series: Mapping[str, Sequence[float]], show: Format, mark: float | None = None
) -> Markup:
    """Draw values from 0 on against a count, on a logarithmic axis.

    Args:
        title: Spoken by a screen reader.
        across: Positive and rising, one for each value of a series.
        series: CSS class of a line, as `sample` draws it for a legend, to its values.
        show: Writes a value.
        mark: Where on the axis a dashed line stands.
    """
    width, left, right, top, bottom = 300, 40, 288, 10, 112
    marks = _around(0, max(map(max, series.values())), 3)
    up = Scale(0, marks[-1], bottom, top)
    along = Scale(math.log(across[0]), math.log(across[-1]), left, right)
    parts = _levels(up, marks, left, right, show)
    for one in (across[0], across[len(across) // 2], across[-1]):
        parts.append(_text(along(math.log(one)), bottom + 15, f"{one:,g}", "faint middle"))
    if mark is not None and across[0] <= mark <= across[-1]:
        parts.append(_line(along(math.log(mark)), top, along(math.log(mark)), bottom, "threshold"))
    for name, values in series.items():
        path = " ".join(f"{_n(along(math.log(x)))},{_n(up(y))}" for x, y in zip(across, values, strict=True))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(name, path))
    return _svg(title, width, bottom + 20, parts)


def sample(name: str) -> Markup:
    """Draw a piece of a line of `curves`, for a legend."""
    return Markup(
        '<svg class="sample" aria-hidden="true" viewBox="0 0 26 8" width="26" height="8">'
        '<polyline class="line {}" points="0,4 26,4"/></svg>'
    ).format(name)


def histogram(title: str, edges: Sequence[float], counts: Sequence[float]) -> Markup:
    """Draw counts between edges as bars; the largest count is written on its bar."""
    width, left, right, top, bottom = 300, 8, 292, 20, 100
    across = Scale(edges[0], max(edges[-1], edges[0] + 1e-9), left, right)
    tallest = max(max(counts, default=0), 1)
    parts = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        tall = (bottom - top) * count / tallest
        parts.append(
            Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
                _n(across(low) + 1), _n(bottom - tall), _n(max(across(high) - across(low) - 2, 1)), _n(tall)
            )
        )
        if count:
            parts.append(_text((across(low) + across(high)) / 2, bottom - tall - 4, f"{count:g}", "faint middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_text(left, bottom + 15, f"{edges[0]:.2g}", "faint"))
    parts.append(_text(right, bottom + 15, f"{edges[-1]:.2g}", "faint end"))
    return _svg(title, width, bottom + 20, parts)


def round_up(value: float) -> float:
    """Return the next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round values inside `low…high`, about `count` of them."""
    if not high > low:
        return [low]
    step = round_up((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _around(low: float, high: float, count: int) -> list[float]:
    """Return round values, about `count` of them, of which the first is at most `low` and the last at least `high`."""
    step = round_up((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 10) for place in range(first, max(last, first + 1) + 1)]


def _grid(scale: Scale, top: float, bottom: float, show: Format) -> Markup:
    parts = []
    for tick in ticks(scale.low, scale.high, 3):
        parts.append(_line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(_text(scale(tick), bottom + 14, show(tick), "faint middle"))
    return Markup("").join(parts)


def _levels(up: Scale, marks: Sequence[float], left: float, right: float, show: Format) -> list[Markup]:
    """The lines across a chart, with their values."""
    parts = []
    for mark in marks:
        parts.append(_line(left, up(mark), right, up(mark), "grid"))
        parts.append(_text(left - 6, up(mark) + 4, show(mark), "faint end"))
    return parts


def _whisker(scale: Scale, y: float, low: float | None, high: float | None, name: str) -> Markup:
    """An interval; an end that is not known runs to the border without a cap."""
    if low is None and high is None:
        return Markup("")
    parts = [
        _line(
            scale(scale.low if low is None else low),
            y,
            scale(scale.high if high is None else high),
            y,
            f"whisker {name}",
        )
    ]
    for end in (low, high):
        if end is not None and scale.low <= end <= scale.high:
            parts.append(_line(scale(end), y - 4, scale(end), y + 4, f"whisker {name}"))
    return Markup("").join(parts)


def _mark(x: float, y: float, state: str) -> Markup:
    """A filled square passes, a diamond fails, an open circle is undecided."""
    if state == "pass":
        return Markup('<rect class="mark pass" x="{}" y="{}" width="10" height="10"/>').format(_n(x - 5), _n(y - 5))
    if state == "fail":
        path = f"M{_n(x)} {_n(y - 7)}L{_n(x + 7)} {_n(y)}L{_n(x)} {_n(y + 7)}L{_n(x - 7)} {_n(y)}Z"
        return Markup('<path class="mark fail" d="{}"/>').format(path)
    return Markup('<circle class="mark open" cx="{}" cy="{}" r="5"/>').format(_n(x), _n(y))


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(name, _n(x1), _n(y1), _n(x2), _n(y2))


def _text(x: float, y: float, text: str, name: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(name, _n(x), _n(y), text)


def _svg(title: str, width: float, height: float, parts: Sequence[Markup], name: str = "") -> Markup:
    return Markup(
        '<svg class="{}" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">'
        "<title>{}</title>{}</svg>"
    ).format(name, title, _n(width), _n(height), _n(width), _n(height), title, Markup("").join(map(escape, parts)))


def _n(value: float) -> str:
    """A coordinate in as few characters as a tenth of a pixel needs."""
    return f"{value:.1f}".removesuffix(".0")
