"""Examples for a person: contact sheets (originals and their variants, rejected images) and charts (classes, sizes).

Sheets are WebP on a transparent ground, with text in a grey that is legible on light and dark pages. The text is in the
alpha channel, which WebP keeps without blur, at any quality. Charts are PNG.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.decode import Decoded, Decoder
from tasks.images.rows import decode_images
from tasks.io import storage
from tasks.io.tensors import Float32Array, Float64Array, Int32Array, Int64Array, UInt8Array, UInt64Array
from tasks.io.text import number, plural
from tasks.report.plots import (
    BEFORE_COLOUR,
    INK_COLOUR,
    NOW_COLOUR,
    compact_png,
    fitted,
    font,
    one_line,
    plain,
    wide_figure,
)
from tasks.report.report import DataTable, Picture
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

if TYPE_CHECKING:
    from PIL import Image as PIL_Image
    from PIL import ImageFont as PIL_ImageFont


SIDE = 112
SHEET_BYTES = 120_000
SIDES = (16, 256)

_ISSUE_COLOUR = "#b3261e"
_WIDTH = 1000  # of a sheet, CSS pixels; one wide row may be wider
_GAP, _STEP, _LINE = 5, 22, 20  # between variants, from the original to them, and of a line of text, CSS pixels
_BLOCK_GAP = 28
_TILE_GAP = 12
_CAPTION, _SMALL, _SMALL_LINE = 12.5, 11, 15
_LOOKS = ((2.0, 60), (1.5, 25), (1.0, 25))
"""Pixels a CSS pixel, and quality of WebP: the first are for nearly all pictures, the others for much noise."""
_ALPHA_QUALITY = 30  # a dozen levels are enough for the edges of letters, and save a third of their bytes
_VARIANTS_SHOWN = 12
_ROWS_SHOWN, _REJECTS_SHOWN = 60, 40
_WEBP_SIDE = 16_383
EXAMPLES = 12
DOUBTFUL = 4
"""Number of examples whose variants have issues."""
REJECTS = 18
EXAMPLE_SIDE = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """One original and its outcome.

    Attributes:
        image_id: name of the original.
        class_name: its class.
        split: its split.
        original: its pixels, uint8, (height, width, 3 or more); a thumbnail is enough.
        variants: pixels of each variant, in the same form.
        issues: names of each variant's issues, one text or several; empty without any.
        note: a sentence about the original.
    """

    image_id: str
    class_name: str
    split: str
    original: UInt8Array
    variants: Sequence[UInt8Array]
    issues: Sequence[str | Sequence[str]] = ()
    note: str = ""


def thumbnail(pixels: UInt8Array, side: int) -> UInt8Array:
    """Shrink a picture to fit into side × side by averaging; smaller ones stay as they are.

    Args:
        pixels: uint8, (height, width, 3 or more); only the first three channels count.
        side: maximum pixels of either side.

    Returns:
        uint8, (height, width, 3).
    """
    return np.asarray(_fitted(pixels, side, enlarge=False))


def contact_sheet(rows: Sequence[SheetRow], side: int = SIDE, max_bytes: int = SHEET_BYTES) -> bytes:
    """Draw originals with their variants beside them, as WebP; variants with issues have a border and the issue's name.

    Everything is drawn for a screen of two pixels a CSS pixel. A result larger than `max_bytes` is drawn again with
    lower quality and smaller, and then without the last rows. A note counts the omitted rows.

    Args:
        rows: Rows to show, in this order: at most 60 originals with 12 variants each.
        side: Height and width of each picture, 16 to 256 CSS pixels.
        max_bytes: Maximum bytes of the result, unless a single row has more.
    """
    assert SIDES[0] <= side <= SIDES[1], f"side = {side} isn't within {SIDES}"

    def draw(shown: int, scale: float) -> _Canvas:
        return _contacts(rows[:shown], side, scale, left_out=len(rows) - shown)

    return _within(max_bytes, draw, min(len(rows), _ROWS_SHOWN))


def tile_sheet(
    items: Sequence[tuple[str, str, UInt8Array | None]],
    side: int = SIDE,
    max_bytes: int = SHEET_BYTES // 2,
    lines: int = 2,
) -> bytes:
    """Draw pictures side by side with a name and a text below each, as WebP; a grey tile represents a missing picture.

    Args:
        items: Name, text, and pixels or a thumbnail, uint8, (height, width, 3 or more), of each: at most 40 show.
        side: Height and width of each picture, 16 to 256 CSS pixels.
        max_bytes: Maximum bytes of the result, unless a single tile has more.
        lines: Maximum lines of text.
    """
    assert SIDES[0] <= side <= SIDES[1], f"side = {side} isn't within {SIDES}"

    def draw(shown: int, scale: float) -> _Canvas:
        return _tiles(items[:shown], side, scale, len(items) - shown, lines=lines)

    return _within(max_bytes, draw, min(len(items), _REJECTS_SHOWN))


def _within(max_bytes: int, draw: Callable[[int, float], _Canvas], shown: int) -> bytes:
    """Return a sheet in the best look within a bound, of as many items as possible, at least one."""
    while True:
        for scale, quality in _LOOKS:
            canvas = draw(shown, scale)
            if max(canvas.alpha.size) <= _WEBP_SIDE:
                data = canvas.encoded(quality)
                if len(data) <= max_bytes or (shown <= 1 and scale == 1):
                    return data
        shown = shown * 3 // 4


class _Canvas:
    """A transparent canvas for pictures and text, measured in CSS pixels."""

    def __init__(self, width: float, height: float, scale: float) -> None:
        from PIL import Image, ImageDraw

        self.scale = scale
        size = (max(self.at(width), 1), max(self.at(height), 1))
        self.colour = Image.new("RGB", size, INK_COLOUR)
        self.alpha = Image.new("L", size, 0)
        self._paint, self._cover = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.alpha)

    def at(self, length: float) -> int:
        return round(length * self.scale)

    def box(self, place: tuple[float, float, float, float], colour: str, opacity: int = 255) -> None:
        """Draw a rectangle with round corners, at x and y, with a width and height."""
        x, y, width, height = place
        corners = (self.at(x), self.at(y), self.at(x + width) - 1, self.at(y + height) - 1)
        self._paint.rectangle(corners, fill=colour)
        self._cover.rounded_rectangle(corners, radius=self.at(min(5, height / 2)), fill=opacity)

    def picture(self, pixels: UInt8Array, x: float, y: float, side: float, border: str | None = None) -> None:
        """Draw a picture in the middle of a square, with a border if a colour is given for one."""
        image = _fitted(pixels, self.at(side), enlarge=True)
        left, top = self.at(x) + (self.at(side) - image.width) // 2, self.at(y) + (self.at(side) - image.height) // 2
        self.colour.paste(image, (left, top))
        place = (left, top, left + image.width - 1, top + image.height - 1)
        self._cover.rounded_rectangle(place, radius=min(self.at(5), *(length // 2 for length in image.size)), fill=255)
        if border is not None:
            self._paint.rectangle(place, outline=border, width=self.at(3))

    def text(
        self,
        text: str,
        x: float,
        y: float,
        width: float,
        *,
        bold: bool = False,
        size: float = _CAPTION,
    ) -> float:
        """Draw a line of text, shortened to fit; return its width."""
        letters = font(self.at(size), bold)
        text = fitted(text, letters, self.at(width))
        self._cover.text((self.at(x), self.at(y)), text, font=letters, fill=255)
        return letters.getlength(text) / self.scale

    def lines(self, text: str, x: float, y: float, width: float, *, most: int) -> None:
        """Draw small text on at most so many lines, the last one shortened to fit."""
        wrapped = _wrapped(text, font(self.at(_SMALL), bold=False), self.at(width), most)
        for place, words in enumerate(wrapped):
            self.text(words, x, y + place * _SMALL_LINE, width, size=_SMALL)

    def chip(self, text: str, x: float, y: float, width: float, colour: str) -> None:
        """Draw white text on a coloured bar."""
        letters = font(self.at(_SMALL), bold=True)
        self.box((x, y, width, 17), colour)
        place = (self.at(x + 5), self.at(y + 1.5))
        self._paint.text(place, fitted(text, letters, self.at(width - 8)), font=letters, fill="white")

    def encoded(self, quality: int) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        image = Image.merge("RGBA", (*self.colour.split(), self.alpha))
        image.save(buffer, "WEBP", quality=quality, alpha_quality=_ALPHA_QUALITY, method=2)
        return buffer.getvalue()


def _contacts(rows: Sequence[SheetRow], side: int, scale: float, left_out: int) -> _Canvas:
    """Draw the rows, two or more beside each other if they are short."""
    most = max((min(len(row.variants), _VARIANTS_SHOWN) for row in rows), default=0)
    block = max(side + (_STEP - _GAP + most * (side + _GAP) if most else 0), 2 * side, 160)
    columns = max(1, (_WIDTH + _BLOCK_GAP) // (block + _BLOCK_GAP))
    pitch = (_WIDTH - block) / (columns - 1) if columns > 1 else 0
    lines = [rows[start : start + columns] for start in range(0, len(rows), columns)]
    heights = [_LINE * (2 if any(row.note for row in line) else 1) + side + 14 for line in lines]
    words = f"and {plural(left_out, 'more original')}" if left_out else "" if rows else "No images to show."
    canvas = _Canvas(max(_WIDTH, block), sum(heights) + (_LINE + 4 if words else 0), scale)
    canvas.text(words, 0, sum(heights) + 2, 300)
    colours = _split_colours({row.split for row in rows})
    y = 0
    for line, height in zip(lines, heights, strict=True):
        for column, row in enumerate(line):
            _contact(canvas, row, (column * pitch, y, block, height - 14), side, colours[row.split])
        y += height
    return canvas


def _contact(canvas: _Canvas, row: SheetRow, place: tuple[float, float, float, float], side: int, dot: str) -> None:
    """Draw one row: a heading, perhaps a note, and the pictures at the bottom of its place (x, y, width, height)."""
    x, y, block, height = place
    top = y + height - side
    split_width = min(96.0, block / 3)
    letters = font(canvas.at(_CAPTION), bold=False)
    split = fitted(row.split, letters, canvas.at(split_width - 14))
    start = x + block - letters.getlength(split) / canvas.scale
    if split:
        canvas.box((start - 14, y + 4.5, 9, 9), dot)
        canvas.text(split, start, y, split_width)
    room = start - 22 - x
    used = canvas.text(row.class_name, x, y, room * 0.62, bold=True)
    hidden = len(row.variants) - _VARIANTS_SHOWN
    more = f" · {_VARIANTS_SHOWN} of {plural(len(row.variants), 'variant')}" if hidden > 0 else ""
    canvas.text(row.image_id + more, x + used + 8, y, room - used - 8)
    if row.note:
        canvas.text(row.note, x, y + _LINE - 2, block)
    canvas.picture(row.original, x, top, side)
    for index, pixels in enumerate(row.variants[:_VARIANTS_SHOWN]):
        left = x + side + _STEP + index * (side + _GAP)
        issues = _joined(row.issues[index]) if index < len(row.issues) else ""
        canvas.picture(pixels, left, top, side, border=_ISSUE_COLOUR if issues else None)
        if issues:
            canvas.chip(issues, left, top + side - 17, side, _ISSUE_COLOUR)
    if row.variants:
        canvas.text("›", x + side + 7, top + side / 2 - 15, 12, size=22)


def _tiles(
    items: Sequence[tuple[str, str, UInt8Array | None]],
    side: int,
    scale: float,
    left_out: int,
    *,
    lines: int,
) -> _Canvas:
    """Draw tiles with names and texts below them; without a picture the text is in the tile."""
    pitch, height = side + _TILE_GAP, side + _LINE + lines * _SMALL_LINE + 10
    columns = max(1, (_WIDTH + _TILE_GAP) // pitch)
    below = -(-len(items) // columns) * height
    words = f"and {left_out:,} more" if left_out else "" if items else "Nothing was rejected."
    canvas = _Canvas(max(_WIDTH, side), below + (_LINE + 4 if words else 0), scale)
    for index, (name, reason, pixels) in enumerate(items):
        x, y = index % columns * pitch, index // columns * height
        canvas.text(name, x, y + side + 2, side, bold=True)
        if pixels is not None:
            canvas.picture(pixels, x, y, side)
            canvas.lines(reason, x, y + side + _LINE, side, most=lines)
        else:
            canvas.box((x, y, side, side), INK_COLOUR, opacity=50)
            canvas.lines(reason, x + 8, y + 8, side - 16, most=max(1, (side - 12) // _SMALL_LINE))
    canvas.text(words, 0, below + 2, 300)
    return canvas


def _fitted(pixels: UInt8Array, side: int, *, enlarge: bool) -> PIL_Image.Image:
    from PIL import Image

    assert pixels.ndim == 3, f"pixels have shape {pixels.shape}, not (height, width, channels)"
    assert pixels.shape[2] >= 3, f"pixels have {pixels.shape[2]} channels, not 3 or more"
    assert pixels.dtype == np.uint8, f"pixels are {pixels.dtype}, not uint8"
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    ratio = side / max(image.size)
    if ratio == 1 or (ratio > 1 and not enlarge):
        return image
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    # Small pictures are shown pixel by pixel.
    method = Image.Resampling.NEAREST if ratio >= 4 else Image.Resampling.BICUBIC
    return image.resize(size, method, reducing_gap=3.0)


def _wrapped(text: str, letters: PIL_ImageFont.FreeTypeFont, width: float, most: int) -> Iterator[str]:
    """Yield lines of words, at most so many; the last one has the rest."""
    words = one_line(text, 200).split()
    for line in range(most):
        count = 1
        while count < len(words) and (line == most - 1 or letters.getlength(" ".join(words[: count + 1])) <= width):
            count += 1
        if words:
            yield " ".join(words[:count])
        words = words[count:]


def _joined(issues: str | Sequence[str]) -> str:
    names = issues.split(",") if isinstance(issues, str) else issues
    return ", ".join(name.strip().replace("_", " ") for name in names)


_SPLIT_COLOURS = {"train": NOW_COLOUR, "validation": BEFORE_COLOUR, "test": "#2f9e78"}
_CLASSES_SHOWN = 30

_SPLITS_A_LINE = 6
_OTHER_COLOURS = ("#8d97a8", "#c3a13a", "#9c5fc0")


def class_balance_chart(counts: Mapping[str, Mapping[str, int]]) -> bytes:
    """Plot the images of each class by split, as PNG: a bar for each of the 30 largest, and a note on the others."""
    from matplotlib.patches import Patch

    totals = {name: sum(splits.values()) for name, splits in counts.items()}
    largest = sorted(totals, key=lambda name: (-totals[name], name))
    shown, others = largest[:_CLASSES_SHOWN], largest[_CLASSES_SHOWN:]
    colours = _split_colours({split for splits in counts.values() for split in splits})
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


def _split_colours(splits: set[str]) -> dict[str, str]:
    """Return the colours of splits in drawing order: well-known splits first."""
    order = list(_SPLIT_COLOURS)
    known = [split for split in order if split in splits]
    others = sorted(splits - set(order))
    colours = {split: _OTHER_COLOURS[place % len(_OTHER_COLOURS)] for place, split in enumerate(others)}
    return {split: _SPLIT_COLOURS[split] for split in known} | colours


def _draw_sizes(axes: Any, size: Float64Array) -> None:
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


def _draw_areas(axes: Any, megapixels: Float64Array) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An image to show, and the files of its unit, one of which holds its variants."""

    image_id: str
    uri: str
    class_name: str
    split: str
    file: str


