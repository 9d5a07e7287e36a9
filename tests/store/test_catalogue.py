"""The table of versions says what the manifests say."""

from __future__ import annotations

import csv
import io
import json

import pytest

from tasks.io import storage
from tasks.store import catalogue, layout, versions
from tests.store.publishing import DATASET, PARTS, ROWS, manifest_of, publish, write


def reject(root: str, thresholds: dict[str, float]) -> None:
    reservation = versions.reserve(root, DATASET, "rejected")
    config = {"thresholds": thresholds, "seed": 1}
    manifest = manifest_of(reservation, write(reservation), status="rejected", verdict="fail", config=config)
    versions.commit(reservation, manifest)


def test_every_committed_version_has_a_row(root: str) -> None:
    published = publish(root, "run")
    reject(root, {"nulls": 0.1})
    versions.reserve(root, DATASET, "unfinished")
    publish(root, "run", "feature-store/a")
    table = catalogue.versions_table(root, [DATASET, "feature-store/a", "feature-store/none"])
    assert table.schema == catalogue.SCHEMA
    assert table.drop_columns(["creation_date"]).to_pylist() == [
        {
            "version": version,
            "dataset": dataset,
            "feature_count": 2,
            "record_count": ROWS * PARTS,
            "status": status,
            "thresholds": thresholds,
        }
        for version, dataset, status, thresholds in [
            (1, "feature-store/a", "published", None),
            (1, DATASET, "published", None),
            (2, DATASET, "rejected", '{"nulls": 0.1}'),
        ]
    ]
    assert table["creation_date"][1].as_py() == published.created_at


def test_the_csv_is_written_anew_from_the_manifests(root: str) -> None:
    uri = catalogue.write_versions_csv(root)
    assert uri == layout.join(storage.normalise(root), layout.METADATA)
    assert storage.read_bytes(uri).decode().strip().count("\n") == 0  # the header alone
    reject(root, {"nulls": 0.1, "drift": 0.2})
    catalogue.write_versions_csv(root)
    catalogue.write_versions_csv(root)
    publish(root, "run", "feature-store/training-ready/churn")
    publish(root, "run", "training-datasets/images")
    catalogue.write_versions_csv(root)
    row, training_set = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode()))
    assert list(row) == catalogue.SCHEMA.names
    assert (row["version"], row["status"], row["record_count"]) == ("1", "rejected", str(ROWS * PARTS))
    assert json.loads(row["thresholds"]) == {"nulls": 0.1, "drift": 0.2}
    assert training_set["dataset"] == "feature-store/training-ready/churn"


def test_a_version_published_while_the_csv_is_written_is_in_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(root, "first")
    write_bytes, late = storage.write_bytes, ["late"]

    def overtaken(uri: str, data: bytes) -> None:
        if late:  # another flow publishes, and writes its table before the one that was made without it
            publish(root, late.pop())
            catalogue.write_versions_csv(root)
        write_bytes(uri, data)

    monkeypatch.setattr(storage, "write_bytes", overtaken)
    text = storage.read_bytes(catalogue.write_versions_csv(root)).decode()
    assert [row["version"] for row in csv.DictReader(io.StringIO(text))] == ["1", "2"]
