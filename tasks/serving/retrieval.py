"""Historical features for rows in memory, in this process: the point-in-time join bucket by bucket, in threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.types as pt

from tasks.engine.partition import bucket_of
from tasks.features.rows import read_keys
from tasks.io import storage
from tasks.io.errors import DefinitionError, InputError, SourceError
from tasks.io.text import closest
from tasks.store.layout import EVENT_TIME
from tasks.training_sets.asof import join_asof, plant
from tasks.training_sets.definition import ALL, STATUS, FeatureReference, Pin, statuses, time_to_live
from tasks.training_sets.history import TIME, History, read_bucket, resolve_history

BUCKETS = 16
"""Pieces that are read and joined one by one: memory holds a sixteenth of the history for each thread."""

FEW = 10_000
"""For at most this many rows of a bucket, read only the row groups that may have their entities."""

_KEY = "\x00key"
_THERE, _LATE = "\x00there", "\x00late"


def retrieve(
    root: str,
    spine: pa.Table,
    references: Sequence[FeatureReference],
    *,
    event_time: str = EVENT_TIME,
    ttl_days: float | None = None,
    strict: bool = False,
    known_at: bool = False,
    full_feature_names: bool = False,
    include_status: bool = False,
) -> pa.Table:
    """Return features as they were at each row's time.

    Args:
        root: Root of the store.
        spine: Rows with the groups' entity keys and a time (UTC if it has no time zone).
        references: Features; 'group:*' means all of the group.
        event_time: Name of the time's column.
        ttl_days: Ignore features older than this.
        strict: Require as_of before the event time.
        known_at: Ignore features computed after the event time.
        full_feature_names: Name each column '<group>__<feature>', not only where names collide.
        include_status: Add the status of each value after it, in a column '<feature>__status'.

    Returns:
        The spine's columns, its rows in their order, followed by the features' columns.

    Raises:
        DefinitionError: no such feature, or two columns would have the same name.
        InputError: a key or a time is of the wrong type.
        SourceError: the spine lacks a column.
        VersionNotFound: no such group or version.
        LeakFound: the join looked into the future.
    """
    if not references:
        raise DefinitionError("no features are asked for; give some, such as customer-features:*")
    root = storage.normalise(root)
    asked: dict[tuple[str, Pin], list[str]] = {}
    for ref in references:
        asked.setdefault((ref.group, ref.pin), []).append(ref.feature)
    histories = {key: resolve_history(root, key[0], features, key[1]) for key, features in asked.items()}
    columns = _columns(references, histories, spine, full=full_feature_names)
    times = _times(spine, event_time)
    ttl = time_to_live(ttl_days)
    found: dict[str, pa.ChunkedArray] = {}
    for key, history in histories.items():
        rows = pl.DataFrame({_KEY: _keys(spine, history), event_time: times}).rename({_KEY: history.entity})
        options: dict[str, Any] = {"entity": history.entity, "event_time": event_time, "ttl": ttl}
        options |= {"strict": strict, "known_at": known_at}
        features = _join(root, rows, history, options, with_status=include_status)
        for name, ref in columns.items():
            if (ref.group, ref.pin) == key:
                found[name] = features[ref.feature]
                if include_status:
                    there, late = (features[mark].to_numpy().astype(np.bool_) for mark in (_THERE, _LATE))
                    found[f"{name}{STATUS}"] = statuses(features[ref.feature], there, late)
    for name in columns:
        for column in (name, f"{name}{STATUS}") if include_status else (name,):
            spine = spine.append_column(column, found[column])
    return spine


def _columns(
    references: Sequence[FeatureReference],
    histories: dict[tuple[str, Pin], History],
    spine: pa.Table,
    *,
    full: bool,
) -> dict[str, FeatureReference]:
    """Return each feature's column, once, in the requested order."""
    spelled = list(
        dict.fromkeys(
            FeatureReference(ref.group, name, ref.pin)
            for ref in references
            for name in (histories[ref.group, ref.pin].features if ref.feature == ALL else [ref.feature])
        )
    )
    features = [ref.feature for ref in spelled]
    found: dict[str, FeatureReference] = {}
    for ref in spelled:
        name = f"{ref.group}__{ref.feature}" if full or features.count(ref.feature) > 1 else ref.feature
        if name in found:
            raise DefinitionError(f"'{found[name]}' and '{ref}' would both be the column '{name}'; leave one out")
        taken = sorted({name, f"{name}{STATUS}"} & set(spine.column_names))
        if taken:
            raise DefinitionError(
                f"the rows have a column '{taken[0]}' already, as the feature '{ref}' is named; rename it, or ask for "
                f"full_feature_names"
            )
        found[name] = ref
    return found


