"""Encoding of columns and labels: fitted and applied as pandas does; exact however the rows are cut."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import (
    MOST_VALUES,
    Encoder,
    Label,
    LabelVector,
    fit_encoder,
    fit_label,
    is_missing,
    label_columns,
    label_counts,
    label_names,
    numbers,
    profile_features,
    sequences,
)
from tasks.delivery.source import sequence_dtype
from tasks.io.errors import ConfigError, InputError
from tasks.quality.profile import merge_profiles
from tasks.quality.sketch import TopValues
from tests.delivery.sources import customers

COLUMNS = ("visits", "spent", "member", "city")


def fitted(table: pa.Table, columns: tuple[str, ...] | None = None, size: int | None = None, **config: Any) -> Encoder:
    """An encoder of a table that is looked at in pieces."""
    columns = columns or tuple(table.column_names)
    step = size or max(table.num_rows, 1)
    pieces = [table.slice(start, step) for start in range(0, max(table.num_rows, 1), step)]
    profile = merge_profiles([profile_features(piece, columns) for piece in pieces])
    return fit_encoder(profile, columns, DeliveryConfig(**config))


def column(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"x": pa.array(values, kind)})


def matrix(table: pa.Table, **config: Any) -> dict[str, list[float]]:
    """The encoded columns by name."""
    encoder = fitted(table, **config)
    values = encoder.encode(table)
    return {feature.name: values[:, place].tolist() for place, feature in enumerate(encoder.features)}


def reference(train: pd.DataFrame, rows: pd.DataFrame, nulls: str, most: int) -> pd.DataFrame:
    """What pandas makes of the customers' columns."""
    made: dict[str, Any] = {}
    for name in COLUMNS:
        if name == "city":
            counts = train[name].value_counts()
            order = sorted(counts.index, key=lambda value: (-counts[value], value))
            for value in order[:most]:
                made[f"{name}={value}"] = (rows[name] == value).astype(float)
            if len(order) > most:
                made[f"{name}=other"] = (~rows[name].isin(order[:most]) & rows[name].notna()).astype(float)
        else:
            seen, now = (frame[name].astype(float).replace([np.inf, -np.inf], np.nan) for frame in (train, rows))
            made[name] = now.fillna(seen.mean() if nulls == "mean" else 0.0)
        if train[name].astype(object).replace([np.inf], None).isna().any():
            made[f"{name}_missing"] = rows[name].astype(object).replace([np.inf], None).isna().astype(float)
    return pd.DataFrame(made)


@pytest.mark.parametrize("nulls", ["mean", "zero"])
@pytest.mark.parametrize("most", [2, 32])
def test_it_encodes_as_pandas_does(nulls: str, most: int) -> None:
    train, other = customers(500, 1), customers(300, 2)
    encoder = fitted(train, COLUMNS, nulls=nulls, max_categories=most)
    for rows in (train, other):
        expected = reference(train.to_pandas(), rows.to_pandas(), nulls, most)
        assert [feature.name for feature in encoder.features] == list(expected)
        np.testing.assert_allclose(encoder.encode(rows), expected.to_numpy(), rtol=1e-6)


@pytest.mark.parametrize("nulls", ["mean", "zero"])
def test_the_statistics_are_those_of_the_encoded_train_split(nulls: str) -> None:
    table = customers(500, 3)
    encoder = fitted(table, COLUMNS, nulls=nulls, max_categories=3)
    values = encoder.encode(table).astype(np.float64)
    for place, feature in enumerate(encoder.features):
        expected = pd.Series(values[:, place])
        assert feature.mean == pytest.approx(expected.mean(), rel=1e-9, abs=1e-12)
        assert feature.std == pytest.approx(expected.std(), rel=1e-9)
        assert (feature.minimum, feature.maximum) == (expected.min(), expected.max())


@pytest.mark.parametrize("size", [1, 7, 100, 499])
def test_the_fit_is_the_same_to_the_bit_however_the_rows_are_cut(size: int) -> None:
    table = customers(500, 4)
    assert fitted(table, COLUMNS, size) == fitted(table, COLUMNS)
    assert fitted(table.take(np.random.default_rng(0).permutation(500)), COLUMNS, size) == fitted(table, COLUMNS)


