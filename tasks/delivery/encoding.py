"""From columns to a float32 matrix and labels: statistics, fitting on the train split, and encoding. Pure.

The fit uses a `TableProfile`, which is exact and independent of the cut into units.

- number: as float32. A missing value (null, NaN, infinite, or too large for float32) becomes the train split's mean,
  or zero.
- boolean: 0 and 1; missing values as for numbers.
- category: a 0/1 column for each of the most frequent values, '<name>=<value>', and one for all others,
  '<name>=other', if the train split has more. A missing or unknown value is 0 everywhere.
- missing: '<name>_missing' is 1 where the value was missing, for columns that have such rows in the train split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.source import list_size, sequence_dtype
from tasks.io.errors import ConfigError, InputError
from tasks.io.hashing import is_text
from tasks.io.tensors import AnyArray, BoolArray, Float32Array, Int64Array
from tasks.quality.profile import ColumnPartial, TableProfile, profile_table
from tasks.quality.sketch import Moments, TopValues

MOST_VALUES = 1 << 16
"""Maximum number of distinct values of a text column that are counted."""
LONGEST_VALUE = 1024
"""Bytes of the longest text that is counted."""


def numbers(column: pa.ChunkedArray) -> Float32Array:
    """Return numbers or booleans as float32, shape (n,); NaN where they are missing, infinite or too large."""
    if pt.is_boolean(column.type):
        column = column.cast(pa.uint8())
    elif pt.is_decimal(column.type):
        column = column.cast(pa.float64())
    values: Float32Array = pc.fill_null(column.cast(pa.float32(), safe=False), math.nan).to_numpy()
    if not (finite := np.isfinite(values)).all():
        values = np.where(finite, values, np.float32(math.nan))
    return values


def is_missing(column: pa.ChunkedArray) -> BoolArray:
    """Return a mask of missing or unusable values of a feature or a target, shape (n,); of lists, if any element is."""
    if (size := list_size(column.type)) is not None:
        absent: BoolArray = np.isnan(_elements(column, size)).max(axis=1)
        return absent
    if pt.is_floating(column.type) or pt.is_decimal(column.type):
        return np.isnan(numbers(column))
    missing: BoolArray = column.is_null().to_numpy()
    return missing


def text_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text, booleans ('true', 'false') or whole numbers as text."""
    if pt.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_string())


class Sequences(NamedTuple):
    """The sequences of a column: elements of all, (m,), the number of each, (n,), and which are missing, (n,).

    A missing one is null, or has an element that is null, NaN or infinite.
    """

    values: AnyArray
    lengths: Int64Array
    missing: BoolArray


