"""A lineage leads back to every file, whatever is between; and the digest of the code follows the code alone."""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tasks.io import storage
from tasks.io.errors import VersionNotFound
from tasks.report import lineage_graph
from tasks.report.lineage_graph import drawn, place
from tasks.report.report import Report, template, to_html
from tasks.store import layout, lineage, versions
from tasks.store.lineage import Lineage, code_digest, package_versions, trace, trace_manifest
from tasks.store.manifest import InputFile, InputRecord, Manifest
from tests.store.publishing import manifest_of, write


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two modules, one of them in a directory below."""
    root = tmp_path / "here" / "features"
    (root / "deep").mkdir(parents=True)
    (root / "kernel.py").write_text("x = 1\n")
    (root / "deep" / "rows.py").write_text("y = 2\n")
    return root


def _move_line(root: Path) -> None:
    (root / "kernel.py").write_text("")
    (root / "deep" / "rows.py").write_text("x = 1\ny = 2\n")


CHANGES: list[tuple[str, Callable[[Path], object], bool]] = [
    # what happens to the package, whether the digest tells
    ("nothing", lambda root: root.stat(), False),
    ("another line", lambda root: (root / "kernel.py").write_text("x = 2\n"), True),
    ("another line below", lambda root: (root / "deep" / "rows.py").write_text("y = 3\n"), True),
    ("a new module", lambda root: (root / "gate.py").write_text(""), True),
    ("a module goes", lambda root: (root / "kernel.py").unlink(), True),
    ("a module is renamed", lambda root: (root / "kernel.py").rename(root / "core.py"), True),
    ("a module moves", lambda root: (root / "kernel.py").rename(root / "deep" / "kernel.py"), True),
    ("a line moves to another module", _move_line, True),
    ("text beside the code", lambda root: (root / "README.md").write_text("hello"), False),
    ("compiled code", lambda root: (root / "kernel.pyc").write_bytes(b"\0"), False),
    ("a module is touched", lambda root: (root / "kernel.py").touch(), False),
]


@pytest.mark.parametrize(("why", "change", "tells"), CHANGES, ids=[case[0] for case in CHANGES])
def test_the_digest_follows_the_code(package: Path, why: str, change: Callable[[Path], object], tells: bool) -> None:
    before = code_digest(package)
    change(package)
    assert (code_digest(package) != before) == tells


def test_it_is_the_same_wherever_the_code_is(package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "features"
    shutil.copytree(package, elsewhere)
    assert code_digest(elsewhere) == code_digest(package)


def test_packages_and_the_extra_text_count(package: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "delivery"
    shutil.copytree(package, renamed)
    digests = [
        code_digest(package),
        code_digest(renamed),
        code_digest(package, renamed),
        code_digest(package, extra="declaration"),
        code_digest(extra="declaration"),
    ]
    assert len(set(digests)) == len(digests)


def test_versions_name_python_the_project_and_the_libraries() -> None:
    versions = package_versions()
    assert set(versions) == {"python", "training-data-pipelines", *lineage.PACKAGES}
    assert all(versions.values())
    assert versions["polars"].split(".")[0].isdigit()


def test_what_isnt_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "PACKAGES", ("no-such-package-anywhere",))
    assert package_versions()["no-such-package-anywhere"] == "unknown"


FEATURES = "feature-store/customer-features"
TRAINING = "feature-store/training-ready/churn"
COPY = "training-datasets/streaming-ready/churn"
NASTY = "<script>alert('x')</script>&\"`"


def source(name: str, *files: str) -> InputRecord:
    """Files of a table, each 'name:fingerprint'."""
    entries = tuple(
        InputFile(uri=f"s3://lake/{name}/{file.partition(':')[0]}", bytes=10, fingerprint=f"etag:{file}")
        for file in files
    )
    return InputRecord(name=name, uri=f"s3://lake/{name}/", rows=100, files=entries)


def input_of(root: str, dataset: str, version: int) -> InputRecord:
    manifest = versions.read_manifest(root, dataset, version)
    return manifest.as_input(layout.version_uri(storage.normalise(root), dataset, version))


def judged(root: str, dataset: str, inputs: Sequence[InputRecord], run: str = "run") -> Manifest:
    """A manifest that isn't committed yet."""
    return _judged(versions.reserve(root, dataset, run), inputs)


