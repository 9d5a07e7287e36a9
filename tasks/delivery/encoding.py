"""From columns to a float32 matrix: fitting on the train split, and encoding. Pure.

The fit uses a `TableProfile`, which is exact and independent of the cut into units.

- number: as float32. A missing value (null, NaN, infinite, or too large for float32) becomes the train split's mean,
  or zero.
- boolean: 0 and 1; missing values as for numbers.
- category: a 0/1 column for each of the most frequent values, '<name>=<value>', and one for all others,
  '<name>=other', if the train split has more. A missing or unknown value is 0 everywhere.
- missing: '<name>_missing' is 1 where the value was missing, for columns that have such rows in the train split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.delivery.columns import (
    LONGEST_VALUE,
    MOST_VALUES,
    FloatArray,
    bounds_of,
    flag_bounds,
    flag_moments,
    moments_of,
    numbers,
    text_of,
)
from tasks.delivery.config import DeliveryConfig
from tasks.io.errors import ConfigError
from tasks.quality.moments import Moments
from tasks.quality.profile import ColumnPartial, TableProfile

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

    def encode(self, rows: pa.Table) -> FloatArray:
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


def _encode_number(column: pa.ChunkedArray, members: Sequence[tuple[int, Feature]], matrix: FloatArray) -> None:
    values = numbers(column)
    missing = np.isnan(values)
    for position, feature in members:
        if feature.encoding == "missing":
            matrix[:, position] = missing
        else:
            assert feature.fill is not None, f"{feature.name} has nothing to stand for what is missing"
            matrix[:, position] = np.where(missing, np.float32(feature.fill), values)


def _encode_category(column: pa.ChunkedArray, members: Sequence[tuple[int, Feature]], matrix: FloatArray) -> None:
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
