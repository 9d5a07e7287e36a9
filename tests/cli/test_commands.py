"""Every command as one types it: what it answers, what it refuses, and the cure that it names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.cli import commands
from tasks.store import layout, versions
from tasks.store.reading import withdrawn
from tests.serving.feature_versions import GROUP, customers, days, publish_features
from tests.serving.redis_server import redis_url  # noqa: F401 - a fixture

DATASET = layout.feature_dataset(GROUP)
CHURN = layout.training_ready_dataset("churn")

Run = Any


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Two versions of a group, the first of which a training set was made from."""
    root = str(tmp_path)
    first = publish_features(root, customers(range(100), days(0, 1)))
    publish_features(root, customers(range(120), days(2), scale=1.5))
    publish_features(root, customers(range(3)), dataset=CHURN, inputs=(first.as_input("x"),))
    return root


@pytest.fixture
def run(store: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on that store: its exit code, and what it prints."""

    def typed(line: str, root: str = store) -> tuple[int, str, str]:
        code = commands.run([*line.split(), "--root", root])
        return code, *capsys.readouterr()

    return typed


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_list_shows_every_dataset(run: Run) -> None:
    code, out, _ = run("list")
    assert (code, rows_of(out)[0][:4]) == (0, ["NAME", "KIND", "LATEST", "VERSIONS"])
    assert rows_of(out)[1] == [GROUP, "features", "v2", "2", "ok", "120", "8", "2024-02-02", "2024-01-31"]
    assert rows_of(out)[2][:4] == ["churn", "training", "set", "v1"]
    code, out, _ = run("list --json")
    assert [(one["name"], one["version"]) for one in json.loads(out)] == [(GROUP, 2), ("churn", 1)]
    assert run("list", "/nowhere")[1] == "no datasets under /nowhere: run the flow, or correct --root\n"


def test_describe_shows_columns_and_versions(run: Run) -> None:
    _, out, _ = run(f"describe {GROUP}")
    assert "120 in 4 files" in out
    assert ["orders", "int64", "0", "%", "0", "2.975", "6", 'col("orders")'] in rows_of(out)
    assert [row[:3] for row in rows_of(out) if row[:1] in (["v1"], ["v2"])] == [
        ["v1", "published", "2024-01-31"],
        ["v2", "published", "2024-01-31"],
    ]
    assert json.loads(run(f"describe {DATASET} v1 --json")[1])["description"]["rows"] == 200
    assert "made from  feature-store/customer-features v1" in run("describe churn")[1]


def test_get_shows_values_with_all_their_digits(run: Run) -> None:
    code, out, err = run(f"get {GROUP} 3 77 1000")
    assert (code, f"not in {GROUP}: 1000" in err.splitlines()) == (0, True)
    assert rows_of(out)[:2] == [["CUSTOMER_ID", "3", "77", "1000"], ["total_spent", "4503.0", "115503.0", "–"]]
    assert rows_of(run(f"get {GROUP} 1 2 3 4 5 --features city,orders")[1])[:2] == [
        ["CUSTOMER_ID", "CITY", "ORDERS"],
        ["1", "city", "1", "1"],
    ]
    assert json.loads(run(f"get {GROUP} 3 --version v1 --features total_spent --json")[1]) == [
        {"customer_id": "3", "total_spent": 3001.0}
    ]
    assert run(f"get {GROUP} 1000")[0] == 1


def test_a_streaming_copy_and_a_store_within_the_store_dont_take_the_name(run: Run, store: str) -> None:
    base = Path(store)
    for copy in ("training-datasets/streaming-ready", "other-store/feature-store"):
        shutil.copytree(base / "feature-store" / GROUP / "v1", base / copy / GROUP / "v1")
    assert "other-store/feature-store/" + GROUP not in versions.list_datasets(store)
    assert run(f"describe {GROUP}")[0] == 0


def test_diff_shows_what_changed(run: Run) -> None:
    code, out, _ = run(f"diff {GROUP} v1 v2")
    assert code == 0
    assert "rows         200 → 120" in out
    assert "only after   2024-02-02" in out
    assert "total_spent" in out
    found = json.loads(run(f"diff {GROUP} v1 v2 --json")[1])
    assert {column["name"]: column["psi"] > 0.5 for column in found["columns"]}["total_spent"]
    assert run(f"diff {GROUP} v1 v1")[1].endswith("no column's profile differs\n")


def test_rollback_withdraws_once_and_names_who_is_hit(run: Run, store: str) -> None:
    code, out, _ = run(f"rollback {GROUP} v2 --reason currency")
    assert (code, out) == (0, f"{DATASET} v2 is withdrawn; its data stays\nlatest is v1\n")
    assert withdrawn(store, DATASET)[2].reason == "currency"
    code, out, _ = run(f"rollback {GROUP} v2")
    assert code == 0
    assert "v2 was withdrawn by" in out
    code, _, err = run(f"rollback {GROUP} v1")
    assert code == 1
    assert "is the only version" in err
    assert "--force" in err
    code, out, _ = run(f"rollback {GROUP} v1 --force")
    assert code == 0
    assert out.splitlines()[1:] == [
        "no version is left to readers",
        f"made from it, and still read: {CHURN} v1; build them again, or withdraw them too",
    ]


def test_a_damaged_version_is_told_and_can_be_withdrawn(run: Run, store: str) -> None:
    path = Path(layout.version_uri(store, DATASET, 2)) / layout.MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    assert rows_of(run("list")[1])[1][2:7] == ["v1", "1", "v2", "damaged", "200"]
    code, out, _ = run(f"describe {GROUP}")
    assert (code, ["v2", "damaged", "–"] in [row[:3] for row in rows_of(out)]) == (0, True)
    assert f"v2 is damaged: {path} can't be read as a manifest" in out
    code, _, err = run(f"describe {GROUP} v2")
    assert (code, f"'rollback {DATASET} v2' withdraws it" in err) == (1, True)
    assert run(f"rollback {DATASET} 2")[1] == f"{DATASET} v2 is withdrawn; its data stays\nlatest is v1\n"
    assert rows_of(run("list")[1])[1][2:5] == ["v1", "1", "ok"]
    assert run(f"prune {GROUP} --keep 1 --yes")[0] == 0
    assert not path.exists()


def test_expired_values_are_told(run: Run) -> None:
    code, out, err = run(f"get {GROUP} 3 --features orders --ttl-days 1")
    assert (code, rows_of(out)[1], err) == (1, ["orders", "–"], f"expired in {GROUP}: 3\n")
    assert run(f"get {GROUP} 3 --ttl-days nan")[0] == 1


@pytest.mark.parametrize("version", ["v1", "1"])
def test_a_version_is_named_with_or_without_v(run: Run, version: str) -> None:
    assert run(f"get {GROUP} 3 --version {version} --features total_spent")[1].split()[-1] == "3001.0"
    assert run(f"describe {GROUP} {version}")[0] == run(f"diff {GROUP} {version} {version}")[0] == 0


def test_prune_only_shows_until_it_is_told_to_delete(run: Run, store: str) -> None:
    publish_features(store, customers(range(5), days(3)))
    assert run("prune")[1] == "nothing to delete; --keep N or --older-than AGE select more\n"
    code, out, _ = run(f"prune {GROUP} --keep 1")
    assert (code, rows_of(out)[1][:4]) == (0, [DATASET, "v2", "published", "2024-01-31"])
    assert rows_of(out)[1][-1] == "2024-02-02", "the history that is lost"
    assert f"{DATASET} v1 stays: {CHURN} v1 was made from it" in out
    assert "would delete 1 version" in out
    assert versions.published_versions(store, DATASET) == [1, 2, 3]
    assert "deleted 1 version" in run(f"prune {GROUP} --keep 1 --older-than 1d --yes")[1]
    assert versions.published_versions(store, DATASET) == [1, 3]
    assert json.loads(run("prune --keep 1 --json")[1]) == {
        "deleted": False,
        "versions": [],
        "held": {DATASET: {"1": f"{CHURN} v1 was made from it"}},
        "left": [],
        "uploads": [],
    }


def test_prune_deletes_what_killed_runs_have_left(run: Run, store: str) -> None:
    version = Path(layout.version_uri(store, DATASET, 2))
    uncommitted = Path(layout.version_uri(store, DATASET, 3))
    uncommitted.mkdir()
    name = f"._manifest.json.{'0' * 32}.tmp"
    left = [version / "part-00000-a7.parquet", version / name, uncommitted / name]
    kept = [version / "notes.txt", version / "_notes.tmp", uncommitted / f"._manifest.json.{'1' * 32}.tmp"]
    for file in (*left, *kept):
        file.write_bytes(b"1234")
    os.utime(left[-1], (0, 0))  # of the two that no commit has passed by, only the old one is surely over
    assert "would delete 3 files that killed runs have left" in run("prune")[1]
    assert json.loads(run("prune --json")[1])["left"] == sorted(map(str, left))
    code, out, _ = run("prune --yes")
    assert (code, "deleted 3 files" in out) == (0, True)
    assert [file.exists() for file in (*left, *kept)] == [False] * 3 + [True] * 3
    assert run("prune")[1] == "nothing to delete; --keep N or --older-than AGE select more\n"
    versions.verify(store, versions.resolve(store, DATASET, 2))


def test_watermarks_and_lineage(run: Run) -> None:
    assert rows_of(run("watermarks")[1])[1][:3] == [GROUP, "v2", "2024-02-02"]
    _, out, _ = run("lineage churn")
    assert CHURN in out.splitlines()[0]
    assert DATASET in out.splitlines()[1]
    assert json.loads(run("lineage churn v1 --json")[1])["of"]
    assert run("lineage churn --mermaid")[1].startswith(("flowchart", "graph"))


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("lst", 2, "no command is named 'lst'; did you mean list?"),
        ("frobnicate", 2, "no command is named 'frobnicate'; there are list, describe"),
        ("describe", 2, "arguments are required: NAME"),
        (f"rollback {GROUP}", 2, "arguments are required: vN"),
        (f"diff {GROUP} 1 x", 2, "'x' is no version; write it as v3"),
        ("prune --older-than soon", 2, "--older-than soon: write a number of hours, days or weeks"),
        ("prune --keep 0", 2, "keep = 0"),
        ("describe customer-feature", 1, "did you mean 'customer-features'?"),
        ("get churn 3", 1, "no feature group 'churn'"),
        (f"describe {GROUP} v9", 1, "has no version v9"),
        (f"diff {GROUP} v1 v9", 1, "published: v1, v2; name one of them"),
        (f"rollback {GROUP} v9", 1, "has no version v9"),
        (f"get {GROUP} three", 1, "('customer_id') are of type int64, which can't be 'three'"),
        (f"get {GROUP} 3 --features total", 1, "did you mean 'total_spent'?"),
        (f"export {GROUP} --redis redis://127.0.0.1:1/0", 1, "Redis doesn't answer"),
    ],
)
def test_mistakes_get_one_line_that_names_the_cure(run: Run, line: str, code: int, message: str) -> None:
    if line.startswith("export"):
        pytest.importorskip("redis", reason="the Redis client isn't installed")
    found, out, err = run(line)
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert err.startswith("error: ")
    assert message in err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ["list", "describe", "get", "diff", "watermarks", "lineage", "plan", "rollback", "prune", "export"]:
        assert re.search(rf"\n    {name}\s", out), name


def test_an_answer_comes_without_ray_and_prefect(store: str) -> None:
    """Start-up is most of the time of a command."""
    program = (
        "import sys; from tasks.cli import commands\n"
        f"code = commands.run(['get', '{GROUP}', '3', '--root', {store!r}])\n"
        "print(code, *sorted({'ray', 'prefect', 'torch', 'numba', 's3fs'} & set(sys.modules)), file=sys.stderr)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "0\n"
    assert time.monotonic() - started < 20, "about a second on an idle machine"


def test_plan_refuses_what_breaks_a_model(run: Run, tmp_path: Path) -> None:
    definitions, models = tmp_path / "groups.yaml", tmp_path / "models.yaml"
    definitions.write_text("groups:\n  customer-features:\n    entity: customer_id\n    features: {orders: COUNT(*)}\n")
    models.write_text(
        "models:\n  churn:\n    entity: customer_id\n    spine: {uri: spine.parquet}\n"
        "    features: ['customer-features:total_spent']\n"
    )
    line = f"plan --definitions {definitions} --models {models}"
    code, out, err = run(line)
    assert code == 1
    assert "error: models would break; mend them first, or give --force" in err.splitlines()
    assert "total_spent" in out
    assert "churn" in out
    assert run(f"{line} --force")[0] == 0
    assert json.loads(run(f"{line} --json")[1])["breaks"]
    assert run("plan --definitions nowhere.yaml")[0] == 1


def test_export_fills_redis(run: Run, request: pytest.FixtureRequest) -> None:
    url: str = request.getfixturevalue("redis_url")
    assert run(f"export {GROUP} --redis {url}") == (0, f"{GROUP}: 120 entities are in Redis\n", "")
    from_files, from_redis = (json.loads(run(f"get {GROUP} 3 999 --json{more}")[1]) for more in ("", f" --redis {url}"))
    assert from_files == from_redis
