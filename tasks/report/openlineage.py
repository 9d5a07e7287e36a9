"""OpenLineage events of runs and the versions they made, sent to a backend if one is configured.

Nothing is sent unless the client's settings name a destination: OPENLINEAGE_URL, OPENLINEAGE_CONFIG, an openlineage.yml
in the working directory or ~/.openlineage, or variables such as OPENLINEAGE__TRANSPORT__TYPE=file. The client is an
optional package. A flow run is a run; each version that it made is a separate run within it, so that the inputs of one
are not mixed with those of another. A flow run never fails because its events can't be sent: that is a warning.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import os
import uuid
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.io import storage
from tasks.store import layout
from tasks.store.manifest import ColumnProfile, InputRecord, Manifest, RunRecord

NAMESPACE = "training-data-pipelines"
"""Namespace of the jobs, unless OPENLINEAGE_NAMESPACE names another."""

_INSTALL = "install it (pip install openlineage-python), or unset its variables"
_FILES = (Path("openlineage.yml"), Path.home() / ".openlineage" / "openlineage.yml")
_warned: set[str] = set()
_log = logging.getLogger(__name__)


def is_configured() -> bool:
    """Return True if the client's settings name a destination for events, and don't disable them."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() in ("true", "1"):
        return False
    named = any(os.environ.get(name) for name in ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"))
    return named or any(name.startswith("OPENLINEAGE__") for name in os.environ) or any(p.is_file() for p in _FILES)


def emit_start(job: str, run: RunRecord, started: dt.datetime | None = None) -> bool:
    """Send the start of a flow run.

    Args:
        job: Name of the flow.
        run: The run.
        started: Time of the start, UTC; now if omitted.

    Returns:
        True if it was sent.
    """
    return _sent(lambda: [_Events(job, run).of_flow("START", started)])


def emit_end(
    job: str,
    run: RunRecord,
    root: str,
    manifests: Sequence[Manifest] = (),
    *,
    error: str | None = None,
    started: dt.datetime | None = None,
) -> bool:
    """Send the end of a flow run, with outputs and inputs; a version that the gate rejected is a failed run.

    Args:
        job: Name of the flow.
        run: The run.
        root: Root of the store.
        manifests: Versions that it made.
        error: Error, if it failed.
        started: Time of its start, UTC; the runs within it have this time, or else that of their manifests.

    Returns:
        True if all was sent.
    """

    def events() -> list[Any]:
        made = _Events(job, run)
        within = [event for manifest in manifests for event in made.of_version(root, manifest, started)]
        return [*within, made.of_flow("COMPLETE" if error is None else "FAIL", error=error)]

    return _sent(events)


def _sent(events: Callable[[], list[Any]]) -> bool:
    """Send events if that is configured; log an error once a process."""
    if not is_configured():
        return False
    try:
        from openlineage.client import OpenLineageClient
    except ImportError:
        _warn("OpenLineage is configured, but its client isn't there: no events are sent; %s", _INSTALL)
        return False
    try:
        client = OpenLineageClient()
        try:
            for event in events():
                client.emit(event)
        finally:
            client.close()
    except Exception as fault:  # noqa: BLE001 — a backend that is down is no reason to lose a run
        _warn("OpenLineage events can't be sent: %s; the run goes on without", f"{type(fault).__name__}: {fault}")
        return False
    return True


def _warn(text: str, detail: str) -> None:
    if text not in _warned:
        _warned.add(text)
        _log.warning(text, detail)


class _Events:
    """Factory of the events of one flow run; only called if the client is installed."""

    def __init__(self, job: str, run: RunRecord) -> None:
        from openlineage.client import facet_v2

        self.job, self.run = job, run
        self.namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or NAMESPACE
        self.producer = f"urn:{NAMESPACE}:{_version()}"
        facet_v2.set_producer(self.producer)

    def of_flow(self, kind: str, at: dt.datetime | None = None, error: str | None = None) -> Any:
        """Return an event of the flow run itself."""
        return self._event(kind, at, run_id=_uuid(self.run.flow_run_id), job=self.job, error=error)

    def of_version(self, root: str, manifest: Manifest, started: dt.datetime | None) -> list[Any]:
        """Return start and end of the inner run that made a version."""
        from openlineage.client.event_v2 import InputDataset, OutputDataset
        from openlineage.client.facet_v2 import parent_run

        parent = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=_uuid(self.run.flow_run_id)),
            job=parent_run.Job(namespace=self.namespace, name=self.job),
        )
        place: dict[str, Any] = {
            "run_id": _uuid(f"{self.run.flow_run_id} {manifest}"),
            "job": f"{self.job}.{manifest.dataset}",
            "parent": parent,
        }
        data: dict[str, Any] = {
            "inputs": [InputDataset(*_name(_directory(one)), **_input_facets(one)) for one in manifest.inputs],
            "outputs": [OutputDataset(*_name(layout.join(root, manifest.dataset)), **_output_facets(manifest))],
        }
        begun = min(started or manifest.created_at, manifest.created_at)
        error = None
        if manifest.status == "rejected":
            failed = [check.message for check in manifest.gate.checks if check.verdict == "fail"]
            error = f"The quality gate failed: {' '.join(failed)}"
        return [
            self._event("START", begun, **place),
            self._event("COMPLETE" if error is None else "FAIL", manifest.created_at, error=error, **place, **data),
        ]

    def _event(
        self,
        kind: str,
        at: dt.datetime | None,
        *,
        run_id: str,
        job: str,
        error: str | None = None,
        parent: Any = None,
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
    ) -> Any:
        from openlineage.client import event_v2
        from openlineage.client.facet_v2 import error_message_run, job_type_job

        facets: dict[str, Any] = {} if parent is None else {"parent": parent}
        if error is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message=error, programmingLanguage="Python")
        kind_of_job = job_type_job.JobTypeJobFacet(
            processingType="BATCH", integration="PREFECT", jobType="FLOW" if parent is None else "DATASET"
        )
        return event_v2.RunEvent(
            eventType=event_v2.RunState[kind],
            eventTime=(at or dt.datetime.now(dt.UTC)).astimezone(dt.UTC).isoformat(),
            run=event_v2.Run(runId=run_id, facets=facets),
            job=event_v2.Job(namespace=self.namespace, name=job, facets={"jobType": kind_of_job}),
            inputs=list(inputs),
            outputs=list(outputs),
            producer=self.producer,
        )


