"""Last steps of every flow: the report of a judged version, and its commit."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefect import get_run_logger
from prefect.events import emit_event
from prefect.runtime import deployment, flow_run
from pydantic import BaseModel

from tasks.artifacts import publish_report
from tasks.engine.signals import held
from tasks.io import storage
from tasks.io.errors import GateFailed
from tasks.quality.faults import ITSELF, blind, failed, summary
from tasks.quality.profile import TableProfile
from tasks.report import page
from tasks.report.report import Report
from tasks.store import layout, versions
from tasks.store.conservation import check_written
from tasks.store.lineage import job_digest, package_versions
from tasks.store.manifest import (
    CheckResult,
    ColumnSpec,
    FaultResult,
    FileEntry,
    GateResult,
    Manifest,
    ReportDigest,
    RowBalance,
    RunRecord,
)
from tasks.store.reservation import Reservation, find_manifest

PUBLISHED = "training-data.version.published"
"""Event of a version's publication; automations and deployment triggers start from it."""


@dataclass(frozen=True, slots=True)
class JudgedVersion:
    """Version that is written, judged and reported, and not yet committed."""

    reservation: Reservation
    manifest: Manifest
    base: int | None = None
    """Number of the version that state is carried over from, as in `versions.commit`."""


COMMITTING: list[JudgedVersion] = []
"""Versions that this process has begun to commit, to report the published ones after a stop."""


class Written(Protocol):
    """Result of a job that wrote a version."""

    @property
    def reservation(self) -> Reservation:
        """Reservation of the version."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Data files."""

    @property
    def rejected_files(self) -> tuple[FileEntry, ...]:
        """Files of rejected rows."""

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Schema of the data files."""

    @property
    def balances(self) -> tuple[RowBalance, ...]:
        """Balances of the rows."""

    @property
    def profile(self) -> TableProfile:
        """Profile of the data files."""


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """Published version."""

    dataset: str
    version: int
    uri: str
    report: str
    verdict: str
    rows: int
    balances: tuple[RowBalance, ...]
    notes: tuple[tuple[str, str], ...] = ()
    """Further facts for the user who ran the flow, each with a label."""


def run_record() -> RunRecord:
    """Return the current flow run, for the manifest."""
    return RunRecord(flow_run_id=str(flow_run.id), flow_run_name=flow_run.name, deployment=deployment.name)


def write_report(report: Report, manifest: Manifest, reservation: Reservation, name: str | None = None) -> Manifest:
    """Write the report's two files beside the data and its artifacts to Prefect; return the manifest with digests.

    Args:
        report: Report to write.
        manifest: Manifest of the version.
        reservation: Reservation of the version.
        name: Prefix of the artifacts' keys; the last part of the dataset's name, if omitted.

    Raises:
        VersionConflict: a newer attempt exists, whose report has the same path.

    """
    name = name or manifest.dataset.rpartition("/")[2]
    versions.ensure_newest(reservation)
    html_uri = layout.join(reservation.uri, layout.REPORT_HTML)
    faces = {html_uri: page.html(report), layout.join(reservation.uri, layout.REPORT_JSON): report.to_json()}
    for uri, content in faces.items():
        storage.write_bytes(uri, content)
    publish_report(name, report.to_markdown(), report.checks_table(), html_uri)
    html, json = (hashlib.sha256(content).hexdigest() for content in faces.values())
    return manifest.model_copy(update={"report": ReportDigest(html_sha256=html, json_sha256=json)})


def manifest_of(
    written: Written,
    gate: GateResult,
    config: BaseModel,
    run: RunRecord,
    declaration: str = "",
    **more: Any,
) -> Manifest:
    """Return the manifest of a version that is written and judged.

    Args:
        written: Result of the job.
        gate: The gate's verdict.
        config: The run's configuration; it never contains credentials.
        run: The run.
        declaration: Digest of the declaration that made it.
        more: Further fields of the manifest: inputs always, and those of the kind of dataset.

    Raises:
        BalanceError: rows don't balance, or the files differ from the reports.

    """
    reservation = written.reservation
    check_written(reservation.dataset, reservation.uri, written.files, written.rejected_files, written.balances)
    return Manifest(
        dataset=reservation.dataset,
        version=reservation.version,
        status="rejected" if gate.verdict == "fail" else "published",
        created_at=dt.datetime.now(dt.UTC),
        files=written.files,
        rejected_files=written.rejected_files,
        columns=written.columns,
        balances=written.balances,
        profile=written.profile.columns(),
        gate=gate,
        config=config.model_dump(mode="json"),
        code_digest=job_digest(layout.kind(reservation.dataset), declaration),
        packages=package_versions(),
        run=run.model_copy(update={"attempt": reservation.attempt}),
        **more,
    )


def judged_version(
    manifest: Manifest,
    reservation: Reservation,
    previous: Manifest | None,
    self_test: Callable[[], tuple[FaultResult, ...]] | None,
    *,
    base: int | None = None,
    name: str | None = None,
    **report: Any,
) -> JudgedVersion:
    """Run the self-test of a version's gate, write the version's report and show both in Prefect.

    Args:
        manifest: Manifest of the version.
        reservation: Reservation of the version.
        previous: Manifest of the version it is compared with.
        self_test: Injects faults into a sample of the version and judges each; None leaves it out.
        base: As in `JudgedVersion`.
        name: As in `write_report`.
        report: Further fields of the report.

    Raises:
        VersionConflict: a newer attempt exists, whose report has the same path.

    """
    if self_test is not None:
        manifest = proven(manifest, self_test)
    manifest = write_report(Report.of(manifest, previous, **report), manifest, reservation, name)
    log = get_run_logger()
    verdict = manifest.gate.verdict
    (log.info if verdict == "pass" else log.warning)("%s: verdict %s", reservation.dataset, verdict)
    return JudgedVersion(reservation, manifest, base)


def proven(manifest: Manifest, self_test: Callable[[], tuple[FaultResult, ...]]) -> Manifest:
    """Return the manifest with the gate's self-test; the gate's verdict is unchanged.

    A self-test that can't be made doesn't fail the version: it is reported as failed.

    Args:
        manifest: Manifest of the written and judged version.
        self_test: Injects faults into a sample of the version, and judges each.

    """
    log = get_run_logger()
    try:
        results = self_test()
    except Exception as error:  # noqa: BLE001 - whatever the error, the version is whole and judged
        results = (failed(error),)
    unseen = blind(results)
    (log.warning if unseen else log.info)("%s: self-test: %s", manifest.dataset, summary(results))
    return manifest.model_copy(update={"self_test": results})


def publish(judged: Sequence[JudgedVersion], root: str, cures: Mapping[str, str]) -> list[PublishedVersion]:
    """Commit all versions of a run, or none.

    Args:
        judged: Versions of the run.
        root: Root of the store.
        cures: Advice about a failed check, by the check's name.

    Raises:
        GateFailed: the gate failed a version; it is recorded as rejected, and nothing is published.
        VersionConflict: another publisher holds a version.
        Superseded: another one was published since the version's base.

    """
    failed = [version for version in judged if version.manifest.gate.verdict == "fail"]
    if failed:
        for version in judged:
            versions.commit(version.reservation, _rejected(version, failed))
        raise GateFailed(_why(failed, cures))
    COMMITTING.extend(judged)
    with held():  # Ctrl-C between two commits would publish some of them
        manifests = [versions.commit(version.reservation, version.manifest, version.base) for version in judged]
        for manifest in manifests:
            announce(root, manifest)
    return [published(root, manifest) for manifest in manifests]


def announce(root: str, manifest: Manifest) -> None:
    """Tell Prefect of a committed version, so that waiting automations start.

    Sent after the commit, and again by a retry that finds its version committed: automations must tolerate this. If the
    API can't be reached, the event is lost, not the version.
    """
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    emit_event(
        event=PUBLISHED,
        resource={
            "prefect.resource.id": f"training-data.dataset.{manifest.dataset.replace('/', '.')}",
            "prefect.resource.name": f"{manifest.dataset} v{manifest.version}",
            "training-data.kind": layout.kind(manifest.dataset),
        },
        payload={
            "root": root,
            "dataset": manifest.dataset,
            "version": manifest.version,
            "uri": uri,
            "report": layout.join(uri, layout.REPORT_HTML),
            "rows": manifest.rows,
            "verdict": manifest.gate.verdict,
        },
    )


def _rejected(version: JudgedVersion, failed: Sequence[JudgedVersion]) -> Manifest:
    """Return the manifest of a version that isn't published, because it or another version of its run failed."""
    manifest = version.manifest
    if version in failed:
        return manifest
    message = f"Not published, because {', '.join(other.manifest.dataset for other in failed)} of the same run failed."
    check = CheckResult(name="same run", verdict="fail", bound="all groups pass", message=message)
    gate = GateResult(verdict="fail", checks=(*manifest.gate.checks, check))
    return manifest.model_copy(update={"status": "rejected", "gate": gate})