def _judged(reservation: versions.Reservation, inputs: Sequence[InputRecord]) -> Manifest:
    dataset, run = reservation.dataset, reservation.run_id
    manifest = manifest_of(reservation, write(reservation))
    update = {
        "inputs": tuple(inputs),
        "definition": {"name": dataset},
        "run": manifest.run.model_copy(update={"flow_run_name": f"{run}-otter"}),
        "as_of": (dt.datetime(2024, reservation.version, 1, tzinfo=dt.UTC),) if dataset == FEATURES else (),
    }
    return manifest.model_copy(update=update)


def publish(root: str, dataset: str, inputs: Sequence[InputRecord], run: str = "run") -> Manifest:
    reservation = versions.reserve(root, dataset, run)
    return versions.commit(reservation, _judged(reservation, inputs))


def store(root: str, history: int = 2) -> str:
    """Features of some days, each with one file more, a training set of all of them, and a copy of that."""
    files = [f"day-{day}.parquet:a" for day in range(history)]
    customers = source("customers", "all.csv:a")
    for day in range(history):
        publish(root, FEATURES, [source("transactions", *files[: day + 1]), customers], f"day{day}")
    read = [input_of(root, FEATURES, day + 1) for day in range(history)]
    publish(root, TRAINING, [*read, source("spine", "won.parquet:a")], "train")
    publish(root, COPY, [input_of(root, TRAINING, 1)], "copy")
    return root


def edges(lineage: Lineage) -> set[tuple[str, str]]:
    return {(edge.source.partition(" ")[0], edge.target) for edge in lineage.edges}


def _svg(lineage: Lineage) -> str:
    """The drawing as the report's page has it."""
    return str(template("lineage.svg.j2").render(picture=place(lineage)))


def test_from_the_copy_to_the_files(root: str) -> None:
    found = trace(store(root), COPY, 1)
    assert found.of == f"{COPY}@v1"
    assert [node.id for node in found.versions] == [
        f"{COPY}@v1",
        f"{TRAINING}@v1",
        f"{FEATURES}@v1",
        f"{FEATURES}@v2",
    ]
    assert {node.status for node in found.versions} == {"published"}
    assert edges(found) == {
        (f"{TRAINING}@v1", f"{COPY}@v1"),
        (f"{FEATURES}@v1", f"{TRAINING}@v1"),
        (f"{FEATURES}@v2", f"{TRAINING}@v1"),
        ("spine", f"{TRAINING}@v1"),
        *((name, f"{FEATURES}@v{n}") for name in ("transactions", "customers") for n in (1, 2)),
    }
    assert {run.flow_run_id for run in found.runs} == {"copy", "train", "day0", "day1"}
    sources = {node.name: [file.uri.rpartition("/")[2] for file in node.files] for node in found.sources}
    assert sources == {
        "transactions": ["day-0.parquet", "day-1.parquet"],
        "customers": ["all.csv"],
        "spine": ["won.parquet"],
    }
    made = found.versions[1]
    assert (made.run, made.rows, made.uri) == ("train", 100, layout.version_uri(storage.normalise(root), TRAINING, 1))
    assert made.definition is not None
    assert re.fullmatch("[0-9a-f]{64}", made.definition)
    assert [node.as_of[0].month for node in found.versions[2:]] == [1, 2]


def test_an_edge_says_which_files_were_read(tmp_path: object) -> None:
    root = str(tmp_path)
    publish(root, FEATURES, [source("transactions", "a:1", "b:1")], "one")
    publish(root, FEATURES, [source("transactions", "a:1", "b:2")], "two")
    publish(root, FEATURES, [source("transactions", "a:1", "b:1")], "three")
    read = [input_of(root, FEATURES, number) for number in (1, 2, 3)]
    found = trace_manifest(root, judged(root, TRAINING, read))
    by_target = {edge.target: edge for edge in found.edges if edge.source.startswith("transactions")}
    digests = [by_target[f"{FEATURES}@v{number}"].fingerprint for number in (1, 2, 3)]
    assert digests[0] == digests[2] != digests[1]
    (node,) = found.sources
    assert [file.fingerprint for file in node.files] == ["etag:a:1", "etag:b:1", "etag:b:2"]
    assert {edge.files for edge in by_target.values()} == {2}


