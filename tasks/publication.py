"""First and last steps of every flow: the reservation of versions; their self-test, report, commit and announcement."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State
from prefect.events import emit_event
from prefect.flows import Flow
from prefect.runtime import flow_run

from tasks.artifacts import publish_report
from tasks.engine.cluster import held
from tasks.io import storage
from tasks.io.errors import GateFailed, Superseded
from tasks.kinds import kind_of
from tasks.quality.faults import ITSELF, blind, failed, summary
from tasks.quality.rules import Figures, Written
from tasks.report.openlineage import emit_end, emit_start, is_configured
from tasks.report.report import Report, to_html
from tasks.runner import RETRY, ray_runner
from tasks.store import layout, versions
from tasks.store.catalogue import write_versions_csv
from tasks.store.lineage import package_versions, trace_manifest
from tasks.store.manifest import (
    CheckResult,
    FaultResult,
    GateResult,
    Manifest,
    ReportDigest,
    RowBalance,
    RunRecord,
)
from tasks.store.reading import read_manifest
from tasks.store.reservation import Reservation, find_manifest, reserve

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


@task(name="reserve-versions", cache_policy=NO_CACHE, **RETRY)
def reserve_versions(root: str, datasets: Sequence[str], run_id: str, *, keep: bool = False) -> list[Reservation]:
    """Reserve the next version of each dataset; remove the files of an earlier attempt.

    Called in the flow's process, whose death frees the reservations.

    Args:
        root: Root of the store.
        datasets: Names of the datasets.
        run_id: The flow run.
        keep: Leave the files of an earlier attempt to the job, which takes the finished ones over.

    Raises:
        InputError: a dataset is of no known kind.
    """
    reserved = []
    for dataset in datasets:
        kind_of(dataset)  # an error comes before the work
        reserved.append(reserve(root, dataset, run_id))
        if not keep:
            versions.discard_attempt_files(reserved[-1])
    return reserved


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
    faces = {html_uri: to_html(report), layout.join(reservation.uri, layout.REPORT_JSON): report.to_json()}
    for uri, content in faces.items():
        storage.write_bytes(uri, content)
    publish_report(name, report.to_markdown(), report.checks_table(), html_uri)
    html, json = (hashlib.sha256(content).hexdigest() for content in faces.values())
    return manifest.model_copy(update={"report": ReportDigest(html_sha256=html, json_sha256=json)})


def judged_version(
    written: Written,
    config: Any,
    run: RunRecord,
    previous: Manifest | None,
    *,
    recorded: Mapping[str, Any],
    figures: Figures | None = None,
    base: int | None = None,
    name: str | None = None,
    traced: bool = False,
    **report: Any,
) -> JudgedVersion:
    """Judge a written version, test its gate, write its report and show both in Prefect.

    Args:
        written: Result of the job.
        config: The run's configuration; it never contains credentials.
        run: The run.
        previous: Manifest of the version it is compared with.
        recorded: Fields of the manifest that its kind adds: `inputs` and `definition` always.
        figures: What the gate judges, if that isn't the result of the job.
        base: As in `JudgedVersion`.
        name: As in `write_report`.
        traced: Show the whole lineage in the report.
        report: Further fields of the report.

    Raises:
        BalanceError: rows don't balance, or the files differ from the reports.
        VersionConflict: a newer attempt exists, whose report has the same path.
    """
    reservation = written.reservation
    kind, root = kind_of(reservation.dataset), reservation.root
    gate = kind.judge(config, figures or written, previous)
    manifest = manifest_of(written, gate, config, run, recorded)
    if config.self_test:
        manifest = proven(manifest, partial(kind.self_test, root, manifest, previous))
    fields = {"timings": written.timings, **report}
    if traced:
        fields["lineage"] = trace_manifest(root, manifest)
    manifest = write_report(Report.of(manifest, previous, **fields), manifest, reservation, name)
    log = get_run_logger()
    verdict = manifest.gate.verdict
    (log.info if verdict == "pass" else log.warning)("%s: verdict %s", reservation.dataset, verdict)
    return JudgedVersion(reservation, manifest, base)


def manifest_of(
    written: Written, gate: GateResult, config: Any, run: RunRecord, recorded: Mapping[str, Any]
) -> Manifest:
    """Return the manifest of a version that is written and judged, with arguments as those of `judged_version`.

    Raises:
        BalanceError: rows don't balance, or the files differ from the reports.
    """
    reservation = written.reservation
    files = written.files, written.rejected_files
    versions.check_written(reservation.dataset, reservation.uri, *files, written.balances)
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
        code_digest=kind_of(reservation.dataset).digest(recorded["definition"]),
        packages=package_versions(),
        run=run.model_copy(update={"attempt": reservation.attempt}),
        **recorded,
    )


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


@task(name="publish-versions", cache_policy=NO_CACHE, **RETRY)
def publish_versions(
    judged: Sequence[JudgedVersion], root: str, committed: Sequence[Reservation] = (), *, together: bool = False
) -> list[PublishedVersion]:
    """Commit the versions of a run that passed their gates; those superseded since their base are left out.

    Called in the flow's process: a commit is a conditional write, safe to repeat, but not to run in two places.

    Args:
        judged: Versions that this attempt has written.
        root: Root of the store.
        committed: Versions that an earlier attempt of this run has published.
        together: Commit all of them, or none.

    Raises:
        GateFailed: the gate failed a version; it is recorded as rejected.
        VersionConflict: another publisher holds a version.
    """
    published = [committed_version(reservation) for reservation in committed]
    failed: list[GateFailed] = []
    with held():
        for batch in [judged] if together else [[version] for version in judged]:
            try:
                published += publish(batch, root)
            except GateFailed as fault:
                failed.append(fault)
            except Superseded as fault:
                get_run_logger().warning("%s Planning anew", fault)
        if any(version.manifest.dataset.startswith(f"{layout.FEATURE_STORE}/") for version in judged):
            write_versions_csv(root)
    if failed:
        beside = ", ".join(f"{version.dataset} v{version.version}" for version in published)
        raise GateFailed(" ".join(map(str, failed)) + (f" (published beside it: {beside})" if beside else ""))
    return published


def publish(judged: Sequence[JudgedVersion], root: str) -> list[PublishedVersion]:
    """Commit all versions, or none.

    Raises:
        GateFailed: the gate failed a version; it is recorded as rejected, and nothing is published.
        VersionConflict: another publisher holds a version.
        Superseded: another one was published since the version's base.
    """
    failed = [version for version in judged if version.manifest.gate.verdict == "fail"]
    if failed:
        for version in judged:
            versions.commit(version.reservation, _rejected(version, failed))
        raise GateFailed(_why(failed))
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
    uri = manifest.uri(root)
    emit_event(
        event=PUBLISHED,
        resource={
            "prefect.resource.id": f"training-data.dataset.{manifest.dataset.replace('/', '.')}",
            "prefect.resource.name": str(manifest),
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


def _why(failed: Sequence[JudgedVersion]) -> str:
    """Describe the failed checks, their cures, and the location of the report."""
    checks = [
        (version.manifest.dataset, check)
        for version in failed
        for check in version.manifest.gate.checks
        if check.verdict == "fail"
    ]
    causes = [f"{dataset}: {check.message.rstrip('.')} (asked for {check.bound})" for dataset, check in checks]
    cures = [kind_of(dataset).cures.get(check.name) for dataset, check in checks]
    known = "; ".join(dict.fromkeys(filter(None, cures)))
    shown = "; ".join(causes[:3]) + (f"; and {len(causes) - 3} more" if len(causes) > 3 else "")
    reports = ", ".join(layout.join(version.reservation.uri, layout.REPORT_HTML) for version in failed)
    cure = f" To go on: {known}." if known else ""
    return f"The quality gate failed, nothing was published. {shown}.{cure} Reports: {reports}"


def published(root: str, manifest: Manifest) -> PublishedVersion:
    """Return a committed version in the form for flows' callers."""
    uri = manifest.uri(root)
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


