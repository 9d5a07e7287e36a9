"""Distributions of columns, this version against the last: as bars to draw, and as one PNG of small multiples."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.io.tensors import Float64Array
from tasks.io.text import number, shortened
from tasks.quality.profile import HISTOGRAM_BINS
from tasks.store.manifest import CheckResult, ColumnProfile, Histogram

if TYPE_CHECKING:
    from PIL import Image as PIL_Image
    from PIL import ImageDraw as PIL_ImageDraw
    from PIL import ImageFont as PIL_ImageFont

NOW_COLOUR = "#3b6fd4"
BEFORE_COLOUR = "#d9822b"
INK_COLOUR = "#767e8b"  # equally far from white and from the dark page: readable on both
_TEXT_COLOUR = "#3c424c"
_CELL, _MARGIN, _LEGEND = (486, 300), 16, 56  # pixels; a page shows two of them as one
_BINS = 28
_LOG_RATIO = 1000.0
_CATEGORIES = 6
_OTHER = "other"


@dataclass(frozen=True)
class Distribution:
    """Shares of one column's values, ready to draw.

    Attributes:
        column: name of the column.
        layout: 'range' for a continuous column, 'values' for a bar for each number, 'names' for a bar for each text.
        labels: one text for each bar; for a range its two ends, and between them the scale unless it is linear.
        now: shares of this version, one for each bar.
        before: shares of the last version over the same bars, or None.
    """

    column: str
    layout: Literal["range", "values", "names"]
    labels: tuple[str, ...]
    now: tuple[float, ...]
    before: tuple[float, ...] | None

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Return labels that fit under upright bars, each with its place from 0 to the number of bars."""
        if self.layout == "values" and len(self.labels) <= 10 and sum(map(len, self.labels)) <= 26:
            return [(index + 0.5, label) for index, label in enumerate(self.labels)]
        ends = [(0.0, self.labels[0]), (float(len(self.now)), self.labels[-1])]
        return [*ends, (len(self.now) / 2, self.labels[1])] if self.layout == "range" and len(self.labels) > 2 else ends

    @property
    def peak(self) -> float:
        """Return the largest share of either version."""
        return max(*self.now, *(self.before or ()), 0.0) or 1.0


def distributions(
    profile: Mapping[str, ColumnProfile], previous: Mapping[str, ColumnProfile], checks: Sequence[CheckResult] = ()
) -> list[Distribution]:
    """Return distributions of a version's columns, those with the worst drift verdict first, else in schema order."""
    drift = {
        check.column: (False, check.verdict == "warn", -float(check.figure or 0))
        for check in checks
        if check.name == "drift" and not isinstance(check.figure, str) and check.verdict != "pass"
    }
    drawn = [distribution(name, now, previous.get(name)) for name, now in profile.items()]
    calm = (True, False, 0.0)
    return sorted((d for d in drawn if d is not None), key=lambda d: drift.get(d.column, calm))


def distribution(column: str, now: ColumnProfile, before: ColumnProfile | None = None) -> Distribution | None:
    """Return the bars of one column; None if it has no value, or too many different ones to name."""
    if before is not None and before.kind != now.kind:
        before = None
    if now.histogram is not None:
        return _numeric(column, now, now.histogram, before)
    if now.top_values:
        return _named(column, now, before)
    return None


