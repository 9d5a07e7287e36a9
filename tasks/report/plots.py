"""Distributions of columns, this version against the last: as bars to draw, and as one PNG of small multiples."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tasks.io.text import number, shortened
from tasks.quality.profile import HISTOGRAM_BINS
from tasks.store.manifest import CheckResult, ColumnProfile, Histogram

FloatArray = npt.NDArray[np.float64]

NOW_COLOUR = "#3b6fd4"
BEFORE_COLOUR = "#d9822b"
INK_COLOUR = "#767e8b"  # equally far from white and from the dark page: readable on both
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
    """Return a PNG of small multiples, four in a row: this version as bars, the last one as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = drawn[:limit]
    columns = min(4, max(1, len(shown)))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(2.7 * columns, 1.75 * lines + 0.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index, one in enumerate(shown):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw(axes, one)
    figure.legend(handles=_legend(shown), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return png(figure, dpi=90)


def png(figure: Any, dpi: float) -> bytes:
    """Return a figure as deterministic PNG; letters missing in the font become boxes without a warning."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


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


def _shares(profile: ColumnProfile, edges: FloatArray, logarithmic: bool = False) -> tuple[float, ...]:
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


def _draw(axes: Any, one: Distribution) -> None:
    places = np.arange(len(one.now)) + 0.5
    if one.layout == "names":
        axes.barh(places, one.now, color=NOW_COLOUR, height=0.75)
        if one.before:
            axes.scatter(one.before, places, color=BEFORE_COLOUR, marker="|", s=90, linewidths=2, zorder=3)
        axes.set_yticks(places, [plain(short_name(label)) for label in one.labels])
        axes.invert_yaxis()
        axes.set_xlim(0, one.peak * 1.08)
        axes.set_xticks([])
    else:
        axes.bar(places, one.now, color=NOW_COLOUR, width=1.0 if one.layout == "range" else 0.8)
        if one.before:
            axes.stairs(one.before, np.arange(len(one.now) + 1), color=BEFORE_COLOUR, linewidth=1.5)
        axes.set_xticks([place for place, _ in one.ticks], [plain(label) for _, label in one.ticks])
        axes.set_ylim(0, one.peak * 1.08)
        axes.set_yticks([])
    axes.set_title(plain(shortened(one.column, 34)), fontsize=8.5, loc="left")
    axes.tick_params(labelsize=7, length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def _legend(drawn: Sequence[Distribution]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=NOW_COLOUR, label="this version")]
    if any(one.before for one in drawn):
        handles.append(Line2D([], [], color=BEFORE_COLOUR, linewidth=1.5, label="last version"))
    return handles


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
    """Return a figure as PNG in 64 colours, a third of the bytes: charts have few colours besides letters' edges."""
    from PIL import Image

    with Image.open(io.BytesIO(png(figure, dpi=150))) as image:
        few = image.convert("RGBA").quantize(64, method=Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