def test_a_manifest_that_is_being_judged(tmp_path: object) -> None:
    root = store(str(tmp_path))
    manifest = judged(root, TRAINING, [input_of(root, FEATURES, 1)], "later")
    found = trace_manifest(root, manifest)
    assert found.of == f"{TRAINING}@v2"
    assert [node.id for node in found.versions] == [f"{TRAINING}@v2", f"{FEATURES}@v1"]


def test_what_is_withdrawn_or_gone_is_still_told(root: str) -> None:
    store(root)
    storage.write_bytes(layout.join(root, FEATURES, "v1", layout.WITHDRAWN), b"{}")
    storage.delete(layout.join(root, FEATURES, "v2", layout.MANIFEST))
    found = trace(root, COPY, 1)
    assert {node.id: node.status for node in found.versions if node.dataset == FEATURES} == {
        f"{FEATURES}@v1": "withdrawn",
        f"{FEATURES}@v2": "gone",
    }
    gone = found.versions[-1]
    assert (gone.rows, gone.run, gone.created_at) == (100, None, None)
    assert "gone" in lineage_graph.text(found)
    assert "withdrawn" in _svg(found)


def test_a_broken_manifest_before_it_is_no_reason_to_fail(tmp_path: object) -> None:
    root = store(str(tmp_path))
    storage.write_bytes(layout.join(root, FEATURES, "v2", layout.MANIFEST), b"{")
    assert [node.status for node in trace(root, TRAINING, 1).versions] == ["published", "published", "gone"]


def test_a_version_of_another_root_is_followed_there(tmp_path: object) -> None:
    other, root = store(f"{tmp_path}/other"), f"{tmp_path}/root"
    publish(root, COPY, [input_of(other, TRAINING, 1)])
    assert {node.name for node in trace(root, COPY, 1).sources} == {"transactions", "customers", "spine"}


def test_trainings_on_a_copy(root: str) -> None:
    store(root)
    copy = versions.read_manifest(root, COPY, 1)
    run = copy.run.model_copy(update={"flow_run_id": "trained", "flow_run_name": "brave-finch"})
    report = Report.of(copy, None, run=run)
    for name in ("v1-trained", "v10-other"):
        storage.write_bytes(layout.join(layout.training_runs(root, "churn"), name, "_report.json"), report.to_json())
    storage.write_bytes(layout.join(layout.training_runs(root, "churn"), "v1-under-way", "records"), b"")
    found = trace(root, COPY, 1)
    (training,) = found.trainings
    assert (training.run, training.verdict, training.uri.rpartition("/")[2]) == ("trained", "pass", "v1-trained")
    assert (f"{COPY}@v1", training.id) in {(edge.source, edge.target) for edge in found.edges}
    assert lineage_graph.text(found).startswith("training · ")
    assert "brave-finch" in _svg(found)
    assert trace(root, TRAINING, 1).trainings == ()


def test_an_unknown_version_is_named(tmp_path: object) -> None:
    with pytest.raises(VersionNotFound, match="v7"):
        trace(store(str(tmp_path)), TRAINING, 7)


def test_json_reads_back(tmp_path: object) -> None:
    found = trace(store(str(tmp_path)), COPY, 1)
    assert Lineage.model_validate_json(found.to_json()) == found
    assert json.loads(found.to_json())["of"] == f"{COPY}@v1"


