"""Small published versions to deliver, and readers of what was made of them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from tasks.delivery.config import DeliveryConfig
from tasks.io import storage
from tasks.io.tensors import encoded_field, parquet_settings, tensor_array, tensor_field, to_numpy
from tasks.loader.samples import LABEL
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry, Manifest, RowBalance
from tasks.store.reservation import reserve
from tests.manifests import manifest

FEATURES = "feature-store/customer-features"
IMAGES = "training-datasets/images"


def publish(
    root: str,
    dataset: str,
    files: Sequence[tuple[str, pa.Table]],
    definition: Mapping[str, Any],
    row_group: int = 1000,
) -> Manifest:
    """Publish tables, each with the directory that it stands in."""
    reservation = reserve(root, dataset, uuid.uuid4().hex)
    entries = []
    for index, (directory, table) in enumerate(files):
        settings = {**parquet_settings(table.schema), "row_group_size": row_group}
        written = storage.write_parquet(table, reservation.data_uri(index, directory), **settings)
        entries.append(reservation.entry(written))
    schema = files[0][1].schema
    rows = sum(entry.rows for entry in entries)
    balances = (RowBalance(name="rows", rows_in=rows, rows_out=rows),)
    made = manifest(reservation, schema, files=tuple(entries), balances=balances, definition=dict(definition))
    return versions.commit(reservation, made)


def customers(rows: int, seed: int = 0) -> pa.Table:
    """Customers with every kind of column, and every way of missing a value."""
    draw = np.random.default_rng(seed)
    spent = draw.normal(100, 30, rows)
    spent[draw.random(rows) < 0.05] = np.nan
    spent[draw.random(rows) < 0.02] = np.inf
    return pa.table(
        {
            "customer_id": pa.array(np.arange(rows) * 7),
            "visits": pa.array(draw.integers(0, 40, rows), mask=draw.random(rows) < 0.1),
            "spent": spent,
            "member": pa.array(draw.random(rows) < 0.3, mask=draw.random(rows) < 0.03),
            "city": pa.array(draw.choice(["Lima", "Oslo", "Rome", "Bonn"], rows), mask=draw.random(rows) < 0.04),
            "since": pa.array(draw.integers(0, 10_000, rows).astype(np.int32), pa.date32()),
            "target": pa.array(draw.choice(["low", "mid", "high"], rows), mask=draw.random(rows) < 0.02),
            "is_training_ready": draw.random(rows) < 0.9,
            "data_quality_score": draw.random(rows),
            "as_of": pa.array([0] * rows, pa.timestamp("us", "UTC")),
            "feature_version": ["v1"] * rows,
        }
    )


def publish_customers(root: str, rows: int = 900, files: int = 3, seed: int = 0, row_group: int = 50) -> pa.Table:
    """Publish customers in some files; all their rows."""
    table = customers(rows, seed)
    bounds = np.linspace(0, rows, files + 1).astype(int).tolist()
    parts = [("", table.slice(a, b - a)) for a, b in pairwise(bounds)]
    publish(root, FEATURES, parts, {"entity": "customer_id"}, row_group)
    return table


def pictures(
    count: int, variants: int = 2, seed: int = 0, dtype: str = "uint8", encoding: str | None = None
) -> pa.Table:
    """Variants of images of noise; the first pixel is the image's number. Of JPEGs each has a quality of its own."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 256, (count * variants, 3, 4, 5)).astype(dtype)
    originals = np.repeat(np.arange(count), variants)
    values[:, 0, 0, 0] = originals % 256
    schema = pa.schema(
        [
            pa.field("image_id", pa.string()),
            pa.field("original_image_id", pa.string()),
            tensor_field("image", (3, 4, 5), dtype, ("channel", "height", "width"))
            if encoding is None
            else encoded_field("image", encoding, (3, 4, 5), ("channel", "height", "width")),
            pa.field("class_id", pa.int32()),
            pa.field("is_training_ready", pa.bool_()),
            pa.field("quality_issues", pa.list_(pa.string())),
            pa.field("data_quality_score", pa.float32()),
        ]
    )
    arrays = [
        pa.array([f"{seed}-{image}_aug_{number % variants}" for number, image in enumerate(originals)]),
        pa.array([f"{seed}-{image}" for image in originals]),
        tensor_array(values)
        if encoding is None
        else pa.array(list(map(_jpeg, values, range(len(values)))), pa.binary()),
        pa.array(originals % 3, pa.int32()),
        pa.array(originals % 10 != 9),
        pa.array([[]] * len(originals), pa.list_(pa.string())),
        pa.array(draw.random(len(originals)), pa.float32()),
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _jpeg(values: npt.NDArray[np.uint8], number: int) -> bytes:
    pixels = np.ascontiguousarray(values.transpose(1, 2, 0))
    data: bytes = simplejpeg.encode_jpeg(pixels, 50 + number % 50, "RGB", "444")
    return data


def publish_pictures(
    root: str, train: int = 60, validation: int = 20, dataset: str = IMAGES, row_group: int = 16, **options: Any
) -> dict[str, pa.Table]:
    """Publish images in two splits; their rows by split."""
    tables = {"train": pictures(train, seed=1, **options), "validation": pictures(validation, seed=2, **options)}
    files = []
    for split, table in tables.items():
        half = table.num_rows // 2
        files += [(layout.split_directory(split), part) for part in (table.slice(0, half), table.slice(half))]
    definition = {
        "classes": {"cat": 0, "dog": 1, "owl": 2},
        "image": {"format": "uint8", "shape": [3, 4, 5]},
        "normalise": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "scale": 255},
    }
    publish(root, dataset, files, definition, row_group)
    return tables


def configured(root: str, **changes: Any) -> DeliveryConfig:
    return DeliveryConfig(root=root, **changes)


def read_samples(uri: str, files: Sequence[FileEntry], split: str) -> dict[str, npt.NDArray[Any]]:
    """Samples of a split in their order."""
    own = [entry for entry in files if entry.path.startswith(layout.split_directory(split) + "/")]
    tables = []
    for entry in own:
        with storage.open_input(layout.join(uri, entry.path)) as source:
            tables.append(pq.read_table(source))
    return {name: np.concatenate([to_numpy(table, name) for table in tables]) for name in tables[0].column_names}


__all__ = ["FEATURES", "IMAGES", "LABEL", "configured", "customers", "publish_customers", "read_samples"]