@settings(max_examples=60)
@given(
    st.lists(st.none() | st.floats(width=64) | st.floats(-5, 5), min_size=1, max_size=30),
    st.integers(1, 10),
    st.sampled_from(["mean", "zero"]),
)
def test_whatever_the_numbers_are_the_matrix_is_finite_and_only_the_missing_are_marked(
    values: list[float | None], size: int, nulls: str
) -> None:
    table = column(values, pa.float64())
    encoder = fitted(table, size=size, nulls=nulls)
    assert encoder == fitted(table, nulls=nulls)
    encoded = encoder.encode(table)
    assert np.isfinite(encoded).all()
    with np.errstate(over="ignore"):
        narrow = np.array([math.nan if value is None else value for value in values]).astype(np.float32)
    good = np.isfinite(narrow)
    np.testing.assert_array_equal(encoded[good, 0], narrow[good])
    assert len(set(encoded[~good, 0].tolist())) <= 1
    assert encoded.shape[1] == 1 + (not good.all())
    if not good.all():
        assert encoded[:, 1].tolist() == (~good).tolist()


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # nothing but nulls: the fill is zero, and the indicator tells
        (column([None, None], pa.float64()), {"x": [0, 0], "x_missing": [1, 1]}),
        (column([None, None], pa.null()), {"x": [0, 0], "x_missing": [1, 1]}),
        (column([None, None], pa.string()), {"x_missing": [1, 1]}),
        (column([None, None], pa.bool_()), {"x": [0, 0], "x_missing": [1, 1]}),
        # NaN and infinities are missing, and so is what float32 can't hold
        (column([1.0, math.nan, -math.inf, 1e300]), {"x": [1, 1, 1, 1], "x_missing": [0, 1, 1, 1]}),
        (column([True, False, None, True]), {"x": [1, 0, pytest.approx(2 / 3), 1], "x_missing": [0, 0, 1, 0]}),
        # ties go by name
        (column(["b", "a", "b", "a", "c"]), {"x=a": [0, 1, 0, 1, 0], "x=b": [1, 0, 1, 0, 0], "x=c": [0, 0, 0, 0, 1]}),
        (column([2, 3], pa.decimal128(5, 2)), {"x": [2, 3]}),
        (column([2**62, 1], pa.int64()), {"x": [2.0**62, 1]}),
    ],
)
def test_odd_columns(table: pa.Table, expected: dict[str, Any]) -> None:
    assert matrix(table) == expected


def test_a_dictionary_column_is_encoded_as_its_values() -> None:
    table = column(["b", "a", None, "b"])
    assert matrix(pa.table({"x": table["x"].dictionary_encode()})) == matrix(table)


def test_a_category_that_the_train_split_has_not_is_zero_everywhere_or_one_of_the_others() -> None:
    few = fitted(column(["a", "b"]))
    assert few.encode(column(["z", "a"])).tolist() == [[0, 0], [1, 0]]
    many = fitted(column(["a", "a", "b"]), max_categories=1)
    assert [feature.name for feature in many.features] == ["x=a", "x=other"]
    assert many.features[1].describe()["value"] is None
    assert many.encode(column(["z", "a", None])).tolist() == [[0, 1], [1, 0], [0, 0]]


def test_names_that_would_be_alike_are_told_apart() -> None:
    table = pa.table({"x": [1.0, None], "x_missing": [0.5, 0.5]})
    assert [feature.name for feature in fitted(table).features] == ["x", "x_missing", "x_missing_"]


def test_only_numbers_are_standardised_and_a_constant_is_not_divided_by_zero() -> None:
    table = pa.table({"n": [1.0, 3.0], "c": [5.0, 5.0], "b": [True, False], "t": ["u", "v"]})
    assert fitted(table).normalise() == {"mean": [2, 5, 0, 0, 0], "std": [math.sqrt(2), 1, 1, 1, 1]}


def test_a_column_of_too_many_texts_is_refused_with_the_cure() -> None:
    table = column([str(number) for number in range(MOST_VALUES + 1)])
    with pytest.raises(ConfigError, match="--exclude x"):
        fitted(table)


