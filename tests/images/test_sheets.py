"""Contact sheets and charts: they show what they are given, keep to their bytes, and no name or size breaks them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.images.sheets import (
    SHEET_BYTES,
    SheetRow,
    class_balance_chart,
    contact_sheet,
    size_chart,
    thumbnail,
    tile_sheet,
)

RED = (255, 0, 0)
HOSTILE = [
    "",
    " ",
    "a" * 5_000,
    "two\nlines\tand a tab",
    "日本語 ürgh Ελλάδα עברית 🦊",
    "$x^2$ {}_\\%s <script>",
    "\x00\x1b\u202e\ufeff",
    "\ud800",  # a file name that isn't UTF-8 has such letters
    "_begins_with_underscore",
]


def flat(height: int, width: int, colour: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.full((height, width, len(colour)), colour, np.uint8)


def noise(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def row(**changes: Any) -> SheetRow:
    fields: dict[str, Any] = {
        "image_id": "img-000001",
        "class_name": "stripes",
        "split": "train",
        "original": flat(120, 90, (0, 0, 255)),
        "variants": [flat(64, 64, (0, 255, 0))] * 3,
    }
    return SheetRow(**(fields | changes))


def opened(data: bytes, kind: str = "WEBP") -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == kind
    return image.convert("RGBA")


def near(data: bytes, colour: tuple[int, int, int], kind: str = "WEBP") -> float:
    """Share of a picture that is drawn in a colour."""
    pixels = np.asarray(opened(data, kind)).astype(int)
    return float(((np.abs(pixels[..., :3] - colour).max(axis=2) < 40) & (pixels[..., 3] > 200)).mean())


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((400, 200), 100, (100, 50)),
        ((200, 400), 100, (50, 100)),
        ((30, 20), 100, (30, 20)),  # never enlarged
        ((5000, 1), 100, (100, 1)),  # never vanishes
        ((1, 5000), 100, (1, 100)),
        ((100, 100), 100, (100, 100)),
        ((7, 7), 1, (1, 1)),
    ],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_thumbnail_fits(shape: tuple[int, int], side: int, expected: tuple[int, int], channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    small = thumbnail(pixels, side)
    assert (small.shape, small.dtype) == ((*expected, 3), np.uint8)
    assert np.array_equal(small, thumbnail(pixels, side))


def test_thumbnail_averages() -> None:
    """Stripes of one pixel become grey; taking every nth pixel would make them black or white."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[::2] = 255
    small = thumbnail(stripes, 32).astype(int)
    assert 120 <= small.min() <= small.max() <= 135
    assert np.array_equal(thumbnail(stripes[:, ::-1], 32), thumbnail(np.ascontiguousarray(stripes[:, ::-1]), 32))


def test_a_sheet_shows_originals_and_variants() -> None:
    data = contact_sheet([row()] * 4)
    assert near(data, (0, 0, 255)) > 0.02
    assert near(data, (0, 255, 0)) == pytest.approx(4 * near(data, (0, 0, 255)), rel=0.1)  # 3 squares, 3:4 of one
    assert np.asarray(opened(data))[..., 3].min() == 0  # transparent ground


def test_only_what_has_issues_is_marked() -> None:
    mark = (179, 38, 30)
    assert near(contact_sheet([row()]), mark) == 0
    one = near(contact_sheet([row(issues=["", "low_contrast", ""])]), mark)
    assert one > 0
    assert near(contact_sheet([row(issues=["dark", ["dark", "magnified"], ()])]), mark) == pytest.approx(
        2 * one, rel=0.3
    )
    assert near(contact_sheet([row(issues=["dark"])]), mark) == pytest.approx(one, rel=0.3)  # too few: none for others


def test_a_sheet_is_the_same_every_time() -> None:
    rows = [row(note="turned"), row(split="validation")]
    assert contact_sheet(rows) == contact_sheet(rows)


def test_a_usual_sheet_keeps_to_its_bytes_at_a_high_resolution() -> None:
    rows = []
    for seed in range(12):
        smooth = thumbnail(noise(40, 40, seed), 10)
        large = np.asarray(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BICUBIC))
        rows.append(row(original=large, variants=[large] * 3))
    data = contact_sheet(rows)
    assert len(data) <= SHEET_BYTES
    assert opened(data).width == 2000


@pytest.mark.parametrize("max_bytes", [60_000, 20_000])
def test_a_sheet_of_noise_keeps_to_its_bytes(max_bytes: int) -> None:
    """First by lower quality and resolution, then with fewer rows."""
    rows = [row(original=noise(112, 112, seed), variants=[noise(112, 112, seed)] * 3) for seed in range(6)]
    data = contact_sheet(rows, max_bytes=max_bytes)
    assert len(data) <= max_bytes
    assert len(contact_sheet(rows[:1], max_bytes=1)) > 1  # one row is always shown


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_breaks_a_picture(text: str) -> None:
    one = row(image_id=text, class_name=text, split=text, note=text, issues=[text, [text, text]])
    assert opened(contact_sheet([one, row()], max_bytes=10**6)).width == 2000
    assert opened(tile_sheet([(text, text, None), (text, text, flat(9, 9, RED))])).width == 2000
    assert opened(class_balance_chart({text: {text: 3, "train": 1}}), "PNG").width > 1000


