"""Tasks of the publish-dataset flow. They run in the flow's process, which has the Ray that the dataset lives in."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import progress
from tasks.datasets.config import DatasetConfig
from tasks.datasets.pipeline import DatasetWritten, find_content, write_dataset
from tasks.datasets.rows import Form
from tasks.kinds import kind_of
from tasks.publication import JudgedVersion, judged_version
from tasks.runner import RETRY
from tasks.store import layout, versions
from tasks.store.manifest import Manifest, RunRecord
from tasks.store.reservation import Reservation


@task(name="find-same-rows", cache_policy=NO_CACHE, **RETRY)
def find_same_rows(dataset: Any, form: Form) -> Manifest | None:
    """Return the latest version if it has just the rows of a dataset, and left out as many; else None."""
    config = form.config
    latest = versions.latest(config.root, layout.ray_dataset(config.name))
    assert latest is not None, "there is a version to compare with"
    read, content = find_content(dataset, form)
    definition = form.define(content)
    same = (
        latest.definition == definition
        and [balance.rows_in for balance in latest.balances] == [read]
        and {spec.name: spec.type for spec in latest.columns} == {field.name: str(field.type) for field in form.schema}
        and latest.code_digest == kind_of(latest.dataset).digest(definition)
    )
    get_run_logger().info("%s v%d has %s rows", latest.dataset, latest.version, "the same" if same else "other")
    return latest if same else None


@task(name="write-dataset", tags=["ray-data"], cache_policy=NO_CACHE, **RETRY)
def write_rows(dataset: Any, form: Form, reservation: Reservation) -> DatasetWritten:
    """Write the rows of a dataset: the Ray job."""
    with progress("Reading again") as done:
        made = write_dataset(dataset, form, reservation, on_rows=done)
    [balance] = made.written.balances
    get_run_logger().info(
        "%s of %s rows written in %d files", f"{balance.rows_out:,}", f"{balance.rows_in:,}", len(made.written.files)
    )
    return made


@task(name="validate-dataset", cache_policy=NO_CACHE, **RETRY)
def validate_rows(made: DatasetWritten, config: DatasetConfig, run: RunRecord) -> JudgedVersion:
    """Judge the rows against their thresholds and the last version; write the report and show it in Prefect."""
    reservation = made.written.reservation
    previous = versions.latest(reservation.root, reservation.dataset)
    recorded = {"definition": made.definition, "inputs": ()}
    return judged_version(made.written, config, run, previous, recorded=recorded, name=f"{config.name}-dataset")
