"""Profiles of a table's columns, merged in any order, and the drift between two of them.

    blocks ── profile_table ──▶ TableProfile ── merge_profiles ──▶ TableProfile ── columns() ──▶ the manifest

A profile is a pure function of the multiset of rows: block sizes, block order and worker counts leave no trace in it.

Drift is the population stability index (PSI): how far a column has moved since an earlier version.

PSI = Σ (p - q) ln(p / q) over bins, with p and q the shares of the two versions: Jeffreys' divergence, in the form
that credit scoring uses (Siddiqi 2006, "Credit Risk Scorecards"), where 0.1 is a shift to look at and 0.25 a large
one. Two samples of n and m rows from one population differ by chance: their PSI over k bins behaves as
(1/n + 1/m) χ²(k-1) (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.errors import InputError
from tasks.io.hashing import is_text, stable_hash
from tasks.io.tensors import Float64Array, Int64Array
from tasks.quality.sketch import DistinctSketch, Moments, QuantileSketch, TopValues
from tasks.store.manifest import ColumnProfile, Histogram

Kind = Literal["numeric", "boolean", "string", "temporal", "other"]

QUANTILE_LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_BINS = 20
TOP_VALUES = 20


@dataclass(frozen=True)
class ColumnPartial:
    """Mergeable profile of one column; figures that don't apply to its kind are None."""

    kind: Kind
    type: str
    count: int
    nulls: int
    nans: int = 0
    infinities: int = 0
    quantiles: QuantileSketch | None = None
    moments: Moments | None = None
    distinct: DistinctSketch | None = None
    top: TopValues | None = None
    span: tuple[int, int] | None = None  # first and last tick of a temporal column
    settled: ColumnProfile | None = None  # the manifest's form, if the sketches that it follows from were dropped

    def without_sketches(self) -> ColumnPartial:
        """Return a small partial: it has the manifest's form, and can't be merged or searched any more."""
        known = _column_profile(self)
        return ColumnPartial(self.kind, self.type, self.count, self.nulls, self.nans, self.infinities, settled=known)


@dataclass(frozen=True)
class TableProfile:
    """Profile of a table or of some of its blocks; small enough to travel between processes."""

    rows: int
    partials: dict[str, ColumnPartial]

    def partial(self, column: str) -> ColumnPartial:
        """Return the partial profile of one column.

        Raises:
            InputError: the table has no such column.
        """
        if column not in self.partials:
            raise InputError(f"no column {column!r} in the profile: it has {', '.join(self.partials) or 'none'}")
        return self.partials[column]

    def sketch(self, column: str) -> QuantileSketch:
        """Return the quantile sketch of a numeric column.

        Raises:
            InputError: the table has no such column, or it isn't numeric.
        """
        partial = self.partial(column)
        assert partial.settled is None, f"the sketches of {column} were dropped"
        if partial.quantiles is None:
            raise InputError(f"column {column!r} is {partial.kind} ({partial.type}): only a numeric one has quantiles")
        return partial.quantiles

    def quantiles(self, column: str, levels: Sequence[float]) -> Float64Array:
        """Return quantiles of a numeric column's finite values, shape (levels,); NaN if it has none.

        Raises:
            InputError: the table has no such column, or it isn't numeric.
        """
        return self.sketch(column).quantiles(levels)

    def columns(self) -> dict[str, ColumnProfile]:
        """Return the profile in the manifest's form."""
        return {name: _column_profile(partial) for name, partial in self.partials.items()}


def profile_table(table: pa.Table) -> TableProfile:
    """Profile one table or block.

    Numbers (integers, floats, decimals) are profiled as float64: integers beyond 2**53 lose their last digits in
    minimum, maximum, quantiles and mean, but not in the number of distinct values. Dictionary columns are profiled
    as their values. Binary, nested and duration columns get counts and nulls only.

    Raises:
        InputError: two columns share a name.
    """
    if len(set(table.column_names)) != table.num_columns:
        raise InputError(f"can't profile columns that share a name: {table.column_names}; rename them first")
    return TableProfile(table.num_rows, {name: _partial(table[name]) for name in table.column_names})