def tell_start(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Send the start of a flow run; a hook."""
    if is_configured():
        emit_start(flow.name, _record(flow_run), state.timestamp)


def tell_end(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Send the end of a flow run, however it ended; a hook."""
    if not is_configured():
        return
    result: Any = state.result(raise_on_failure=False) if state.is_completed() else None
    made = [version for version in result or () if isinstance(version, PublishedVersion)]
    error = None if state.is_completed() else state.message or state.name
    root = _root(made[0]) if made else ""
    emit_end(flow.name, _record(flow_run), root, [_manifest(version) for version in made], error=error)


def _record(flow_run: FlowRun) -> RunRecord:
    return RunRecord(flow_run_id=str(flow_run.id), flow_run_name=flow_run.name)


def _root(version: PublishedVersion) -> str:
    return version.uri.removesuffix(f"/{version.dataset}/v{version.version}")


def _manifest(version: PublishedVersion) -> Manifest:
    return read_manifest(_root(version), version.dataset, version.version)


def flow_settings(describe: Callable[[Any], str]) -> dict[str, Any]:
    """Return the settings of a flow: its runs on Ray, their names, one retry, and the hooks that announce them.

    Args:
        describe: Function that names a run, from the flow's parameter `config`; the time is added.
    """

    def name() -> str:
        return f"{describe(flow_run.parameters['config'])} {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S}"

    return {
        "flow_run_name": name,
        "task_runner": ray_runner(),
        "retries": 1,
        "retry_delay_seconds": 5,
        "on_running": [tell_start],
        **{f"on_{end}": [tell_end] for end in ("completion", "failure", "cancellation", "crashed")},
    }
