"""Table of all versions, for people and notebooks: derived from the manifests; no flow reads it back."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.csv as pacsv

from tasks.io import storage
from tasks.store import layout, versions

SCHEMA = pa.schema(
    [
        ("version", pa.int64()),
        ("dataset", pa.string()),
        ("feature_count", pa.int64()),
        ("record_count", pa.int64()),
        ("status", pa.string()),
        ("thresholds", pa.string()),
        ("creation_date", pa.timestamp("us", tz="UTC")),
    ]
)


def versions_table(root: str, datasets: Iterable[str]) -> pa.Table:
    """Describe every committed version of some datasets, published and rejected, by dataset and version.

    The index is its source: a version whose manifest was damaged since keeps its row.

    Returns:
        One row a version, in `SCHEMA`: feature_count is the number of columns, keys included; record_count is the
        number of rows; thresholds is the JSON of the configuration's 'thresholds', or null where it has none.

    Raises:
        CorruptVersion: a manifest can't be read.
    """
    rows = [
        {
            "version": one.version,
            "dataset": dataset,
            "feature_count": one.columns,
            "record_count": one.rows,
            "status": one.status,
            "thresholds": _json(one.thresholds),
            "creation_date": one.created_at,
        }
        for dataset in sorted(set(datasets))
        for one in versions.overview(root, dataset).warned().versions.values()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_versions_csv(root: str) -> str:
    """Write `versions_table` of all datasets of the feature store as CSV, replacing the last one.

    A table that was made before another flow published, and is written after that flow's, would lack its version: so
    the manifests are read once more after writing, and the last writer has seen all of them.

    Returns:
        URI of the CSV file.
    """
    uri = layout.join(storage.normalise(root), layout.METADATA)
    table, written = _feature_versions(root), None
    while table != written:
        sink = pa.BufferOutputStream()
        pacsv.write_csv(table, sink)
        storage.write_bytes(uri, sink.getvalue())
        table, written = _feature_versions(root), table
    return uri


def _feature_versions(root: str) -> pa.Table:
    store = layout.join(storage.normalise(root), layout.FEATURE_STORE)
    names = versions.list_datasets(store)
    return versions_table(root, [layout.join(layout.FEATURE_STORE, name) for name in names])


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)