def added(total: TableProfile | None, profile: TableProfile) -> TableProfile:
    """Merge a profile into a running total: keeping the profiles of many blocks one by one takes much memory."""
    return profile if total is None else merge_profiles([total, profile])


def merge_profiles(profiles: Sequence[TableProfile]) -> TableProfile:
    """Merge one or more profiles of one schema; their order makes no difference.

    The columns are in the first profile's order. A column that is all null in a block, and so has Arrow's null
    type there, merges with any type.

    Raises:
        InputError: there is no profile, or columns or their types differ.
    """
    if not profiles:
        raise InputError("no profiles to merge: profile an empty table of the right schema instead")
    if len(profiles) == 1:
        return profiles[0]
    names = list(profiles[0].partials)
    for profile in profiles:
        differing = sorted(set(names) ^ set(profile.partials))
        if differing:
            raise InputError(
                f"can't merge profiles: column {differing[0]!r} isn't in all of them; blocks share a schema"
            )
    merged = {name: _merge_partials(name, [profile.partials[name] for profile in profiles]) for name in names}
    return TableProfile(sum(profile.rows for profile in profiles), merged)


def _partial(column: pa.ChunkedArray) -> ColumnPartial:
    if pt.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    arrow = column.type
    size, nulls = len(column), column.null_count
    if pt.is_integer(arrow) or pt.is_floating(arrow) or pt.is_decimal(arrow):
        return _numeric(column)
    if pt.is_boolean(arrow):
        counted = column.drop_null().cast(pa.string()).value_counts()
        return ColumnPartial("boolean", "bool", size, nulls, top=TopValues.of(*counted.flatten()))
    if is_text(arrow):
        values, counts = column.cast(pa.large_string()).drop_null().value_counts().flatten()
        distinct = DistinctSketch.of(stable_hash(values))
        return ColumnPartial("string", "string", size, nulls, distinct=distinct, top=TopValues.of(values, counts))
    if pt.is_timestamp(arrow) or pt.is_date(arrow):
        valid = column.drop_null()
        ticks = pc.min_max(valid.cast(pa.int32() if pt.is_date32(arrow) else pa.int64())).as_py()
        span = None if ticks["min"] is None else (ticks["min"], ticks["max"])
        distinct = DistinctSketch.of(stable_hash(valid))
        return ColumnPartial("temporal", str(arrow), size, nulls, distinct=distinct, span=span)
    return ColumnPartial("other", str(arrow), size, nulls)


def _numeric(column: pa.ChunkedArray) -> ColumnPartial:
    valid = column.drop_null()
    values: Float64Array = valid.cast(pa.float64(), safe=False).to_numpy()
    finite = np.isfinite(values)
    nans = infinities = 0
    if not finite.all():
        nans = int(np.count_nonzero(np.isnan(values)))
        infinities = int(np.count_nonzero(np.isinf(values)))
        values = values[finite]
    hashes = stable_hash(valid if pt.is_integer(column.type) else pa.array(values))
    return ColumnPartial(
        kind="numeric",
        type=str(column.type),
        count=len(column),
        nulls=column.null_count,
        nans=nans,
        infinities=infinities,
        quantiles=QuantileSketch.of(values),
        moments=Moments.of(values),
        distinct=DistinctSketch.of(hashes),
    )


def _merge_partials(name: str, parts: list[ColumnPartial]) -> ColumnPartial:
    assert all(part.settled is None for part in parts), f"the sketches of {name} were dropped"
    typed = [part for part in parts if part.type != "null"] or parts[:1]
    types = sorted({part.type for part in typed})
    if len(types) > 1:
        raise InputError(f"can't merge profiles: column {name!r} is {' and '.join(types)}; cast the blocks to one type")
    first = typed[0]
    spans = [part.span for part in typed if part.span is not None]
    return ColumnPartial(
        kind=first.kind,
        type=first.type,
        count=sum(part.count for part in parts),
        nulls=sum(part.nulls for part in parts),
        nans=sum(part.nans for part in parts),
        infinities=sum(part.infinities for part in parts),
        quantiles=first.quantiles and QuantileSketch.merge_all(p.quantiles for p in typed if p.quantiles is not None),
        moments=first.moments and Moments.merge_all(p.moments for p in typed if p.moments is not None),
        distinct=first.distinct and DistinctSketch.merge_all([p.distinct for p in typed if p.distinct is not None]),
        top=first.top and TopValues.merge_all([p.top for p in typed if p.top is not None]),
        span=(min(low for low, _ in spans), max(high for _, high in spans)) if spans else None,
    )


