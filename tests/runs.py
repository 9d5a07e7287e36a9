"""Flow runs that have ended, and what must be true of every version that they publish."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from uuid import UUID

import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, TaskRun

from tasks.io import storage
from tasks.publication import PublishedVersion
from tasks.store import layout, versions
from tasks.store.manifest import Manifest
from tests.test_runner import eventually, run_id, task_runs


@dataclass(frozen=True)
class Run:
    """A flow run that has ended."""

    root: str
    state: State

    @property
    def published(self) -> list[PublishedVersion]:
        return self.state.result()

    @property
    def id(self) -> UUID:
        return run_id(self.state)

    @property
    def uri(self) -> str:
        [version] = self.published
        return version.uri

    def record(self) -> Manifest:
        """The manifest of the only version."""
        [version] = self.published
        return self.manifest(version.dataset)

    def manifest(self, dataset: str) -> Manifest:
        number = next(version.version for version in self.published if version.dataset == dataset)
        return versions.resolve(self.root, dataset, number)

    def data(self, dataset: str) -> list[str]:
        return versions.data_files(self.root, self.manifest(dataset))

    def flow_run(self) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id)

    def tasks(self) -> dict[str, TaskRun]:
        """Task runs by name, once all of them have reached the API."""
        runs = eventually(lambda: task_runs(self.id), lambda runs: all(run.state.is_final() for run in runs))
        return {run.name: run for run in runs}

    def completed(self) -> Self:
        assert self.state.is_completed(), self.state.message
        return self

    def failed_at_once(self, kind: type[Exception], message: str) -> None:
        """Assert that an error ended the run, and that nothing was tried again."""
        assert self.state.name == "Failed"
        with pytest.raises(kind, match=message):
            self.state.result()
        assert self.flow_run().run_count == 1, "the run was tried again"
        assert {task.run_count for task in self.tasks().values()} <= {1}, "a task was tried again"


def assert_whole(run: Run, dataset: str, beside: Iterable[str] = ()) -> Manifest:
    """A version is what its manifest says, and nothing else stands in its directory but the files `beside`."""
    manifest = run.manifest(dataset)
    versions.verify(run.root, manifest)
    base = layout.version_uri(run.root, dataset, manifest.version)
    found = {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}
    listed = {file.path for file in (*manifest.files, *manifest.rejected_files, *manifest.side_files)}
    protocol = {layout.MANIFEST, layout.REPORT_HTML, layout.REPORT_JSON, *reservations(manifest), *beside}
    assert found == listed | protocol, f"{dataset}: other files than the manifest lists: {found ^ (listed | protocol)}"
    assert manifest.run.flow_run_id == str(run.id)
    assert manifest.rows == sum(pq.read_metadata(storage.open_input(uri)).num_rows for uri in run.data(dataset))
    for balance in manifest.balances:
        assert balance.missing == 0, f"{dataset}: {balance.name} doesn't balance: {balance}"
    return manifest


def reservations(manifest: Manifest) -> set[str]:
    return {layout.reservation_name(attempt) for attempt in range(1, manifest.run.attempt + 1)}


def assert_rejected(root: str, dataset: str, version: int) -> Manifest:
    """Assert that a version is whole, with its reports, and not published, as its gate failed."""
    manifest = versions.read_manifest(root, dataset, version)
    assert (manifest.status, manifest.gate.verdict) == ("rejected", "fail")
    versions.verify(root, manifest)
    uri = layout.version_uri(root, dataset, version)
    assert b"<html" in storage.read_bytes(layout.join(uri, layout.REPORT_HTML)).lower()
    assert storage.exists(layout.join(uri, layout.REPORT_JSON))
    assert [info.uri for info in storage.list_files(uri)] == [], "a reader that just opens the directory finds data"
    return manifest


def assert_nothing_published(root: str, datasets: Iterable[str]) -> None:
    for dataset in datasets:
        assert versions.published_versions(root, dataset) == [], f"{dataset} has a published version"
        for number in versions.version_numbers(root, dataset):
            files = storage.list_files(layout.version_uri(root, dataset, number))
            assert files == [], f"{dataset} v{number} shows data to readers that just open the directory: {files}"
