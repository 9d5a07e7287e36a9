"""A flow's process is killed (-9) at steps of its commit, and the same is run again.

One root a flow is killed at one point after the other, so that each run also has to make good what several dead ones
have left. The commit is the same code for all flows, and `tests/store/test_versions.py` kills it too: one flow is
killed at each step, the others where a worker of their own comes to. Where the point is reached by the flow's own
process, the runs share this session's Ray, as deployed runs do; else the flow has its own, as by hand, which must go
away with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import ray
import yaml
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.states import AwaitingRetry, Crashed
from pydantic import BaseModel

from tasks.cli import commands
from tasks.delivery.config import TrainingConfig
from tasks.engine.cluster import cluster_cpus
from tasks.io import storage
from tasks.publication import PUBLISHED
from tasks.store import layout, versions
from tests.faults.failpoints import environment
from tests.faults.three_flows import (
    DATASETS,
    DELIVERY,
    FEATURES,
    IMAGES,
    Reader,
    Runner,
    Starter,
    Store,
    assert_same_rows,
    contents,
    copied,
    first_by_default,
    left_over,
)
from tests.tables import Proven
from tests.test_runner import eventually

pytestmark = pytest.mark.slow

CHURN = layout.training_ready_dataset("churn")
CUSTOMERS, PRODUCTS = DATASETS[FEATURES]
MID_DATA = "in mid-data"
BY_A_WORKER = [MID_DATA, "after the data, before the report"]
POINTS = {
    IMAGES: ["after reserving", *BY_A_WORKER, "after the report, before the manifest", "in mid-manifest"],
    FEATURES: BY_A_WORKER,
    DELIVERY: BY_A_WORKER,
}
ENOUGH = 6  # files of images: a unit has two, so that one at least is finished while two are under way
WITH_REPORT = {"after the report, before the manifest", "in mid-manifest"}


def shared() -> dict[str, str]:
    """This session's Ray, for a process."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def await_idle_ray() -> None:
    eventually(ray.available_resources, lambda free: free["CPU"] == cluster_cpus(), 120)


def units(version: Path, pattern: str) -> set[int]:
    """Numbers of the units of images of which there is a file."""
    return {int(path.name.split("-")[1]) for path in version.glob(pattern)}


@pytest.mark.parametrize("flow", first_by_default(IMAGES, FEATURES, DELIVERY))
def test_a_flow_killed_at_each_step_is_made_good_by_the_next_run(
    *, flow: str, undisturbed: Store, start: Starter, run: Runner, tmp_path: Path, proven: Proven
) -> None:
    store = copied(undisturbed, tmp_path / "root")
    root, config, dataset = str(store.root), store.config(flow), DATASETS[flow][0]
    version, finished = Path(layout.version_uri(root, dataset, 2)), set[int]()
    with Reader(store, flow) as reader:
        for number, point in enumerate(POINTS[flow], 1):
            written = ENOUGH if (flow, point) == (IMAGES, MID_DATA) else None
            armed = environment(tmp_path / "hook", point, version, written=written)
            alone = point == MID_DATA  # with an API server of its own too
            command = start(flow, config, alone=alone, **armed, **({} if point in BY_A_WORKER else shared()))
            command.await_kill()
            if point in BY_A_WORKER:
                assert command.end_family() == set(), "the killed flow's Ray or API server goes on"
            else:
                await_idle_ray()
            assert len(versions.attempts(root, dataset, 2)) == number, f"{point}: the version wasn't taken over"
            for one in DATASETS[flow]:
                assert versions.published_versions(root, one) == [1], f"{point}: {one} is visible"
                assert not Path(root, one, "v3").exists(), "the dead run's number wasn't taken over"
            assert not (version / layout.MANIFEST).exists()
            assert any(version.rglob("part-*.parquet")) == (point != "after reserving"), point
            assert (version / layout.REPORT_HTML).exists() == (point in WITH_REPORT), point
            if point == MID_DATA:
                finished = units(version, "_work/unit-*")
                begun = units(version, "split=*/part-*") - finished
                assert flow != IMAGES or len(begun) <= (os.cpu_count() or 1), "more is lost than was under way"
                assert flow != IMAGES or finished, "it was killed before anything was finished"
            elif flow == IMAGES and point == BY_A_WORKER[1]:
                again = units(version, f"split=*/part-*-a{number}.parquet")
                assert again, "the kill came too late"
                assert not again & finished, "finished work was thrown away"
        ended = run(flow, config)
    assert ended.state.is_completed(), ended.state.message
    assert {number for seen in reader.seen.values() for number in seen} <= {1, 2}
    assert_same_rows(store, flow)
    for one in DATASETS[flow]:
        assert versions.published_versions(root, one) == [1, 2]
        assert commands.run(["prune", one, "--root", root, "--json", "--yes"]) == 0
        assert left_over(store, one, 2) == set()
    for point in POINTS[flow]:
        proven(f"flow killed (-9) {point}", flow, "nothing visible, next run: same number, same digests")


