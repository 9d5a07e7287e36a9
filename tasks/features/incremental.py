"""Incremental runs: judged events kept beside a version, and the plan of a run that builds on earlier versions.

    {version}/_events/part-<bucket>-a1.parquet    the bucket's new events, with their file and row

A later run needn't read and judge their files again. A version keeps the events of the files that it read itself; those
of earlier files stay with earlier versions, so that the state of a version is a chain of links. An event is alive as
long as its file exists unchanged.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of, frame_of
from tasks.features.plan import FeaturePlan, GroupPlan, SourcePlan, StateLink, StatePlan
from tasks.io import storage
from tasks.store import layout
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reading import first_live, list_dataset, opened, overview, read_committed, read_manifest
from tasks.store.reservation import Reservation

_DIRECTORY = "_events"
FILE, ROW = "_file", "_row"
MAX_LINKS = 16
"""Links of a chain; after that many all live events are rewritten in one."""

_JUDGES = tuple(Path(__file__).with_name(name) for name in ("csv_text.py", "rows.py", "sources.py"))
Prints = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Watermark:
    """Progress of a group's published versions: their latest as-of time, and their newest event."""

    as_of: dt.datetime | None
    newest_event: dt.datetime | None


def watermark(root: str, dataset: str) -> Watermark:
    """Return the progress of a feature group from its published manifests, the only record of it."""
    live = overview(root, dataset, listed=list_dataset(root, dataset)).warned().live
    times = [moment for one in live for moment in one.as_of]
    events = [one.newest_event for one in live if one.newest_event is not None]
    return Watermark(max(times, default=None), max(events, default=None))


def with_state(plan: FeaturePlan, root: str) -> FeaturePlan:
    """Return the plan of an incremental run: it reads only files whose events no earlier version has kept.

    Returns:
        The plan with a state a group and the files' fingerprints. Later events are kept too, so that no row is
        filtered by its time while it is read.
    """
    root = storage.normalise(root)
    prints = plan.events.table.fingerprints()
    lookups = {lookup.dimension.name: lookup.dimension.table.fingerprints() for lookup in plan.lookups}
    states = tuple(_plan_state(plan, planned, root, prints, lookups) for planned in plan.groups)
    events = replace(plan.events, rows=replace(plan.events.rows, as_of=None))
    return replace(plan, events=events, fingerprints=prints, states=states)


def _plan_state(plan: FeaturePlan, planned: GroupPlan, root: str, prints: Sequence[str], lookups: Prints) -> StatePlan:
    digest = _digest(plan, planned, lookups)
    uris = [file.info.uri for file in plan.events.table.files]
    today = {file: number for number, file in enumerate(zip(uris, prints, strict=True))}
    chain = _newest_chain(root, layout.feature_dataset(planned.group.name), digest)
    links = tuple(link for manifest in chain if (link := _link(manifest, root, plan.events.name, today)).live)
    kept = {number for link in links for number in link.live.values()}
    return StatePlan(
        digest=digest,
        parent=chain[-1].version if links else None,
        depth=len(chain) + 1 if links else 1,
        links=links,
        new=frozenset(range(len(uris))) - kept,
        whole=len(chain) >= MAX_LINKS or not links,
    )


def kept_links(manifest: Manifest, root: str, source: str) -> tuple[StateLink, ...]:
    """Return the events that an incremental version builds on: its own, and those taken from versions before it.

    Args:
        manifest: Its manifest; one without a state has no links.
        root: Root of the store.
        source: Name of the event source.

    Raises:
        VersionNotFound: a version that it builds on was pruned.
    """
    files = next(record for record in manifest.inputs if record.name == source).files
    numbers = {(file.uri, file.fingerprint): number for number, file in enumerate(files)}
    chain, link = list[Manifest](), manifest if "state" in manifest.definition else None
    while link is not None:
        chain.insert(0, link)
        parent = link.definition["state"]["parent"]
        link = None if parent is None else read_manifest(root, manifest.dataset, parent)
    return tuple(_link(one, storage.normalise(root), source, numbers) for one in chain)


def _newest_chain(root: str, dataset: str, digest: str) -> list[Manifest]:
    """Return manifests of the newest published version with a fitting state and of those it builds on, oldest first."""
    found = overview(root, dataset).warned()
    for newest in (one.version for one in reversed(found.live) if one.state_digest == digest):
        if first_live(root, dataset, [newest]) is None:
            continue
        chain: list[Manifest] = []
        number: int | None = newest
        while number is not None and number in found.versions and found.versions[number].state_digest == digest:
            # A withdrawn version can't be built on, but it may be a link of an earlier one.
            link = read_committed(root, dataset, [number]).warned().versions.get(number)
            if link is None:  # pruned, or damaged since
                break
            chain.insert(0, link)
            number = link.definition["state"]["parent"]
            if number is None:
                return chain
    return []


