"""Lineage of a version back to its source files, and its provenance: the code and the libraries.

The manifests contain all of the lineage: each names its inputs with their fingerprints, its declaration, the digest of
the code and the run. Following them is enough; there is no separate registry.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import platform
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.io import storage
from tasks.io.errors import CorruptVersion
from tasks.store import layout
from tasks.store.manifest import Count, InputFile, InputRecord, Manifest, Record, RunRecord
from tasks.store.reading import read_manifest
from tasks.store.reservation import parse_manifest

PACKAGES = (
    *("ray", "prefect", "prefect-ray", "polars", "pyarrow", "numpy", "pandas"),
    *("numba", "pillow", "simplejpeg", "torch", "torchvision"),
)

_SHARED = ("tasks.io", "tasks.store", "tasks.quality", "tasks.engine")
"""Packages whose code makes datasets of all kinds."""


def job_digest(*packages: str, extra: str = "") -> str:
    """Return the digest of a job's code, as `code_digest`: of the shared packages and of some more, by import path."""
    specs = [find_spec(name) for name in (*_SHARED, *packages)]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
    assert len(places) == len(specs), f"{packages} are packages"
    return code_digest(*map(Path, places), extra=extra)


def code_digest(*packages: Path, extra: str = "") -> str:
    """Return the SHA-256 over the Python files of some directories and a text, hexadecimal; independent of location.

    Args:
        packages: Directories of Python files.
        extra: Anything else that affects the result, such as the digest of a declaration.
    """
    digest = hashlib.sha256(extra.encode())
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"\0{package.name}/{file.relative_to(package).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that affect the results."""
    versions = {"python": platform.python_version()}
    for name in ("training-data-pipelines", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree that isn't installed
            versions[name] = "unknown"
    return versions


_LOG = logging.getLogger(__name__)


class VersionNode(Record):
    """Version of a dataset."""

    id: str = Field(description="'<dataset>@v<N>'.")
    dataset: str = Field(description="Dataset name.")
    version: int = Field(ge=1, description="Version number N of vN.")
    uri: str = Field(description="Its directory.")
    status: Literal["published", "rejected", "withdrawn", "gone"] = Field(
        description="As in its manifest; withdrawn since; or gone: what was read is known, but it isn't there any more."
    )
    created_at: dt.datetime | None = Field(default=None, description="When it was made, UTC.")
    rows: Count | None = Field(default=None, description="Rows in its data files.")
    as_of: tuple[dt.datetime, ...] = Field(default=(), description="Times that its features are of, UTC.")
    definition: str | None = Field(default=None, description="SHA-256 of its declaration, hexadecimal.")
    code: str | None = Field(default=None, description="SHA-256 of the code and declaration, hexadecimal.")
    run: str | None = Field(default=None, description="Id of the flow run that made it.")


class SourceNode(Record):
    """External table, with every file of it that was read, in each of its states."""

    id: str = Field(description="'<name> <uri>'.")
    name: str = Field(description="Role, such as 'transactions'.")
    uri: str = Field(description="What the configuration named.")
    files: tuple[InputFile, ...] = Field(default=(), description="Files; one that was changed stands twice.")


class TrainingNode(Record):
    """Training on a version."""

    id: str = Field(description="Its directory.")
    uri: str = Field(description="Its directory.")
    verdict: str = Field(description="Verdict of its report.")
    created_at: dt.datetime = Field(description="When its report was made, UTC.")
    run: str = Field(description="Id of the flow run that trained.")


class Edge(Record):
    """Edge from an input to a node made from it."""

    source: str = Field(description="Id of the node that was read.")
    target: str = Field(description="Id of the node that was made from it.")
    files: Count = Field(default=0, description="Files that were read.")
    fingerprint: str | None = Field(
        default=None, description="SHA-256 over the fingerprints of those files, in their order, hexadecimal."
    )


class Lineage(Record):
    """Version and everything it was made from."""

    of: str = Field(description="Id of the version that was asked for.")
    versions: tuple[VersionNode, ...] = Field(description="Versions of our datasets, it and then those before it.")
    sources: tuple[SourceNode, ...] = Field(default=(), description="Tables that aren't ours.")
    trainings: tuple[TrainingNode, ...] = Field(default=(), description="Trainings on the version that was asked for.")
    runs: tuple[RunRecord, ...] = Field(default=(), description="Flow runs that made them.")
    edges: tuple[Edge, ...] = Field(default=(), description="What was made from what.")

    def to_json(self) -> bytes:
        """Return canonical JSON (sorted keys, UTF-8); `Lineage.model_validate_json` reads it back."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, indent=1)
        return text.encode() + b"\n"


def trace(root: str, dataset: str, version: int) -> Lineage:
    """Return the lineage of a committed version, published or rejected, with the trainings on it.

    Raises:
        VersionNotFound: the version isn't committed.
        CorruptVersion: its manifest can't be read; an unreadable manifest of an earlier version counts as deleted.
    """
    root = storage.normalise(root)
    return trace_manifest(root, read_manifest(root, dataset, version))


def trace_manifest(root: str, manifest: Manifest) -> Lineage:
    """Return the lineage of a version by its manifest, which may not be committed yet."""
    root = storage.normalise(root)
    uri = manifest.uri(root)
    record = layout.join(uri, layout.WITHDRAWN)
    found = _Found()
    found.add(uri, manifest, withdrawn=record in storage.read_many([record]))
    pending = list(manifest.inputs)
    while pending:
        fresh = {one.uri: one for one in pending if one.version is not None and not found.knows(one)}
        made = _read(fresh.values())
        for uri, one in fresh.items():
            found.add(uri, made[uri][0], withdrawn=made[uri][1], recorded=one)
        pending = [one for before, _ in made.values() if before is not None for one in before.inputs]
    own = _id(manifest.dataset, manifest.version)
    trainings = _trainings(root, manifest)
    runs = {run.flow_run_id: run for _, run in trainings} | found.runs
    return Lineage(
        of=own,
        versions=tuple(found.versions.values()),
        sources=tuple(
            SourceNode(id=_source_id(one), name=one.name, uri=one.uri, files=tuple(files.values()))
            for one, files in found.sources.values()
        ),
        trainings=tuple(training for training, _ in trainings),
        runs=tuple(runs.values()),
        edges=(*found.edges, *(Edge(source=own, target=training.id) for training, _ in trainings)),
    )


class _Found:
    """Nodes, runs and edges collected so far."""

    def __init__(self) -> None:
        self.versions: dict[str, VersionNode] = {}
        self.sources: dict[str, tuple[InputRecord, dict[tuple[str, str], InputFile]]] = {}
        self.runs: dict[str, RunRecord] = {}
        self.edges: list[Edge] = []

    def knows(self, one: InputRecord) -> bool:
        return one.version is not None and _id(one.name, one.version) in self.versions

    def add(
        self, uri: str, manifest: Manifest | None, *, withdrawn: bool = False, recorded: InputRecord | None = None
    ) -> None:
        """Add a version, with its run and the edges to its inputs; without a manifest, only its record as an input."""
        if manifest is None:
            assert recorded is not None, "a version without manifest is known from who read it"
            assert recorded.version is not None, "and is a version"
            key = _id(recorded.name, recorded.version)
            facts: dict[str, Any] = {"dataset": recorded.name, "version": recorded.version, "rows": recorded.rows}
            self.versions[key] = VersionNode(id=key, uri=uri, status="gone", **facts)
            return
        key = _id(manifest.dataset, manifest.version)
        self.versions[key] = VersionNode(
            id=key,
            dataset=manifest.dataset,
            version=manifest.version,
            uri=uri,
            status="withdrawn" if withdrawn else manifest.status,
            created_at=manifest.created_at,
            rows=manifest.rows,
            as_of=manifest.as_of,
            definition=_digest(manifest.definition) if manifest.definition else None,
            code=manifest.code_digest,
            run=manifest.run.flow_run_id,
        )
        self.runs.setdefault(manifest.run.flow_run_id, manifest.run)
        for one in manifest.inputs:
            before = _source_id(one) if one.version is None else _id(one.name, one.version)
            if one.version is None:
                files = self.sources.setdefault(before, (one, {}))[1]
                files.update({(file.uri, file.fingerprint): file for file in one.files})
            fingerprint = _digest([file.fingerprint for file in one.files]) if one.files else None
            self.edges.append(Edge(source=before, target=key, files=len(one.files), fingerprint=fingerprint))


def _read(inputs: Iterable[InputRecord]) -> dict[str, tuple[Manifest | None, bool]]:
    """Read versions by their directories: manifest, None if it is deleted, and True if it is withdrawn."""
    wanted = {one.uri: one for one in inputs}
    contents = storage.read_many(
        layout.join(uri, name) for uri in wanted for name in (layout.MANIFEST, layout.WITHDRAWN)
    )
    found: dict[str, tuple[Manifest | None, bool]] = {}
    for uri, one in wanted.items():
        place = layout.join(storage.normalise(uri), layout.MANIFEST)
        assert one.version is not None, "only versions are read"
        manifest = None
        if place in contents:
            try:
                manifest = parse_manifest(place, contents[place], one.name, one.version)
            except CorruptVersion:  # an unreadable manifest of an old version must not fail a new one
                manifest = None
        found[uri] = manifest, layout.join(storage.normalise(uri), layout.WITHDRAWN) in contents
    return found


def _trainings(root: str, manifest: Manifest) -> list[tuple[TrainingNode, RunRecord]]:
    """Return the trainings on a streaming-ready version that have a report."""
    if not manifest.dataset.startswith(layout.STREAMING_READY + "/"):
        return []
    runs = layout.training_runs(root, manifest.dataset.removeprefix(layout.STREAMING_READY + "/"))
    names = [name for name in storage.list_directories(runs) if name.startswith(f"v{manifest.version}-")]
    uris = {layout.join(runs, name, layout.REPORT_JSON): layout.join(runs, name) for name in sorted(names)}
    contents = storage.read_many(uris)
    found = []
    for report, uri in uris.items():
        if report in contents:
            try:
                raw = json.loads(contents[report])
                run = RunRecord.model_validate(raw["run"])
                facts = {"verdict": raw["verdict"], "created_at": raw["created_at"], "run": run.flow_run_id}
                found.append((TrainingNode(id=uri, uri=uri, **facts), run))
            except (ValueError, LookupError, TypeError) as fault:  # the rest of the lineage doesn't depend on it
                _LOG.warning("left out of the lineage: %s is no report of a training (%s)", report, fault)
    return found


def _id(dataset: str, version: int) -> str:
    return f"{dataset}@v{version}"


def _source_id(one: InputRecord) -> str:
    return f"{one.name} {one.uri}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