def _why(failed: Sequence[JudgedVersion], cures: Mapping[str, str]) -> str:
    """Describe the failed checks, their cures, and the location of the report."""
    checks = [
        (version.manifest.dataset, check)
        for version in failed
        for check in version.manifest.gate.checks
        if check.verdict == "fail"
    ]
    causes = [f"{dataset}: {check.message.rstrip('.')} (asked for {check.bound})" for dataset, check in checks]
    known = "; ".join(dict.fromkeys(cures[check.name] for _, check in checks if check.name in cures))
    shown = "; ".join(causes[:3]) + (f"; and {len(causes) - 3} more" if len(causes) > 3 else "")
    reports = ", ".join(layout.join(version.reservation.uri, layout.REPORT_HTML) for version in failed)
    cure = f" To go on: {known}." if known else ""
    return f"The quality gate failed, nothing was published. {shown}.{cure} Reports: {reports}"


def published(root: str, manifest: Manifest) -> PublishedVersion:
    """Return a committed version in the form for flows' callers."""
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    return PublishedVersion(
        dataset=manifest.dataset,
        version=manifest.version,
        uri=uri,
        report=layout.join(uri, layout.REPORT_HTML),
        verdict=manifest.gate.verdict,
        rows=manifest.rows,
        balances=manifest.balances,
        notes=_blindness(manifest),
    )


def _blindness(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """Describe the faults that a version's gate doesn't notice, in a line for the user who ran the flow."""
    unseen = blind(manifest.self_test)
    if not unseen:
        return ()
    if ITSELF in unseen:
        return (("blind", summary(manifest.self_test)),)
    return (("blind", f"the gate doesn't notice these faults: {', '.join(unseen)}; the report says why"),)


def is_published(judged: JudgedVersion) -> bool:
    """Check in the store that a version is published as this run has judged it."""
    reservation = judged.reservation
    manifest = find_manifest(reservation.root, reservation.dataset, reservation.version)
    return manifest is not None and manifest.status == "published" and manifest.run == judged.manifest.run


def committed_version(reservation: Reservation) -> PublishedVersion:
    """Return the version that an earlier attempt of this run has published, possibly without reporting it.

    Don't write under such a reservation any more: readers would see the files.
    """
    manifest = versions.resolve(reservation.root, reservation.dataset, reservation.version)
    announce(reservation.root, manifest)
    return published(reservation.root, manifest)