def _column_profile(partial: ColumnPartial) -> ColumnProfile:
    if partial.settled is not None:
        return partial.settled
    known: dict[str, Any] = {
        "kind": partial.kind,
        "count": partial.count,
        "nulls": partial.nulls,
        "nans": partial.nans,
        "infinities": partial.infinities,
    }
    if partial.distinct is not None:
        known |= {"distinct": partial.distinct.count, "distinct_exact": partial.distinct.is_exact}
    if partial.top is not None:
        known["top_values"] = partial.top.top(TOP_VALUES)
    if partial.kind == "boolean" and partial.top is not None and partial.top.counts is not None:
        known |= {"distinct": len(partial.top.counts), "distinct_exact": True}
        if partial.top.counts:
            known["mean"] = partial.top.counts.get("true", 0) / sum(partial.top.counts.values())
    if partial.span is not None:
        known |= {"minimum": _iso(partial.span[0], partial.type), "maximum": _iso(partial.span[1], partial.type)}
    sketch, moments = partial.quantiles, partial.moments
    if sketch is not None and moments is not None and sketch.count:
        low, high = float(sketch.lows[0]), float(sketch.highs[-1])
        integers = partial.type.startswith(("int", "uint"))
        if sketch.is_exact and (not integers or max(-low, high) < 2**53):  # then no two values became one
            known |= {"distinct": len(sketch.counts), "distinct_exact": True}
        known |= {
            "minimum": low,
            "maximum": high,
            "mean": moments.mean,
            "std": moments.std,
            "quantiles": dict(zip(map(str, QUANTILE_LEVELS), sketch.quantiles(QUANTILE_LEVELS).tolist(), strict=True)),
            "histogram": _histogram(sketch),
        }
    return ColumnProfile(**known)


def _histogram(sketch: QuantileSketch) -> Histogram:
    """Return bins for drift: one for each value if they are few, else of about equal counts with heavy values alone."""
    values = sketch.lows
    if sketch.is_exact and len(values) <= HISTOGRAM_BINS:
        edges = _edges_around(values)
    else:
        ranks = np.arange(HISTOGRAM_BINS) * sketch.count // HISTOGRAM_BINS
        buckets = np.searchsorted(np.cumsum(sketch.counts), ranks, side="right")
        # A value so frequent that two ranks fall on it gets a bin of its own: the next edge follows directly.
        behind = buckets[1:][buckets[1:] == buckets[:-1]] + 1
        starts = np.unique(np.concatenate([[0], buckets, behind[behind < len(values)]]))
        edges = values[starts]
        last = float(sketch.highs[-1])
        if last <= edges[-1]:
            last = min(last + (last / 2 - float(edges[-2]) / 2), float(np.finfo(np.float64).max))
        edges = np.append(edges, last)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(sketch.histogram(edges).tolist()))


def _edges_around(values: Float64Array) -> Float64Array:
    """Return edges halfway between ascending values, shape (values + 1,)."""
    middles = values[:-1] / 2 + values[1:] / 2
    middles = np.where(middles > values[:-1], middles, values[1:])
    margin = np.abs(values) * 2.0**-50
    limit = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        if len(values) == 1:
            half = np.maximum(margin, 0.5)
            around: Float64Array = np.clip(np.concatenate([values - half, values + half]), -limit, limit)
            return around
        first = max(values[0] - np.maximum(middles[0] - values[0], margin[0]), -limit)
        last = min(values[-1] + np.maximum(values[-1] - middles[-1], margin[-1]), limit)
    return np.concatenate([[first], middles, [last]])


