"""Charts of a dataset of images, as PNG on a transparent ground: classes by split, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.io.text import number, plural, shortened
from tasks.report.plots import BEFORE_COLOUR, INK_COLOUR, NOW_COLOUR, compact_png, plain, wide_figure

SPLIT_COLOURS = {"train": NOW_COLOUR, "validation": BEFORE_COLOUR, "test": "#2f9e78"}
CLASSES_SHOWN = 30

_SPLITS_A_LINE = 6
_OTHER_COLOURS = ("#8d97a8", "#c3a13a", "#9c5fc0")


def class_balance_chart(counts: Mapping[str, Mapping[str, int]]) -> bytes:
    """Plot the images of each class by split, as PNG: a bar for each of the 30 largest, and a note on the others.

    Args:
        counts: Number of images by class and split.
    """
    from matplotlib.patches import Patch

    totals = {name: sum(splits.values()) for name, splits in counts.items()}
    largest = sorted(totals, key=lambda name: (-totals[name], name))
    shown, others = largest[:CLASSES_SHOWN], largest[CLASSES_SHOWN:]
    colours = split_colours({split for splits in counts.values() for split in splits})
    legend = -(-len(colours) // _SPLITS_A_LINE)
    figure, axes = wide_figure(height=0.45 + 0.25 * legend + 0.27 * max(len(shown), 1) + (0.25 if others else 0))
    left = np.zeros(len(shown))
    for split, colour in colours.items():
        widths = np.array([counts[name].get(split, 0) for name in shown], float)
        axes.barh(np.arange(len(shown)), widths, left=left, height=0.72, color=colour)
        left += widths
    for place, name in enumerate(shown):
        axes.text(left[place], place, f" {totals[name]:,}", va="center", color=INK_COLOUR, fontsize=9)
    axes.set_yticks(np.arange(len(shown)), [plain(one_line(name, 28)) for name in shown])
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xlim(0, max(left.max(initial=0) * 1.07, 1))
    axes.set_xticks([])
    if others:
        rest = sum(totals[name] for name in others)
        axes.set_xlabel(
            f"and {plural(len(others), 'more class', 'more classes')} with {plural(rest, 'image')}", loc="left"
        )
    if colours:
        # matplotlib accepts labels that begin with an underscore only with explicit handles.
        patches = [Patch(color=colour) for colour in colours.values()]
        names = [plain(one_line(split, 30)) or "(blank)" for split in colours]
        style = {"frameon": False, "labelcolor": INK_COLOUR, "fontsize": 9.5}
        figure.legend(patches, names, loc="outside upper left", ncols=_SPLITS_A_LINE, **style)
    return compact_png(figure)


def size_chart(heights: npt.ArrayLike, widths: npt.ArrayLike) -> bytes:
    """Plot the sizes of the originals, as PNG: width against height, and a histogram of megapixels.

    Args:
        heights: Height of each image, pixels.
        widths: Width of each image, pixels, in the same order.
    """
    size = np.stack([np.asarray(widths, float).ravel(), np.asarray(heights, float).ravel()])
    figure, (sizes, areas) = wide_figure(height=3.0, columns=2)
    if size.shape[1]:
        _draw_sizes(sizes, size)
        _draw_areas(areas, size.prod(axis=0) / 1e6)
    else:
        for axes in (sizes, areas):
            axes.set_xticks([])
            axes.set_yticks([])
    sizes.set_xlabel("width, pixels")
    sizes.set_ylabel("height, pixels")
    areas.set_xlabel("megapixels")
    areas.set_ylabel("images")
    return compact_png(figure)


def split_colours(splits: set[str]) -> dict[str, str]:
    """Return the colours of splits in drawing order: well-known splits first."""
    order = list(SPLIT_COLOURS)
    known = [split for split in order if split in splits]
    others = sorted(splits - set(order))
    colours = {split: _OTHER_COLOURS[place % len(_OTHER_COLOURS)] for place, split in enumerate(others)}
    return {split: SPLIT_COLOURS[split] for split in known} | colours


def one_line(text: str, longest: int) -> str:
    """Return text as one short line of printable characters."""
    printable = "".join(character if character.isprintable() else "·" for character in " ".join(text.split()))
    return shortened(printable, longest)


def _draw_sizes(axes: Any, size: npt.NDArray[np.float64]) -> None:
    """Draw a point for each size; its area shows the number of images."""
    size = np.maximum(size, 1.0)
    low, high = size.min(), size.max()
    cell = max((high / low) ** (1 / 48), 1.002)  # sizes closer than that share a point, the first of them
    cells = np.round(np.log(size) / np.log(cell))
    _, first, counts = np.unique(cells, axis=1, return_index=True, return_counts=True)
    area = 8 + 120 * counts / counts.max()
    axes.plot([low, high], [low, high], color=INK_COLOUR, linewidth=0.8, alpha=0.4, zorder=0)
    axes.scatter(*size[:, first], s=area, color=NOW_COLOUR, alpha=0.6, linewidths=0)
    if low == high:
        axes.set_xlim(low * 0.8, high * 1.2)
        axes.set_ylim(low * 0.8, high * 1.2)
        return
    axes.margins(0.06)
    if high / low > 8:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _mark(axes.xaxis, *size[0])
        _mark(axes.yaxis, *size[1])


def _mark(axis: Any, *values: float) -> None:
    """Set the ticks of a logarithmic axis: 1, 2 and 5 times powers of ten, or the powers alone if there are many."""
    low, high = max(min(values), 1e-6), max(*values, 1e-6)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    marks = [mark for power in powers for mark in power * np.array(steps) if low / 1.3 <= mark <= high * 1.3]
    axis.set_ticks(marks, [number(float(f"{mark:.3g}")) for mark in marks])
    axis.set_ticks([], minor=True)


def _draw_areas(axes: Any, megapixels: npt.NDArray[np.float64]) -> None:
    low, high = max(megapixels.min(), 1e-6), max(megapixels.max(), 1e-6)
    wide = high / low > 30
    if low == high:
        edges = low * np.array([0.8, 0.97, 1.03, 1.2])
    else:
        edges = np.geomspace(low, high, 33) if wide else np.linspace(low, high, 33)
        edges[[0, -1]] = low, high
    axes.hist(np.maximum(megapixels, low), edges, color=NOW_COLOUR, rwidth=0.92)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if wide:
        axes.set_xscale("log")
        _mark(axes.xaxis, low, high)