def test_a_train_split_without_any_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing can be encoded"):
        fitted(column([], pa.string()))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.5, None, math.nan, math.inf, 1e39], pa.float64(), [False, True, True, True, True]),
        ([1, None], pa.int8(), [False, True]),
        (["", None], pa.string(), [False, True]),
        ([True, None], pa.bool_(), [False, True]),
    ],
)
def test_what_is_missing(values: list[Any], kind: pa.DataType, expected: list[bool]) -> None:
    chunked = pa.chunked_array([pa.array(values, kind)])
    assert is_missing(chunked).tolist() == expected
    if kind != pa.string():
        assert np.isnan(numbers(chunked)).tolist() == expected


TEXT = profile_features(column(["a"]), ["x"]).partial("x")


def label_of(values: list[Any], target_kind: Any = "auto") -> Label:
    table = column(values)
    partial = profile_features(table, ["x"]).partial("x")
    return fit_label("x", label_counts(table["x"], target_kind), partial, None, target_kind)


@pytest.mark.parametrize(
    ("values", "target_kind", "classes", "ids"),
    [
        (["b", "a", "b"], "auto", ("a", "b"), [1, 0, 1]),
        ([True, False], "auto", ("false", "true"), [1, 0]),
        ([10, 9, -1], "auto", ("-1", "9", "10"), [2, 1, 0]),  # by value, not by text
        (["only"], "auto", ("only",), [0]),
        (list(range(60)), "class", tuple(map(str, range(60))), list(range(60))),
    ],
)
def test_classes_are_numbered_in_order(values: list[Any], target_kind: str, classes: Any, ids: list[int]) -> None:
    label = label_of(values, target_kind=target_kind)
    assert label.describe() == {"column": "x", "kind": "class", "classes": list(classes)}
    encoded = label.encode(column(values)["x"])
    assert (encoded.dtype, encoded.tolist()) == (np.dtype(np.int64), ids)


@pytest.mark.parametrize(
    ("values", "target_kind"),
    [([0.5, 2.5], "auto"), (list(range(51)), "auto"), ([1, 2], "number"), ([True, False], "number")],
)
def test_numbers_are_learned_as_float32(values: list[Any], target_kind: str) -> None:
    label = label_of(values, target_kind=target_kind)
    series = pd.Series(values, dtype=float)
    assert label.kind == "number"
    assert [label.mean, label.std] == pytest.approx([series.mean(), series.std()])
    encoded = label.encode(column(values)["x"])
    assert (encoded.dtype, encoded.tolist()) == (np.dtype(np.float32), series.tolist())


def test_a_number_that_never_differs_is_divided_by_one() -> None:
    assert label_of([3.0, 3.0]).std == 1


def test_names_of_classes_come_from_the_source_where_it_has_them() -> None:
    label = fit_label("x", TopValues({"2": 1}), TEXT, ("cat", "dog", "owl"), "auto")
    assert label.classes == ("cat", "dog", "owl")
    assert label.encode(column([2, 0], pa.int32())["x"]).tolist() == [2, 0]
    with pytest.raises(InputError, match="'3', which is none"):
        label.encode(column([3])["x"])


def test_too_many_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="that is no class"):
        fit_label("x", TopValues(None), TEXT, None, "auto")


@settings(max_examples=50)
@given(st.data(), st.integers(1, 3), st.booleans())
def test_lists_of_one_size_are_a_column_for_each_element(data: st.DataObject, size: int, tensors: bool) -> None:
    number = st.none() | st.floats(width=32)
    rows = data.draw(st.lists(st.none() | st.lists(number, min_size=size, max_size=size), max_size=8))
    lists = pa.array(rows, pa.list_(pa.float32(), size))
    if tensors:
        lists = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [size]), lists)
    cut = data.draw(st.integers(0, len(rows)))
    table = pa.concat_tables([pa.table({"y": lists}).slice(0, cut), pa.table({"y": lists}).slice(cut)])
    columns = label_columns(table, ("y",))
    assert list(columns) == [f"y[{number}]" for number in range(size)]
    wanted = [[math.nan] * size if row is None else [math.nan if v is None else v for v in row] for row in rows]
    expected = np.array(wanted, np.float32).reshape(-1, size)
    expected[~np.isfinite(expected)] = math.nan
    found = np.stack([numbers(part) for part in columns.values()], axis=1)
    np.testing.assert_array_equal(found, expected)
    assert is_missing(table["y"]).tolist() == np.isnan(expected).any(axis=1).tolist()


