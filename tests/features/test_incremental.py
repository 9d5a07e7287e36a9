"""A run that reads only what is new publishes what a full rebuild publishes, to the last bit."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks import feature_store
from tasks.features import incremental
from tasks.features.config import FeatureStoreConfig
from tasks.features.incremental import watermark, with_state
from tasks.features.pipeline import compute_groups
from tasks.features.plan import plan_features, with_uris
from tasks.features.standard import SAMPLE_AS_OF, STANDARD, sample_customers, sample_products, sample_transactions
from tasks.io import storage
from tasks.publication import manifest_of
from tasks.store import layout, versions
from tasks.store.manifest import GateResult, Manifest, RunRecord
from tasks.store.reservation import reserve
from tasks.store.versions import withdraw

DAY = dt.timedelta(days=1)
CUSTOMERS, PRODUCTS = "feature-store/customer-features", "feature-store/product-features"
OF_THE_RUN = ["feature_creation_date", "feature_version"]
ROWS = 4_000
T = [SAMPLE_AS_OF - DAY * days for days in (300, 200, 100, 0)]


@dataclass
class Store:
    """Sources that change from day to day, and the versions that are made of them."""

    root: str
    runs: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, rows: pl.DataFrame) -> None:
        uri = layout.join(self.root, "transactions", name)
        if name.endswith(".csv"):
            content = rows.write_csv(datetime_format="%Y-%m-%dT%H:%M:%S%.6fZ") + "this,is,no,row,at,all,of,ours\n"
            storage.write_bytes(uri, content.encode())
        else:
            storage.write_parquet(rows.to_arrow(), uri)

    def delete(self, name: str) -> None:
        storage.delete(layout.join(self.root, "transactions", name))

    def run(self, *as_of: dt.datetime, incremental: bool = True, at: str | None = None, **more: Any) -> list[Manifest]:
        """Publish both groups; the manifests. at: another root, so that nothing is there to build upon."""
        root, self.runs = at or self.root, self.runs + 1
        settings = {"rows_per_bucket": 1_000, **self.config, **more}
        uris = {name: layout.join(self.root, name) for name in ("transactions", "customers", "products")}
        times = tuple(moment.isoformat() for moment in as_of)
        config = FeatureStoreConfig(root=root, as_of=times, incremental=incremental, **uris, **settings)
        (plan,) = plan_features(with_uris(STANDARD, config), config, as_of)
        if incremental:
            plan = with_state(plan, root)
        run = RunRecord(flow_run_id=f"run-{self.runs}")
        names = [layout.feature_dataset(planned.group.name) for planned in plan.groups]
        reservations = [reserve(root, name, run.flow_run_id) for name in names]
        gate = GateResult(verdict="pass", checks=())
        computed = compute_groups(plan, config, reservations, SAMPLE_AS_OF)
        manifests = [
            manifest_of(group, gate, config, run, feature_store.group_record(plan, number, group))
            for number, group in enumerate(computed)
        ]
        return [versions.commit(group.reservation, one) for group, one in zip(computed, manifests, strict=True)]

    def rows(self, manifest: Manifest, root: str | None = None) -> pl.DataFrame:
        frame = pl.from_arrow(versions.read_table(root or self.root, manifest.dataset, manifest.version, verify=True))
        assert isinstance(frame, pl.DataFrame)
        return frame.drop(OF_THE_RUN)


def bits(frame: pl.DataFrame) -> pl.DataFrame:
    key = frame.columns[0]
    floats = [name for name, dtype in frame.schema.items() if dtype == pl.Float64]
    return frame.with_columns(pl.col(floats).reinterpret(dtype=pl.Int64)).sort(key, "as_of")


@pytest.fixture
def store(root: str) -> Store:
    made = Store(root)
    storage.write_parquet(sample_customers(ROWS, 0).to_arrow(), layout.join(root, "customers", "c.parquet"))
    storage.write_parquet(sample_products(ROWS, 0).to_arrow(), layout.join(root, "products", "p.parquet"))
    return made


def parts() -> list[pl.DataFrame]:
    """The sample's transactions in five parts by time; the first spans most of it, the last lies after T[1]."""
    rows = sample_transactions(ROWS, 0, 0, ROWS)
    edges = [T[0], T[0] + 30 * DAY, T[1], T[2]]
    number = sum(((pl.col("timestamp") > edge).fill_null(value=False).cast(pl.Int8) for edge in edges), pl.lit(0))
    return [rows.filter(number == wanted) for wanted in range(5)]