@pytest.mark.parametrize(
    ("rows", "side"),
    [
        ([], 112),
        ([row(variants=[])], 112),
        ([row(variants=[flat(8, 8, RED)] * 1000)], 256),
        ([row(original=flat(1, 3000, RED), variants=[flat(3000, 1, RED), flat(1, 1, RED)])], 112),
        ([row(original=noise(8, 8), variants=[noise(8, 8)])], 16),
        ([row(variants=[flat(8, 8, RED)] * number) for number in range(4)], 112),
    ],
    ids=["none", "no variants", "many variants", "thin", "tiny", "ragged"],
)
def test_any_shape_of_sheet(rows: list[SheetRow], side: int) -> None:
    assert opened(contact_sheet(rows, side, max_bytes=10**6)).width >= 1000


def test_a_sheet_keeps_to_the_bound_of_webp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16,383 pixels a side; a smaller one takes less time to reach."""
    monkeypatch.setattr("tasks.images.sheets._WEBP_SIDE", 1100)
    assert max(opened(contact_sheet([row(variants=[])] * 200, 64)).size) == 1000
    assert opened(contact_sheet([row(variants=[])] * 8, 16)).size[0] == 1000


def test_what_is_not_shown_is_counted() -> None:
    """In words, that take a line: the sheet of 61 rows is higher than that of 60, which are shown of either."""
    few, many = (opened(contact_sheet([row(variants=[])] * count, 16, 10**6)).height for count in (60, 61))
    assert few < many < few * 1.05


def test_rejects() -> None:
    items = [("a", "empty file", None), ("b", "two labels: checks and dots", flat(50, 80, RED))]
    data = tile_sheet(items)
    assert near(data, RED) > 0.02
    assert near(tile_sheet(items[:1]), RED) == 0
    alpha = np.asarray(opened(tile_sheet(items[:1])))[..., 3]
    assert ((alpha > 20) & (alpha < 90)).mean() > 0.03  # the grey tile
    assert opened(tile_sheet([])).height < 100
    assert len(tile_sheet([("n", "r", noise(112, 112, 0))] * 50)) <= SHEET_BYTES // 2


BLUE, ORANGE = (59, 111, 212), (217, 130, 43)


def test_class_balance_is_in_proportion() -> None:
    data = class_balance_chart({"a": {"train": 300, "validation": 100}, "b": {"train": 300, "validation": 100}})
    assert near(data, BLUE, "PNG") == pytest.approx(3 * near(data, ORANGE, "PNG"), rel=0.1)
    assert opened(data, "PNG").getpixel((0, 0))[3] == 0  # type: ignore[index]


def test_many_classes_are_cut() -> None:
    many = {f"class {number}": {"train": 1000 - number} for number in range(1000)}
    height = opened(class_balance_chart(many), "PNG").height
    assert height == opened(class_balance_chart(dict(list(many.items())[:31])), "PNG").height
    assert height > opened(class_balance_chart(dict(list(many.items())[:30])), "PNG").height
    assert len(class_balance_chart(many)) < 60_000


@pytest.mark.parametrize(
    "counts",
    [{}, {"a": {}}, {"a": {"train": 0}}, {"a": {"x": 1}, "b": {"y": 10**12}}, {"a": {str(n): 1 for n in range(20)}}],
)
def test_any_counts_can_be_drawn(counts: dict[str, dict[str, int]]) -> None:
    assert opened(class_balance_chart(counts), "PNG").width > 1000


def test_charts_are_the_same_every_time() -> None:
    sizes = np.random.default_rng(0).integers(100, 400, (2, 300))
    assert size_chart(*sizes) == size_chart(*sizes)
    assert class_balance_chart({"a": {"train": 2}}) == class_balance_chart({"a": {"train": 2}})


@settings(max_examples=8)
@given(st.lists(st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)), max_size=40))
def test_any_sizes_can_be_drawn(sizes: list[tuple[int, int]]) -> None:
    data = size_chart([height for height, _ in sizes], [width for _, width in sizes])
    assert len(data) < 60_000
    assert (near(data, BLUE, "PNG") > 0) == bool(sizes)


@pytest.mark.parametrize(
    "sizes", [([224] * 10, [224] * 10), ([1], [1]), ([1, 100_000], [100_000, 1]), ([300, 301], [300, 300])]
)
def test_sizes_at_the_edge(sizes: tuple[list[int], list[int]]) -> None:
    assert near(size_chart(*sizes), BLUE, "PNG") > 0.001