def test_several_labels_are_those_of_each_column() -> None:
    table = pa.table({"a": ["x", "y", "x"], "b": [True, False, True], "c": [1.0, 2.5, 3.0], "d": [4, 5, 6]})
    colours = Label(column="a", kind="class", values=("x", "y"), classes=("x", "y"))
    flags = Label(column="b", kind="class", values=("false", "true"), classes=("false", "true"))
    classes = LabelVector(("a", "b"), (colours, flags))
    made = classes.encode_rows(table)
    assert (made.dtype, made.tolist()) == (np.int64, [[0, 1], [1, 0], [0, 1]])
    described = classes.describe()
    assert described == {"columns": ["a", "b"], "kind": "classes", "classes": [["x", "y"], ["false", "true"]]}
    scales = LabelVector(("d", "c"), (Label(column="d", kind="number"), Label(column="c", kind="number", mean=2)))
    made = scales.encode_rows(table)
    assert (made.dtype, made.tolist()) == (np.float32, [[4, 1], [5, 2.5], [6, 3]])
    assert scales.describe() == {"columns": ["d", "c"], "kind": "numbers", "mean": [0.0, 2], "std": [1.0, 1.0]}
    assert [label_names(one) for one in (described, {"columns": ["v"], "kind": "numbers", "mean": [0, 0]}, None)] == [
        ["a", "b"],
        ["v[0]", "v[1]"],
        [],
    ]


NUMBER = st.none() | st.floats(width=32) | st.floats(-9, 9, width=32)
COLUMNS_OF_SEQUENCES = {
    "text": (pa.string(), st.none() | st.text(max_size=5)),
    "large text": (pa.large_string(), st.none() | st.text(max_size=5)),
    "categories": (pa.dictionary(pa.int32(), pa.string()), st.none() | st.sampled_from(["", "a", "żółć"])),
    "bytes": (pa.binary(), st.none() | st.binary(max_size=5)),
    "tokens": (pa.list_(pa.int16()), st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=4)),
    "ids": (pa.large_list(pa.uint32()), st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=4)),
    "numbers": (pa.list_(pa.float32()), st.none() | st.lists(NUMBER, max_size=4)),
    "pairs": (pa.list_(pa.float64(), 2), st.none() | st.lists(NUMBER, min_size=2, max_size=2)),
}


@settings(max_examples=25)
@pytest.mark.parametrize(("kind", "values"), COLUMNS_OF_SEQUENCES.values(), ids=COLUMNS_OF_SEQUENCES)
@given(data=st.data())
def test_sequences_are_bytes_or_numbers_as_they_were(kind: pa.DataType, values: Any, data: st.DataObject) -> None:
    rows = data.draw(st.lists(values, max_size=8))
    places = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    whole = pa.array(rows, kind)
    column = pa.chunked_array([whole[a:b] for a, b in itertools.pairwise([0, *places, len(rows)])], kind)
    found = sequences(column)
    assert found.values.dtype.name == sequence_dtype(kind)
    bounds = np.cumsum([0, *found.lengths])
    assert (len(found.lengths), bounds[-1]) == (len(rows), len(found.values))
    for row, start, end, missing in zip(rows, bounds, bounds[1:], found.missing, strict=False):
        raw = row.encode() if isinstance(row, str) else row
        bad = raw is None or any(one is None or not math.isfinite(one) for one in raw)
        assert missing == bad
        if not bad:
            assert found.values[start:end].tolist() == list(raw)


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.uint64()), pa.list_(pa.bool_()), pa.list_(pa.string())])
def test_other_columns_are_no_sequences(kind: pa.DataType) -> None:
    assert sequence_dtype(kind) is None
