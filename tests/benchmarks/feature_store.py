"""Speed of the feature computation, both standard groups, read to write, against what else does it on this machine.

    python -m tests.benchmarks.feature_store                    10 million rows against DuckDB and Polars
    python -m tests.benchmarks.feature_store --map-groups       1 million rows against Ray Data's map_groups (minutes)
    python -m tests.benchmarks.feature_store --repartition      10 million rows, Ray Data's keyed repartition
    python -m tests.benchmarks.feature_store --large            50 million rows, object store limited to 2 GB
    python -m tests.benchmarks.feature_store --incremental      2 million rows and one more day: that day against all

The sides take turns in one run, and medians and ratios are printed. Ours also judges each row, profiles, scores
and checks the balance, which the others don't. All sides' features are compared once before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import shutil
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

import duckdb
import polars as pl

from tasks import feature_store
from tasks.engine import cluster
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import FeatureGroup
from tasks.features.incremental import with_state
from tasks.features.pipeline import ComputedGroup, compute_groups
from tasks.features.plan import plan_features, with_uris
from tasks.features.standard import CUSTOMER_FEATURES, PRODUCT_FEATURES, STANDARD
from tasks.publication import manifest_of
from tasks.store import versions
from tasks.store.manifest import GateResult, Manifest, RunRecord
from tasks.store.reservation import reserve
from tests.benchmarks.data import transactions
from tests.benchmarks.turns import GIB, Side, grow, median, ratio, scratch, take_turns

AS_OF = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
CPUS = 2
PREFIX = "feature-benchmark-"

CUSTOMER_SQL = """
copy (
  select customer_id, count(*) transaction_count, sum(amount) total_spent, avg(amount) avg_transaction_value,
    coalesce(stddev_samp(amount), 0) transaction_std,
    floor(epoch(max(timestamp) - min(timestamp)) / 86400)::bigint days_active,
    count(distinct category) unique_categories,
    list_avg(list_transform(max(struct_pack(t := timestamp, p := product_id, a := amount), 5), lambda x: x.a))
      recent_avg_transaction,
    {windows},
    count(*) / greatest(floor(epoch(max(timestamp) - min(timestamp)) / 86400), 1) purchase_frequency,
    count(distinct category) / count(*) category_diversity,
    case when recent_avg_transaction - avg_transaction_value > 0.1 * abs(avg_transaction_value) then 'increasing'
         when recent_avg_transaction - avg_transaction_value < -0.1 * abs(avg_transaction_value) then 'decreasing'
         else 'stable' end spending_trend
  from '{source}/*.parquet'
  where amount is not null and isfinite(amount) and customer_id is not null and product_id is not null
    and timestamp <= timestamp '2026-01-01'
  group by customer_id
) to '{target}' (format parquet, compression zstd)
"""
WINDOWS_SQL = ", ".join(
    f"count(*) filter (timestamp > timestamp '2026-01-01' - interval {days} day) transaction_count_{days}d, "
    f"coalesce(sum(amount) filter (timestamp > timestamp '2026-01-01' - interval {days} day), 0) total_spent_{days}d"
    for days in (7, 30, 90)
)
PRODUCT_SQL = """
copy (
  with pairs as (
    select product_id, customer_id, count(*) n, sum(amount) s, avg(amount) m,
      var_pop(amount) * count(*) q, min(timestamp) first, max(timestamp) last
    from '{source}/*.parquet'
    where amount is not null and isfinite(amount) and customer_id is not null and product_id is not null
      and timestamp <= timestamp '2026-01-01'
    group by all
  ), whole as (select product_id, sum(s) / sum(n) mean from pairs group by all)
  select product_id, sum(n)::bigint total_sales, sum(s) total_revenue, sum(s) / sum(n) avg_sale_price,
    coalesce(sum(q + n * (m - mean) ** 2) / nullif(sum(n) - 1, 0), 0) price_variance,
    count(*) unique_customers, avg((n > 1)::int) repeat_customer_share,
    (sum(n) - count(*)) / greatest(count(*), 1) repeat_purchase_rate,
    floor(epoch(max(last) - min(first)) / 86400)::bigint days_on_sale,
    sum(n) / greatest(floor(epoch(max(last) - min(first)) / 86400), 1) sales_velocity,
    case when sales_velocity > 1 then 'high' when sales_velocity > 0.1 then 'medium' else 'low' end performance_tier
  from pairs join whole using (product_id) group by product_id
) to '{target}' (format parquet, compression zstd)
"""


def ours(source: Path, target: Path) -> list[ComputedGroup]:
    """Both groups by the pipeline, on the Ray that is connected."""
    config = FeatureStoreConfig(root=str(target), transactions=str(source))
    (plan,) = plan_features(with_uris(STANDARD, config), config, (AS_OF,))
    reservations = [reserve(str(target), planned.group.name, "benchmark") for planned in plan.groups]
    return compute_groups(plan, config, reservations, AS_OF)


def by_duckdb(source: Path, target: Path) -> None:
    """Both groups by one DuckDB process with as many threads as ours has CPUs."""
    with duckdb.connect() as connection:
        connection.execute(f"set threads = {CPUS}")
        connection.execute(CUSTOMER_SQL.format(windows=WINDOWS_SQL, source=source, target=target / "c.parquet"))
        connection.execute(PRODUCT_SQL.format(source=source, target=target / "p.parquet"))


def by_polars(source: Path, target: Path) -> None:
    """Both groups by Polars in this process, with the declared expressions themselves."""
    events = pl.scan_parquet(str(source / "*.parquet")).filter(
        pl.col("amount").is_finite() & pl.col("customer_id").is_not_null() & pl.col("product_id").is_not_null()
    )
    events = events.with_columns(pl.col("timestamp").dt.replace_time_zone("UTC")).filter(pl.col("timestamp") <= AS_OF)
    for group, name in ((CUSTOMER_FEATURES, "c"), (PRODUCT_FEATURES, "p")):
        _polars_group(events, group).sink_parquet(target / f"{name}.parquet", engine="streaming")


def _polars_group(events: pl.LazyFrame, group: FeatureGroup) -> pl.LazyFrame:
    named = [expression.alias(name) for name, expression in group.features.items()]
    for window in group.windows:
        inside = pl.col("timestamp") > AS_OF - dt.timedelta(days=window.days)
        named += [inside.sum().cast(pl.Int64).alias(f"transaction_count_{window.days}d")]
        named += [pl.col("amount").filter(inside).sum().alias(f"total_spent_{window.days}d")]
    features = events.group_by(group.entity).agg(named)
    for name, expression in group.derived.items():
        features = features.with_columns(expression.alias(name))
    return features


def by_map_groups(source: Path, target: Path) -> None:
    """Both groups as Ray's documentation shows it: a pandas function a group."""
    import pandas as pd
    import ray
    from ray.data.expressions import col

    def customer(group: pd.DataFrame) -> pd.DataFrame:
        days = (group.timestamp.max() - group.timestamp.min()).days
        latest = group.sort_values(["timestamp", "product_id", "amount"], ascending=False).amount.head(5).mean()
        row = {
            "customer_id": group.customer_id.iloc[0],
            "transaction_count": len(group),
            "total_spent": group.amount.sum(),
            "avg_transaction_value": group.amount.mean(),
            "transaction_std": group.amount.std() if len(group) > 1 else 0.0,
            "days_active": days,
            "unique_categories": group.category.nunique(),
            "recent_avg_transaction": latest,
        }
        for window in (7, 30, 90):
            inside = group[group.timestamp > AS_OF.replace(tzinfo=None) - dt.timedelta(days=window)]
            row |= {f"transaction_count_{window}d": len(inside), f"total_spent_{window}d": inside.amount.sum()}
        return pd.DataFrame([row])

    def product(group: pd.DataFrame) -> pd.DataFrame:
        per_customer = group.customer_id.value_counts()
        days = (group.timestamp.max() - group.timestamp.min()).days
        row = {
            "product_id": group.product_id.iloc[0],
            "total_sales": len(group),
            "total_revenue": group.amount.sum(),
            "avg_sale_price": group.amount.mean(),
            "price_variance": group.amount.var() if len(group) > 1 else 0.0,
            "unique_customers": len(per_customer),
            "repeat_customer_share": (per_customer > 1).mean(),
            "repeat_purchase_rate": (len(group) - len(per_customer)) / len(per_customer),
            "days_on_sale": days,
            "sales_velocity": len(group) / max(days, 1),
        }
        return pd.DataFrame([row])

    with cluster.data_context():
        for key, function in (("customer_id", customer), ("product_id", product)):
            rows = ray.data.read_parquet(str(source)).filter(expr=col("amount") == col("amount"))
            rows.groupby(key).map_groups(function, batch_format="pandas").write_parquet(str(target / key))


