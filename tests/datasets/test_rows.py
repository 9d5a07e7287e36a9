"""Rows of a Ray Dataset as they are stored: ids, digests of the content, rejected rows, and refused columns."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.datasets.config import DatasetConfig
from tasks.datasets.rows import Form, added_up, content_of, form_of, make_rows
from tasks.io.errors import InputError
from tasks.io.tensors import to_numpy

ROWS = st.lists(
    st.tuples(
        st.none() | st.integers(-5, 5),
        st.sampled_from([0.5, -1.25, float("nan"), None]),
        st.none() | st.booleans(),
        st.sampled_from(["", "a", "ä", None]),
    ),
    min_size=1,
    max_size=30,
)


def table(rows: list[tuple[Any, ...]]) -> pa.Table:
    types = {"count": pa.int32(), "amount": pa.float64(), "member": pa.bool_(), "city": pa.string()}
    columns = [
        pa.array(list(values), kind) for values, kind in zip(zip(*rows, strict=True), types.values(), strict=True)
    ]
    return pa.table(columns, names=list(types))


def form(head: pa.Table, **settings: Any) -> Form:
    return form_of(head, DatasetConfig(name="toys", **settings))


@settings(max_examples=60)
@given(rows=ROWS, data=st.data())
def test_ids_and_digest_are_those_of_the_rows_whatever_their_order_and_blocks(
    rows: list[Any], data: st.DataObject
) -> None:
    whole, own = table(rows), form(table(rows))
    wanted = make_rows(whole, own).rows
    order = data.draw(st.permutations(range(len(rows))))
    bounds = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    mixed = whole.take(pa.array(order))
    parts = [mixed.slice(a, b - a) for a, b in zip([0, *bounds], [*bounds, len(rows)], strict=True)]
    made = [make_rows(part, own).rows for part in parts]
    together = pa.concat_tables(made).combine_chunks()
    assert together["row_id"].to_pylist() == wanted["row_id"].take(pa.array(order)).to_pylist()
    assert added_up([content_of(part["row_id"]) for part in made]) == content_of(wanted["row_id"])


@settings(max_examples=60)
@given(rows=ROWS, place=st.integers(0, 29))
def test_another_value_or_another_number_of_a_row_is_another_content(rows: list[Any], place: int) -> None:
    own = form(table(rows))

    def content(given: list[Any]) -> object:
        return content_of(make_rows(table(given), own).rows["row_id"])

    place %= len(rows)
    changed = [*rows]
    changed[place] = (7, *rows[place][1:])
    assert content(changed) != content(rows)
    assert content([*rows, rows[place]]) != content(rows), "a row twice isn't a row once"


def test_rows_without_label_or_entity_are_set_aside_with_the_reason() -> None:
    given = pa.table({"who": ["a", None, "b", None], "score": [1.0, 2.0, float("nan"), None], "more": [1, 2, 3, 4]})
    made = make_rows(given, form(given, label="score", entity="who"))
    assert made.rows["more"].to_pylist() == [1]
    assert dict(made.reasons) == {"null_who": 2, "null_score": 1}
    assert made.rejected["more"].to_pylist() == [2, 3, 4]
    assert made.rejected["_reason"].to_pylist() == ["null_who", "null_score", "null_who"]


def test_text_is_text_in_any_encoding_and_a_block_may_lack_values() -> None:
    own = form(pa.table({"city": pa.array(["Rome", "Oslo"])}))
    plain = make_rows(pa.table({"city": pa.array(["Rome", "Oslo"])}), own).rows
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert make_rows(pa.table({"city": pa.array(["Rome", "Oslo"], kind)}), own).rows.equals(plain)
    assert make_rows(pa.table({"city": pa.nulls(2)}), own).rows["city"].null_count == 2


def pixels(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def tensors(values: npt.NDArray[Any]) -> pa.FixedShapeTensorArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(values)


def encoded(values: npt.NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "png")
    return sink.getvalue()


LAYOUTS: list[tuple[str, tuple[int, ...], Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]] = [
    ("height, width, channels", (4, 6, 5, 3), lambda images: np.moveaxis(images, 3, 1)),
    ("channels first", (4, 3, 6, 5), lambda images: images),
    ("one channel", (4, 6, 5, 1), lambda images: np.repeat(np.moveaxis(images, 3, 1), 3, axis=1)),
    ("gray", (4, 6, 5), lambda images: np.repeat(images[:, None], 3, axis=1)),
]


@pytest.mark.parametrize(("shape", "wanted"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS])
def test_tensors_are_stored_channels_first(shape: tuple[int, ...], wanted: Callable[..., npt.NDArray[Any]]) -> None:
    images = pixels(*shape)
    given = pa.table({"picture": tensors(images), "label": ["a", "b", "a", None]})
    made = make_rows(given, form(given, image="picture", label="label"))
    assert made.rows.column_names == ["image_id", "image", "label"]
    assert np.array_equal(to_numpy(made.rows, "image"), wanted(images)[:3])
    assert made.rejected.column_names == ["label", "_reason", "_detail"], "pictures aren't kept twice"


def test_encoded_images_are_decoded_and_resized_and_broken_ones_rejected() -> None:
    image = pixels(8, 6, 3)
    given = pa.table({"bytes": [encoded(image), b"GIF89a of nothing", None, b""]})
    made = make_rows(given, form(given, image="bytes", image_size=(8, 6)))
    assert np.array_equal(to_numpy(made.rows, "image")[0], np.moveaxis(image, 2, 0)), "of the asked size: unchanged"
    assert sum(made.reasons.values()) == 3
    assert {"null_bytes", "empty_file"} < {*made.reasons}
    small = make_rows(given, form(given, image="bytes", image_size=(4, 3)))
    assert to_numpy(small.rows, "image").shape == (1, 3, 4, 3)


GOOD = pa.table({"x": [1, 2], "y": ["a", "b"]})
REFUSED: list[tuple[str, pa.Table, dict[str, Any], str]] = [
    (
        "a list",
        GOOD.append_column("z", [[[1], [2]]]),
        {},
        "column 'z' is list<item: int64>, and only numbers, booleans",
    ),
    ("bytes", pa.table({"z": [b"a"]}), {}, "column 'z' is binary.* a column of images is named with image"),
    ("a tensor", pa.table({"z": tensors(pixels(2, 3, 4))}), {}, "column 'z' is .*tensor"),
    ("no value", GOOD.append_column("z", pa.nulls(2)), {}, "column 'z' has no value in the first rows"),
    ("our column", GOOD.rename_columns(["row_id", "y"]), {}, "has a column 'row_id': that name is kept"),
    ("a hidden column", GOOD.rename_columns(["_x", "y"]), {}, "has a column '_x': that name is kept"),
    ("a name twice", pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]), {}, "two columns 'x'"),
    ("no label", GOOD, {"label": "yy"}, "label: dataset 'toys' has no column 'yy'; did you mean 'y'"),
    ("a time as label", pa.table({"t": pa.array([0], pa.date32())}), {"label": "t"}, "label = 't' is date32"),
    ("no images", GOOD, {"image": "x"}, r"image = 'x' is int64: give uint8 tensors"),
    ("no size", pa.table({"z": [b"a"]}), {"image": "z"}, r"the images are encoded files: give image_size"),
    ("channels", pa.table({"z": tensors(pixels(2, 5, 6, 4))}), {"image": "z"}, r"tensors of shape \(5, 6, 4\): give"),
]


@pytest.mark.parametrize(
    ("head", "settings", "message"), [case[1:] for case in REFUSED], ids=[one[0] for one in REFUSED]
)
def test_what_cannot_be_stored_is_refused(head: pa.Table, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        form(head, **settings)


CHANGED = [
    ("a type", pa.table({"x": ["1"], "y": ["a"]}), "column 'x' is string in one, and int64 in the first"),
    ("a column more", GOOD.append_column("z", [[1, 2]]), "one has a column 'z', which the first one lacks"),
    ("a column less", GOOD.select(["x"]), "one lacks column 'y'"),
]


@pytest.mark.parametrize(("block", "message"), [case[1:] for case in CHANGED], ids=[case[0] for case in CHANGED])
def test_blocks_of_other_columns_are_refused(block: pa.Table, message: str) -> None:
    with pytest.raises(InputError, match=f"dataset 'toys' changes between blocks: {message}"):
        make_rows(block, form(GOOD))


def test_pixels_that_are_no_bytes_and_other_shapes_are_refused() -> None:
    own = form(pa.table({"z": tensors(pixels(1, 4, 5, 3))}), image="z")
    with pytest.raises(InputError, match="holds float32 tensors: convert the images to uint8"):
        make_rows(pa.table({"z": tensors(pixels(1, 4, 5, 3).astype(np.float32))}), own)
    with pytest.raises(InputError, match=r"an image of shape \(6, 5\) is among those of \(4, 5\)"):
        make_rows(pa.table({"z": tensors(pixels(1, 6, 5, 3))}), own)
