"""A flow that is killed while it writes, and the same command again: one whole version, nothing of the dead run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from tasks.core import layout, storage, versions
from tasks.core.manifest import Manifest

pytestmark = pytest.mark.slow

DATASETS = ["feature-store/customer-features", "feature-store/product-features"]
OF_THE_RUN = ["feature_creation_date", "feature_version"]
ENDED_BY_THEMSELVES = 20.0  # the API server, Ray and its workers notice within some seconds that the flow is gone
OUTLIVE = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # Ray's own agents don't always


@dataclass
class Command:
    """The flow as somebody starts it in a shell, and every process that it started."""

    process: subprocess.Popen[str]
    family: set[psutil.Process] = field(default_factory=set)

    def look(self) -> None:
        """Note the processes that are there now: once the flow is dead nobody can tell whose they were."""
        try:
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def finish(self) -> None:
        output, errors = self.process.communicate(timeout=150)
        assert self.process.returncode == 0, f"the run failed:\n{errors}\n{output}"

    def kill_when(self, reached: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 120
        while not reached():
            assert self.process.poll() is None, f"the run ended first:\n{self.process.communicate()}"
            assert time.monotonic() < give_up, "the run wrote nothing"
            self.look()
            time.sleep(0.01)
        self.look()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def end_family(self) -> set[str]:
        """Wait for what the flow left behind, end what is still there and give its names."""
        names = {}
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                names[process] = process.name()
        agents = [process for process, name in names.items() if name in OUTLIVE]
        _, alive = psutil.wait_procs([process for process in names if process not in agents], ENDED_BY_THEMSELVES)
        for process in (*alive, *agents):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return {names[process] for process in alive}


@pytest.fixture
def start(prefect_home: Path, tmp_path: Path) -> Iterator[Callable[[Path], Command]]:
    started: list[Command] = []

    def run(root: Path) -> Command:
        home = tmp_path / f"home-{len(started)}"
        home.mkdir()
        if (database := prefect_home / "prefect.db").exists():
            shutil.copy(database, home / "prefect.db")
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        options = ["--root", str(root), "--rows-per-bucket", "1000", "--sample-transactions", "60000"]
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.feature_store", *options],
            env={**environment, "PREFECT_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Command(process))
        return started[-1]

    yield run
    for command in started:
        if command.process.poll() is None:
            command.look()
            command.process.kill()
            command.process.communicate()
        command.end_family()


def features(root: Path, manifest: Manifest) -> pd.DataFrame:
    frame = versions.read_table(str(root), manifest.dataset, manifest.version, verify=True).to_pandas()
    return frame.drop(columns=OF_THE_RUN)


def files(root: Path, dataset: str, version: int) -> set[str]:
    base = layout.version_uri(str(root), dataset, version)
    return {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}


def test_a_run_killed_in_mid_write_is_made_good_by_the_next(start: Callable[[Path], Command], tmp_path: Path) -> None:
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "root"
    start(undisturbed).finish()

    killed = start(root)
    written = [root / dataset / "v1" for dataset in DATASETS]
    killed.kill_when(lambda: any([*version.glob("part-*"), *version.glob("_rejected/*")] for version in written))
    left = {dataset: files(root, dataset, 1) for dataset in DATASETS}
    assert any(name.endswith(".parquet") for names in left.values() for name in names), "nothing was left to clean up"
    for dataset in DATASETS:
        assert layout.MANIFEST not in left[dataset]
        assert versions.published_versions(str(root), dataset) == [], "a reader sees the killed run's files"
    assert killed.end_family() == set(), "the killed flow's Ray or API server goes on"

    start(root).finish()
    for dataset in DATASETS:
        assert versions.published_versions(str(root), dataset) == [1], "the dead run's number wasn't taken over"
        manifest = versions.resolve(str(root), dataset)
        assert manifest.run.attempt == 2
        listed = {file.path for file in (*manifest.files, *manifest.rejected_files)}
        protocol = {"_reservation.json", "_reservation-2.json", "_manifest.json", "_report.html", "_report.json"}
        assert files(root, dataset, 1) == listed | protocol, f"{dataset}: orphans of the killed run, or files missing"
        assert all("-a2." in name for name in listed)
        for balance in manifest.balances:
            assert balance.missing == 0, balance
        whole = versions.resolve(str(undisturbed), dataset)
        assert [file.rows for file in manifest.files] == [file.rows for file in whole.files]
        pd.testing.assert_frame_equal(features(root, manifest), features(undisturbed, whole), check_exact=True)
        visible = sum(pq.read_metadata(path).num_rows for path in (root / dataset / "v1").glob("*.parquet"))
        assert visible == manifest.rows == whole.rows
