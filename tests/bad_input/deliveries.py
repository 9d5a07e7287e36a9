"""Published tables with something wrong in them, and the copy that the delivery job makes of them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from tasks.delivery.gate import judge_copy
from tasks.delivery.pipeline import write_streaming_ready
from tasks.delivery.shuffle import StreamingReady
from tasks.delivery.source import find_source
from tasks.store import layout
from tasks.store.reservation import reserve
from tests.bad_input.shop import Judged, Table
from tests.bad_input.training_sets import read
from tests.delivery.sources import FEATURES, configured, publish, read_samples

ROWS = 60


def table(**changed: Any) -> Table:
    """Columns of a good table to deliver; some of them changed, or None to leave them out."""
    columns: Table = {
        "customer_id": list(range(ROWS)),
        "spent": [row * 1.5 for row in range(ROWS)],
        "city": [("Lima", "Oslo", "Rome")[row % 3] for row in range(ROWS)],
        "target": [row % 2 for row in range(ROWS)],
        "is_training_ready": [True] * ROWS,
    }
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


@dataclass
class Delivered(Judged):
    """What the job has made of a table."""

    copy: StreamingReady
    samples: dict[str, npt.NDArray[Any]]

    @property
    def names(self) -> list[str]:
        """Names of the matrix's columns."""
        return [feature["name"] for feature in self.copy.definition["features"]]


def deliver(root: Path, columns: Table, entity: str | None = "customer_id", **settings: Any) -> Delivered:
    """Publish a table, deliver it on Ray and judge the copy: all that the flow does before it publishes."""
    publish(str(root), FEATURES, [("", pa.table(columns))], {"entity": entity} if entity else {}, 20)
    config = configured(str(root), **settings)
    source = find_source(config)
    reservation = reserve(str(root), layout.streaming_dataset(config.dataset_name), uuid.uuid4().hex)
    copy = write_streaming_ready(config, source, reservation)
    (balance,) = copy.balances
    assert balance.missing == 0, balance
    kept = [pl.DataFrame(read(reservation.uri, file.path)) for file in copy.rejected_files]
    aside = pl.concat(kept) if kept else pl.DataFrame()
    splits = [read_samples(reservation.uri, copy.files, split) for split, count in copy.samples.items() if count]
    samples = {name: np.concatenate([part[name] for part in splits]) for name in (splits[0] if splits else ())}
    found = Delivered(judge_copy(config, copy, None), aside, copy, samples)
    assert found.reasons == dict(balance.rejected)
    assert balance.rows_out == sum(copy.samples.values()) == len(samples.get("sample_id", ()))
    return found