def assert_rebuilt(store: Store, found: Sequence[Manifest], scratch: Path, **more: Any) -> None:
    """The versions hold what a full run over today's sources gives."""
    store.runs += 1
    elsewhere = str(scratch / f"full-{store.runs}")
    full = store.run(*found[0].as_of, incremental=False, at=elsewhere, **more)
    for mine, whole in zip(found, full, strict=True):
        assert bits(store.rows(mine)).equals(bits(store.rows(whole, elsewhere))), mine.dataset
        assert mine.definition["newest_event"] == whole.definition["newest_event"]
        taken = [balance for balance in mine.balances if balance.name.startswith("transactions")]
        (read,) = (balance for balance in whole.balances if balance.name == "transactions")
        assert sum(balance.rows_out for balance in taken) == read.rows_out
        assert mine.balances[-1] == whole.balances[-1]


def read_rows(manifest: Manifest) -> int:
    return next(balance.rows_in for balance in manifest.balances if balance.name == "transactions")


@pytest.mark.parametrize("root", ["local", pytest.param("s3", marks=pytest.mark.nightly)], indirect=True)
def test_day_by_day_equals_a_full_rebuild(ray_cluster: None, store: Store, tmp_path: Path) -> None:
    a, b, c, d, e = parts()
    store.put("b.parquet", a)
    store.put("c.csv", b)
    first = store.run(T[1])
    assert_rebuilt(store, first, tmp_path)
    assert first[0].definition["state"]["parent"] is None

    store.put("d.parquet", d)  # one more period
    second = store.run(T[2])
    assert [read_rows(manifest) for manifest in second] == [d.height] * 2
    assert second[0].definition["state"]["parent"] == 1
    (kept,) = (balance for balance in second[0].balances if "kept" in balance.name)
    assert (kept.name, kept.rows_in) == ("transactions kept by v1", sum(f.rows for f in first[0].side_files))
    assert_rebuilt(store, second, tmp_path)

    store.put("a-late.parquet", c)  # late, and it sorts before all others
    third = store.run(T[2])
    assert read_rows(third[0]) == c.height
    assert_rebuilt(store, third, tmp_path)

    corrected = b.with_columns(pl.col("amount") * 1.1)
    store.put("c.csv", corrected)
    store.put("e.parquet", e)  # events after T[2] are there, and don't count yet
    fourth = store.run(T[2], rows_per_bucket=3_000)  # and other buckets
    assert read_rows(fourth[0]) == b.height + e.height + 1
    late = [balance.filtered.get("after_as_of", 0) for balance in fourth[0].balances[:2]]
    assert late[0] > 0
    assert_rebuilt(store, fourth, tmp_path)

    store.delete("d.parquet")
    fifth = store.run(
        T[0] - 9_000 * DAY, T[0], T[2], T[3], rows_per_bucket=1_000
    )  # nothing new to read, and several times at once
    assert [read_rows(manifest) for manifest in fifth] == [0, 0]
    assert_rebuilt(store, fifth, tmp_path)

    sixth = store.run(T[0])  # one old time alone
    assert_rebuilt(store, sixth, tmp_path)
    recomputed = store.rows(fifth[1]).filter(pl.col("as_of") == T[0])
    assert bits(store.rows(sixth[1])).equals(bits(recomputed)), "a snapshot depends on those beside it"
    assert watermark(store.root, PRODUCTS).as_of == T[3]
    newest = watermark(store.root, PRODUCTS).newest_event
    assert newest is not None
    assert T[2] < newest <= T[3]


def test_the_chain_is_bounded_and_what_is_kept_can_be_left_out(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incremental, "MAX_LINKS", 2)
    store = Store(str(tmp_path / "root"), config={"groups": ("product-features",), "rows_per_bucket": 100_000})
    for name, table in (("customers", sample_customers(ROWS, 0)), ("products", sample_products(ROWS, 0))):
        storage.write_parquet(table.to_arrow(), layout.join(store.root, name, "x.parquet"))
    states = []
    for number, rows in enumerate(parts()):
        store.put(f"{number}.parquet", rows)
        (manifest,) = store.run(T[3])
        assert read_rows(manifest) == rows.height
        states.append((manifest.definition["state"]["parent"], len(manifest.definition["state"]["files"])))
    assert states == [(None, 1), (1, 1), (None, 3), (3, 1), (None, 5)]
    assert_rebuilt(store, [manifest], tmp_path)

    def rows_read(**more: Any) -> int:
        (made,) = store.run(T[3], **more)
        return read_rows(made)

    assert rows_read() == 0
    withdraw(store.root, PRODUCTS, 6, "a test", "pytest")
    assert rows_read(groups=("product-features",)) == 0  # on v5
    assert rows_read(earliest=T[0]) == ROWS  # judged otherwise: nothing that is kept fits
    assert rows_read() == 0
    os.remove(tmp_path / "root" / PRODUCTS / "v5" / layout.MANIFEST)  # a link is pruned
    for version in (7, 9):
        withdraw(store.root, PRODUCTS, version, "a test", "pytest")
    assert rows_read() == parts()[4].height  # v4 on v3 keep four of the five files; what v8 keeps doesn't fit
