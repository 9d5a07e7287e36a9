"""OpenLineage events of flow runs, by hooks of Prefect: `@flow(**LINEAGE_HOOKS)`. Silent unless it is configured."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from tasks.publication import PublishedVersion
from tasks.report.openlineage import emit_end, emit_start, is_configured
from tasks.store.manifest import Manifest, RunRecord
from tasks.store.reading import read_manifest


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


LINEAGE_HOOKS: dict[str, Any] = {
    "on_running": [tell_start],
    "on_completion": [tell_end],
    "on_failure": [tell_end],
    "on_cancellation": [tell_end],
    "on_crashed": [tell_end],
}