def _link(manifest: Manifest, root: str, source: str, today: Mapping[tuple[str, str], int]) -> StateLink:
    state: dict[str, Any] = manifest.definition["state"]
    inputs = next(record for record in manifest.inputs if record.name == source).files
    live, rows = {}, 0
    for number, count in state["files"]:
        file = inputs[number]
        if (now := today.get((file.uri, file.fingerprint))) is not None:
            live[number] = now
            rows += count
    return StateLink(
        version=manifest.version,
        buckets=state["buckets"],
        files=_bucket_files(manifest.uri(root), manifest.side_files),
        live=live,
        rows=rows,
        complete=len(live) == len(state["files"]),
    )


def _digest(plan: FeaturePlan, planned: GroupPlan, lookups: Prints) -> str:
    """Return the digest of all settings that affect the kept events; their files and the as-of times don't."""
    used = [lookup for lookup in plan.lookups if set(lookup.columns) & set(planned.columns)]
    wanted = {*planned.columns, *(lookup.key for lookup in used)}
    parts = {
        "entity": planned.group.entity,
        "columns": planned.columns,
        "events": _spelled(plan.events, wanted),
        "lookups": [
            [lookup.key, lookup.columns, _spelled(lookup.dimension), lookups[lookup.dimension.name]] for lookup in used
        ],
    }
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for file in _JUDGES:
        found.update(file.read_bytes())
    return found.hexdigest()


def _spelled(source: SourcePlan, wanted: Set[str] | None = None) -> list[object]:
    """Return the rules for judging rows; unwanted columns that reject no row make no difference."""
    rows = source.rows
    columns = [
        (c.name, c.source_name, c.kind, c.required, c.key_type, None if c.dtype is None else str(c.dtype))
        for c in rows.columns
        if wanted is None or c.required or c.name in wanted or c.name in rows.reject_negative
    ]
    missing = (rows.missing.text, rows.missing.typed)
    return [rows.time, columns, str(rows.earliest), rows.timezone, rows.epoch_unit, rows.reject_negative, missing]


def _bucket_files(version_uri: str, side_files: Sequence[FileEntry]) -> dict[int, str]:
    """Return the URIs of a version's kept events, by bucket."""
    kept = [file.path for file in side_files if file.path.startswith(f"{_DIRECTORY}/")]
    numbered = ((layout.part_number(path), path) for path in kept)
    return {number: layout.join(version_uri, path) for number, path in numbered if number is not None}


def read_kept(
    links: Sequence[StateLink], bucket: int, buckets: int, entity: str, schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """Return events of one of today's buckets kept by earlier versions.

    Args:
        links: The chain.
        bucket: Bucket of the entities.
        buckets: Number of buckets, a power of two, as in every link.
        entity: Key column.
        schema: Columns to return and their types, among them `FILE`: the number of the source file, as of today.
    """
    frames = [_read_link(link, bucket, buckets, entity, schema) for link in links if link.live]
    return pl.concat([pl.DataFrame(schema=schema), *frames])


def _read_link(
    link: StateLink, bucket: int, buckets: int, entity: str, schema: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    numbers = range(bucket, link.buckets, buckets) if link.buckets > buckets else [bucket % link.buckets]
    texts = [name for name, dtype in schema.items() if dtype == pl.Categorical]
    live = None if link.complete else [(FILE, "in", list(link.live))]
    frames = []
    for uri in (link.files[number] for number in numbers if number in link.files):
        with opened(uri) as source:
            table = pq.read_table(
                source, columns=list(schema), filters=live, use_threads=False, read_dictionary=texts, pre_buffer=True
            )
        if link.buckets < buckets:
            table = table.filter(pa.array(bucket_of(table[entity], buckets) == bucket))
        today = pl.col(FILE).replace_strict(dict(link.live), return_dtype=pl.Int32)
        frames.append(frame_of(table).with_columns(today).cast(pl.Schema(schema)))
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def in_order(events: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return each entity's events in the order of a full reading: by file, and by row in each.

    Within one file an entity's events come from one frame, in their order, so that the rows' numbers aren't needed.
    """
    together = pl.concat(events)
    files = together[FILE].to_numpy()
    if np.all(files[:-1] <= files[1:]):
        return together
    # A stable sort of 16-bit integers is a radix sort; more files than that are rare.
    narrow = files.astype(np.uint16) if files.max() < 2**16 else files
    return together[np.argsort(narrow, kind="stable")]


def write_kept(events: pa.Table, reservation: Reservation, bucket: int) -> FileEntry:
    """Write a bucket's events beside the version."""
    uri = reservation.data_uri(bucket, _DIRECTORY)
    plain = [name for name in events.column_names if name != ROW]
    options = {"use_dictionary": plain, "column_encoding": {ROW: "DELTA_BINARY_PACKED"}}
    return reservation.entry(storage.write_parquet(events, uri, **options))
