"""Contents of the store, as values for people and programs: datasets, their versions, and the columns of a version.

The table of all versions is for people and notebooks: derived from the manifests; no flow reads it back.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv

from tasks.io import storage
from tasks.io.errors import VersionNotFound
from tasks.io.listing import FileInfo
from tasks.io.text import closest
from tasks.store import layout, versions
from tasks.store.layout import FEATURES
from tasks.store.manifest import Manifest
from tasks.store.reading import (
    CURE,
    Overview,
    faults_of_files,
    first_live,
    list_dataset,
    list_datasets,
    overview,
    read_manifest,
    resolve,
)
from tasks.store.version_index import IndexedVersion, files_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """Summary of a dataset: its latest live version, if any, and the number of versions.

    status: 'ok', or which versions readers can't use: 'v2 incomplete, v3 damaged'.
    """

    name: str
    dataset: str
    kind: str
    version: int | None
    versions: int
    status: str
    rows: int | None
    columns: int | None
    as_of: dt.datetime | None
    created: dt.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSummary:
    """Summary of a committed version.

    status: also 'damaged' (its manifest can't be read, so that the other fields are unknown) and 'incomplete' (data
    files are missing or of another size). note: reason and cure.
    """

    version: int
    status: Literal["published", "withdrawn", "rejected", "damaged", "incomplete"]
    created: dt.datetime | None
    rows: int | None
    bytes: int | None
    as_of: tuple[dt.datetime, ...]
    verdict: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSummary:
    """Summary of a version's column, with its profile's main figures."""

    name: str
    type: str
    declared: str
    nulls: float | None
    minimum: float | str | None
    mean: float | None
    maximum: float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Description of a version: location, inputs and columns; faults: one sentence for each faulty data file."""

    name: str
    dataset: str
    kind: str
    version: int
    uri: str
    faults: tuple[str, ...]
    created: dt.datetime
    rows: int
    files: int
    bytes: int
    entity: str | None
    partition: str | None
    as_of: tuple[dt.datetime, ...]
    verdict: str
    run: str
    inputs: tuple[str, ...]
    columns: tuple[ColumnSummary, ...]


def find_dataset(root: str, name: str, kind: str | None = None) -> str:
    """Return a dataset's full name from that or its last part: 'customer-features' → 'feature-store/customer-features'.

    A streaming copy has the same last part as its source; the name means the source.

    Raises:
        VersionNotFound: no dataset, or several, have the name; the message names the closest.
    """
    known = [found for found in list_datasets(root) if kind is None or kind_in_words(found) == kind]
    if name in known:
        return name
    matching = [found for found in known if short_name(found) == name]
    matching = [found for found in matching if kind_in_words(found) != "streaming copy"] or matching
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise VersionNotFound(f"several datasets are named '{name}'; give one of {', '.join(matching)}")
    what = {"features": "feature group", None: "dataset"}.get(kind, kind)
    if not known:
        raise VersionNotFound(
            f"no {what} '{name}' under {root}: nothing is there yet; run the flow, or correct the root"
        )
    raise VersionNotFound(f"no {what} '{name}' under {root}{closest(name, [short_name(found) for found in known])}")


def short_name(dataset: str) -> str:
    """Return the last part of a dataset's name."""
    return dataset.rpartition("/")[2]


def kind_in_words(dataset: str) -> str:
    """Return the kind of a dataset, in words for people: 'training set'."""
    return layout.kind(dataset).replace("-", " ")


def summaries(root: str) -> list[DatasetSummary]:
    """Return a summary of every dataset under a root, by name."""
    return [_summary(root, dataset) for dataset in list_datasets(root)]


def _summary(root: str, dataset: str) -> DatasetSummary:
    listed = list_dataset(root, dataset)
    committed = overview(root, dataset, listed=listed)
    live, there = committed.live, _data_by_version(root, dataset, listed)
    faulty = {one.version: "incomplete" for one in live if _faults(root, dataset, one, there)}
    faulty |= dict.fromkeys(committed.unreadable, "damaged")
    latest = live[-1] if live else None
    return DatasetSummary(
        name=short_name(dataset),
        dataset=dataset,
        kind=kind_in_words(dataset),
        version=latest.version if latest else None,
        versions=len(live),
        status=", ".join(f"v{number} {faulty[number]}" for number in sorted(faulty)) or "ok",
        rows=latest.rows if latest else None,
        columns=latest.columns if latest else None,
        as_of=max((moment for one in live for moment in one.as_of), default=None),
        created=latest.created_at if latest else None,
    )