def test_a_flow_killed_between_two_manifests_leaves_each_dataset_whole(
    *,
    undisturbed: Store,
    start: Starter,
    run: Runner,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    proven: Proven,
) -> None:
    """Old or new is a promise of each dataset: the first group is new, the second old, until the next run."""
    store = copied(undisturbed, tmp_path / "root")
    root, config = str(store.root), store.config(FEATURES)
    with Reader(store, FEATURES) as reader:
        armed = environment(tmp_path / "hook", "right after the manifest", Path(root, CUSTOMERS, "v2"))
        start(FEATURES, config, **armed, **shared()).await_kill()
        await_idle_ray()
        assert [versions.published_versions(root, one) for one in DATASETS[FEATURES]] == [[1, 2], [1]]
        ended = run(FEATURES, config)
    assert ended.state.is_completed(), ended.state.message
    assert {one: set(seen) for one, seen in reader.seen.items()} == {CUSTOMERS: {1, 2, 3}, PRODUCTS: {1, 2}}
    for one, number in ((CUSTOMERS, 2), (CUSTOMERS, 3), (PRODUCTS, 2)):
        assert contents(store, one, number) == contents(store, one, 1)
    assert store.manifest(PRODUCTS, 2).run.attempt == 2
    assert left_over(store, CUSTOMERS, 3) == left_over(store, PRODUCTS, 2) == set()
    # The version that is whole but whose run couldn't tidy up: no later run comes there, prune does.
    assert any(storage.is_temporary(name) for name in left_over(store, CUSTOMERS, 2))
    assert commands.run(["prune", "--root", root, "--yes"]) == 0
    assert "that killed runs have left" in capsys.readouterr().out
    assert left_over(store, CUSTOMERS, 2) == set()
    result = "each group whole, the first new, the second old; next run publishes both"
    proven("flow killed (-9) between two manifests", FEATURES, result)


def models(root: Path) -> str:
    """A file of one model over customers, by a label."""
    label = {"entity": "customer_id", "at": "2024-06-30/2024-11-30/1mo", "days": 30, "target": "COUNT(*) = 0"}
    features = ["customer-features:transaction_count", "customer-features:total_spent_90d"]
    declared = {"labels": {"churned": label}, "models": {"churn": {"label": "churned", "features": features}}}
    root.mkdir(parents=True, exist_ok=True)
    (root / "models.yaml").write_text(yaml.safe_dump(declared))
    return str(root / "models.yaml")


def deployed(flow: str, config: BaseModel) -> UUID:
    """A flow run of a deployment, not started yet."""
    name = flow.replace("-", "_")
    with get_client(sync_client=True) as client:
        made = client.create_deployment(
            client.create_flow_from_name(flow), f"kills-{flow}", entrypoint=f"flows.{name}.{name}"
        )
        parameters = {"config": config.model_dump(mode="json")}
        return client.create_flow_run_from_deployment(made, parameters=parameters).id


