"""What a run made is told in events that OpenLineage takes; a run never fails for them."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest

from tasks.quality.profile import profile_table
from tasks.report import openlineage
from tasks.report.openlineage import emit_end, emit_start
from tasks.store.manifest import (
    CheckResult,
    ColumnSpec,
    FileEntry,
    GateResult,
    InputFile,
    InputRecord,
    Manifest,
    RowBalance,
    RunRecord,
)

client = pytest.importorskip("openlineage.client")

RUN = RunRecord(flow_run_id=str(uuid.UUID(int=7)), flow_run_name="vivid-otter")
NOW = dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC)
ROOT = "s3://lake/store"

# What the specification asks of an event: required fields, their types and formats, and facets that say what they are.
FACETS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["_producer", "_schemaURL"],
        "properties": {name: {"type": "string", "format": "uri"} for name in ("_producer", "_schemaURL")},
    },
}
DATASETS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["namespace", "name"],
        "properties": {
            "namespace": {"type": "string"},
            "name": {"type": "string"},
            **dict.fromkeys(("facets", "inputFacets", "outputFacets"), FACETS),
        },
        "additionalProperties": False,
    },
}
EVENT = {
    "type": "object",
    "required": ["eventType", "eventTime", "run", "job", "producer", "schemaURL"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "format": "date-time"},
        "producer": {"type": "string", "format": "uri"},
        "schemaURL": {"type": "string", "format": "uri"},
        "run": {
            "type": "object",
            "required": ["runId"],
            "properties": {"runId": {"type": "string", "format": "uuid"}, "facets": FACETS},
        },
        "job": {
            "type": "object",
            "required": ["namespace", "name"],
            "properties": {"namespace": {"type": "string"}, "name": {"type": "string"}, "facets": FACETS},
        },
        "inputs": DATASETS,
        "outputs": DATASETS,
    },
    "additionalProperties": False,
}
MODELS = {
    "schema": "schema_dataset.SchemaDatasetFacet",
    "version": "dataset_version_dataset.DatasetVersionDatasetFacet",
    "dataQualityMetrics": "data_quality_metrics_dataset.DataQualityMetricsDatasetFacet",
    "dataQualityAssertions": "data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet",
    "outputStatistics": "output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet",
    "inputStatistics": "input_statistics_input_dataset.InputStatisticsInputDatasetFacet",
    "parent": "parent_run.ParentRunFacet",
    "tags": "tags_run.TagsRunFacet",  # the client adds its own version
    "errorMessage": "error_message_run.ErrorMessageRunFacet",
    "jobType": "job_type_job.JobTypeJobFacet",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine's own, and no warning given yet."""
    for name in list(os.environ):
        if name.startswith("OPENLINEAGE"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(openlineage, "_FILES", (Path("openlineage.yml"),))
    monkeypatch.setattr(openlineage, "_warned", set())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """File to which events go, one a line."""
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(path))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    return path


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def manifest(version: int = 3, status: str = "published", **changes: Any) -> Manifest:
    table = pa.table(
        {
            "id": [1, 2, 3],
            "spent": [1.5, None, float("inf")],
            "tier": ["a", "b", "b"],
            "empty": pa.nulls(3, pa.float64()),
        }
    )
    check = CheckResult(name="nulls", column="spent", verdict="warn", figure=0.3, bound="≤ 0.1", message="Some nulls.")
    if status == "rejected":
        check = check.model_copy(update={"verdict": "fail"})
    read = InputFile(uri="s3://raw/transactions/a.parquet", bytes=100, fingerprint="etag:1")
    fields: dict[str, Any] = {
        "dataset": "feature-store/training-ready/churn",
        "version": version,
        "status": status,
        "created_at": NOW,
        "files": (FileEntry(path="part-00000-a1.parquet", rows=3, bytes=50, digest="blake3:" + "0" * 64),),
        "columns": tuple(ColumnSpec(name=field.name, type=str(field.type)) for field in table.schema),
        "balances": (RowBalance(name="spine", rows_in=3, rows_out=3),),
        "profile": profile_table(table).columns(),
        "gate": GateResult(verdict=check.verdict, checks=(check,)),
        "inputs": (
            InputRecord(name="transactions", uri="s3://raw/transactions/", rows=10, files=(read,)),
            InputRecord(
                name="feature-store/customer-features",
                uri=f"{ROOT}/feature-store/customer-features/v2",
                version=2,
                rows=5,
            ),
        ),
        "config": {},
        "code_digest": "0",
        "packages": {},
        "run": RUN,
    }
    return Manifest(**fields | changes)


def assert_valid(event: dict[str, Any]) -> None:
    """As the specification has it; each facet is one that its class in the client's package takes."""
    jsonschema.validate(event, EVENT, format_checker=jsonschema.FormatChecker())
    dt.datetime.fromisoformat(event["eventTime"])
    uuid.UUID(event["run"]["runId"])
    owners = [event["run"], event["job"], *event["inputs"], *event["outputs"]]
    for owner in owners:
        for kind in ("facets", "inputFacets", "outputFacets"):
            for name, facet in owner.get(kind, {}).items():
                module, _, cls = MODELS[name].partition(".")
                model = getattr(getattr(client.facet_v2, module), cls)
                known = {key: value for key, value in facet.items() if not key.startswith("_")}
                assert facet["_schemaURL"] == model._get_schema()
                model(**known)


def test_nothing_is_sent_unless_it_is_configured(caplog: pytest.LogCaptureFixture) -> None:
    assert not emit_start("feature-store", RUN)
    assert not emit_end("feature-store", RUN, ROOT, [manifest()])
    assert caplog.records == []


