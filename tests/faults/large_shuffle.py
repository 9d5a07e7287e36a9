"""A shuffle of 160 MB, for a Ray whose object store holds 80 MB; prints the sums of its buckets as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa
import ray

from tasks.engine.cluster import connect, losses_explained
from tasks.engine.jobs import Parts, shuffle
from tasks.io.errors import PipelineError

UNITS, BUCKETS, ROWS = 16, 2, 625_000
STORE_BYTES = 80_000_000


def scatter(unit: int) -> tuple[int, list[pl.DataFrame]]:
    """5 MB for each bucket, which can't be compressed."""
    rows = np.random.default_rng(unit).integers(0, 1 << 40, BUCKETS * ROWS)
    return unit, [pl.DataFrame({"x": part}) for part in np.split(rows, BUCKETS)]


def gather(_: int, frames: Mapping[int, pl.DataFrame]) -> tuple[int, pa.Table]:
    """The sum of all numbers."""
    return sum(int(frame["x"].sum()) for frame in frames.values()), pa.table({})


def expected() -> list[int]:
    """What is printed where nothing is lost."""
    return [sum(int(scatter(unit)[1][bucket]["x"].sum()) for unit in range(UNITS)) for bucket in range(BUCKETS)]


if __name__ == "__main__":
    connect(num_cpus=2, object_store_memory=STORE_BYTES)
    try:
        with losses_explained("lower ROWS"):
            done = shuffle(Parts(UNITS), BUCKETS, scatter, gather, names=("scatter", "gather"), volume=2 * STORE_BYTES)
            print(json.dumps(done.summaries))
    except PipelineError as error:
        print(type(error).__name__, error)
        raise SystemExit(1) from error
    finally:
        ray.shutdown()