def by_repartition(source: Path, target: Path) -> None:
    """Both groups with Ray Data's own keyed repartition and the same kernel: what the exchange stands in for."""
    import pyarrow as pa
    import ray

    from tasks.features.kernel import evaluate
    from tasks.features.writer import to_arrow

    with cluster.data_context() as context:
        context.shuffle_compression = "none"
        for group in (CUSTOMER_FEATURES, PRODUCT_FEATURES):

            def features(block: pa.Table, group: FeatureGroup = group) -> pa.Table:
                frame = pl.from_arrow(block)
                assert isinstance(frame, pl.DataFrame)
                frame = frame.filter(pl.col("amount").is_finite())
                frame = frame.with_columns(pl.col("timestamp").dt.replace_time_zone("UTC"))
                return to_arrow(evaluate(group, frame, "timestamp", AS_OF))

            rows = ray.data.read_parquet(str(source)).select_columns(sorted(group.event_columns | {"timestamp"}))
            rows = rows.repartition(8, keys=[group.entity])
            rows.map_batches(features, batch_size=None, batch_format="pyarrow").write_parquet(str(target / group.name))


def compare(source: Path) -> None:
    """Fail unless our features are those of DuckDB, to 1e-9."""
    with scratch(PREFIX) as target:
        computed = ours(source, target)
        by_duckdb(source, target)
        for group, result, file in zip((CUSTOMER_FEATURES, PRODUCT_FEATURES), computed, "cp", strict=True):
            mine = pl.read_parquet([str(Path(result.reservation.uri) / f.path) for f in result.files])
            theirs = pl.read_parquet(target / f"{file}.parquet")
            names = [group.entity, *group.feature_names]
            mine, theirs = (f.select(names).sort(group.entity) for f in (mine, theirs))
            for name in names:
                if mine[name].dtype.is_float():
                    gap = ((mine[name] - theirs[name]).abs() / theirs[name].abs().clip(1)).max()
                    assert isinstance(gap, float)
                    assert gap < 1e-9, f"{name} differs by {gap}"
                elif name == "spending_trend":
                    # A customer exactly on the bound falls to either side by the last digit of a mean.
                    assert (mine[name] != theirs[name]).sum() <= len(mine) / 10_000, f"{name} differs"
                else:
                    assert mine[name].cast(pl.String).equals(theirs[name].cast(pl.String)), f"{name} differs"
    print("features equal to 1e-9")


