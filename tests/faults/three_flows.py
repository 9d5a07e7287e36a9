"""The three flows on small data, for faults: what they publish undisturbed, and what readers see of a store meanwhile.

A test begins with a copy of the undisturbed store, so each dataset has a v1; the disturbed run is to publish v2 with
the same rows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel

from flows.feature_store import feature_store
from flows.image_augmentation import image_augmentation
from flows.training_delivery import training_delivery
from tasks.by_hand import one_sentence
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.features.config import FeatureStoreConfig
from tasks.features.standard import SAMPLE_AS_OF
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.io import storage
from tasks.io.hashing import digest
from tasks.store import layout, versions
from tasks.store.layout import CREATED, VERSION
from tasks.store.manifest import Manifest
from tests.processes import Command, own_home
from tests.runs import Run

PLANTED = Path(__file__).parent / "planted"
# What a fault can be planted in. Most of it is done by Ray's workers, and some by the tasks that drive them.
PLANTABLE = (
    "tasks.features.writer:write_part",
    "tasks.features.shuffle:Job.gather",
    "tasks.features.shuffle:Job.scatter",
    "tasks.images.augment:augment_unit",
    "tasks.delivery.shuffle:Look.scatter",
    "tasks.delivery.shuffle:Shuffle.gather",
    "tasks.delivery.shuffle:Shuffle.scatter",
    "tasks.publication:write_report",
)

IMAGES, FEATURES, DELIVERY = "image-augmentation", "feature-store", "training-delivery"
FLOWS: Mapping[str, Callable[..., Any]] = {
    IMAGES: image_augmentation,
    FEATURES: feature_store,
    DELIVERY: training_delivery,
}
DATASETS: Mapping[str, tuple[str, ...]] = {
    IMAGES: ("training-datasets/images",),
    FEATURES: ("feature-store/customer-features", "feature-store/product-features"),
    DELIVERY: ("training-datasets/streaming-ready/customer-features",),
}


@dataclass(frozen=True)
class Store:
    """A root, and the sources that it is made from."""

    root: Path
    sources: Path

    def config(self, flow: str, **changes: Any) -> BaseModel:
        """A small run of a flow, which has several tasks of each kind; `changes` are settings of its configuration."""
        root = str(self.root)
        if flow == IMAGES:
            images = {name: str(self.sources / "images" / path) for name, path in _image_paths(self.sources).items()}
            chosen = {"augmentation": Augmentation(size=32), "images_per_file": 16, **images}
            return ImageAugmentationConfig(**{"root": root, **chosen, **changes})
        if flow == FEATURES:
            tables = _table_paths(self.sources)
            return FeatureStoreConfig(
                **{"root": root, "as_of": SAMPLE_AS_OF, "rows_per_bucket": 1000, **tables, **changes}
            )
        training = TrainingConfig(enabled=False)
        return DeliveryConfig(
            **{
                "root": root,
                "dataset": DATASETS[FEATURES][0],
                "target": "spending_trend",
                "file_megabytes": 0.01,
                "training": training,
                **changes,
            }
        )

    def manifest(self, dataset: str, version: int) -> Manifest:
        return versions.resolve(str(self.root), dataset, version)


def _image_paths(sources: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((sources / "images.json").read_text())
    return found


def _table_paths(sources: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((sources / "tables.json").read_text())
    return found


def copied(store: Store, root: Path) -> Store:
    """The same store under another root."""
    shutil.copytree(store.root, root)
    return Store(root, store.sources)


def contents(store: Store, dataset: str, version: int) -> dict[str, str]:
    """Digest of each file's bytes, by its name without the attempt; of features, of all but the stamps of the run."""
    manifest = store.manifest(dataset, version)
    versions.verify(str(store.root), manifest)
    found = {}
    for entry in (*manifest.files, *manifest.rejected_files, *manifest.side_files):
        name = re.sub(r"-a\d+\.", ".", entry.path)
        assert name not in found, f"{dataset} v{version}: {name} is there twice"
        found[name] = entry.digest
    if manifest.dataset in DATASETS[FEATURES]:
        for entry, uri in zip(manifest.files, versions.data_files(str(store.root), manifest), strict=True):
            with storage.open_input(uri) as source:
                rows = pq.read_table(source).drop_columns([CREATED, VERSION])
            found[re.sub(r"-a\d+\.", ".", entry.path)] = digest(repr(rows.to_pydict()).encode())
    return found


def assert_same_rows(store: Store, flow: str, version: int = 2) -> None:
    """A version has what the undisturbed v1 has, and nothing that it doesn't list stands in its directory."""
    for dataset in DATASETS[flow]:
        assert contents(store, dataset, version) == contents(store, dataset, 1), dataset
        one, other = (store.manifest(dataset, number) for number in (1, version))
        assert one.balances == other.balances, dataset
        assert _unstamped(one) == _unstamped(other), dataset
        assert left_over(store, dataset, version) == set()


def _unstamped(manifest: Manifest) -> dict[str, Any]:
    return {name: profile for name, profile in manifest.profile.items() if name not in (CREATED, VERSION)}


