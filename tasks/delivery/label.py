"""The label of samples: classes numbered in their order, or numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.delivery.columns import MOST_VALUES, moments_of, numbers, text_of, top_values
from tasks.io.errors import ConfigError, InputError
from tasks.quality.profile import ColumnPartial
from tasks.quality.sketch import TopValues

TargetKind = Literal["auto", "class", "number"]

FEW_INTEGERS = 50
"""Whole numbers of at most this many distinct values count as classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """The label of samples.

    Attributes:
        column: column of the source.
        kind: 'class' or 'number'.
        values: text of each class in the column, by class id.
        classes: name of each class, by class id.
        mean: mean of a number in the train split.
        std: its deviation, never 0.
    """

    column: str
    kind: Literal["class", "number"]
    values: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def dtype(self) -> Literal["int64", "float32"]:
        """Element type of the labels."""
        return "int64" if self.kind == "class" else "float32"

    def describe(self) -> dict[str, Any]:
        """Return the manifest's form."""
        described: dict[str, Any] = {"column": self.column, "kind": self.kind}
        if self.kind == "class":
            return described | {"classes": list(self.classes)}
        return described | {"mean": self.mean, "std": self.std}

    def encode(self, column: pa.ChunkedArray) -> npt.NDArray[Any]:
        """Return class ids or numbers of a column without missing values, shape (n,), of `dtype`.

        Raises:
            InputError: a class is unknown.
        """
        if self.kind == "number":
            return numbers(column)
        texts = text_of(column)
        ids = pc.index_in(texts, pa.array(self.values, pa.large_string()))
        if ids.null_count:
            odd = texts.filter(ids.is_null())[0].as_py()
            raise InputError(f"column {self.column!r} holds {odd!r}, which is none of the version's classes")
        encoded: npt.NDArray[Any] = ids.to_numpy().astype(np.int64)
        return encoded


def label_counts(column: pa.ChunkedArray, target_kind: TargetKind) -> TopValues | None:
    """Return values of a target that may be classes, with their counts; None for one that can't be."""
    kind = column.type
    if pt.is_floating(kind) or pt.is_decimal(kind) or target_kind == "number":
        return None
    few = pt.is_integer(kind) and target_kind == "auto"
    return top_values(text_of(column), FEW_INTEGERS if few else MOST_VALUES)


def fit_label(
    column: str,
    counts: TopValues | None,
    partial: ColumnPartial,
    names: Sequence[str] | None,
    target_kind: TargetKind,
) -> Label:
    """Decide if a target is a class or a number, and number the classes.

    Args:
        column: The target.
        counts: Its values in all splits (`label_counts`).
        partial: Its profile in the train split.
        names: Names of the classes by id, where the source numbers them itself.
        target_kind: The requested kind.

    Raises:
        ConfigError: there are too many classes.
    """
    if counts is not None and counts.counts is not None:
        if names is not None:
            return Label(column=column, kind="class", values=tuple(map(str, range(len(names)))), classes=tuple(names))
        values = tuple(sorted(counts.counts, key=_class_order))
        return Label(column=column, kind="class", values=values, classes=values)
    if partial.kind == "string" or target_kind == "class":
        raise ConfigError(
            f"target = '{column}' has more than {MOST_VALUES:,} different values, or long ones: that is no class; take "
            "another target"
        )
    moments = moments_of(partial)
    return Label(column=column, kind="number", mean=moments.mean or 0.0, std=moments.std or 1.0)


def _class_order(value: str) -> tuple[int, int, str]:
    """Return a sort key: whole numbers by their value, before text."""
    try:
        return 0, int(value), value
    except ValueError:
        return 1, 0, value