def choose_examples(keys: UInt64Array, class_ids: Int64Array, scores: Float32Array) -> list[int]:
    """Choose images to show: some of as many classes as possible, and some whose variants are doubtful.

    Args:
        keys: Key of each image; they decide among equals. Shape (n,).
        class_ids: Class of each image, shape (n,).
        scores: Mean quality score of its variants, shape (n,).

    Returns:
        Rows, at most `EXAMPLES`, by class.
    """
    order = np.lexsort((keys, scores))
    doubtful = [int(row) for row in order[:DOUBTFUL] if scores[row] < 1]
    by_key = np.lexsort((keys, class_ids))
    # The number of an image within its class, in the order of keys: first one of every class, then a second.
    starts = np.flatnonzero(np.diff(class_ids[by_key], prepend=-1))
    turn = np.arange(len(by_key)) - np.repeat(starts, np.diff(np.append(starts, len(by_key))))
    chosen = by_key[np.lexsort((keys[by_key], turn))]
    usual = [int(row) for row in chosen if int(row) not in doubtful][: EXAMPLES - len(doubtful)]
    return sorted([*usual, *doubtful], key=lambda row: (class_ids[row], keys[row]))


def contact_picture(
    examples: Sequence[Example], config: ImageAugmentationConfig, max_bytes: int | None = None
) -> Picture | None:
    """Draw originals beside their variants, as they were stored."""
    decoder = Decoder(config.max_pixels, config.background)
    rows = list(_sheet_rows(examples, config, decoder))
    if not rows:
        return None
    data = contact_sheet(rows) if max_bytes is None else contact_sheet(rows, max_bytes=max_bytes)
    caption = "Originals, and beside each its variants as they are stored; a coloured border names an issue."
    return Picture.of("Contact sheet", caption, "image/webp", data)