RESUMED = {
    IMAGES: "the same version, told of",
    FEATURES: "the same version, told of; the second group and the training set follow",
    DELIVERY: "the same version, told of; trains",
}


@pytest.mark.nightly
@pytest.mark.parametrize("flow", [IMAGES, FEATURES, DELIVERY])
def test_a_deployed_run_killed_after_a_manifest_goes_on_as_the_same_run(
    flow: str, undisturbed: Store, start: Starter, tmp_path: Path, proven: Proven
) -> None:
    """Killed before it could tell of it; then Retry, as in the UI, starts the same flow run in a new process."""
    store, number, made = copied(undisturbed, tmp_path / "root"), 2, list(DATASETS[flow])
    changes: dict[str, Any] = {}
    if flow == FEATURES:
        store, number, made = Store(tmp_path / "other", undisturbed.sources), 1, [*made, CHURN]
        changes = {"as_of": ("2024-05-31/2024-12-31/1mo",), "models": models(store.root)}
    if flow == DELIVERY:
        changes = {"training": TrainingConfig(epochs=1, workers=1)}
    root, dataset = str(store.root), made[0]
    run = deployed(flow, store.config(flow, **changes))
    with get_client(sync_client=True) as client:
        armed = environment(tmp_path / "hook", "right after the manifest", Path(root, dataset, f"v{number}"))
        execute = {**shared(), "PREFECT__FLOW_RUN_ID": str(run)}  # as Prefect's worker does
        start.start("prefect.engine", (), **execute, **armed).await_kill()
        manifest = versions.resolve(root, dataset)
        assert (manifest.version, manifest.run.flow_run_id) == (number, str(run))
        client.set_flow_run_state(run, Crashed(), force=True)  # as the automation does
        client.set_flow_run_state(run, AwaitingRetry(), force=True)  # as the UI's button does
        start.start("prefect.engine", (), **execute).finish()
        ended = client.read_flow_run(run)
        assert ended.state is not None
        assert ended.state.is_completed(), ended.state
    assert versions.resolve(root, dataset) == manifest, "the version was written again"
    for one in made:
        assert versions.published_versions(root, one)[-1] == number, f"the run has published {one} twice"
        assert versions.resolve(root, one).run.flow_run_id == str(run)
    if flow != FEATURES:
        assert contents(store, dataset, number) == contents(store, dataset, 1)
    told = eventually(lambda: announced(run), lambda found: found >= set(made))
    assert told == set(made), "what waits for a version never hears of it"
    if flow == FEATURES:
        assert_training_set_follows(root, made)
    if flow == DELIVERY:
        runs = layout.training_runs(root, "customer-features")
        assert storage.list_directories(runs) == [f"v2-{run}"], "it wasn't trained"
    proven("deployed flow killed (-9) right after the manifest, retried", flow, RESUMED[flow])


def assert_training_set_follows(root: str, made: Iterable[str]) -> None:
    [record] = [record for record in versions.resolve(root, CHURN).inputs if record.name == CUSTOMERS]
    assert record == versions.resolve(root, CUSTOMERS).as_input(layout.version_uri(root, CUSTOMERS, 1))
    listed = Path(root, layout.METADATA).read_text()
    assert all(one in listed for one in made)


def announced(run: UUID) -> set[str]:
    """Datasets of which a run has told that a version is published."""
    names = EventNameFilter(name=[PUBLISHED])
    with get_client(sync_client=True) as client:
        body = {"filter": EventFilter(event=names).model_dump(mode="json"), "limit": 50}
        events = client.request("POST", "/events/filter", json=body).json()["events"]
    mine = [event for event in events if any(str(run) in one["prefect.resource.id"] for one in event["related"])]
    return {str(event["payload"]["dataset"]) for event in mine}