def test_a_tree(tmp_path: object) -> None:
    lines = lineage_graph.text(trace(store(str(tmp_path)), COPY, 1)).splitlines()
    names = [re.sub(r" · .*", "", line) for line in lines]
    assert names == [
        COPY,
        f"└─ {TRAINING}",
        f"   ├─ {FEATURES}",
        "   │  ├─ transactions",
        "   │  └─ customers",
        f"   ├─ {FEATURES}",
        "   │  ├─ transactions",
        "   │  └─ customers",
        "   └─ spine",
    ]
    assert "v1, 100 rows · as of 2024-01-01 · by day0-otter" in lines[2]
    assert lines[3].endswith("transactions · s3://lake/transactions/ · 2 files, 20 bytes")


def test_a_long_history_is_one_box(tmp_path: object) -> None:
    found = trace(store(str(tmp_path), history=6), TRAINING, 1)
    assert len(found.versions) == 7
    boxes, links = drawn(found)
    assert list(boxes) == [
        f"{TRAINING}@v1",
        f"{FEATURES}@v1–v6",
        "spine s3://lake/spine/",
        "transactions s3://lake/transactions/",
        "customers s3://lake/customers/",
    ]
    assert len(links) == 4
    assert boxes[f"{FEATURES}@v1–v6"].lines == (
        "v1–v6, 600 rows, 6 times",
        "as of 2024-01-01 … 2024-06-01",
        "6 runs",
    )


def test_mermaid(tmp_path: object) -> None:
    lines = lineage_graph.mermaid(trace(store(str(tmp_path)), TRAINING, 1)).splitlines()
    assert lines[0] == "flowchart LR"
    nodes = [line for line in lines[1:] if "-->" not in line]
    assert all(re.fullmatch(r'  n\d+(\[".*"\]|\[\(".*"\)\]|\(\[".*"\]\))', line) for line in nodes)
    assert len(lines) - 1 - len(nodes) == 7


def test_boxes_don_t_overlap_and_arrows_go_to_the_right(tmp_path: object) -> None:
    picture = place(trace(store(str(tmp_path), history=3), COPY, 1))
    corners = {one.box.id: (one.x, one.y) for one in picture.boxes}
    assert len(set(corners.values())) == len(picture.boxes) == 8
    for one in picture.boxes:
        assert one.x >= 0
        assert one.y >= 0
        assert one.x + picture.box_width <= picture.width
        assert one.y + picture.box_height <= picture.height
        beside = [two for two in picture.boxes if two.x == one.x and two is not one]
        assert all(abs(two.y - one.y) >= picture.box_height for two in beside)
    across = {name.partition("@")[0].partition(" ")[0]: x for name, (x, _) in corners.items()}
    assert across["transactions"] < across[FEATURES] < across[TRAINING] < across[COPY]
    assert across["spine"] == across[FEATURES]  # right before who reads it
    assert len(picture.tips) == 5  # one for each box that was made from another


def test_text_from_the_data_stays_text(tmp_path: object) -> None:
    root = str(tmp_path)
    manifest = judged(root, TRAINING, [source(NASTY, f"{NASTY}:1")], NASTY)
    found = trace_manifest(root, manifest)
    picture = ET.fromstring(_svg(found))
    assert "script" not in {element.tag.rpartition("}")[2] for element in picture.iter()}
    assert '"<' not in lineage_graph.mermaid(found)
    assert "<script" not in lineage_graph.mermaid(found)
    report = Report.of(manifest, None, lineage=found)
    page = to_html(report).decode()
    assert "<script" not in page
    assert 'aria-label="Lineage, from the sources on"' in page
    assert "`" not in report.to_markdown().partition("```text\n")[2].partition("\n```")[0]


def test_the_report_shows_it(tmp_path: object) -> None:
    root = store(str(tmp_path))
    manifest = versions.read_manifest(root, COPY, 1)
    report = Report.of(manifest, None, lineage=trace(root, COPY, 1))
    page, text = to_html(report).decode(), report.to_markdown()
    assert page.count("<svg xmlns") == 1
    assert "transactions" in page
    assert "Inputs, run and version" not in page
    assert "<style>" not in page[page.index("<svg xmlns") :]
    assert f"```text\n{COPY} · v1, 100 rows" in text
    assert Report.model_validate_json(report.to_json()) == report