def version_summaries(root: str, dataset: str) -> list[VersionSummary]:
    """Return a summary of every committed version of a dataset, ascending."""
    root = storage.normalise(root)
    listed = list_dataset(root, dataset)
    committed, there = overview(root, dataset, listed=listed), _data_by_version(root, dataset, listed)
    found = [_version_summary(root, dataset, one, committed, there) for one in committed.versions.values()]
    for number, fault in committed.damaged.items():
        withdrawal = committed.withdrawals.get(number)
        found.append(
            VersionSummary(
                version=number,
                status="withdrawn" if withdrawal else "damaged",
                created=None,
                rows=None,
                bytes=None,
                as_of=(),
                verdict="",
                note=f"{withdrawal}; {fault}" if withdrawal else str(fault),
            )
        )
    return sorted(found, key=lambda one: one.version)


def _version_summary(
    root: str, dataset: str, version: IndexedVersion, committed: Overview, there: Mapping[int, Mapping[str, int]]
) -> VersionSummary:
    status: Literal["published", "withdrawn", "rejected", "incomplete"] = "published"
    note = ""
    if version.status != "published":
        status, note = "rejected", version.note
    elif version.version in committed.withdrawals:
        status, note = "withdrawn", str(committed.withdrawals[version.version])
    elif faults := _faults(root, dataset, version, there):
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        status, note = "incomplete", f"{faults[0]}{more}: {CURE}"
    return VersionSummary(
        version=version.version,
        status=status,
        created=version.created_at,
        rows=version.rows,
        bytes=version.bytes,
        as_of=version.as_of,
        verdict=version.verdict,
        note=note,
    )


def _data_by_version(root: str, dataset: str, listed: Mapping[str, FileInfo]) -> dict[int, dict[str, int]]:
    """Return sizes of the visible files of each version, by their paths in its directory."""
    root = storage.normalise(root)
    found: dict[int, dict[str, int]] = {}
    for info in listed.values():
        number, path = layout.version_and_path(root, dataset, info.uri)
        if number is not None and not any(part.startswith(("_", ".")) for part in path.split("/")):
            found.setdefault(number, {})[path] = info.bytes
    return found


