"""Leakage: how well one feature alone predicts the target, as a feature from the future does.

Two measures, in [0, 1]. For classes the area under the ROC curve, of each class against the others: 0.5 is no leakage,
1 a full leak. For numbers the share of the target's variance that is explained: 0 is no leakage.

Each is computed twice, and the larger counts: once by the order of the feature's values, for which a few rows are
enough; once by its values in bins, each with the target's mean over the *other* folds of the rows, which finds any
shape, handles text like numbers, and gives a feature of many values no credit for memorising each row. Folds keep the
rows of an entity together, so that a name gets no credit for the constant behaviour of its entity. A missing value is a
value like others: its absence alone may be a leak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.hashing import is_text, stable_hash
from tasks.io.tensors import AnyArray, Float64Array, Int64Array

BINS = 64
FOLDS = 5
PRIOR_ROWS = 1.0  # a bin's mean begins as the mean of all, with this weight
CHANCE_DEVIATIONS = 3.72  # chance exceeds this once in ten thousand times: a model has many features


@dataclass(frozen=True, slots=True)
class Target:
    """Target without gaps, prepared for many features.

    Attributes:
        classes: names of the classes, none for a number.
        codes: class of each row, shape (n,); of a number the rank of its value.
        values: one column for each target to explain, shape (n, 1 or 2): a number and its rank; unused for classes.
        folds: fold of each row, shape (n,), in [0, FOLDS).
    """

    classes: tuple[str, ...]
    codes: Int64Array
    values: Float64Array
    folds: Int64Array


@dataclass(frozen=True, slots=True)
class Leakage:
    """Result for one feature.

    score: the measure. chance: the score that an unrelated feature reaches once in ten thousand times; at 1 or above
        there are too few rows to judge. about: the class that it predicts best, if there are classes.
    """

    score: float
    chance: float
    about: str | None = None


def prepare(target: pa.ChunkedArray, classes: tuple[str, ...], entities: pa.ChunkedArray | None = None) -> Target:
    """Prepare a target without missing values.

    Args:
        target: The target, shape (n,), without nulls or NaN.
        classes: Its classes, as `as_text` gives them; none if it is a number.
        entities: Entity of each row; None if unknown.
    """
    rows = len(target)
    folds = np.arange(rows) if entities is None else stable_hash(entities) % np.uint64(FOLDS)
    folds = folds.astype(np.int64) % FOLDS
    if classes:
        found = pc.index_in(as_text(target), pa.array(classes, pa.string()))
        return Target(classes, found.to_numpy().astype(np.int64), np.empty((rows, 0)), folds)
    values = target.cast(pa.float64(), safe=False).to_numpy()
    ranks = _midranks(_ordered(target))
    return Target((), ranks.astype(np.int64), np.stack([values, ranks], axis=1), folds)


def as_text(target: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the text of each value of a target, whatever the width of its numbers: 1 and 1.0 are '1'."""
    if pt.is_floating(target.type) or pt.is_decimal(target.type):
        target = target.cast(pa.float64(), safe=False)
    return target.cast(pa.string())


def leakage(feature: pa.ChunkedArray, target: Target) -> Leakage | None:
    """Measure how well a feature predicts the target; None for a type without order and categories, or without data."""
    rows = len(feature)
    codes = _categories(feature) if is_text(feature.type) else _ordered(feature)
    if codes is None or not rows:
        return None
    ranks = None if is_text(feature.type) else _midranks(codes)
    bins = codes if ranks is None or codes.max() < BINS else _binned(codes, ranks)
    width = int(bins.max()) + 1
    cells = _Cells(target.folds * width + bins, FOLDS * width)  # the cells of a fold follow those of the one before
    return _of_classes(ranks, cells, target) if target.classes else _of_number(ranks, cells, target)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Rows by fold and bin: the cell of each row, shape (n,), and the number of cells."""

    places: Int64Array
    count: int

    def sums(self, weights: AnyArray | None = None) -> Float64Array:
        """Sum the rows' weights, or count the rows, in each cell, shape (count,)."""
        return np.bincount(self.places, weights=weights, minlength=self.count).astype(np.float64)