def show(seconds: dict[str, list[float]], rows: int) -> None:
    """Medians, and our time as a ratio of each other side's, pair by pair."""
    for name, values in seconds.items():
        speed = median(values, lambda middle: f"{rows / middle / 1e6:5.2f} M rows/s")
        print(f"{name:12s} {speed}, ours/{name} {ratio(seconds['ours'], values)}")


def large(directory: Path, repeats: int) -> None:
    """50 million rows beside 10 million, object store of 2 GB: time a row and peak memory."""
    cluster.connect(num_cpus=CPUS, object_store_memory=2 * GIB)
    sizes = {rows: transactions(directory, rows) for rows in (10_000_000, 50_000_000)}
    grow(ours, sizes, repeats, prefix=PREFIX, item="row", unit="ns")


def publish(source: Path, target: Path, *, incremental: bool) -> list[Manifest]:
    """Both groups as the flow makes them, without a gate: planned, computed, and published with their inputs."""
    config = FeatureStoreConfig(root=str(target), transactions=str(source), incremental=incremental)
    (plan,) = plan_features(with_uris(STANDARD, config), config, (AS_OF,))
    plan = with_state(plan, config.root) if incremental else plan
    names = [f"feature-store/{planned.group.name}" for planned in plan.groups]
    run = RunRecord(flow_run_id=uuid.uuid4().hex)  # a run that has published would be given its own version again
    reservations = [reserve(config.root, name, run.flow_run_id) for name in names]
    made = []
    for number, group in enumerate(compute_groups(plan, config, reservations, AS_OF)):
        gate = GateResult(verdict="pass", checks=())
        manifest = manifest_of(group, gate, config, run, feature_store.group_record(plan, number, group))
        made.append(versions.commit(group.reservation, manifest))
    return made