def _faults(root: str, dataset: str, version: IndexedVersion, there: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Return the faults of a live version's data files; read its manifest only if the files differ from the index."""
    files = there.get(version.version, {})
    if files_digest(files.items()) == version.files_digest:
        return []
    uri = layout.version_uri(storage.normalise(root), dataset, version.version)
    sizes = {layout.join(uri, path): size for path, size in files.items()}
    return faults_of_files(root, read_manifest(root, dataset, version.version), sizes)


def describe(root: str, dataset: str, version: int | None = None) -> Description:
    """Describe a version; the latest live one if none is given.

    Raises:
        VersionNotFound: there is no such version, or readers skip it.
    """
    root = storage.normalise(root)
    manifest = resolve(root, dataset, "latest" if version is None else version)
    by, uri = manifest.partition, layout.version_uri(root, dataset, manifest.version)
    there = {info.uri: info.bytes for info in storage.list_files(uri)}
    inputs = [
        f"{record.name} v{record.version}" if record.version else f"{record.name} ({record.uri})"
        for record in manifest.inputs
    ]
    return Description(
        name=short_name(dataset),
        dataset=dataset,
        kind=kind_in_words(dataset),
        version=manifest.version,
        uri=uri,
        faults=tuple(faults_of_files(root, manifest, there)),
        created=manifest.created_at,
        rows=manifest.rows,
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        entity=manifest.definition.get("entity"),
        partition=f"{by.buckets} buckets by {by.key}" if by else None,
        as_of=manifest.as_of,
        verdict=manifest.gate.verdict,
        run=manifest.run.flow_run_name or manifest.run.flow_run_id,
        inputs=tuple(inputs),
        columns=tuple(_columns(manifest)),
    )


def _columns(manifest: Manifest) -> list[ColumnSummary]:
    declared = declarations(manifest)
    found = []
    for column in manifest.columns:
        profile = manifest.profile.get(column.name)
        found.append(
            ColumnSummary(
                name=column.name,
                type=column.type,
                declared=declared.get(column.name, ""),
                nulls=profile.nulls / profile.count if profile and profile.count else None,
                minimum=profile.minimum if profile else None,
                mean=profile.mean if profile else None,
                maximum=profile.maximum if profile else None,
            )
        )
    return found


def declarations(manifest: Manifest) -> dict[str, str]:
    """Return the declaration of each feature of a group, in words of the definition."""
    definition: dict[str, Any] = manifest.definition
    features = definition.get("features", {})
    found: dict[str, str] = dict(features) if isinstance(features, dict) else {}
    for window in definition.get("windows", ()):
        days = window["days"]
        found |= {f"{name}_{days}d": f"{text} over {days} days" for name, text in window["features"].items()}
    return {**found, **definition.get("derived", {})}


def feature_names(manifest: Manifest) -> list[str]:
    """Return the columns of a feature version that are features: declared ones and its dimension's, in order."""
    others = {manifest.definition.get("entity"), *FEATURES}
    return [column.name for column in manifest.columns if column.name not in others]


def newest(root: str, dataset: str, known: Overview | None = None) -> Manifest | None:
    """Return the feature version for look-ups: the newest of those with the newest as-of time; None without any.

    It isn't always 'latest': a version that recomputes an old day is later, and has old values.

    Args:
        root: Root of the store.
        dataset: Dataset name.
        known: Current overview of the dataset; read if omitted.
    """
    first = dt.datetime.min.replace(tzinfo=dt.UTC)
    found = (overview(root, dataset) if known is None else known).warned()
    ranked = sorted(found.live, key=lambda one: (max(one.as_of, default=first), one.version), reverse=True)
    return first_live(root, dataset, [one.version for one in ranked])


SCHEMA = pa.schema(
    {"version": pa.int64(), "dataset": pa.string(), "feature_count": pa.int64(), "record_count": pa.int64()}
    | {"status": pa.string(), "thresholds": pa.string(), "creation_date": pa.timestamp("us", tz="UTC")}
)


def versions_table(root: str, datasets: Iterable[str]) -> pa.Table:
    """Describe every committed version of some datasets, published and rejected, by dataset and version.

    The index is its source: a version whose manifest was damaged since keeps its row.

    Returns:
        One row a version, in `SCHEMA`: feature_count is the number of columns, keys included; record_count is the
        number of rows; thresholds is the JSON of the configuration's 'thresholds', or null where it has none.

    Raises:
        CorruptVersion: a manifest can't be read.
    """
    rows = [
        {
            "version": one.version,
            "dataset": dataset,
            "feature_count": one.columns,
            "record_count": one.rows,
            "status": one.status,
            "thresholds": _json(one.thresholds),
            "creation_date": one.created_at,
        }
        for dataset in sorted(set(datasets))
        for one in versions.overview(root, dataset).warned().versions.values()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_versions_csv(root: str) -> str:
    """Write `versions_table` of all datasets of the feature store as CSV, replacing the last one.

    A table that was made before another flow published, and is written after that flow's, would lack its version: so
    the manifests are read once more after writing, and the last writer has seen all of them.

    Returns:
        URI of the CSV file.
    """
    uri = layout.join(storage.normalise(root), layout.METADATA)
    table, written = _feature_versions(root), None
    while table != written:
        sink = pa.BufferOutputStream()
        pacsv.write_csv(table, sink)
        storage.write_bytes(uri, sink.getvalue())
        table, written = _feature_versions(root), table
    return uri


def _feature_versions(root: str) -> pa.Table:
    store = layout.join(storage.normalise(root), layout.FEATURE_STORE)
    names = versions.list_datasets(store)
    return versions_table(root, [layout.join(layout.FEATURE_STORE, name) for name in names])


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)
