"""Training sets on real Ray: every row finds what a search by brute force finds, however the work is cut."""

from __future__ import annotations

import datetime as dt
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions
from tasks.features.plan import with_uris
from tasks.features.standard import STANDARD
from tasks.io import storage
from tasks.io.errors import CorruptVersion, LeakFound, SourceError
from tasks.store import layout
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.store.reservation import Reservation, reserve
from tasks.training_sets import shuffle
from tasks.training_sets.asof import join_asof
from tasks.training_sets.definition import FeatureReference, Label, Model, SpineSource
from tasks.training_sets.pipeline import ComputedSet, bucket_count, build_training_set, pieces_to_read
from tasks.training_sets.plan import TrainingSetPlan, plan_training_set
from tests.serving.feature_versions import DAY, customers, days, publish_features

STARTED = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)


def references(*texts: str) -> tuple[FeatureReference, ...]:
    return tuple(map(FeatureReference.parse, texts))


def model(spine: SpineSource | Label, *features: str, **options: Any) -> Model:
    return Model(name="churn", entity="customer_id", spine=spine, features=references(*features), **options)


def spine(count: int, seed: int = 0) -> pl.DataFrame:
    """Rows of customers at odd and even hours; some without key, some twice, one customer hot."""
    rng = np.random.default_rng(seed)
    customer = np.where(rng.random(count) < 0.3, 7, rng.integers(0, 60, count))
    hours = rng.integers(-24 * 10, 24 * 90, count)
    frame = pl.DataFrame(
        {
            "customer_id": pl.Series(customer),
            EVENT_TIME: [DAY + int(hour) * HOUR for hour in hours],
            TARGET: rng.integers(0, 2, count),
        },
        schema_overrides={EVENT_TIME: pl.Datetime("us", "UTC")},
    )
    missing = pl.Series(rng.random(count) < 0.05)
    return frame.with_columns(pl.when(~missing).then("customer_id").alias("customer_id"))