def _times(spine: pa.Table, event_time: str) -> pl.Series:
    _check_column(spine, event_time, "the time of each row")
    values = spine[event_time]
    if not (pt.is_timestamp(values.type) or pt.is_date(values.type)):
        raise InputError(
            f"column '{event_time}' is of type {values.type}; give timestamps, such as those of pandas.to_datetime"
        )
    series = _series(values)
    if series.dtype == pl.Date:
        series = series.cast(pl.Datetime("us"))
    zone = getattr(series.dtype, "time_zone", None)
    return series.dt.replace_time_zone("UTC").cast(TIME) if zone is None else series.cast(TIME)


def _keys(spine: pa.Table, history: History) -> pl.Series:
    """Return the keys in the history's type, null for rows without one."""
    _check_column(spine, history.entity, f"the key of '{history.group}'")
    return _series(
        read_keys(spine[history.entity], history.key_type, f"keys of '{history.group}' ('{history.entity}')")
    )


def _series(values: pa.Array | pa.ChunkedArray) -> pl.Series:
    series = pl.from_arrow(values)
    assert isinstance(series, pl.Series)
    return series


def _check_column(spine: pa.Table, name: str, what: str) -> None:
    if name not in spine.column_names:
        raise SourceError(f"the rows have no column '{name}', {what}{closest(name, spine.column_names)}")


def _join(
    root: str,
    rows: pl.DataFrame,
    history: History,
    options: dict[str, Any],
    *,
    with_status: bool,
) -> pa.Table:
    """Return the history's features for each row, in the rows' order; with masks of matched and of expired rows."""
    keys = rows[history.entity].to_arrow(compat_level=pl.CompatLevel.oldest())
    schema = pa.schema([pa.field(name, history.types[name]) for name in history.features])
    # Versions without buckets would be read once for each bucket.
    buckets = BUCKETS if any(version.partition for version in history.versions) else 1
    bucket = bucket_of(keys.cast(history.key_type), buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(np.bincount(bucket, minlength=buckets))
    ordered = rows[order]
    parts = [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def joined(number: int) -> pa.Table:
        own = parts[number]
        few = own[history.entity].drop_nulls() if own.height <= FEW else None
        past = read_bucket(root, history, number, buckets, known_at=options["known_at"], keys=few)
        found = join_asof(own, past, **options)
        plant(own, past, found, **options)
        features = past.select(history.features).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
        taken = features.take(pa.array(found, mask=found < 0))
        if not with_status:
            return taken
        there = join_asof(own, past, **{**options, "ttl": None}) >= 0
        return taken.append_column(_THERE, pa.array(there)).append_column(_LATE, pa.array(there & (found < 0)))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="retrieval") as pool:
        tables = list(pool.map(joined, [number for number in range(buckets) if parts[number].height]))
    marks = [pa.field(_THERE, pa.bool_()), pa.field(_LATE, pa.bool_())] if with_status else []
    return pa.concat_tables([pa.schema([*schema, *marks]).empty_table(), *tables]).take(pa.array(np.argsort(order)))