def _sheet_rows(examples: Sequence[Example], config: ImageAugmentationConfig, decoder: Decoder) -> Iterator[SheetRow]:
    for example in examples:
        decoded = decoder.decode(storage.read_bytes(example.uri))
        if not isinstance(decoded, Decoded):
            continue  # the file has changed since it was augmented
        rows = _stored_rows(example)
        yield SheetRow(
            image_id=example.image_id,
            class_name=example.class_name,
            split=example.split,
            original=thumbnail(decoded.pixels[:, :, :3], EXAMPLE_SIDE),
            variants=[thumbnail(levels(image, config.augmentation), EXAMPLE_SIDE) for image in decode_images(rows)],
            issues=rows["quality_issues"].to_pylist(),
        )


def _stored_rows(example: Example) -> pa.Table:
    with storage.open_input(example.file) as source:
        return pq.read_table(source, filters=[("original_image_id", "=", example.image_id)])


def levels(image: npt.NDArray[np.generic], augmentation: Augmentation) -> UInt8Array:
    """Return a stored image as RGB rows of uint8, shape (height, width, 3)."""
    rows = np.moveaxis(np.asarray(image), 0, 2)
    if rows.dtype == np.uint8:
        return np.ascontiguousarray(rows)
    mean, std = np.array(augmentation.mean), np.array(augmentation.std)
    return np.ascontiguousarray(np.clip((rows * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8))


def reject_picture(
    entries: Sequence[FileEntry], reservation: Reservation, config: ImageAugmentationConfig
) -> Picture | None:
    """Draw some of the rejected images of each reason, if they can be decoded."""
    decoder = Decoder(config.max_pixels, config.background)
    items: list[tuple[str, str, UInt8Array | None]] = []
    shown: Counter[str] = Counter()
    for row in _rejected(entries, reservation):
        if len(items) == REJECTS:
            break
        shown[row["reason"]] += 1
        if shown[row["reason"]] > REJECTS // 4:
            continue
        items.append((row["image_id"] or row["path"], row["reason"], _thumbnail_of(row["uri"], decoder)))
    if not items:
        return None
    caption = "Rejected images; all of them, with the reason, are in _rejected/. A grey tile can't be decoded."
    return Picture.of("Rejected images", caption, "image/webp", tile_sheet(items))


def _rejected(entries: Sequence[FileEntry], reservation: Reservation) -> Iterator[dict[str, str]]:
    for entry in entries:
        with storage.open_input(layout.join(reservation.uri, entry.path)) as source:
            table = pq.read_table(source)
        if "uri" in table.column_names:  # the others are labels
            yield from table.to_pylist()


def _thumbnail_of(uri: str, decoder: Decoder) -> UInt8Array | None:
    try:
        decoded = decoder.decode(storage.read_bytes(uri))
    except (OSError, ValueError):
        return None
    return thumbnail(decoded.pixels[:, :, :3], EXAMPLE_SIDE) if isinstance(decoded, Decoded) else None


def charts(counts: Mapping[str, Mapping[str, int]], sizes: Int32Array) -> list[Picture]:
    """Return charts of the classes by split, and of the sizes of the originals.

    Args:
        counts: Images by class, then split.
        sizes: Height and width of each original, shape (n, 2).
    """
    if not len(sizes):
        return []
    return [
        Picture.of(
            "Classes", "Images of each class by split, before augmentation.", "image/png", class_balance_chart(counts)
        ),
        Picture.of(
            "Sizes", "Width and height of the originals, pixels.", "image/png", size_chart(sizes[:, 0], sizes[:, 1])
        ),
    ]


def reject_table(rejected: Mapping[str, int], images: int) -> DataTable | None:
    """Return the number of rejected images for each reason."""
    if not rejected:
        return None
    rows = tuple(
        (reason, count, round(count / max(images, 1), 4))
        for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    )
    return DataTable(title="Rejected images", columns=("reason", "images", "share"), rows=rows)
