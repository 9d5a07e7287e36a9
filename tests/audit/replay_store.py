"""A small store with a version of every kind, made by the pipelines themselves, to be replayed and tampered with."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks import feature_store, image_augmentation
from tasks.delivery.config import DeliveryConfig, TrainingConfig
from tasks.delivery.pipeline import write_streaming_ready
from tasks.delivery.source import find_source
from tasks.features.config import FeatureStoreConfig
from tasks.features.incremental import with_state
from tasks.features.pipeline import compute_groups
from tasks.features.plan import plan_features, with_uris
from tasks.features.standard import SAMPLE_AS_OF, sample_customers, sample_products, sample_transactions
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.pipeline import augment_images
from tasks.images.plan import plan_images
from tasks.images.sample import write_sample as write_images
from tasks.io import storage
from tasks.io.notation import expand
from tasks.io.tensors import parquet_settings
from tasks.publication import manifest_of
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry, GateResult, Manifest, RunRecord
from tasks.store.reservation import reserve
from tasks.training_sets.definition import load_models
from tasks.training_sets.pipeline import build_training_set
from tasks.training_sets.plan import plan_training_set
from tests.delivery.sources import publish, publish_pictures
from tests.training_sets.declared import churn_and

CUSTOMERS, PRODUCTS = "feature-store/customer-features", "feature-store/product-features"
CHURN, DEMAND = (layout.training_ready_dataset(model) for model in ("churn", "demand"))
IMAGES = "training-datasets/images"
COPY, PICTURES, JPEGS, TEXTS = (layout.streaming_dataset(name) for name in ("churn", "images", "jpegs", "texts"))
EVERY = (CUSTOMERS, PRODUCTS, CHURN, DEMAND, IMAGES, COPY, PICTURES, JPEGS, TEXTS)

MONTHS = "2024-09-30/2024-12-31/1mo"
PASSED = GateResult(verdict="pass", checks=())


@dataclass(frozen=True)
class Store:
    """A root with versions, and the sources that they were made from beside them."""

    root: str

    def source(self, path: str) -> str:
        return layout.join(self.root, "sources", path)

    def manifest(self, dataset: str, version: int = 1) -> Manifest:
        return versions.read_manifest(self.root, dataset, version)

    def uri(self, dataset: str, path: str, version: int = 1) -> str:
        return layout.join(layout.version_uri(self.root, dataset, version), path)

    def table(self, dataset: str, entry: FileEntry) -> pa.Table:
        return read(self.uri(dataset, entry.path))

    def edit_manifest(self, dataset: str, version: int = 1, **changes: Any) -> None:
        """Replace fields of a manifest, as nobody should."""
        uri = self.uri(dataset, layout.MANIFEST, version)
        storage.write_bytes(uri, json.dumps(json.loads(storage.read_bytes(uri)) | changes).encode())

    def rewrite(self, dataset: str, entry: FileEntry, column: str, row: int, value: Any, *, hide: bool) -> None:
        """Change a value of a stored table; hide: adjust the manifest too, so that no digest tells."""
        uri = self.uri(dataset, entry.path)
        with storage.open_input(uri) as source:
            footer = pq.read_metadata(source)
        rows = footer.row_group(0).num_rows
        kept = {name: text for name, text in (footer.metadata or {}).items() if name != b"ARROW:schema"}
        table = changed(read(uri), column, row, value).replace_schema_metadata(kept or None)
        written = storage.write_parquet(table, uri, **{**parquet_settings(table.schema), "row_group_size": rows})
        if hide:
            self.admit(dataset, entry, bytes=written.bytes, digest=written.digest)

    def admit(self, dataset: str, entry: FileEntry, **made: Any) -> None:
        """Write other facts of a file into the manifest."""
        manifest = self.manifest(dataset)
        files: dict[str, Any] = {
            name: [one.model_dump() | (made if one.path == entry.path else {}) for one in getattr(manifest, name)]
            for name in ("files", "side_files")
        }
        self.edit_manifest(dataset, **files)


def read(uri: str) -> pa.Table:
    with storage.open_input(uri) as source:
        return pq.read_table(source)


def changed(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    """A table with one other value; a callable makes it of the one that is there."""
    values = table[column].to_pylist()
    values[row] = value(values[row]) if callable(value) else value
    place = table.schema.get_field_index(column)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def make_features(root: str, config: FeatureStoreConfig) -> list[Manifest]:
    """Publish all groups of a configuration; the manifests."""
    as_of = expand(config.as_of)
    (plan,) = plan_features(with_uris(feature_store.declared(config), config), config, as_of)
    if config.incremental:
        plan = with_state(plan, root)
    run = RunRecord(flow_run_id=uuid.uuid4().hex)
    reservations = [reserve(root, layout.feature_dataset(one.group.name), run.flow_run_id) for one in plan.groups]
    manifests = []
    for number, group in enumerate(compute_groups(plan, config, reservations, SAMPLE_AS_OF)):
        manifest = manifest_of(group, PASSED, config, run, feature_store.group_record(plan, number, group))
        manifests.append(versions.commit(group.reservation, manifest))
    return manifests


def make_training_sets(root: str, config: FeatureStoreConfig) -> None:
    """Publish the training sets of all models of a configuration."""
    assert config.models is not None
    run = RunRecord(flow_run_id=uuid.uuid4().hex)
    for model in load_models(config.models).values():
        plan = plan_training_set(model, with_uris(feature_store.declared(config), config), config, SAMPLE_AS_OF)
        reservation = reserve(root, layout.training_ready_dataset(model.name), run.flow_run_id)
        computed = build_training_set(plan, reservation)
        recorded = feature_store.set_record(plan, computed)
        versions.commit(reservation, manifest_of(computed, PASSED, config, run, recorded))


def make_images(root: str, config: ImageAugmentationConfig) -> Manifest:
    """Publish images."""
    run = RunRecord(flow_run_id=uuid.uuid4().hex)
    reservation = reserve(root, layout.image_dataset(config.name), run.flow_run_id)
    previous = versions.latest(root, reservation.dataset)
    plan = plan_images(config, reservation, previous)
    augmented = augment_images(plan, config)
    recorded = image_augmentation.image_record(plan, augmented, config)
    return versions.commit(reservation, manifest_of(augmented, PASSED, config, run, recorded))


def make_copy(root: str, config: DeliveryConfig) -> Manifest:
    """Publish a streaming-ready copy."""
    run = RunRecord(flow_run_id=uuid.uuid4().hex)
    reservation = reserve(root, layout.streaming_dataset(config.dataset_name), run.flow_run_id)
    source = find_source(config)
    copy = write_streaming_ready(config, source, reservation)
    recorded = {"definition": copy.definition, "inputs": (source.record(),)}
    return versions.commit(reservation, manifest_of(copy, PASSED, config, run, recorded))


def models(store: Store) -> str:
    """A file of two models: customers by a label, products by a table of the user's own, some of its rows twice."""
    days = pl.datetime_range(
        pl.datetime(2024, 10, 1), pl.datetime(2024, 12, 1), "1mo", time_zone="UTC", eager=True
    ).alias("day")
    products = pl.DataFrame({"product_id": [*range(30), None, *range(5)]}).join(days.to_frame(), how="cross")
    products = products.with_row_index("sold").with_columns(pl.col("sold").cast(pl.Float64))
    table = store.source("sold.parquet")
    storage.write_parquet(products.to_arrow(), table)
    demand = {
        "entity": "product_id",
        "spine": {"uri": table, "columns": {"target": "sold", "event_timestamp": "day"}},
        "features": ["product-features:total_sales", "product-features:sales_velocity"],
    }
    file = store.source("models.yaml")
    storage.write_bytes(file, churn_and("2024-09-30/2024-11-30/1mo", 30, ["*"], 45, demand=demand).encode())
    return file