def incremental(directory: Path, rows: int, repeats: int) -> None:
    """One more day on top of a published version: reading that day alone, against reading all."""
    cluster.connect(num_cpus=CPUS, object_store_memory=2 * GIB)
    made = pl.read_parquet(f"{transactions(directory, rows)}/*.parquet").sort("timestamp")
    last = made["timestamp"].max()
    assert isinstance(last, dt.datetime)
    new = made.filter(pl.col("timestamp") > last - dt.timedelta(days=1))
    with scratch(PREFIX) as source, scratch(PREFIX) as store:
        made.head(len(made) - len(new)).write_parquet(source / "year.parquet")
        publish(source, store, incremental=True)
        new.write_parquet(source / "day.parquet")  # sorts before what is there

        def one_more_day(target: Path) -> None:
            shutil.copytree(store, target, dirs_exist_ok=True, copy_function=os.link)
            found.append(publish(source, target, incremental=True)[0])

        found: list[Manifest] = []
        sides: dict[str, Side] = {"day": one_more_day, "all": partial(publish, source, incremental=False)}
        seconds = take_turns(sides, repeats, prefix=PREFIX)
    read = next(balance.rows_in for balance in found[-1].balances if balance.name == "transactions")
    print(f"{read:,} of {rows:,} rows are read; day/all {ratio(seconds['day'], seconds['all'])}")


def main() -> None:
    """Run the comparison that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=None, help="transactions")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--map-groups", action="store_true")
    parser.add_argument("--repartition", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--incremental", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "feature-benchmark-data")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if arguments.large:
        large(arguments.directory, arguments.repeats)
        return
    if arguments.incremental:
        incremental(arguments.directory, int(arguments.rows or 2e6), arguments.repeats)
        return
    rows = int(arguments.rows or (1e6 if arguments.map_groups else 1e7))
    source = transactions(arguments.directory, rows)
    started = time.perf_counter()
    cluster.connect(num_cpus=CPUS, object_store_memory=2 * GIB)
    print(f"Ray started in {time.perf_counter() - started:.1f} s")
    compare(source)
    sides: dict[str, Side] = {"ours": partial(ours, source)}
    if arguments.map_groups:
        sides["map_groups"] = partial(by_map_groups, source)
    elif arguments.repartition:
        sides["repartition"] = partial(by_repartition, source)
    else:
        sides |= {"duckdb": partial(by_duckdb, source), "polars": partial(by_polars, source)}
    # map_groups isn't warmed up: it runs for minutes, so a second or two of starting don't show.
    show(take_turns(sides, arguments.repeats, prefix=PREFIX, cold={"map_groups"}), rows)


if __name__ == "__main__":
    main()