def left_over(store: Store, dataset: str, version: int) -> set[str]:
    """Files of a committed version that its manifest and the protocol don't know."""
    manifest = store.manifest(dataset, version)
    base = layout.version_uri(str(store.root), dataset, version)
    found = {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}
    known = {entry.path for entry in (*manifest.files, *manifest.rejected_files, *manifest.side_files)}
    known |= {layout.MANIFEST, layout.REPORT_HTML, layout.REPORT_JSON, layout.CLASS_SUMMARY}
    known |= {layout.reservation_name(attempt) for attempt in range(1, manifest.run.attempt + 1)}
    return found - known


def assert_failed_at_once(run: Run) -> str:
    """The run failed and nothing of it was tried again; what a person is told."""
    assert run.state.is_failed(), run.state
    assert run.flow_run().run_count == 1
    assert {task.run_count for task in run.tasks().values()} == {1}, "it was tried again"
    error = run.state.result(raise_on_failure=False)
    assert isinstance(error, BaseException)
    return one_sentence(error)


def temporary_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*.tmp") if path.is_file()]


class Reader(threading.Thread):
    """Looks at the latest version of some datasets all the time: each must be whole, and never older than the last."""

    def __init__(self, store: Store, flow: str) -> None:
        super().__init__(daemon=True)
        self._store, self._datasets, self._end = store, DATASETS[flow], threading.Event()
        self.seen: dict[str, list[int]] = {dataset: [] for dataset in self._datasets}
        self.fault: Exception | None = None

    def run(self) -> None:
        try:
            ended = False
            while not ended:
                ended = self._end.wait(0.1)  # one look more then: what came last is seen, too
                for dataset in self._datasets:
                    manifest = versions.resolve(str(self._store.root), dataset)
                    versions.verify(str(self._store.root), manifest)
                    self.seen[dataset].append(manifest.version)
        except Exception as fault:  # noqa: BLE001 - whatever a reader meets is the test's to tell
            self.fault = fault

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join(30)
        if self.fault is not None:
            raise AssertionError("a reader saw something that wasn't whole") from self.fault
        for dataset, numbers in self.seen.items():
            assert numbers, f"nobody has looked at {dataset}"
            assert numbers == sorted(numbers), f"{dataset}: readers fell back: {numbers}"


def first_by_default(first: Any, *others: Any) -> list[Any]:
    """Return cases of which only the first one isn't left to the nightly tests."""
    later = [case if isinstance(case, tuple) else (case,) for case in others]
    return [first, *(pytest.param(*case, marks=pytest.mark.nightly) for case in later)]


def fault(function: str, does: str = "kill", when: str = "after", times: int = 1, **more: Any) -> dict[str, Any]:
    """A fault to plant, see `planted/sitecustomize.py`."""
    assert function in PLANTABLE, f"{function} isn't among the functions that faults can be planted in"
    return {"function": function, "does": does, "when": when, "times": times, **more}


@dataclass(frozen=True)
class Planted:
    """Faults in the functions of processes that have this environment; see `planted/sitecustomize.py`."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """What the processes need, or the one that starts them."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "functions.json").write_text(json.dumps(PLANTABLE))
        return {"PLANTED": str(self.folder), "PYTHONPATH": f"{PLANTED}{os.pathsep}{Path(__file__).parents[2]}"}

    def arm(self, *faults: dict[str, Any]) -> None:
        """Have these faults happen from now on, and no others."""
        for file in (*self.folder.glob("mark-*"), *self.folder.glob("go")):
            file.unlink()
        partial = self.folder / "arming.json"
        partial.write_text(json.dumps(faults))
        partial.replace(self.folder / "armed.json")

    def struck(self) -> int:
        """How often an armed fault has happened."""
        return len(list(self.folder.glob("mark-*")))

    def go_on(self) -> None:
        """End of the faults that wait."""
        (self.folder / "go").touch()


@dataclass
class Runner:
    """Runs flows in this process, on this session's Prefect API and Ray, with faults planted in Ray's workers."""

    planted: Planted

    def __call__(self, flow: str, config: BaseModel, *faults: dict[str, Any]) -> Run:
        self.planted.arm(*faults)
        return Run(str(config.root), FLOWS[flow](config, return_state=True))  # type: ignore[attr-defined]

    def struck(self) -> int:
        """How often a fault has happened in the last run."""
        return self.planted.struck()


@dataclass
class Starter:
    """Starts flows as processes of their own, on this session's Prefect API."""

    folder: Path
    started: list[Command] = field(default_factory=list)

    def __call__(self, flow: str, config: BaseModel, *, alone: bool = False, **environment: str) -> Command:
        """Start a flow, `alone` with an API server of its own; `environment` may hold a Ray's address, and faults."""
        file = self.folder / f"config-{len(self.started)}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        module = f"flows.{flow.replace('-', '_')}"
        return self.start(module, ["--config", str(file)], alone=alone, **environment)

    def start(self, module: str, options: Sequence[str], *, alone: bool = False, **environment: str) -> Command:
        """Start a module."""
        home = own_home(self.folder / f"home-{len(self.started)}")
        api = {} if alone else {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
        self.started.append(Command.start(module, options, home, **api | environment))
        return self.started[-1]

    def stop(self) -> None:
        for command in self.started:
            command.stop()