def feature_settings(store: Store, rows: int = 1_500, **more: Any) -> FeatureStoreConfig:
    """Sources of the sample in files of several formats, and how features are computed of them."""
    transactions = sample_transactions(rows, 0, 0, rows)
    third = rows // 3
    for number, name in enumerate(("a.parquet", "b.parquet", "c.parquet")):
        part = transactions.slice(number * third, third)
        storage.write_parquet(part.to_arrow(), store.source(f"transactions/{name}"), row_group_size=100)
    storage.write_bytes(store.source("customers/c.csv"), sample_customers(rows, 0).write_csv().encode())
    storage.write_parquet(sample_products(rows, 0).to_arrow(), store.source("products/p.parquet"))
    uris = {name: store.source(name) for name in ("transactions", "customers", "products")}
    return FeatureStoreConfig(root=store.root, **{"as_of": (MONTHS,), "rows_per_bucket": 1_000, **uris, **more})


def make_store(root: str) -> Store:
    """A version of every kind."""
    store = Store(root)
    config = feature_settings(store, models=models(store))
    make_features(root, config)
    make_training_sets(root, config)
    make_images(
        root,
        ImageAugmentationConfig(
            root=root, **write_images(root, 30, 7), augmentation=Augmentation(size=16, variants=2), images_per_file=8
        ),
    )
    plain = {"root": root, "training": TrainingConfig(enabled=False)}
    make_copy(root, DeliveryConfig(dataset=CHURN, batch_size=16, file_megabytes=0.02, ready_only=False, **plain))
    make_copy(root, DeliveryConfig(dataset=IMAGES, file_megabytes=0.01, weight="data_quality_score", **plain))
    encoded = "training-datasets/jpegs"
    publish_pictures(root, 20, 5, dataset=encoded, encoding="jpeg")
    make_copy(root, DeliveryConfig(dataset=encoded, file_megabytes=0.01, **plain))
    texts = pa.table({"k": range(40), "text": ["ab" * (1 + k * 7 % 11) for k in range(40)], "target": [0, 1] * 20})
    publish(root, "feature-store/texts", [("", texts)], {"entity": "k"})
    make_copy(root, DeliveryConfig(dataset="feature-store/texts", sequence="text", batch_size=8, **plain))
    return store
