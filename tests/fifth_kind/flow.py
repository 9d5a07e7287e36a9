"""The flow of the toy kind: its own step is the job; the others are those of all kinds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from prefect import flow
from prefect.runtime import flow_run

from tasks.io import storage
from tasks.publication import (
    PublishedVersion,
    judged_version,
    manifest_of,
    publish_versions,
    reserve_versions,
    run_record,
)
from tasks.store import versions
from tasks.store.manifest import ColumnSpec
from tests.fifth_kind.kind import ToyConfig, figures_of, judge_squares, squares


@flow
def toy(config: ToyConfig) -> list[PublishedVersion]:
    [reservation] = reserve_versions(config.root, ["toys/squares"], str(flow_run.id))
    table = squares(np.arange(config.count))
    file = reservation.entry(storage.write_parquet(table, reservation.data_uri(0)))
    figures = figures_of(table, "numbers")
    columns = tuple(ColumnSpec(name=field.name, type=str(field.type)) for field in table.schema)
    written = SimpleNamespace(
        reservation=reservation, files=(file,), rejected_files=(), columns=columns, **vars(figures)
    )
    definition = {"entity": "number"}
    manifest = manifest_of(written, judge_squares(figures), config, run_record(), definition=definition, inputs=())
    previous = versions.latest(config.root, reservation.dataset)
    return publish_versions([judged_version(manifest, reservation, previous, self_test=True)], config.root)
