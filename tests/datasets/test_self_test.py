"""Faults of a published Ray Dataset that its gate notices; the laws of all gates are in `tests.test_kinds`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.datasets.config import DatasetConfig, DatasetThresholds
from tasks.datasets.gate import trial
from tasks.datasets.rows import content_of, form_of, make_rows
from tasks.io import storage
from tasks.quality import rules
from tasks.quality.faults import Trial
from tasks.quality.profile import profile_table
from tasks.store.reservation import reserve
from tests.gates import RULES, by_fault, lax, made_by, noticed, outcomes
from tests.manifests import manifest

EXPECTED = outcomes("""
    no rows    refused  rows
    lost rows  refused  balance of toys
    bad rows   refused  rejected of toys
    schema     refused  schema of spent
    nulls      warned  nulls of spent
    one label  refused  target of label
    shift      refused  drift of spent
""")
SAID = {"bad rows": ("40% of the rows lost their label.", "were rejected")}
LAXEST = lax(bad_rows="rejected", nulls="missing", shift="drift")
CHECKS = {
    **{fault: RULES[fault] for fault in ("no rows", "lost rows", "schema")},
    **made_by(rules, bad_rows="check_rejected_share", nulls="check_nulls", one_label="check_target"),
    **made_by(rules, shift="check_drift"),
}


def toys(rows: int = 2000) -> pa.Table:
    draw = np.random.default_rng(0)
    return pa.table(
        {
            "spent": draw.normal(100, 10, rows),
            "city": draw.choice(["Lima", "Oslo"], rows),
            "label": draw.choice(["low", "high"], rows),
        }
    )


def tried(root: Path, table: pa.Table | None = None, *, label: str | None = "label", **thresholds: float) -> Trial[Any]:
    config = DatasetConfig(root=str(root), name="toys", label=label, thresholds=DatasetThresholds(**thresholds))
    given = toys() if table is None else table
    form = form_of(given, config)
    rows = make_rows(given, form).rows
    reservation = reserve(str(root), "datasets/toys", uuid.uuid4().hex)
    entry = reservation.entry(storage.write_parquet(rows, reservation.data_uri(0)))
    profile = profile_table(given).columns()
    definition = form.define(content_of(rows["row_id"]))
    return trial(
        str(root),
        manifest(reservation, rows.schema, files=(entry,), profile=profile, definition=definition),
        config,
        None,
    )


def test_without_label_or_number_some_faults_have_no_place(tmp_path: Path) -> None:
    results = noticed(by_fault(tried(tmp_path, toys().select(["city"]), label=None)))
    assert {name for name, (outcome, _) in results.items() if outcome == "not applicable"} == {
        "bad rows",
        "one label",
        "shift",
    }


def test_classes_move_where_there_is_no_number(tmp_path: Path) -> None:
    results = noticed(by_fault(tried(tmp_path, toys().select(["city", "label"]))))
    assert results["shift"] == ("refused", "drift of label")
