"""A fifth kind of dataset, in a folder of its own, goes through the programs of the four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.cli import commands
from tasks.io.errors import GateFailed
from tasks.report.report import Report
from tasks.store import layout, versions
from tests.fifth_kind import kind as module
from tests.fifth_kind.flow import toy
from tests.fifth_kind.kind import KIND, ToyConfig

DATASET = "toys/squares"


@pytest.fixture
def root(tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with a version of the toy kind."""
    monkeypatch.setitem(layout.KINDS, "toys", ("toy", "tests.fifth_kind.kind"))
    [published] = toy(ToyConfig(root=str(tmp_path)))
    assert (published.dataset, published.version, published.rows, published.notes) == (DATASET, 1, 300, ())
    return str(tmp_path)


def run(line: str, root: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """The exit code of a command, and its answer."""
    capsys.readouterr()
    code = commands.run([*line.split(), "--root", root, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err


def test_it_is_published_reported_and_listed(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = versions.resolve(root, DATASET)
    versions.verify(root, manifest)
    assert manifest.code_digest == KIND.digest(manifest.definition)
    report = Report.model_validate_json(Path(root, DATASET, "v1", layout.REPORT_JSON).read_bytes())
    assert (report.rows, report.self_test) == (300, manifest.self_test)
    assert {result.fault: result.outcome for result in manifest.self_test} == dict.fromkeys(
        ("no rows", "lost rows", "nulls"), "refused"
    )
    [listed] = run("list", root, capsys)[1]
    assert (listed["dataset"], listed["kind"], listed["status"]) == (DATASET, "toy", "ok")


def test_it_is_tested_replayed_and_explained(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, tested = run("self-test squares", root, capsys)
    assert (code, tested["blind"], tested["unproven"]) == (0, [], [])
    code, replayed = run("replay squares v1", root, capsys)
    assert (code, replayed["outcome"], replayed["replayed"]) == (0, "ok", 100)
    code, explained = run("explain squares v1 12", root, capsys)
    assert (code, explained["kind"], explained["headline"]) == (0, "toy", "12 squared is 144")
    assert run("explain squares v1 12 --picture x.png", root, capsys)[0] == 2
    job = module.squares
    monkeypatch.setattr(module, "squares", lambda numbers: job(np.abs(numbers)).set_column(1, "square", [numbers**3]))
    code, replayed = run("replay squares v1 --sample 300", root, capsys)
    assert (code, replayed["differing"]) == (1, 298), "0 and 1 are their own cubes"


def test_a_gate_that_refuses_it_names_its_cure(root: str) -> None:
    with pytest.raises(GateFailed, match=r"toys/squares: .*To go on: give a --count above 0"):
        toy(ToyConfig(root=root, count=0))
    assert versions.published_versions(root, DATASET) == [1]
