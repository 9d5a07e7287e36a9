"""Matches of a training row: the row of each feature history that it was given, and why that one, or why none.

The history is that of the versions which the training set's manifest names, whatever has been published or withdrawn
since; the match is the flow's own (`tasks.serving.asof`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from tasks.core import layout
from tasks.core.errors import PipelineError, VersionNotFound
from tasks.core.manifest import Manifest
from tasks.core.own_columns import AS_OF, EVENT_TIME
from tasks.core.partition import bucket_of
from tasks.core.reading import read_manifest
from tasks.serving.asof import join_asof
from tasks.serving.definition import FeatureReference
from tasks.serving.history import FROM, TIME, UNTIL, History, HistoryVersion, history_of, read_bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Match of a feature group and a training row.

    Attributes:
        group: Name of the group.
        versions: Versions that were read for the training set.
        version: The version whose row was matched; None: none.
        as_of: Time of that row.
        age: From then to the event.
        why: The match in words, or why there is none.
        columns: Column of the training set → value in the matched row.
        gone: Versions that were read and have been deleted since.

    """

    group: str
    versions: tuple[int, ...]
    version: int | None = None
    as_of: dt.datetime | None = None
    age: dt.timedelta | None = None
    why: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    gone: tuple[int, ...] = ()


def matches(root: str, manifest: Manifest, row: Mapping[str, Any]) -> list[Match]:
    """Find the match of each group for a row of a training set.

    Args:
        root: Root of the store.
        manifest: The training set.
        row: The row, with its keys and its time.

    """
    references = {column: FeatureReference.parse(text) for column, text in manifest.definition["columns"].items()}
    groups = dict.fromkeys(reference.group for reference in references.values())
    found = []
    for group in groups:
        own = {column: ref.feature for column, ref in references.items() if ref.group == group}
        found.append(_match(root, manifest, row, group, own))
    return found


def _match(root: str, manifest: Manifest, row: Mapping[str, Any], group: str, own: Mapping[str, str]) -> Match:
    dataset = layout.feature_dataset(group)
    read = sorted(record.version for record in manifest.inputs if record.name == dataset and record.version)
    known, gone = [], []
    for version in read:
        try:
            known.append(read_manifest(root, dataset, version))
        except VersionNotFound:
            gone.append(version)
    told: dict[str, Any] = {"group": group, "versions": tuple(read), "gone": tuple(gone)}
    if not known:
        return Match(**told, why="every version that was read has been deleted since")
    try:
        history = history_of(root, group, list(dict.fromkeys(own.values())), known)
        value = row.get(history.entity)
        if value is None:
            return Match(**told, why=f"the row has no {history.entity}")
        rows, versions = _rows_of(root, history, value, known_at=bool(manifest.definition["known_at"]))
    except PipelineError as fault:
        return Match(**told, why=f"the history can't be read: {fault}")
    when, options = row[EVENT_TIME], _options(manifest)
    spine = pl.DataFrame({history.entity: [value], EVENT_TIME: [when]}, schema_overrides={EVENT_TIME: TIME})
    place = int(join_asof(spine, rows, entity=history.entity, event_time=EVENT_TIME, **options)[0])
    if place < 0:
        return Match(**told, why=_why_not(rows, when, options))
    as_of = rows[AS_OF][place]
    values = rows.row(place, named=True)
    columns = {column: values[feature] for column, feature in own.items()}
    before = "before" if options["strict"] else "at or before"
    why = f"the newest {before} the event" + (" that was known by then" if options["known_at"] else "")
    return Match(**told, version=versions[place].version, as_of=as_of, age=when - as_of, why=why, columns=columns)


def _options(manifest: Manifest) -> dict[str, Any]:
    days = manifest.definition["ttl_days"]
    ttl = None if days is None else dt.timedelta(days=days)
    return {"ttl": ttl, "strict": manifest.definition["strict"], "known_at": manifest.definition["known_at"]}


def _rows_of(root: str, history: History, value: Any, known_at: bool) -> tuple[pl.DataFrame, list[HistoryVersion]]:
    """Read the rows of an entity in all versions, oldest first, and the version of each."""
    keys = pl.Series(history.entity, [value])
    bucket = int(bucket_of(keys.to_arrow(), history.buckets)[0])
    frames, owners = [], []
    for version in history.versions:
        alone = replace(history, versions=(version,))
        frame = read_bucket(root, alone, bucket, history.buckets, known_at=known_at, keys=keys)
        frames.append(frame)
        owners += [version] * frame.height
    return pl.concat(frames), owners


def _why_not(rows: pl.DataFrame, when: dt.datetime, options: Mapping[str, Any]) -> str:
    """Say why no row of a history counts."""
    times = rows[AS_OF].to_list()
    before = [moment for moment in times if (moment < when if options["strict"] else moment <= when)]
    if not times:
        return "the versions have no row of this key"
    if not before:
        return f"none before: the first is of {min(times):%Y-%m-%d %H:%M}"
    young = [moment for moment in before if options["ttl"] is None or when - moment <= options["ttl"]]
    if not young:
        age = days_of(when - max(before))
        return f"too old: the newest before is {age} old, and ttl_days is {options['ttl'] / dt.timedelta(days=1):g}"
    known = [until is None or until > when for start, until in rows.select(FROM, UNTIL).iter_rows() if start <= when]
    return "none was known by then" if not any(known) else "none that was known by then is before the event"


def days_of(span: dt.timedelta) -> str:
    """Return a span of time in days."""
    days = span / dt.timedelta(days=1)
    return f"{days:.4g} day{'s' if days != 1 else ''}"
