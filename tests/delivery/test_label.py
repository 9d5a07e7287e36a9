"""Classes are numbered in their order; numbers keep their unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tasks.delivery.columns import profile_features
from tasks.delivery.label import Label, fit_label, label_counts
from tasks.io.errors import ConfigError, InputError
from tasks.quality.sketch import TopValues


def column(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"x": pa.array(values, kind)})


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
