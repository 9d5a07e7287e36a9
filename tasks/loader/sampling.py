"""Samples drawn by weight: which ones an epoch has, and how often.

Samples of the same class, or of the same weight, form a group. The expected number of a group's draws in an epoch is
its share of all weights, and its number is that one rounded down or up, by systematic sampling: the expected numbers
lie one after the other on a line, and the draws are the points u, u + 1, u + 2, …, with u from (seed, epoch). Within a
group all samples are drawn equally often, or some once more than others: an epoch goes on, to within a sample, where
the last one has ended, in the order of the files, which is random.

In memory are 8 bytes for each sample of the split, and 8 for each draw of an epoch; about four times as many while an
epoch begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.tensors import Float64Array, Int64Array
from tasks.loader.arguments import one_of
from tasks.loader.kernel import draw_key
from tasks.loader.order import DRAWS
from tasks.loader.samples import WEIGHT, SampleFormat
from tasks.loader.version_files import CURE, Version, stored_column

_BITS = 20  # of u, which keeps away from whole numbers: sums of floats are as good as exact
_NEARLY = 1e-6  # of a sample: whole numbers of draws add up to whole numbers, whatever the rounding
_NUMBERS = "use finite numbers, 0 or more"
_FORMS = (
    "give a mapping of classes to weights, or (ids, weights), two arrays of the same length, or 'weight' for the "
    "stored weights"
)
_RANGES = 10  # of weights that are told apart


class Draws:
    """The samples of each epoch, drawn by the weights of their groups.

    Args:
        groups: (n,) group of each sample, from 0.
        weights: (G,) weight of each sample of a group, finite and 0 or more, not all of the samples' 0.
        size: Draws of an epoch; None: one for each sample, or, without replacement, as many as keep the proportions.
        replacement: False: no sample comes twice in an epoch.

    Attributes:
        size: draws of an epoch.
        digest: of groups and weights.

    Raises:
        ConfigError: without replacement, so many draws can't keep the proportions.

    """

    def __init__(self, groups: Int64Array, weights: Float64Array, size: int | None, replacement: bool = True) -> None:
        counts = np.bincount(groups, minlength=len(weights))
        self._members = np.argsort(groups, kind="stable")
        self._firsts, self._counts = np.cumsum(counts) - counts, counts
        there = counts > 0
        # Of weights up to 1e308 the sum might be infinite.
        scaled = weights / weights[there].max()
        shares = scaled * counts
        most = int(shares.sum() * (1 + 1e-12))  # draws at which a sample of the largest weight comes once
        if size is None:
            size = len(groups) if replacement else most
        if not replacement and size > most:
            raise ConfigError(
                f"epoch_size = {size} without replacement: a sample of the largest weight would come more than once; "
                f"use at most {most}, or replacement=True"
            )
        self.size = size
        self._expected = shares * (size / shares.sum())
        hashed = xxhash.xxh3_128()
        for values in (self._members, counts, scaled):
            hashed.update(values.data)
        self.digest: str = hashed.hexdigest()

    def of_epoch(self, seed: int, epoch: int) -> Int64Array:
        """Return the samples of an epoch, ascending, (size,)."""
        ends = np.cumsum(self._expected)
        ends *= self.size / ends[-1]
        bits = int(draw_key(seed, epoch, DRAWS, 0)) >> (64 - _BITS)
        counts = np.diff(np.floor(ends + (bits + 0.5) / (1 << _BITS)), prepend=0).astype(np.int64)
        drawn = np.flatnonzero(counts)
        counts, members = counts[drawn], self._counts[drawn]
        starts = (np.floor(epoch * self._expected[drawn] + _NEARLY) % members).astype(np.int64)
        places = np.arange(self.size) - np.repeat(np.cumsum(counts) - counts - starts, counts)
        places %= np.repeat(members, counts)
        places += np.repeat(self._firsts[drawn], counts)
        found: Int64Array = self._members[places]
        found.sort()
        return found


def class_labels(version: Version, split: str) -> tuple[Int64Array, list[str]]:
    """Return the class of each sample of a split, (n,), and the names of all classes.

    Raises:
        ConfigError: the version has no classes.
        CorruptVersion: the labels can't be read, or aren't those of the classes.
    """
    label = version.definition["label"]
    if label is None or label["kind"] != "class":
        kinds = {"number": "numbers as labels", "classes": "several labels each", "numbers": "several labels each"}
        kind = "no labels" if label is None else kinds[label["kind"]]
        raise ConfigError(f"{version.uri} has {kind}, not classes: give weights by id")
    names = [str(name) for name in label["classes"]]
    labels = stored_column(version, split, "label")
    if labels.min() < 0 or labels.max() >= len(names):
        wrong = labels[(labels < 0) | (labels >= len(names))][0]
        raise CorruptVersion(f"{version.uri}: label {wrong} is none of {len(names)} classes: {CURE}")
    return labels, names


def stored_weights(version: Version, split: str) -> Float64Array:
    """Return the stored weight of each sample of a split, (n,).

    Raises:
        ConfigError: the version has no weights.
        CorruptVersion: they can't be read, or aren't finite numbers of 0 or more.
    """
    if not SampleFormat.of(version.definition).weight:
        raise ConfigError(
            f"{version.uri} has no weights: make the copy with --weight COLUMN, or give weights by class or id"
        )
    values = stored_column(version, split, WEIGHT).astype(np.float64)
    wrong = values[~((values >= 0) & np.isfinite(values))]
    if len(wrong):
        raise CorruptVersion(f"{version.uri}: weight {wrong[0]} of a sample is no finite number of 0 or more: {CURE}")
    return values


def weight_groups(version: Version, split: str) -> tuple[Int64Array, list[str]]:
    """Return a group of samples of like weights for each sample of a split, (n,), and the names of all groups.

    A group is a weight, or, if there are many, one of ten ranges of about equally many samples.

    Raises:
        ConfigError, CorruptVersion: as `stored_weights`.
    """
    weights = stored_weights(version, split)
    values, groups, counts = np.unique(weights, return_inverse=True, return_counts=True)
    if len(values) <= _RANGES:
        return groups.astype(np.int64), [f"{value:.6g}" for value in values]
    before = np.cumsum(counts) - counts
    ranges = np.unique(before * _RANGES // len(weights), return_inverse=True)[1]
    firsts = np.flatnonzero(np.diff(ranges, prepend=-1))
    lasts = np.append(firsts[1:], len(values)) - 1
    pairs = zip(values[firsts], values[lasts], strict=True)
    names = [f"{low:.6g}" if low == high else f"{low:.6g} – {high:.6g}" for low, high in pairs]
    return ranges[groups].astype(np.int64), names


def distribution(version: Version, split: str, by: str, drawn: Int64Array | None) -> dict[str, dict[str, int]]:
    """Return the samples of each group: 'natural' in the split, and 'epoch' among the drawn ones; None for all.

    Args:
        version: The version.
        split: The split.
        by: 'class', or 'weight' for `weight_groups`.
        drawn: Samples of an epoch.

    Raises:
        ConfigError: the version has no classes, or no weights.
        CorruptVersion: they can't be read.
    """
    one_of("by", by, ("class", "weight"))
    groups, names = (class_labels if by == "class" else weight_groups)(version, split)
    counts = {"natural": groups, "epoch": groups if drawn is None else groups[drawn]}
    return {
        kind: dict(zip(names, np.bincount(found, minlength=len(names)).tolist(), strict=True))
        for kind, found in counts.items()
    }


def weights_of(version: Version, split: str, weights: Any, balance: str | None) -> tuple[Int64Array, Float64Array]:
    """Return the group of each sample, (n,), and the weight of each group's samples, (G,).

    Args:
        version: The version.
        split: The split.
        weights: Mapping of classes, by name or number, to weights of their samples; or a pair of arrays, ids and
            weights; or 'weight' for the stored ones; or None. Other samples have weight 1.
        balance: 'class' for weights by which each class is drawn equally often, or None.

    Raises:
        ConfigError: weights are of an unknown class or id, below zero, infinite, not a number, or all zero; both
            arguments are given; or the version has no classes, or no weights.
        CorruptVersion: the labels, weights or ids can't be read.
    """
    if balance is not None and weights is not None:
        raise ConfigError("balance and weights: give one of them")
    if balance is not None:
        labels, names = class_labels(version, split)
        counts = np.bincount(labels, minlength=len(names))
        return labels, 1 / np.maximum(counts, 1)
    if isinstance(weights, Mapping):
        labels, names = class_labels(version, split)
        return labels, _nonzero(_by_class(weights, names), labels)
    stored = isinstance(weights, str) and weights == WEIGHT
    if not stored and (not isinstance(weights, tuple | list) or len(weights) != 2):
        raise ConfigError(f"weights = {weights!r:.80}: {_FORMS}")
    found = stored_weights(version, split) if stored else _by_id(version, split, *weights)
    values, groups = np.unique(found, return_inverse=True)
    return groups.astype(np.int64), _nonzero(values, groups)


def _by_class(weights: Mapping[Any, Any], names: list[str]) -> Float64Array:
    numbers: dict[Any, int] = {key: number for number, name in enumerate(names) for key in (number, name)}
    found = np.ones(len(names))
    for key, weight in weights.items():
        if isinstance(key, bool) or key not in numbers:
            known = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
            raise ConfigError(f"weights of class {key!r}: there is no such class; use some of {known}")
        found[numbers[key]] = weight_of(f"weights of class {key!r}", weight)
    return found


def weight_of(name: str, value: Any) -> float:
    """Return a weight as a float.

    Raises:
        ConfigError: it is below zero, infinite, or not a number.
    """
    try:
        number = float("nan") if isinstance(value, str | bytes | bool | np.bool_) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{name} = {value!r}: {_NUMBERS}")
    return number


def _by_id(version: Version, split: str, ids: Any, weights: Any) -> Float64Array:
    """Return the weight of each sample, (n,)."""
    try:
        wanted, values = np.asarray(ids), np.asarray(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"weights: {_FORMS} ({error})") from error
    if wanted.ndim != 1 or wanted.shape != values.shape or (len(wanted) and wanted.dtype.kind not in "iu"):
        raise ConfigError(f"weights of ids of shape {wanted.shape} and type {wanted.dtype}: {_FORMS}, ids of int64")
    wanted = wanted.astype(np.int64)
    wrong = np.flatnonzero(~((values >= 0) & np.isfinite(values)))
    if len(wrong):
        raise ConfigError(f"weights of id {wanted[wrong[0]]} = {values[wrong[0]]}: {_NUMBERS}")
    order = np.argsort(wanted, kind="stable")
    wanted, values = wanted[order], values[order]
    again = np.flatnonzero(wanted[1:] == wanted[:-1])
    if len(again):
        raise ConfigError(f"weights of id {wanted[again[0]]}: it is there twice; give each id once")
    stored = stored_column(version, split, "sample_id")
    found = np.ones(len(stored))
    if len(wanted):
        places = np.minimum(np.searchsorted(wanted, stored), len(wanted) - 1)
        known = wanted[places] == stored
        found[known] = values[places[known]]
        missing = np.ones(len(wanted), np.bool_)
        missing[places[known]] = False
        if missing.any():
            raise ConfigError(
                f"weights of id {wanted[missing][0]}: split {split!r} of {version.uri} has no such sample "
                f"({missing.sum()} of {len(wanted)} ids are unknown); give ids from its column 'sample_id'"
            )
    return found


def _nonzero(weights: Float64Array, groups: Int64Array) -> Float64Array:
    if not weights[groups].any():
        raise ConfigError(f"weights of all {len(groups)} samples are 0: give some of them a weight above 0")
    return weights