def sequences(column: pa.ChunkedArray) -> Sequences:
    """Return the sequences of a column of text, as its bytes in UTF-8, of bytes, or of lists of numbers."""
    dtype = str(sequence_dtype(column.type))
    lists = pt.is_nested(column.type)
    if not lists:
        column = text_of(column) if is_text(column.type) else column
        column = column.cast(pa.large_binary())
    parts = [Sequences(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.bool_))]
    for chunk in column.chunks:
        missing = chunk.is_null().to_numpy(zero_copy_only=False).copy()
        if lists:
            values, sizes = chunk.flatten(), pc.fill_null(pc.list_value_length(chunk), 0)
            lengths = sizes.to_numpy(zero_copy_only=False).astype(np.int64)
            odd = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
            if pt.is_floating(values.type):
                odd |= ~np.isfinite(pc.fill_null(values, 0).to_numpy(zero_copy_only=False))
            missing[np.repeat(np.arange(len(chunk)), lengths)[odd]] = True
            found = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).astype(dtype)
        else:
            whole = pc.fill_null(chunk, b"")
            bounds = np.frombuffer(whole.buffers()[1], np.int64, len(whole) + 1, whole.offset * 8)
            lengths = np.diff(bounds)
            found = np.frombuffer(whole.buffers()[2] or b"", np.uint8)[bounds[0] : bounds[-1]]
        parts.append(Sequences(found, lengths, missing))
    return Sequences(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def length_name(sequence: str) -> str:
    """Return the name of the lengths of sequences in a profile."""
    return f"length of {sequence}"


def top_values(texts: pa.ChunkedArray, capacity: int) -> TopValues:
    """Return counts of distinct texts, up to a number of them."""
    values, counts = texts.drop_null().value_counts().flatten()
    return TopValues.of(values, counts, capacity, LONGEST_VALUE)


def profile_features(rows: pa.Table, columns: Sequence[str], chosen: BoolArray | None = None) -> TableProfile:
    """Return the profile of feature columns, or of a target, as encoded: missing values count as null.

    Args:
        rows: Rows to profile.
        columns: Names of the columns.
        chosen: Mask of the rows that count, shape (n,); all of them if not given.
    """
    partials = {}
    for name in columns:  # one at a time: together they would take as much memory as the rows
        column = rows[name] if chosen is None else rows[name].filter(pa.array(chosen))
        cleaned = _cleaned(column)
        partial = profile_table(pa.table({name: cleaned})).partial(name)
        partials[name] = replace(partial, top=top_values(cleaned, MOST_VALUES)) if partial.kind == "string" else partial
    return TableProfile(rows.num_rows if chosen is None else int(chosen.sum()), partials)


def _cleaned(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text, booleans, or float64 with null for missing values."""
    if is_text(column.type):
        return text_of(column)
    if pt.is_boolean(column.type):
        return column
    values = numbers(column).astype(np.float64)
    return pa.chunked_array([pa.array(values, mask=np.isnan(values))])


def moments_of(partial: ColumnPartial) -> Moments:
    """Return the moments of numbers or booleans."""
    return flag_moments(*_ones(partial)) if partial.kind == "boolean" else partial.moments or Moments()


def bounds_of(partial: ColumnPartial) -> tuple[float, float]:
    """Return the smallest and largest number or boolean; zeros if there is none."""
    if partial.kind == "boolean":
        return flag_bounds(*_ones(partial))
    sketch = partial.quantiles
    return (float(sketch.lows[0]), float(sketch.highs[-1])) if sketch and sketch.count else (0.0, 0.0)


def _ones(partial: ColumnPartial) -> tuple[int, int]:
    """Return the number of true booleans, and of all."""
    counts: Mapping[str, int] = (partial.top.counts if partial.top else None) or {}
    return counts.get("true", 0), sum(counts.values())


def flag_moments(ones: int, rows: int) -> Moments:
    """Return the moments of a column that is 1 in some rows, and 0 in the others."""
    one = Moments.of(np.ones(1))
    return Moments(rows, one.total * ones, one.squares * ones)


def flag_bounds(ones: int, rows: int) -> tuple[float, float]:
    """Return the smallest and largest value of a column that is 1 in some rows, and 0 in the others."""
    return float(0 < rows == ones), float(ones > 0)


Encoding = Literal["number", "boolean", "category", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One column of the matrix; its statistics are of its encoded values in the train split."""

    name: str
    column: str
    encoding: Encoding
    value: str | None = None
    """Value of a category; None for 'all others'."""
    fill: float | None = None
    """Replacement of a missing number or boolean."""
    mean: float
    std: float
    minimum: float
    maximum: float

    def describe(self) -> dict[str, Any]:
        """Return the manifest's form."""
        described: dict[str, Any] = {"name": self.name, "column": self.column, "encoding": self.encoding}
        if self.encoding == "category":
            described["value"] = self.value
        if self.fill is not None:
            described["fill"] = self.fill
        names = ("mean", "std", "minimum", "maximum")
        return described | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encoder of rows as the matrix."""

    features: tuple[Feature, ...]

    def encode(self, rows: pa.Table) -> Float32Array:
        """Return the matrix of some rows, shape (n, features)."""
        matrix = np.zeros((rows.num_rows, len(self.features)), np.float32)
        by_column: dict[str, list[tuple[int, Feature]]] = {}
        for position, feature in enumerate(self.features):
            by_column.setdefault(feature.column, []).append((position, feature))
        for column, members in by_column.items():
            if any(feature.encoding == "category" for _, feature in members):
                _encode_category(rows[column], members, matrix)
            else:
                _encode_number(rows[column], members, matrix)
        return matrix

    def normalise(self) -> dict[str, list[float]]:
        """Return mean and deviation to standardise numbers by; columns of 0 and 1 stay as they are."""
        numeric = [feature.encoding == "number" for feature in self.features]
        pairs = list(zip(self.features, numeric, strict=True))
        return {
            "mean": [feature.mean if number else 0.0 for feature, number in pairs],
            "std": [(feature.std or 1.0) if number else 1.0 for feature, number in pairs],
        }


def fit_encoder(profile: TableProfile, columns: Sequence[str], config: DeliveryConfig) -> Encoder:
    """Choose the matrix's columns by the profile of the train split.

    Raises:
        ConfigError: a text column has too many distinct values, or no column is left.
    """
    features: list[Feature] = []
    for column in columns:
        partial = profile.partial(column)
        if partial.kind == "string":
            features += _fit_category(column, partial, config.max_categories)
        else:
            features.append(_fit_number(column, partial, config.nulls))
        if partial.nulls and config.nulls != "reject":
            features.append(_flag(f"{column}_missing", column, "missing", (partial.nulls, partial.count)))
    if not features:
        raise ConfigError(
            f"no value of the features {', '.join(columns)} is in the train split: nothing can be encoded; take other "
            "features, or give a smaller validation_share"
        )
    return Encoder(tuple(_named_apart(features)))


def _fit_number(column: str, partial: ColumnPartial, nulls: str) -> Feature:
    values, (low, high) = moments_of(partial), bounds_of(partial)
    fill = float(np.float32(values.mean or 0.0)) if nulls != "zero" else 0.0
    if partial.nulls:
        one = Moments.of(np.array([fill]))
        filled = Moments(partial.nulls, one.total * partial.nulls, one.squares * partial.nulls)
        low, high = (min(low, fill), max(high, fill)) if values.count else (fill, fill)
        values = Moments.merge_all([values, filled])
    return Feature(
        name=column,
        column=column,
        encoding="boolean" if partial.kind == "boolean" else "number",
        fill=fill,
        mean=values.mean or 0.0,
        std=values.std or 0.0,
        minimum=low,
        maximum=high,
    )


def _fit_category(column: str, partial: ColumnPartial, most: int) -> list[Feature]:
    counts = partial.top.counts if partial.top else None
    if counts is None:
        raise ConfigError(
            f"column '{column}' has more than {MOST_VALUES:,} different values, or values of more than "
            f"{LONGEST_VALUE:,} bytes: that is no category; leave it out with --exclude {column}"
        )
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept, rest = ordered[:most], ordered[most:]
    features = [
        replace(_flag(f"{column}={value}", column, "category", (rows, partial.count)), value=value)
        for value, rows in kept
    ]
    if rest:
        ones = sum(rows for _, rows in rest)
        features.append(_flag(f"{column}=other", column, "category", (ones, partial.count)))
    return features


def _flag(name: str, column: str, encoding: Encoding, shown: tuple[int, int]) -> Feature:
    """Return a column that is 1 in some rows, and 0 in the others."""
    moments, (low, high) = flag_moments(*shown), flag_bounds(*shown)
    mean, std = moments.mean or 0.0, moments.std or 0.0
    return Feature(name=name, column=column, encoding=encoding, mean=mean, std=std, minimum=low, maximum=high)


def _named_apart(features: Sequence[Feature]) -> list[Feature]:
    """Return features with unique names: a column's name may equal another's encoding."""
    taken: set[str] = set()
    apart = []
    for feature in features:
        name = feature.name
        while name in taken:
            name += "_"
        taken.add(name)
        apart.append(replace(feature, name=name))
    return apart


def _encode_number(column: pa.ChunkedArray, members: Sequence[tuple[int, Feature]], matrix: Float32Array) -> None:
    values = numbers(column)
    missing = np.isnan(values)
    for position, feature in members:
        if feature.encoding == "missing":
            matrix[:, position] = missing
        else:
            assert feature.fill is not None, f"{feature.name} has nothing to stand for what is missing"
            matrix[:, position] = np.where(missing, np.float32(feature.fill), values)


def _encode_category(column: pa.ChunkedArray, members: Sequence[tuple[int, Feature]], matrix: Float32Array) -> None:
    texts = text_of(column)
    missing = texts.is_null().to_numpy()
    known = {f.value: position for position, f in members if f.encoding == "category" and f.value is not None}
    others = [position for position, f in members if f.encoding == "category" and f.value is None]
    place = pc.fill_null(pc.index_in(texts, pa.array(list(known), pa.large_string())), -1).to_numpy()
    rows = np.flatnonzero((place >= 0) & ~missing)
    matrix[rows, np.array(list(known.values()), np.int64)[place[rows]]] = 1
    for position in others:
        matrix[:, position] = (place < 0) & ~missing
    for position, feature in members:
        if feature.encoding == "missing":
            matrix[:, position] = missing


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

    def encode_rows(self, rows: pa.Table) -> AnyArray:
        """Return the labels of rows without missing values: see `encode`."""
        return self.encode(rows[self.column])

    def encode(self, column: pa.ChunkedArray) -> AnyArray:
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
        encoded: AnyArray = ids.to_numpy().astype(np.int64)
        return encoded


@dataclass(frozen=True, slots=True)
class LabelVector:
    """Several labels of a sample, all of one kind: of a column each, or of one column of lists of numbers.

    Attributes:
        columns: columns of the source.
        parts: each label; those of a list are of the columns 'name[0]', 'name[1]', ….
    """

    columns: tuple[str, ...]
    parts: tuple[Label, ...]

    @property
    def kind(self) -> Literal["classes", "numbers"]:
        """What the labels are."""
        return "classes" if self.parts[0].kind == "class" else "numbers"

    @property
    def dtype(self) -> Literal["int64", "float32"]:
        """Element type of the labels."""
        return self.parts[0].dtype

    def describe(self) -> dict[str, Any]:
        """Return the manifest's form."""
        described: dict[str, Any] = {"columns": list(self.columns), "kind": self.kind}
        if self.kind == "classes":
            return described | {"classes": [list(part.classes) for part in self.parts]}
        return described | {"mean": [part.mean for part in self.parts], "std": [part.std for part in self.parts]}

    def encode_rows(self, rows: pa.Table) -> AnyArray:
        """Return the labels of rows without missing values, shape (n, labels), of `dtype`.

        Raises:
            InputError: a class is unknown.
        """
        columns = label_columns(rows, self.columns)
        return np.stack([part.encode(columns[part.column]) for part in self.parts], axis=1)


def label_columns(rows: pa.Table, targets: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Return the columns that labels are made of: the targets, or of lists a column for each of their elements."""
    columns = {}
    for name in targets:
        if (size := list_size(rows.schema.field(name).type)) is None:
            columns[name] = rows[name]
        else:
            values = _elements(rows[name], size)
            columns |= {part: pa.chunked_array([values[:, n]]) for n, part in enumerate(element_names(name, size))}
    return columns


def element_names(column: str, size: int) -> list[str]:
    """Return the name of each element of a column of lists."""
    return [f"{column}[{number}]" for number in range(size)]


def label_names(described: Mapping[str, Any] | None) -> list[str]:
    """Return the column of each label of a version, by the manifest's form; of a list the names of its elements."""
    if described is None:
        return []
    if described["kind"] in ("class", "number"):
        return [described["column"]]
    columns: list[str] = described["columns"]
    size = len(described["classes" if described["kind"] == "classes" else "mean"])
    return columns if len(columns) == size else element_names(columns[0], size)


def _elements(column: pa.ChunkedArray, size: int) -> Float32Array:
    """Return lists of one size as float32, (n, size); NaN where the list or an element is missing."""
    parts = [np.empty((0, size), np.float32)]
    for chunk in column.chunks:
        lists = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        flat = lists.values.slice(lists.offset * size, len(lists) * size)
        values = numbers(pa.chunked_array([flat])).reshape(-1, size).copy()
        values[lists.is_null().to_numpy(zero_copy_only=False)] = math.nan
        parts.append(values)
    return np.concatenate(parts)


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
