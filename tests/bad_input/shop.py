"""A small shop whose tables a test spoils, and what the feature job makes of them."""

from __future__ import annotations

import datetime as dt
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine import jobs
from tasks.features import pipeline
from tasks.features.config import FeatureStoreConfig
from tasks.features.gate import judge_group
from tasks.features.pipeline import ComputedGroup, compute_groups
from tasks.features.plan import plan_features, with_uris
from tasks.features.standard import STANDARD
from tasks.io import storage
from tasks.store import layout
from tasks.store.manifest import FileEntry, GateResult, RowBalance
from tasks.store.reservation import reserve

Table = dict[str, Any]
Files = Mapping[str, "bytes | str | Table | pa.Table"]

AS_OF = dt.datetime(2024, 7, 1, tzinfo=dt.UTC)
FIRST = dt.datetime(2024, 5, 1, 9, 30, tzinfo=dt.UTC)
ROWS, CUSTOMERS, PRODUCTS = 40, 8, 5
CATEGORIES = ("books", "toys", "food")


def transactions(rows: int = ROWS, **changed: Any) -> Table:
    """Columns of good transactions; some of them changed, or None to leave them out."""
    columns: Table = {
        "customer_id": [row % CUSTOMERS for row in range(rows)],
        "product_id": [row * 3 % PRODUCTS for row in range(rows)],
        "timestamp": [FIRST + dt.timedelta(hours=7 * row) for row in range(rows)],
        "amount": [round(5 + row * 1.25, 2) for row in range(rows)],
        "category": [CATEGORIES[row % len(CATEGORIES)] for row in range(rows)],
    }
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


def customers(**changed: Any) -> Table:
    """Columns of a customers' table without faults."""
    number = range(CUSTOMERS)
    columns: Table = {
        "customer_id": list(number),
        "age": [20 + row for row in number],
        "gender": [("female", "male")[row % 2] for row in number],
        "location": [("Lima", "Oslo")[row % 2] for row in number],
        "signup_date": [dt.date(2020, 1, 1 + row) for row in number],
    }
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


def products(**changed: Any) -> Table:
    """Columns of a products' table without faults."""
    number = range(PRODUCTS)
    columns: Table = {
        "product_id": list(number),
        "category": [CATEGORIES[row % len(CATEGORIES)] for row in number],
        "brand": [f"brand {row}" for row in number],
        "price": [1.5 * row for row in number],
        "launch_date": [dt.date(2021, 1, 1 + row) for row in number],
    }
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


def csv(table: Table, separator: str = ",") -> str:
    """The columns as CSV; times as ISO 8601."""
    names = list(table)
    rows = zip(*table.values(), strict=True)
    lines = [separator.join(names), *(separator.join("" if v is None else str(v) for v in row) for row in rows)]
    return "\n".join(lines) + "\n"


def put(place: Path, files: Files) -> str:
    """Write files into a directory: bytes or text as they are, columns as Parquet."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes | str):
            (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), place / name)
    return str(place)


@dataclass
class Judged:
    """What the gate says of a job's result, and the rows that the job kept aside."""

    gate: GateResult
    rejected: pl.DataFrame

    @property
    def reasons(self) -> dict[str, int]:
        """Rejected rows by reason."""
        return dict(Counter(self.rejected["_reason"])) if self.rejected.height else {}

    @property
    def faults(self) -> str:
        """What the gate says of the checks that fail."""
        return " ".join(check.message for check in self.gate.checks if check.verdict == "fail")


@dataclass
class Made(Judged):
    """What the job has made of a group: features by entity, and the rows that it kept aside."""

    group: ComputedGroup
    features: pd.DataFrame
    balances: dict[str, RowBalance] = field(init=False)

    def __post_init__(self) -> None:
        """Check the law of conservation, which holds whatever the input is."""
        self.balances = {balance.name: balance for balance in self.group.balances}
        assert all(balance.missing == 0 for balance in self.balances.values()), self.balances
        counted: Counter[str] = Counter()
        for balance in self.balances.values():
            counted.update(balance.rejected)
        assert self.reasons == counted, f"kept aside {self.reasons}, counted {counted}"
        assert len(self.features) == self.group.balances[-1].rows_out


def make(
    root: Path,
    transactions: Files | str | None = None,
    customers: Files | str | None = None,
    products: Files | str | None = None,
    **settings: Any,
) -> list[Made]:
    """Plan the standard groups, compute them on Ray and judge them: all that the flow does before it publishes.

    Args:
        root: Where everything is written.
        transactions: Files by name, or where they are; good ones by default.
        customers: Likewise; none by default.
        products: Likewise.
        settings: Of the configuration.
    """
    tables = {"transactions": transactions, "customers": customers, "products": products}
    uris = {
        name: files if isinstance(files, str) else put(root / name, files)
        for name, files in tables.items()
        if files is not None
    }
    config = FeatureStoreConfig(root=str(root), **uris, **settings)
    (plan,) = plan_features(with_uris(STANDARD, config), config, (AS_OF,))
    datasets = [layout.feature_dataset(planned.group.name) for planned in plan.groups]
    reservations = [reserve(str(root), dataset, "run") for dataset in datasets]
    made = []
    for planned, group in zip(plan.groups, compute_groups(plan, config, reservations, AS_OF), strict=True):
        gate = judge_group(config, group, None)
        features = pa.concat_tables(pq.read_table(written(group, file)) for file in group.files)
        rejected = [pl.read_parquet(written(group, file)) for file in group.rejected_files]
        frame = features.to_pandas().sort_values(planned.group.entity, ignore_index=True)
        aside = pl.concat(rejected, how="diagonal_relaxed") if rejected else pl.DataFrame()
        made.append(Made(gate, aside, group, frame))
    return made


def written(group: ComputedGroup, file: FileEntry) -> io.BytesIO:
    """A file that the job wrote."""
    return io.BytesIO(storage.read_bytes(layout.join(group.reservation.uri, file.path)))


def here_and_now(patch: Any) -> None:
    """Let the job's tasks run one after another in this process, packed and unpacked as between processes."""

    def shuffle(parts: jobs.Parts, buckets: int, scatter: Any, gather: Any, **settings: Any) -> jobs.Shuffled[Any, Any]:
        keys, typed = [0], settings.get("typed", (0,))
        items = ((unit,) for unit in range(parts.count)) if parts.tables is None else jobs._items(parts.tables)
        sent = [jobs._sent(item[0], *scatter(*item), keys, with_empty=item[0] in typed) for item in items]
        done = pa.concat_tables(jobs._gathered(pa.concat_tables(sent), gather))
        return jobs._added_up(
            iter(jobs._without_data(done).to_pylist()),
            done,
            (parts.count, buckets, settings.get("lanes", 1)),
            settings.get("on_note", lambda _: None),
            settings.get("on_summary", lambda _: None),
        )

    def mapped(parts: jobs.Parts, function: Any, **_: Any) -> Iterator[Any]:
        return (function(*item) for item in jobs._items(parts.tables))

    patch.setattr(pipeline, "shuffle", shuffle)
    patch.setattr(pipeline, "mapped", mapped)
