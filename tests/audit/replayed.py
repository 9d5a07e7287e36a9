"""Fixtures of the replay's tests: a store that is made once a session and put back after each test, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.cli import commands
from tests.audit.replay_store import Store, make_store

ALL = 1_000_000


@pytest.fixture(scope="session", name="made")
def made_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(str(tmp_path_factory.mktemp("replay") / "root"))


@pytest.fixture(scope="session", name="pristine")
def kept_aside(made: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made.root, tmp_path_factory.mktemp("pristine") / "root"))


@pytest.fixture(name="store")
def put_back_afterwards(made: Store, pristine: Path) -> Iterator[Store]:
    """The store, which is put back afterwards: manifests name their inputs by absolute paths."""
    yield made
    shutil.rmtree(made.root)
    shutil.copytree(pristine, made.root)


@dataclass(frozen=True)
class Found:
    """What a replay answered in JSON."""

    code: int
    values: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return [row["name"] for row in self.values["rows"]]

    @property
    def differing(self) -> dict[str, Mapping[str, Any]]:
        return {row["name"]: row for row in self.values["rows"] if row["outcome"] == "differs"}

    @property
    def reasons(self) -> set[str]:
        return {reason["text"] for row in self.differing.values() for reason in row["reasons"]}

    @property
    def kinds(self) -> set[str]:
        return {reason["kind"] for row in self.differing.values() for reason in row["reasons"]}

    @property
    def columns(self) -> set[str]:
        return {one["column"] for row in self.differing.values() for one in row["differences"]}


Replay = Callable[..., Found]


@pytest.fixture(name="replay")
def replaying(capsys: pytest.CaptureFixture[str]) -> Replay:
    """Replay a version of a store."""

    def run(store: Store, dataset: str, version: int = 1, sample: int = ALL, seed: int = 0) -> Found:
        sampled = ["--sample", str(sample), "--seed", str(seed)]
        code = commands.run(["replay", dataset, f"v{version}", *sampled, "--json", "--root", store.root])
        out, err = capsys.readouterr()
        assert code in (0, 1), err
        return Found(code, json.loads(out))

    return run