def written(frame: pl.DataFrame, place: Path, name: str = "spine.parquet", files: int = 3) -> str:
    """The frame in several files of small row groups."""
    folder = place / name
    folder.mkdir(parents=True)
    step = -(-frame.height // files)
    for number in range(files):
        frame.slice(number * step, step).write_parquet(folder / f"{number}.parquet", row_group_size=400)
    return str(folder)


def publish_history(root: str, customers_of: int = 50) -> None:
    """Three times, of which the second was computed again with fewer customers."""
    everybody = range(customers_of)
    publish_features(root, customers(everybody, days(0, 30)), buckets=8, created=days(31)[0])
    publish_features(root, customers(range(0, customers_of, 2), days(30), 10.0), buckets=2, created=days(40)[0])
    publish_features(root, customers(everybody, days(60)), buckets=None, created=days(61)[0])


def expected(customer: int | None, when: dt.datetime, ttl: dt.timedelta | None) -> float | None:
    """What the history of `publish_history` says, by hand."""
    time = next((moment for moment in days(60, 30, 0) if moment <= when), None)
    if customer is None or time is None or (ttl is not None and when - time > ttl):
        return None
    day = (time - DAY).days
    # v2 alone holds day 30; a customer whom it doesn't have keeps the row of day 0.
    if day == 30 and customer % 2:
        if ttl is not None and when - DAY > ttl:
            return None
        day = 0
    return None if customer >= 50 else (customer * 1000 + day) * (10.0 if day == 30 else 1.0)


def build(planned: TrainingSetPlan, root: str) -> tuple[ComputedSet, pl.DataFrame, Reservation]:
    reservation = reserve(root, layout.training_ready_dataset(planned.model.name), "run")
    read: list[int] = []
    joined: list[int] = []
    computed = build_training_set(planned, reservation, on_read=read.append, on_joined=joined.append)
    assert sum(read) == pieces_to_read(planned)
    assert sum(joined) == bucket_count(planned)
    tables = []
    for file in computed.files:
        with storage.open_input(layout.join(reservation.uri, file.path)) as source:
            tables.append(pq.read_table(source))
    frame = pl.from_arrow(pa.concat_tables(tables))
    assert isinstance(frame, pl.DataFrame)
    return computed, frame, reservation


def config(root: str, **options: Any) -> FeatureStoreConfig:
    return FeatureStoreConfig(root=root, **{"rows_per_bucket": 1000, **options})


@pytest.mark.parametrize("ttl_days", [None, 20])
def test_every_row_finds_what_brute_force_finds(ray_cluster: None, root: str, tmp_path: Path, ttl_days: int) -> None:
    publish_history(root)
    rows = spine(3000)
    declared = model(SpineSource(uri=written(rows, tmp_path)), "customer-features:total_spent", ttl_days=ttl_days)
    planned = plan_training_set(declared, STANDARD, config(root), STARTED)
    computed, frame, _ = build(pickle.loads(pickle.dumps(planned)), root)

    ttl = None if ttl_days is None else dt.timedelta(days=ttl_days)
    wanted = rows.with_columns(
        pl.Series(
            "feature_total_spent",
            [expected(c, t, ttl) for c, t in rows.select("customer_id", EVENT_TIME).iter_rows()],
            dtype=pl.Float64,
        )
    ).select("customer_id", EVENT_TIME, "feature_total_spent", TARGET)
    order = wanted.columns
    assert frame.sort(order).equals(wanted.sort(order))
    assert len(computed.files) > 1
    assert computed.rows == 3000
    assert computed.matched == {"customer-features": wanted["feature_total_spent"].count()}
    assert computed.null_keys == wanted["customer_id"].null_count()
    assert computed.duplicates == 3000 - wanted.select("customer_id", EVENT_TIME).n_unique()
    assert computed.planted > 0
    assert computed.profile_earlier.rows + computed.profile_later.rows == 3000
    assert 0.15 < computed.profile_later.rows / 3000 < 0.25
    assert computed.sample.num_rows == 3000
    assert computed.newest_event == rows[EVENT_TIME].max()
    assert [balance.name for balance in computed.balances] == ["spine", "churn"]
    assert planned.columns == {"feature_total_spent": "customer-features:total_spent"}
    (record,) = planned.source_records(computed)
    assert (record.rows, len(record.files)) == (3000, 3)


def test_an_altered_feature_reaches_no_model(ray_cluster: None, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    declared = model(SpineSource(uri=written(spine(300), tmp_path)), "customer-features:*")
    planned = plan_training_set(declared, STANDARD, config(root), STARTED)
    file = Path(planned.histories[0].versions[1].files[0])
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptVersion, match=rf"{file.name}: digests differ from its manifest"):
        build(planned, root)


def test_buckets_and_order_of_work_leave_no_trace(ray_cluster: None, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    declared = model(SpineSource(uri=written(spine(3000), tmp_path)), "customer-features:*")
    whole, cut = (
        build(plan_training_set(declared, STANDARD, config(root, rows_per_bucket=size), STARTED), root)
        for size in (100_000, 1000)
    )
    assert len(whole[0].files) == 1 < len(cut[0].files)
    keys = ["customer_id", EVENT_TIME]
    assert whole[1].equals(cut[1].sort(keys, maintain_order=True))
    assert whole[0].profile.columns() == cut[0].profile.columns()
    assert whole[0].profile_later.columns() == cut[0].profile_later.columns()
    assert (
        whole[0]
        .sample.sort_by([(name, "ascending") for name in whole[0].sample.column_names])
        .equals(cut[0].sample.sort_by([(name, "ascending") for name in cut[0].sample.column_names]))
    )
    assert whole[0].matched == cut[0].matched


def test_groups_of_two_entities_join_by_their_own_keys(ray_cluster: None, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    products = customers(range(20), days(0)).rename({"customer_id": "product_id"}).drop("city")
    publish_features(root, products, "product-features", "product_id", buckets=2)
    rows = spine(2000).with_columns(pl.int_range(pl.len()).mod(25).alias("product_id"))
    declared = model(
        SpineSource(uri=written(rows, tmp_path)),
        "customer-features:orders",
        "product-features:total_spent",
        "product-features:orders",
    )
    computed, frame, _ = build(plan_training_set(declared, STANDARD, config(root), STARTED), root)
    assert frame.columns == [
        "customer_id",
        "product_id",
        EVENT_TIME,
        "feature_customer_features__orders",
        "feature_total_spent",
        "feature_product_features__orders",
        TARGET,
    ]
    late = frame.filter(pl.col(EVENT_TIME) >= DAY)
    known = late.filter(pl.col("product_id") < 20)
    assert (known["feature_total_spent"] == known["product_id"] * 1000).all()
    assert late.filter(pl.col("product_id") >= 20)["feature_total_spent"].null_count() == late.height - known.height
    assert computed.matched["product-features"] == known.height
    keys = ["customer_id", "product_id", EVENT_TIME, TARGET]
    assert frame.select(keys).sort(keys).equals(rows.select(keys).sort(keys))


def test_bad_rows_are_rejected_with_their_reason_and_times_without_zone_are_local(
    ray_cluster: None, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    publish_features(root, customers(range(5), (dt.datetime(2024, 1, 31, 23, tzinfo=dt.UTC),)))
    (tmp_path / "spine.csv").write_text(
        "who,day,bought\n1,2024-02-01,0\n1,2024-01-31T23:30,1\n2,gibberish,1\n3,2024-03-01,\n,2024-03-01,1\n"
    )
    source = SpineSource(
        uri=str(tmp_path / "spine.csv"), columns={"customer_id": "who", EVENT_TIME: "day", TARGET: "bought"}
    )
    planned = plan_training_set(
        model(source, "customer-features:orders"), STANDARD, config(root, timezone="Europe/Berlin"), STARTED
    )
    computed, frame, reservation = build(planned, root)
    # Midnight in Berlin is 23:00 UTC, the time of the features; half an hour before, they weren't known.
    assert frame.sort(EVENT_TIME)["feature_orders"].to_list() == [None, 1, None]
    assert computed.balances[0].rejected == {"null_target": 1, f"unparsable_{EVENT_TIME}": 1}
    assert computed.null_keys == 1
    (file,) = computed.rejected_files
    assert set(pl.read_parquet(layout.join(reservation.uri, file.path))["_reason"]) == set(
        computed.balances[0].rejected
    )


def transactions(place: Path) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    frame = pl.DataFrame(
        {
            "customer_id": rng.integers(0, 40, 2500),
            "product_id": rng.integers(0, 5, 2500),
            "timestamp": [DAY + int(hour) * HOUR for hour in rng.integers(-24 * 60, 24 * 100, 2500)],
            "amount": rng.random(2500).round(2),
        }
    )
    written(frame, place, "transactions.parquet")
    return frame


def test_a_label_looks_ahead_and_its_features_back(ray_cluster: None, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    events = transactions(tmp_path)
    label = Label(
        name="spends",
        entity="customer_id",
        at=tuple(moment.isoformat() for moment in days(10, 40, 75, 90)),
        days=20,
        target=pl.col("amount").count(),
        active_days=30,
    )
    settings = config(root, transactions=str(tmp_path / "transactions.parquet"))
    definitions: Definitions = with_uris(STANDARD, settings)
    planned = plan_training_set(model(label, "customer-features:total_spent"), definitions, settings, STARTED)
    computed, frame, _ = build(planned, root)

    # The last event comes some 100 days after DAY: of day 90, 20 days aren't over.
    wanted = []
    for moment in days(10, 40, 75):
        for customer, own in events.group_by("customer_id"):
            times = own["timestamp"]
            if ((times <= moment) & (times > moment - dt.timedelta(days=30))).any():
                count = ((times > moment) & (times <= moment + dt.timedelta(days=20))).sum()
                wanted.append((customer[0], moment, expected(customer[0], moment, None), count))
    assert sorted(frame.iter_rows(), key=str) == sorted(wanted, key=str)
    assert "leaves out 2024-04-30: 20 days aren't over" in " ".join(computed.notes)
    label_balance = computed.balances[1]
    assert label_balance.rows_out == len(wanted)
    assert label_balance.filtered["not_over"] > 0
    assert computed.newest_event == events["timestamp"].max()

    early = config(root, transactions=settings.transactions, as_of=days(15)[0].isoformat())
    planned = plan_training_set(model(label, "customer-features:orders"), definitions, early, STARTED)
    with pytest.raises(SourceError, match="has 20 days behind it by 2024-02-15"):
        build(planned, root)


def test_a_join_that_looks_ahead_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    declared = model(SpineSource(uri=written(spine(500), tmp_path)), "customer-features:orders")
    planned = plan_training_set(declared, STANDARD, config(root), STARTED)
    job = shuffle.Job(planned, reserve(root, "x", "run"), ())

    def leaky(rows: pl.DataFrame, history: pl.DataFrame, **options: Any) -> np.ndarray:
        later = rows.with_columns(pl.col(EVENT_TIME) + dt.timedelta(days=45))
        return join_asof(later, history, **options)

    monkeypatch.setattr(shuffle, "join_asof", leaky)
    with pytest.raises(LeakFound):
        job.gather(0, 1, 0, {0: spine(500)})


def test_without_rows_there_is_a_file_with_the_schema(ray_cluster: None, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    rows = spine(10).with_columns(pl.lit(None, pl.Int64).alias(TARGET))
    declared = model(SpineSource(uri=written(rows, tmp_path)), "customer-features:orders")
    computed, frame, _ = build(plan_training_set(declared, STANDARD, config(root), STARTED), root)
    assert frame.height == computed.rows == 0
    assert frame.schema["feature_orders"] == pl.Int64
    assert computed.balances[0].rejected == {"null_target": 10}


def test_buckets_are_a_power_of_two_and_count_the_history_in(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_history(root)
    declared = model(SpineSource(uri=written(spine(3000), tmp_path)), "customer-features:orders")
    planned = plan_training_set(declared, STANDARD, config(root), STARTED)
    assert bucket_count(planned) == 4
    assert bucket_count(replace(planned, history_rows=40_000)) == 16
    assert bucket_count(replace(planned, rows_per_bucket=10)) == 256
    assert bucket_count(replace(planned, rows_per_bucket=10_000)) == 1