def _iso(tick: int, arrow: str) -> str:
    """Format a tick of an Arrow date or timestamp type in ISO 8601, without a fraction of a second if it is zero."""
    if arrow.startswith("date"):
        unit = "D" if arrow.startswith("date32") else "ms"
        return str(np.array(tick, dtype=f"datetime64[{unit}]").astype("datetime64[D]"))
    unit = arrow.removeprefix("timestamp[").split(",")[0].rstrip("]")
    moment = np.array(tick, dtype=f"datetime64[{unit}]")
    seconds = moment.astype("datetime64[s]")
    return str(seconds if seconds == moment else moment) + ("Z" if "tz=" in arrow else "")


SMOOTHING = 0.5
_Z_999 = 3.090232306167813


def population_stability_index(now: Int64Array, before: Int64Array) -> float:
    """Return the PSI of two arrays of counts over the same bins, shape (bins,); NaN if a side has no count at all.

    Half a row is added to each bin of either side (the Jeffreys prior), as an empty bin would make it infinite.
    """
    if not now.sum() or not before.sum():
        return math.nan
    p = (now + SMOOTHING) / (now.sum() + SMOOTHING * len(now))
    q = (before + SMOOTHING) / (before.sum() + SMOOTHING * len(before))
    return float(np.sum((p - q) * np.log(p / q)))


def chance_index(now: int, before: int, bins: int) -> float:
    """Return the PSI that chance alone exceeds once in a thousand times, for two samples of some numbers of rows.

    The quantile of χ² is Wilson and Hilferty's (1931) approximation, within 2 % of the truth for 2 bins or more.
    """
    freedom = bins - 1
    if freedom < 1:
        return 0.0
    spread = 2 / (9 * freedom)
    return freedom * float(1 - spread + _Z_999 * math.sqrt(spread)) ** 3 * (1 / max(now, 1) + 1 / max(before, 1))


def binned(now: ColumnPartial, before: ColumnProfile) -> tuple[Int64Array, Int64Array]:
    """Count both versions over the earlier one's bins, each of shape (bins,), int64.

    Numbers: the bins of the earlier histogram, the outer two open; if each bin was one value, values beyond them are
    counted apart, as a new code matters however near it lies. Strings and booleans: the earlier top values, and one bin
    for all others. One more bin for missing values (null, NaN, infinite) if either version has any.

    The caller ensures that both are of one kind, and that counts of values were not dropped.
    """
    assert now.settled is None, "the sketches were dropped: they had to be compared before"
    missing = [now.nulls + now.nans + now.infinities, before.nulls + before.nans + before.infinities]
    if now.quantiles is not None:
        edges, seen = ((), (0,)) if before.histogram is None else (before.histogram.edges, before.histogram.counts)
        if before.distinct_exact and before.distinct == len(seen):
            # One bin a value: any value beyond the first or the last is new, however near. The histogram's outer edges
            # leave room around them, in which a column of one value could move unnoticed.
            seen = (0, *seen, 0)
            low, high = float(before.minimum or 0.0), float(before.maximum or 0.0)
            edges = (low, *edges[1:-1], float(np.nextafter(high, np.inf)))
        else:
            edges = edges[1:-1]
        new = now.quantiles.histogram([-np.inf, *edges, np.inf])
        old = np.array(seen, dtype=np.int64)
    else:
        assert now.top is not None
        assert now.top.counts is not None
        listed = dict(before.top_values)
        new = np.array([now.top.counts.get(value, 0) for value in listed] + [0], dtype=np.int64)
        old = np.array([*listed.values(), 0], dtype=np.int64)
        new[-1] = now.count - missing[0] - new.sum()
        old[-1] = before.count - missing[1] - old.sum()
    if any(missing):
        new, old = np.append(new, missing[0]), np.append(old, missing[1])
    occupied = (new > 0) | (old > 0)
    return new[occupied], old[occupied]
