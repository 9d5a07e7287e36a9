"""Point-in-time join: the training-set job against Polars' join_asof and DuckDB's ASOF JOIN, interleaved.

    python -m tests.benchmarks.serving [--rows 10000000] [--times 50] [--repeats 3] [--directory /tmp]

A spine of `rows` rows is joined with a history of rows / 10 entities at `times` times in three versions, each with 8
features, of which 4 are joined: 10 million rows with 50 million by default. Every side scans Parquet, joins, and
writes Parquet. Ours also rejects bad rows, tries the join by planted rows and profiles what it wrote, with Ray's object
store limited to 2 GB; Ray runs before the clock does. The others hold both tables in one process's memory. The results
are compared first.
"""

from __future__ import annotations

import argparse
import datetime as dt
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import ray

from tasks.engine.cluster import connect
from tasks.features.config import FeatureStoreConfig
from tasks.features.standard import STANDARD
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.store.reservation import reserve
from tasks.training_sets.definition import FeatureReference, Model, SpineSource
from tasks.training_sets.pipeline import bucket_count, build_training_set
from tasks.training_sets.plan import TrainingSetPlan, plan_training_set
from tests.benchmarks.turns import GIB, Side, machine, median, ratio, scratch, take_turns, timed_with_memory
from tests.serving.feature_versions import DAY, ENTITY, GROUP, publish_features

FEATURES, JOINED, VERSIONS, BUCKETS = 8, 4, 3, 8
STARTED = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMES = [f"f{number}" for number in range(JOINED)]


def publish_history(root: str, entities: int, times: int) -> None:
    """All entities once a day, in three versions, as the flow writes them."""
    draw = np.random.default_rng(0)
    for days in np.array_split(np.arange(times), VERSIONS):
        moments = pl.Series([DAY + dt.timedelta(days=int(day)) for day in days], dtype=pl.Datetime("us", "UTC"))
        rows = entities * len(days)
        frame = pl.DataFrame(
            {
                ENTITY: np.repeat(np.arange(entities), len(days)),
                **{f"f{number}": draw.gamma(2, 50, rows).round(2) for number in range(FEATURES)},
                "as_of": moments[np.tile(np.arange(len(days)), entities)],
            }
        )
        publish_features(root, frame, buckets=BUCKETS, created=moments[-1])


def write_spine(folder: Path, rows: int, entities: int, times: int) -> None:
    """Rows of any entity at any second, in eight files."""
    draw = np.random.default_rng(1)
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(rows), 8)):
        seconds = draw.integers(-86_400, times * 86_400, len(part))
        frame = pl.DataFrame({ENTITY: draw.integers(0, entities, len(part)), "s": seconds, TARGET: part})
        moment = pl.lit(DAY) + pl.duration(seconds=pl.col("s"))
        frame = frame.select(ENTITY, moment.dt.cast_time_unit("us").alias(EVENT_TIME), TARGET)
        frame.write_parquet(folder / f"{number}.parquet", compression="zstd", compression_level=1)


def ours(planned: TrainingSetPlan, target: Path) -> None:
    """The job, from the spine's files to the written parts."""
    computed = build_training_set(planned, reserve(str(target), "training-set", "run"))
    assert computed.planted, "the canary had nothing to plant"


def with_polars(spine: str, history: str, target: Path) -> None:
    """Both tables sorted by time, joined by entity."""
    rows = pl.scan_parquet(spine).sort(EVENT_TIME)
    known = pl.scan_parquet(history).select(ENTITY, "as_of", *NAMES).sort("as_of")
    joined = rows.join_asof(known, left_on=EVENT_TIME, right_on="as_of", by=ENTITY, check_sortedness=False)
    names = [ENTITY, EVENT_TIME, *NAMES, TARGET]
    joined.select(names).collect().write_parquet(target / "o.parquet", compression="zstd", compression_level=1)


def with_duckdb(spine: str, history: str, target: Path) -> None:
    """ASOF LEFT JOIN on two threads."""
    names = ", ".join(f"h.{name}" for name in NAMES)
    with duckdb.connect(config={"threads": 2}) as connection:
        connection.execute(
            f"COPY (SELECT s.{ENTITY}, s.{EVENT_TIME}, {names}, s.{TARGET} FROM read_parquet('{spine}') s "
            f"ASOF LEFT JOIN read_parquet('{history}') h ON s.{ENTITY} = h.{ENTITY} AND s.{EVENT_TIME} >= h.as_of) "
            f"TO '{target}/o.parquet' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
        )


def planned_join(place: Path, rows: int, entities: int, times: int) -> TrainingSetPlan:
    """Plan of the join of a spine in `place`/spine with the history below `place`/root, made unless they are there."""
    root, folder = str(place / "root"), place / "spine"
    if not folder.exists():
        publish_history(root, entities, times)
        write_spine(folder, rows, entities, times)
    model = Model(
        name="bench",
        entity=ENTITY,
        spine=SpineSource(uri=str(folder)),
        features=tuple(FeatureReference(GROUP, name) for name in NAMES),
    )
    return plan_training_set(model, STANDARD, FeatureStoreConfig(root=root), STARTED)


def check_equal(sides: dict[str, Side], place: Path) -> None:
    """Every side must find the same features, row for row."""
    found = {}
    for name, side in sides.items():
        with scratch("serving-", place) as target:
            seconds, peak = timed_with_memory(side, target)
            print(f"  check   {name:12s} {seconds:7.2f} s, peak memory {peak / GIB:5.1f} GiB", flush=True)
            rows = pl.concat([pl.read_parquet(path) for path in sorted(target.rglob("[!_]*.parquet"))])
            rows = rows.rename({f"feature_{name}": name for name in NAMES}, strict=False).sort(TARGET)
            found[name] = rows.select(ENTITY, *NAMES, TARGET, pl.col(EVENT_TIME).dt.epoch("us"))
    first = found.pop("ours")
    for name, other in found.items():
        assert first.equals(other), f"ours and {name} differ"


def main() -> None:
    """Make the data, compare the results, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    rows, entities = arguments.rows, max(1, arguments.rows // 10)
    with scratch("serving-", arguments.directory) as place:
        planned = planned_join(place, rows, entities, arguments.times)
        print(f"{machine()}: {rows:,} rows, {planned.history_rows:,} of history, {bucket_count(planned)} buckets")
        spine, history = f"{place}/spine/*.parquet", f"{place}/root/feature-store/{GROUP}/*/part-*.parquet"
        sides: dict[str, Side] = {
            "ours": partial(ours, planned),
            "polars": partial(with_polars, spine, history),
            "duckdb": partial(with_duckdb, spine, history),
        }
        assert connect(num_cpus=2, object_store_memory=2 * 10**9), "Ray runs already"
        try:
            check_equal(sides, place)
            seconds = take_turns(sides, arguments.repeats, prefix="serving-", directory=place)
        finally:
            ray.shutdown()
    for name, taken in seconds.items():
        print(f"{name:8s} {median(taken, lambda middle: f'{rows / middle / 1e6:.2f} million rows a second')}")
    for name in ("polars", "duckdb"):
        print(f"ours / {name}: {ratio(seconds['ours'], seconds[name])}")


if __name__ == "__main__":
    main()