def histogram_grid(drawn: Sequence[Distribution], limit: int = 12) -> bytes:
    """Return a PNG of small multiples, four in a row: this version as bars, the last one as a line.

    Drawn by Pillow: importing matplotlib takes longer than checking a small version.
    """
    from PIL import Image, ImageDraw

    shown = drawn[:limit]
    columns = min(4, max(1, len(shown)))
    lines = -(-len(shown) // columns)
    canvas = Image.new("RGB", (columns * _CELL[0], lines * _CELL[1] + _LEGEND), "white")
    draw = ImageDraw.Draw(canvas)
    _draw_legend(draw, canvas.width, with_before=any(one.before for one in shown))
    for index, one in enumerate(shown):
        left, top = index % columns * _CELL[0] + _MARGIN, _LEGEND + index // columns * _CELL[1]
        right, bottom = left + _CELL[0] - 2 * _MARGIN, top + _CELL[1] - _MARGIN
        title = font(21)
        draw.text((left, top), fitted(one.column, title, right - left), "black", title)
        (_draw_named if one.layout == "names" else _draw_upright)(draw, one, (left, top + 34, right, bottom))
    return _few_colours(canvas)


@cache
def font(pixels: int, bold: bool = False) -> PIL_ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib, which has more letters than Pillow's."""
    from PIL import ImageFont

    package = find_spec("matplotlib")  # without importing it
    assert package is not None
    assert package.origin is not None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


def one_line(text: str, longest: int) -> str:
    """Return text as one short line of printable characters."""
    printable = "".join(character if character.isprintable() else "·" for character in " ".join(text.split()))
    return shortened(printable, longest)


def fitted(text: str, letters: PIL_ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text in its middle to at most so many pixels."""
    text = one_line(text, 200)
    fitting = text
    for length in range(len(text) - 1, 0, -1):
        if letters.getlength(fitting) <= width:
            return fitting
        fitting = shortened(text, length)
    return fitting if letters.getlength(fitting) <= width else ""


def _numeric(column: str, now: ColumnProfile, histogram: Histogram, before: ColumnProfile | None) -> Distribution:
    earlier = before if before is not None and before.histogram is not None else None
    layout: Literal["range", "values"] = "values" if _is_discrete(now) else "range"
    logarithmic = False
    if layout == "values":
        edges = np.array(histogram.edges)
        if earlier is not None and earlier.histogram is not None:  # new and lost extremes join the outer bars
            edges[0] = min(edges[0], earlier.histogram.edges[0])
            edges[-1] = max(edges[-1], earlier.histogram.edges[-1])
        labels = tuple(number(float(f"{value:.6g}")) for value in _values(now))
    else:
        low, high = _visible_range([now] if earlier is None else [now, earlier])
        logarithmic = _spans_magnitudes(low, high)
        edges = (np.geomspace if logarithmic else np.linspace)(low, high, _BINS + 1)
        labels = (_axis(low), *(["log scale"] if logarithmic else []), _axis(high))
    old = None if earlier is None else _shares(earlier, edges, logarithmic)
    return Distribution(column, layout, labels, _shares(now, edges, logarithmic), old)


def _is_discrete(profile: ColumnProfile) -> bool:
    """Return True if each bin of the histogram is one value."""
    return profile.histogram is not None and profile.distinct == len(profile.histogram.counts) <= HISTOGRAM_BINS


def _values(profile: ColumnProfile) -> list[float]:
    """Return the values of a discrete column: the inner edges lie halfway between them."""
    assert profile.histogram is not None
    values = [float(profile.minimum or 0.0)]
    for edge in profile.histogram.edges[1:-1]:
        values.append(2 * edge - values[-1])
    return values


def _spans_magnitudes(low: float, high: float) -> bool:
    return low > 0 and high / low >= _LOG_RATIO


def _visible_range(versions: Sequence[ColumnProfile]) -> tuple[float, float]:
    """Return the middle 98 % of all versions, on a linear axis up to the extreme if that lies within a tenth more."""
    low = min(version.quantiles.get("0.01", np.inf) for version in versions)
    high = max(version.quantiles.get("0.99", -np.inf) for version in versions)
    ends = [float(end) for version in versions for end in (version.minimum, version.maximum) if end is not None]
    if _spans_magnitudes(low, high):
        return low, high
    margin = (high - low) / 10
    low = min(ends) if low - min(ends) <= margin else low
    high = max(ends) if max(ends) - high <= margin else high
    return (low, high) if high > low else (min(ends), max(ends))


def _shares(profile: ColumnProfile, edges: Float64Array, logarithmic: bool = False) -> tuple[float, ...]:
    """Return shares of a column's values between edges, assuming even spread within the bins of its histogram.

    On a logarithmic axis the logarithms are evenly spread; its edges are positive.
    """
    assert profile.histogram is not None
    counts = np.array(profile.histogram.counts)
    total = max(int(counts.sum()), 1)
    if _is_discrete(profile):
        within, _ = np.histogram(_values(profile), edges, weights=counts / total)
        return tuple(within.tolist())
    places = list(profile.histogram.edges)
    below = [0.0, *(np.cumsum(counts) / total).tolist()]
    low, high = profile.quantiles.get("0.01", places[0]), profile.quantiles.get("0.99", places[-1])
    if places[0] < low < places[1] and below[1] > 0.01:  # the outer bins are long at the tails
        places, below = [places[0], low, *places[1:]], [0.0, 0.01, *below[1:]]
    if places[-2] < high < places[-1] and below[-2] < 0.99:
        places, below = [*places[:-1], high, places[-1]], [*below[:-1], 0.99, 1.0]
    if logarithmic:
        return tuple(np.diff(np.interp(np.log(edges), np.log(np.maximum(places, edges[0] / 2)), below)).tolist())
    return tuple(np.diff(np.interp(edges, places, below)).tolist())


def _named(column: str, now: ColumnProfile, before: ColumnProfile | None) -> Distribution:
    shown = [value for value, _ in now.top_values[:_CATEGORIES]]
    new = _named_shares(now, shown)
    old = _named_shares(before, shown) if before is not None and before.top_values else None
    if not new[-1] and not (old and old[-1]):
        new, old = new[:-1], old and old[:-1]
    else:
        shown.append(_OTHER)
    return Distribution(column, "names", tuple(shown), tuple(new), tuple(old) if old else None)


def _named_shares(profile: ColumnProfile, values: Sequence[str]) -> list[float]:
    counts = dict(profile.top_values)
    total = max(profile.count - profile.nulls, 1)
    listed = [counts.get(value, 0) / total for value in values]
    rest = total - sum(counts.get(value, 0) for value in values)
    return [*listed, rest / total]


Box = tuple[float, float, float, float]  # left, top, right and bottom, pixels


def _draw_named(draw: PIL_ImageDraw.ImageDraw, one: Distribution, box: Box) -> None:
    """Draw a bar to the right for each value, its name before it, and a stroke for the last version's share."""
    left, top, right, bottom = box
    letters = font(18)
    names = [fitted(short_name(label), letters, 150) for label in one.labels]
    start = left + max(letters.getlength(name) for name in names) + 8
    step, scale = (bottom - top) / len(one.now), (right - start) / (one.peak * 1.08)
    for place, name in enumerate(names):
        middle = top + (place + 0.5) * step
        half = min(0.375 * step, 16)
        draw.text((start - 8, middle), name, _TEXT_COLOUR, letters, anchor="rm")
        draw.rectangle((start, middle - half, start + one.now[place] * scale, middle + half), NOW_COLOUR)
        if one.before:
            end = start + one.before[place] * scale
            draw.line((end, middle - half - 3, end, middle + half + 3), BEFORE_COLOUR, 4)


def _draw_upright(draw: PIL_ImageDraw.ImageDraw, one: Distribution, box: Box) -> None:
    """Draw an upright bar for each share over its label, and the last version's shares as a line of steps."""
    left, top, right, bottom = box
    letters, floor = font(18), bottom - 24
    step, scale = (right - left) / len(one.now), (floor - top) / (one.peak * 1.08)
    gap = 0.0 if one.layout == "range" else 0.1 * step
    for place, share in enumerate(one.now):
        if share:
            begin, end = left + place * step + gap, left + (place + 1) * step - gap
            draw.rectangle((begin, floor - share * scale, end, floor), NOW_COLOUR)
    if one.before:
        heights = [0.0, *one.before, 0.0]
        steps = [
            (left + edge * step, floor - share * scale)
            for edge in range(len(one.before) + 1)
            for share in heights[edge : edge + 2]
        ]
        draw.line(steps, BEFORE_COLOUR, 4)
    for tick, label in one.ticks:
        width = letters.getlength(label)
        begin = min(max(left + tick * step - width / 2, left), right - width)  # all of it is in the cell
        draw.text((begin, bottom), label, _TEXT_COLOUR, letters, anchor="ls")


def _draw_legend(draw: PIL_ImageDraw.ImageDraw, right: float, with_before: bool) -> None:
    letters = font(20)
    entries = [*([("last version", BEFORE_COLOUR)] if with_before else []), ("this version", NOW_COLOUR)]
    right -= _MARGIN
    for text, colour in entries:
        right -= letters.getlength(text)
        draw.text((right, _LEGEND / 2), text, _TEXT_COLOUR, letters, anchor="lm")
        draw.rectangle((right - 40, _LEGEND / 2 - 7, right - 10, _LEGEND / 2 + 7), colour)
        right -= 70


def _axis(value: float) -> str:
    return number(value, in_full_below=1e7)


def short_name(label: str) -> str:
    """Return a value's label beside its bar."""
    return shortened(" ".join(label.split()), 12) or "(blank)"


def plain(text: str) -> str:
    """Escape text for matplotlib."""
    return text.replace("$", r"\$")  # matplotlib reads mathematics between dollar signs


def wide_figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a transparent figure as wide as the report, and its axes; an inch of it is 100 CSS pixels there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.set_facecolor("none")
        one.tick_params(colors=INK_COLOUR, labelsize=9, length=0)
        one.xaxis.label.set_color(INK_COLOUR)
        one.yaxis.label.set_color(INK_COLOUR)
        for side in ("top", "right", "bottom", "left"):
            one.spines[side].set_visible(False)
    return figure, axes if columns > 1 else axes[0]


def compact_png(figure: Any) -> bytes:
    """Return a figure as deterministic PNG in few colours; letters missing in the font become boxes silently."""
    from PIL import Image

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    with Image.open(buffer) as image:
        return _few_colours(image.convert("RGBA"))


def _few_colours(image: PIL_Image.Image) -> bytes:
    """Return a chart as PNG in 64 colours, a third of the bytes: charts have few besides letters' edges."""
    from PIL import Image

    buffer = io.BytesIO()
    image.quantize(64, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
