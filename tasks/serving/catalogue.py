"""What is in the store, as values for people and programs: datasets, their versions, and what one version holds."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.core import layout, storage
from tasks.core.errors import VersionNotFound
from tasks.core.manifest import Manifest
from tasks.core.names import closest
from tasks.core.own_columns import FEATURES
from tasks.core.reading import CURE, Committed, faults_of_files, list_datasets, read_committed, resolve
from tasks.features.incremental import as_of_times

Kind = Literal["features", "training set", "streaming copy", "images", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """One dataset: its latest live version, if it has one, and how many there are.

    status: 'ok', or which versions readers can't use: 'v2 incomplete, v3 damaged'.
    """

    name: str
    dataset: str
    kind: Kind
    version: int | None
    versions: int
    status: str
    rows: int | None
    columns: int | None
    as_of: dt.datetime | None
    created: dt.datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSummary:
    """One committed version.

    status: also 'damaged' (its manifest can't be read, so that nothing else is known of it) and 'incomplete' (data
    files are missing or of another size). note: why, and what to do.
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
    """One column of a version, with its profile's main figures."""

    name: str
    type: str
    declared: str
    nulls: float | None
    minimum: float | str | None
    mean: float | None
    maximum: float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One version: where it is, what it was made from, and its columns; faults: of its data files, a sentence each."""

    name: str
    dataset: str
    kind: Kind
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


def find_dataset(root: str, name: str, kind: Kind | None = None) -> str:
    """Full name of a dataset, given that or its last part: 'customer-features' → 'feature-store/customer-features'.

    A copy for streaming has the name of what it was made from, which is the one that is meant.

    Raises:
        VersionNotFound: there is none of that name, or several end with it; the message names the closest.

    """
    known = [found for found in list_datasets(root) if kind is None or kind_of(found) == kind]
    if name in known:
        return name
    matching = [found for found in known if short_name(found) == name]
    matching = [found for found in matching if kind_of(found) != "streaming copy"] or matching
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
    """Last part of a dataset's name."""
    return dataset.rpartition("/")[2]


def kind_of(dataset: str) -> Kind:
    """What a dataset is, in words for people."""
    return layout.kind(dataset).replace("-", " ")  # type: ignore[return-value]


def summaries(root: str) -> list[DatasetSummary]:
    """Every dataset under a root, by name."""
    return [_summary(root, dataset) for dataset in list_datasets(root)]


def _summary(root: str, dataset: str) -> DatasetSummary:
    committed, listed = read_committed(root, dataset), _listed(root, dataset)
    live = committed.live
    faulty = {manifest.version: "incomplete" for manifest in live if faults_of_files(root, manifest, listed)}
    faulty |= dict.fromkeys(committed.unreadable, "damaged")
    latest = live[-1] if live else None
    return DatasetSummary(
        name=short_name(dataset),
        dataset=dataset,
        kind=kind_of(dataset),
        version=latest.version if latest else None,
        versions=len(live),
        status=", ".join(f"v{number} {faulty[number]}" for number in sorted(faulty)) or "ok",
        rows=latest.rows if latest else None,
        columns=len(latest.columns) if latest else None,
        as_of=max((moment for manifest in live for moment in as_of_times(manifest)), default=None),
        created=latest.created_at if latest else None,
    )


def version_summaries(root: str, dataset: str) -> list[VersionSummary]:
    """Every committed version of a dataset, ascending."""
    committed, listed = read_committed(root, dataset), _listed(root, dataset)
    found = [_version_summary(root, manifest, committed, listed) for manifest in committed.manifests.values()]
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


def _version_summary(root: str, manifest: Manifest, committed: Committed, listed: Mapping[str, int]) -> VersionSummary:
    status: Literal["published", "withdrawn", "rejected", "incomplete"] = manifest.status
    note = ""
    if manifest.status == "rejected":
        note = "; ".join(check.message for check in manifest.gate.checks if check.verdict == "fail")
    elif manifest.version in committed.withdrawals:
        status, note = "withdrawn", str(committed.withdrawals[manifest.version])
    elif faults := faults_of_files(root, manifest, listed):
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        status, note = "incomplete", f"{faults[0]}{more}: {CURE}"
    return VersionSummary(
        version=manifest.version,
        status=status,
        created=manifest.created_at,
        rows=manifest.rows,
        bytes=sum(file.bytes for file in manifest.files),
        as_of=as_of_times(manifest),
        verdict=manifest.gate.verdict,
        note=note,
    )


def _listed(root: str, dataset: str) -> dict[str, int]:
    return _sizes(layout.dataset_uri(storage.normalise(root), dataset))


def _sizes(uri: str) -> dict[str, int]:
    return {info.uri: info.bytes for info in storage.list_files(uri)}


def describe(root: str, dataset: str, version: int | None = None) -> Description:
    """What a version holds; the latest live one if none is given.

    Raises:
        VersionNotFound: there is no such version, or readers pass it over.

    """
    root = storage.normalise(root)
    manifest = resolve(root, dataset, "latest" if version is None else version)
    by, uri = manifest.partition, layout.version_uri(root, dataset, manifest.version)
    inputs = [
        f"{record.name} v{record.version}" if record.version else f"{record.name} ({record.uri})"
        for record in manifest.inputs
    ]
    return Description(
        name=short_name(dataset),
        dataset=dataset,
        kind=kind_of(dataset),
        version=manifest.version,
        uri=uri,
        faults=tuple(faults_of_files(root, manifest, _sizes(uri))),
        created=manifest.created_at,
        rows=manifest.rows,
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        entity=manifest.definition.get("entity"),
        partition=f"{by.buckets} buckets by {by.key}" if by else None,
        as_of=as_of_times(manifest),
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
    """How each feature of a group was declared, in words of the definition."""
    definition: dict[str, Any] = manifest.definition
    features = definition.get("features", {})
    found: dict[str, str] = dict(features) if isinstance(features, dict) else {}
    for window in definition.get("windows", ()):
        days = window["days"]
        found |= {f"{name}_{days}d": f"{text} over {days} days" for name, text in window["features"].items()}
    return {**found, **definition.get("derived", {})}


def feature_names(manifest: Manifest) -> list[str]:
    """Columns of a feature version that are features: declared ones and its dimension's, in order."""
    others = {manifest.definition.get("entity"), *FEATURES}
    return [column.name for column in manifest.columns if column.name not in others]


def newest(manifests: Sequence[Manifest]) -> Manifest | None:
    """The feature version to look up in: the newest of those that hold the newest as-of time; None of none.

    It isn't always 'latest': a version that computes an old day again is later, and has old values.
    """
    first = dt.datetime.min.replace(tzinfo=dt.UTC)
    return max(manifests, key=lambda m: (max(as_of_times(m), default=first), m.version), default=None)
