"""The flow of the toy kind: its own step is the job; the others are those of all kinds."""

from __future__ import annotations

import numpy as np
from prefect import flow
from prefect.runtime import flow_run

from tasks.io import storage
from tasks.publication import PublishedVersion, judged_version, publish_versions, reserve_versions
from tasks.quality.rules import Written
from tasks.runner import run_record
from tasks.store import versions
from tests.fifth_kind.kind import ToyConfig, figures_of, squares


@flow
def toy(config: ToyConfig) -> list[PublishedVersion]:
    [reservation] = reserve_versions(config.root, ["toys/squares"], str(flow_run.id))
    table = squares(np.arange(config.count))
    file = reservation.entry(storage.write_parquet(table, reservation.data_uri(0)))
    written = Written(reservation=reservation, files=(file,), rejected_files=(), timings={}, **vars(figures_of(table)))
    previous = versions.latest(config.root, reservation.dataset)
    recorded = {"definition": {"entity": "number"}, "inputs": ()}
    return publish_versions([judged_version(written, config, run_record(), previous, recorded=recorded)], config.root)