def _input_facets(one: InputRecord) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset, input_statistics_input_dataset

    size = sum(file.bytes for file in one.files) if one.files else None
    statistics = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
        rowCount=one.rows, size=size, fileCount=len(one.files) or None
    )
    facets: dict[str, Any] = {}
    if one.version is not None:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=f"v{one.version}")
    return {"facets": facets, "inputFacets": {"inputStatistics": statistics}}


def _output_facets(manifest: Manifest) -> dict[str, Any]:
    from openlineage.client.facet_v2 import (
        data_quality_assertions_dataset,
        data_quality_metrics_dataset,
        dataset_version_dataset,
        output_statistics_output_dataset,
        schema_dataset,
    )

    size = sum(file.bytes for file in manifest.files)
    fields = [schema_dataset.SchemaDatasetFacetFields(name=one.name, type=one.type) for one in manifest.columns]
    metrics = {
        name: data_quality_metrics_dataset.ColumnMetrics(**_metrics(column))
        for name, column in manifest.profile.items()
    }
    assertions = [
        data_quality_assertions_dataset.Assertion(
            assertion=check.name,
            success=check.verdict == "pass",
            column=check.column if check.column in manifest.profile else None,
            severity="warn" if check.verdict == "warn" else "error",
            description=check.message,
            expected=check.bound,
        )
        for check in manifest.gate.checks
    ]
    return {
        "facets": {
            "schema": schema_dataset.SchemaDatasetFacet(fields=fields),
            "version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=f"v{manifest.version}"),
            "dataQualityMetrics": data_quality_metrics_dataset.DataQualityMetricsDatasetFacet(
                columnMetrics=metrics, rowCount=manifest.rows, bytes=size, fileCount=len(manifest.files)
            ),
            "dataQualityAssertions": data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet(
                assertions=assertions
            ),
        },
        "outputFacets": {
            "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=manifest.rows, size=size, fileCount=len(manifest.files)
            )
        },
    }


def _metrics(column: ColumnProfile) -> dict[str, Any]:
    """Return the metrics that the facet has fields for; JSON has no infinities."""
    numbers = {"min": column.minimum, "max": column.maximum}
    known = {name: value for name, value in numbers.items() if isinstance(value, float) and math.isfinite(value)}
    return known | {
        "nullCount": column.nulls,
        "count": float(column.count - column.nulls),
        "distinctCount": column.distinct,
        "quantiles": {level: value for level, value in column.quantiles.items() if math.isfinite(value)} or None,
    }


def _directory(one: InputRecord) -> str:
    """Return the location of a table; for a version its dataset, as a facet names the version."""
    suffix = f"/v{one.version}"
    return one.uri.removesuffix(suffix) if one.version is not None else one.uri


def _name(uri: str) -> tuple[str, str]:
    """Return namespace and name of a dataset for OpenLineage: ('s3://bucket', 'prefix/name') or ('file', '/name')."""
    uri = storage.normalise(uri)
    if not storage.is_s3(uri):
        return "file", uri
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return f"s3://{bucket}", key or "/"


def _uuid(text: str) -> str:
    """Return a run's id, which must be a UUID: unchanged if it is one, else derived from it."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def _version() -> str:
    try:
        return metadata.version(NAMESPACE)
    except metadata.PackageNotFoundError:  # run from a source tree that isn't installed
        return "unknown"
