"""Manifests of versions that are made up, for tests that need one of them to differ in little."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from tasks.store.manifest import ColumnSpec, GateResult, Manifest, RunRecord
from tasks.store.reservation import Reservation


def manifest(of: str | Reservation, schema: Iterable[pa.Field] = (), **fields: Any) -> Manifest:
    """The manifest of the first version of a dataset, or of a reserved one, without files unless `fields` has some."""
    held = of if isinstance(of, Reservation) else Reservation(root="r", dataset=of, version=1, run_id="run", attempt=1)
    known: dict[str, Any] = {
        "dataset": held.dataset,
        "version": held.version,
        "status": "published",
        "created_at": dt.datetime.now(dt.UTC),
        "files": (),
        "columns": tuple(ColumnSpec(name=field.name, type=str(field.type)) for field in schema),
        "balances": (),
        "profile": {},
        "gate": GateResult(verdict="pass", checks=()),
        "inputs": (),
        "config": {},
        "code_digest": "0",
        "packages": {},
        "run": RunRecord(flow_run_id=held.run_id, attempt=held.attempt),
    }
    return Manifest(**known | fields)
