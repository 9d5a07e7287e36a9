"""The command that tests the gate of a published version: its table, its JSON and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.cli import commands
from tasks.features.config import FeatureStoreConfig, Thresholds
from tasks.images.rows import rows_schema
from tasks.io import storage
from tasks.store.manifest import FileEntry, Manifest
from tests.features import test_self_test as features
from tests.images import test_self_test as images
from tests.training_sets import test_self_test as serving

LAX = FeatureStoreConfig(thresholds=Thresholds(null_warn=1, null_fail=1))


def published(root: Path, manifest: Manifest, config: dict[str, Any]) -> None:
    """A version as a reader finds it."""
    manifest = manifest.model_copy(update={"config": config})
    uri = f"{root}/{manifest.dataset}/v{manifest.version}/_manifest.json"
    storage.write_bytes(uri, manifest.model_dump_json().encode())


def run(line: str, root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = commands.run([*line.split(), "--root", str(root)])
    return code, *capsys.readouterr()


def test_a_gate_that_notices_all_faults_gives_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path, features.written(tmp_path, features.data()), features.FRESH.model_dump(mode="json"))
    code, out, _ = run("self-test spending", tmp_path, capsys)
    assert code == 0
    assert out.splitlines()[0].split() == ["OUTCOME", "FAULT", "INJECTED", "NOTICED", "BY", "IN", "WORDS"]
    assert "feature-store/spending v1: 11 of 13 faults refused, 2 warned" in out


def test_a_blind_gate_gives_1_and_stands_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path, features.written(tmp_path, features.data()), LAX.model_dump(mode="json"))
    code, out, _ = run("self-test spending v1", tmp_path, capsys)
    assert code == 1
    assert out.splitlines()[1].split()[:2] == ["blind", "nulls"]
    assert "blind to 1 (nulls)" in out


def test_the_answer_in_json_names_what_is_blind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path, features.written(tmp_path, features.data()), LAX.model_dump(mode="json"))
    code, out, _ = run("self-test spending --json", tmp_path, capsys)
    answer = json.loads(out)
    assert (code, answer["blind"], answer["version"]) == (1, ["nulls"], 1)
    assert {result["fault"] for result in answer["faults"]} == set(features.EXPECTED)


def test_training_sets_and_images_are_tested_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path, serving.written(tmp_path, serving.data()), FeatureStoreConfig().model_dump(mode="json"))
    code, out, _ = run("self-test churn", tmp_path, capsys)
    assert (code, "label copy" in out) == (0, True)
    images.tried(tmp_path)  # writes the table of originals
    config = images.configured()
    manifest = images.version(config, images.originals())
    schema = rows_schema(config, len(manifest.definition["classes"]))
    path = "split=train/part-00000-a1.parquet"
    made = storage.write_parquet(schema.empty_table(), f"{tmp_path}/{manifest.dataset}/v1/{path}")
    file = FileEntry(path=path, rows=0, bytes=made.bytes, digest=made.digest)
    published(tmp_path, manifest.model_copy(update={"files": (file,)}), config.model_dump(mode="json"))
    code, out, _ = run("self-test images", tmp_path, capsys)
    assert (code, "split overlap" in out) == (0, True)


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path, features.written(tmp_path, features.data()), {"unheard_of": 1})
    assert run("self-test spending v7", tmp_path, capsys)[0] == 1
    code, _, err = run("self-test spending", tmp_path, capsys)
    assert code == 2
    assert err.startswith(
        "error: feature-store/spending v1: this code can't use its configuration (unheard_of: Extra inputs"
    )