def test_a_run_and_what_it_made(log: Path) -> None:
    assert emit_start("feature-store", RUN, NOW)
    assert emit_end("feature-store", RUN, ROOT, [manifest(), manifest(4)], started=NOW - dt.timedelta(hours=1))
    found = events(log)
    for event in found:
        assert_valid(event)
    flow = [event for event in found if event["job"]["name"] == "feature-store"]
    assert [event["eventType"] for event in flow] == ["START", "COMPLETE"]
    assert {event["run"]["runId"] for event in flow} == {RUN.flow_run_id}
    assert {event["job"]["namespace"] for event in found} == {"training-data-pipelines"}
    within = [event for event in found if event not in flow]
    assert [event["eventType"] for event in within] == ["START", "COMPLETE"] * 2
    assert {event["job"]["name"] for event in within} == {"feature-store.feature-store/training-ready/churn"}
    assert within[0]["run"]["runId"] == within[1]["run"]["runId"] != within[2]["run"]["runId"]
    assert within[0]["eventTime"] < within[1]["eventTime"]
    for event in within:
        assert event["run"]["facets"]["parent"]["run"]["runId"] == RUN.flow_run_id


def test_inputs_and_outputs(log: Path) -> None:
    emit_end("feature-store", RUN, ROOT, [manifest()])
    (event,) = (event for event in events(log) if event["outputs"])
    transactions, features = event["inputs"]
    assert (transactions["namespace"], transactions["name"]) == ("s3://raw", "transactions")
    assert transactions["inputFacets"]["inputStatistics"]["rowCount"] == 10
    assert (features["namespace"], features["name"]) == ("s3://lake", "store/feature-store/customer-features")
    assert features["facets"]["version"]["datasetVersion"] == "v2"
    (output,) = event["outputs"]
    assert (output["namespace"], output["name"]) == ("s3://lake", "store/feature-store/training-ready/churn")
    facets = output["facets"]
    assert facets["version"]["datasetVersion"] == "v3"
    assert [(field["name"], field["type"]) for field in facets["schema"]["fields"]] == [
        ("id", "int64"),
        ("spent", "double"),
        ("tier", "string"),
        ("empty", "double"),
    ]
    metrics = facets["dataQualityMetrics"]
    assert (metrics["rowCount"], metrics["bytes"], metrics["fileCount"]) == (3, 50, 1)
    assert metrics["columnMetrics"]["spent"]["nullCount"] == 1
    assert metrics["columnMetrics"]["id"]["min"] == 1.0
    assert metrics["columnMetrics"]["tier"]["distinctCount"] == 2
    (assertion,) = facets["dataQualityAssertions"]["assertions"]
    assert (assertion["assertion"], assertion["column"], assertion["success"]) == ("nulls", "spent", False)
    assert assertion["severity"] == "warn"
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 3


def test_a_local_store_and_an_id_of_ones_own(log: Path, tmp_path: Path) -> None:
    run = RunRecord(flow_run_id="by hand")
    local = InputRecord(name="spine", uri=str(tmp_path / "won #1.parquet"))
    emit_end("feature-store", run, str(tmp_path / "data"), [manifest(inputs=(local,))])
    (event,) = (event for event in events(log) if event["outputs"])
    assert_valid(event)
    names = [(one["namespace"], one["name"]) for one in (*event["inputs"], *event["outputs"])]
    assert names == [
        ("file", str(tmp_path / "won #1.parquet")),
        ("file", str(tmp_path / "data/feature-store/training-ready/churn")),
    ]


def test_a_failed_run(log: Path) -> None:
    emit_end("feature-store", RUN, ROOT, [manifest(status="rejected")], error="GateFailed: too many nulls")
    found = events(log)
    for event in found:
        assert_valid(event)
    assert [event["eventType"] for event in found] == ["START", "FAIL", "FAIL"]
    messages = [event["run"]["facets"]["errorMessage"]["message"] for event in found[1:]]
    assert messages == ["The quality gate failed: Some nulls.", "GateFailed: too many nulls"]


def test_over_http(monkeypatch: pytest.MonkeyPatch, backend: tuple[str, list[dict[str, Any]]]) -> None:
    url, received = backend
    monkeypatch.setenv("OPENLINEAGE_URL", url)
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "ours")
    assert emit_start("feature-store", RUN)
    assert emit_end("feature-store", RUN, ROOT, [manifest()])
    for event in received:
        assert_valid(event)
    assert [event["eventType"] for event in received] == ["START", "START", "COMPLETE", "COMPLETE"]
    assert {event["job"]["namespace"] for event in received} == {"ours"}


@pytest.fixture
def backend() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A small server that keeps the events that are sent to it."""
    received: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def test_a_configuration_file(tmp_path: Path) -> None:
    log = tmp_path / "by_file.jsonl"
    Path("openlineage.yml").write_text(f"transport: {{type: file, log_file_path: {log}, append: true}}\n")
    assert emit_start("feature-store", RUN)
    assert len(events(log)) == 1


def test_disabled_is_not_configured(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    assert not emit_start("feature-store", RUN)
    assert not log.exists()


def test_what_goes_wrong_is_said_once_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "no such transport")
    with caplog.at_level(logging.WARNING, logger="tasks.report.openlineage"):
        assert not emit_start("feature-store", RUN)
        assert not emit_end("feature-store", RUN, ROOT, [manifest()])
    (record,) = (record for record in caplog.records if record.name == "tasks.report.openlineage")
    assert "can't be sent" in record.getMessage()


def test_without_the_client_it_is_said_how_to_get_it(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    assert not emit_start("feature-store", RUN)
    assert "pip install openlineage-python" in caplog.text


def test_it_needs_no_client_where_it_is_not_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    assert not emit_end("feature-store", RUN, ROOT, [manifest()])