def _of_classes(ranks: Float64Array | None, cells: _Cells, target: Target) -> Leakage | None:
    rows = len(cells.places)
    sizes = cells.sums()
    found = []
    for number, name in enumerate(target.classes):
        inside = target.codes == number
        own = int(inside.sum())
        others = rows - own
        if not own or not others:
            continue
        score = 0.5
        if ranks is not None:
            area = (ranks[inside].sum() - own * (own + 1) / 2) / own / others
            score = max(area, 1 - area)
        hits = cells.sums(inside)
        predicted = _means_elsewhere(hits, sizes)
        # Not 1 - area: means over the other folds of nothing but noise predict a fold's own noise upside down.
        score = max(score, _area(predicted, hits, sizes - hits))
        chance = 0.5 + CHANCE_DEVIATIONS * math.sqrt((rows + 1) / 12 / own / others)
        found.append(Leakage(float(score), chance, name))
    return max(found, key=lambda one: (one.score > one.chance, one.score), default=None)


def _of_number(ranks: Float64Array | None, cells: _Cells, target: Target) -> Leakage | None:
    rows = len(cells.places)
    spread = ((target.values - target.values.mean(axis=0)) ** 2).sum(axis=0)
    if not spread.all() or rows < 2:
        return None
    score = 0.0
    if ranks is not None and ranks.min() < ranks.max():
        score = float(np.corrcoef(ranks, target.values[:, 1])[0, 1] ** 2)
    sizes = cells.sums()
    for column, total in zip(target.values.T, spread, strict=True):
        predicted = _means_elsewhere(cells.sums(column), sizes)[cells.places]
        score = max(score, 1 - float(((column - predicted) ** 2).sum() / total))
    return Leakage(score, CHANCE_DEVIATIONS**2 / (rows - 1))


def _means_elsewhere(sums: Float64Array, sizes: Float64Array) -> Float64Array:
    """Return the mean of each bin over the other folds, shrunk to the mean of all of those; cells in, cells out."""
    by_fold, counts = sums.reshape(FOLDS, -1), sizes.reshape(FOLDS, -1)
    rows = counts.sum() - counts.sum(axis=1, keepdims=True)
    overall = (by_fold.sum() - by_fold.sum(axis=1, keepdims=True)) / np.maximum(rows, 1)
    means = (by_fold.sum(axis=0) - by_fold + PRIOR_ROWS * overall) / (counts.sum(axis=0) - counts + PRIOR_ROWS)
    flat: Float64Array = means.reshape(-1)
    return flat


def _area(predicted: Float64Array, own: Float64Array, others: Float64Array) -> float:
    """Return the area under the ROC curve of cells with a prediction and counts of either side; ties count half."""
    _, place = np.unique(predicted, return_inverse=True)
    mine, theirs = np.bincount(place, weights=own), np.bincount(place, weights=others)
    below = np.cumsum(theirs) - theirs / 2
    return float((mine * below).sum() / mine.sum() / theirs.sum())


def _categories(column: pa.ChunkedArray) -> Int64Array:
    """Return the number of each row's text, from 1; 0 if it is missing."""
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    codes: Int64Array = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    return codes


def _ordered(column: pa.ChunkedArray) -> Int64Array | None:
    """Return each row's rank in ascending order, from 1; 0 if it is missing. None for a type without order."""
    kind = column.type
    if pt.is_boolean(kind):
        column = column.cast(pa.int8())
    elif pt.is_date32(kind):
        column = column.cast(pa.int32())
    elif pt.is_temporal(kind) and not pt.is_interval(kind):
        column = column.cast(pa.int64())
    elif pt.is_decimal(kind):
        column = column.cast(pa.float64(), safe=False)
    elif not (pt.is_integer(kind) or pt.is_floating(kind)):
        return None
    known = column.is_valid().to_numpy()
    values = column.drop_null().to_numpy()
    if pt.is_floating(column.type):
        sound = ~np.isnan(values)
        known[known] = sound
        values = values[sound]
    codes = np.zeros(len(column), np.int64)
    codes[known] = np.unique(values, return_inverse=True)[1] + 1
    return codes


def _midranks(codes: Int64Array | None) -> Float64Array:
    """Return the rank of each row from 1; ties share their middle rank."""
    assert codes is not None, "a target is a number, and has an order"
    counts = np.bincount(codes)
    ranks: Float64Array = (np.cumsum(counts) - counts / 2 + 0.5)[codes]
    return ranks


def _binned(codes: Int64Array, ranks: Float64Array) -> Int64Array:
    """Return bins of about equal counts, with equal values in one bin; missing values have bin 0."""
    bins = np.minimum((ranks - 0.5) * (BINS / len(ranks)), BINS - 1).astype(np.int64) + 1
    return np.where(codes == 0, 0, bins)
