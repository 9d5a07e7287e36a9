"""Versions of every kind are made again row by row; whatever was tampered with is found, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from tasks.cli.audit_commands import ALARM
from tasks.delivery.source import random_keys
from tasks.features.kernel import aggregate
from tasks.images.draws import Draws, draw
from tasks.io import storage
from tasks.store import layout
from tasks.store.layout import QUALITY
from tasks.training_sets.asof import join_asof
from tests.audit.replay_store import (
    CHURN,
    COPY,
    CUSTOMERS,
    DEMAND,
    EVERY,
    IMAGES,
    JPEGS,
    PICTURES,
    PRODUCTS,
    Store,
    changed,
    read,
)
from tests.audit.replayed import (  # noqa: F401 - fixtures
    Replay,
    put_back_afterwards,
    replaying,
)


@pytest.mark.parametrize("dataset", EVERY)
def test_a_whole_version_is_made_again_to_the_last_bit(made: Store, replay: Replay, dataset: str) -> None:
    found = replay(made, dataset)
    manifest = made.manifest(dataset)
    total = {IMAGES: 30, COPY: made.manifest(CHURN).rows}.get(dataset, manifest.rows)
    assert (found.code, found.values["outcome"], found.values["differing"]) == (0, "ok", 0), found.differing
    assert found.values["replayed"] == found.values["total"] == len(set(found.names)) == total
    assert found.values["made_by"] == "code and libraries are the same"
    assert (found.values["changed"], found.values["altered"], found.values["notes"]) == ([], [], [])


@pytest.mark.parametrize("dataset", [CUSTOMERS, DEMAND, IMAGES, COPY])
def test_a_seed_decides_which_rows(made: Store, replay: Replay, dataset: str) -> None:
    some, again, others = (replay(made, dataset, sample=7, seed=seed) for seed in (0, 0, 1))
    assert some.names == again.names != others.names
    assert len(some.names) == len(others.names) == 7
    assert some.values["outcome"] == others.values["outcome"] == "ok"
    assert set(some.names) <= set(replay(made, dataset).names)


# What was altered where it is stored


def _next(value: Any) -> Any:
    match value:
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
        case str():
            return f"{value}?"
    return value + 1


STORED = [
    (CUSTOMERS, "total_spent"),
    (CUSTOMERS, "feature_creation_date"),
    (PRODUCTS, "outlier_ratio"),
    (CHURN, "feature_transaction_count_30d"),
    (DEMAND, "target"),
    (IMAGES, "image"),
    (IMAGES, "class_id"),
    (IMAGES, "data_quality_score"),
    (COPY, "features"),
    (COPY, "sample_id"),
    (PICTURES, "image"),
    (PICTURES, "label"),
    (PICTURES, "weight"),
    (JPEGS, "image"),
]


def _tamper(store: Store, dataset: str, column: str, *, hide: bool) -> None:
    entry = store.manifest(dataset).files[0]
    values = store.table(dataset, entry)[column].to_pylist()
    row = next(number for number, value in enumerate(values) if value is not None)
    change = _later if column == "feature_creation_date" else _next
    store.rewrite(dataset, entry, column, row, change, hide=hide)


def _later(value: Any) -> Any:
    return value.replace(microsecond=value.microsecond + 1)


@pytest.mark.parametrize(("dataset", "column"), STORED)
def test_a_stored_value_that_no_digest_betrays_is_found_by_making_it_again(
    store: Store, replay: Replay, dataset: str, column: str
) -> None:
    _tamper(store, dataset, column, hide=True)
    found = replay(store, dataset)
    assert found.code == 1
    assert found.columns <= {column, "batch_id", "(row)"}
    assert column in found.columns
    assert found.reasons == {ALARM.text}
    alone = [name for name, row in found.differing.items() if row["differences"][0]["column"] == column]
    assert len(alone) == 1, found.differing
    assert found.values["altered"] == []


@pytest.mark.parametrize(
    ("dataset", "column"), [(CUSTOMERS, "age"), (DEMAND, "target"), (IMAGES, "image"), (COPY, "label")]
)
def test_a_stored_file_that_was_altered_is_no_nondeterminism(
    store: Store, replay: Replay, dataset: str, column: str
) -> None:
    _tamper(store, dataset, column, hide=False)
    found = replay(store, dataset)
    entry = store.manifest(dataset).files[0]
    assert found.code == 1
    assert found.kinds == {"stored"}
    [reason] = found.reasons
    assert reason.startswith(f"the stored file {entry.path} was altered since it was published (blake3:")
    assert found.values["altered"] == [reason]
    assert column in found.columns


@pytest.mark.parametrize("dataset", EVERY)
def test_a_stored_file_that_cant_be_read_is_named_for_each_of_its_rows(
    store: Store, replay: Replay, dataset: str
) -> None:
    entry = store.manifest(dataset).files[-1]
    uri = store.uri(dataset, entry.path)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-30])
    found = replay(store, dataset)
    assert found.code == 1
    assert found.kinds == {"stored"}
    unreadable = [row for row in found.differing.values() if row["differences"][0]["column"] == "(row)"]
    assert {row["file"] for row in unreadable} == {entry.path}
    # Of several as-of times the fences come from all stored rows.
    assert found.columns <= {"(row)", *QUALITY}
    storage.delete(uri)
    assert replay(store, dataset).reasons == {f"the stored file {entry.path} is gone; restore it from a copy"}


# What made it was something else


@pytest.mark.parametrize("dataset", EVERY)
def test_other_code_and_libraries_that_make_the_same_are_ok(store: Store, replay: Replay, dataset: str) -> None:
    manifest = store.manifest(dataset)
    store.edit_manifest(
        dataset, code_digest="0" * 64, packages={**manifest.packages, "polars": "0.1", "training-data-pipelines": "9"}
    )
    found = replay(store, dataset, sample=5)
    assert (found.code, found.values["outcome"]) == (0, "ok")
    now = manifest.code_digest[:12]
    polars = manifest.packages["polars"]
    assert found.values["made_by"] == (
        f"made again by other code (000000000000 then, {now} now): the same; "
        f"made again with other libraries (polars 0.1 → {polars}): the same"
    )
    assert found.values["libraries"] == {"polars": {"then": "0.1", "now": polars}}


def _broken_features(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "tasks.features.kernel.aggregate",
        lambda group, events, as_of: aggregate(group, events, as_of).with_columns(
            pl.col("^total_spent$") * (1 + 2**-52)
        ),
    )


def _broken_join(patch: pytest.MonkeyPatch) -> None:
    strict = {"strict": True}
    patch.setattr("tasks.training_sets.shuffle.join_asof", lambda *rows, **how: join_asof(*rows, **how | strict))


def _broken_draws(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tasks.images.engines.draw", lambda *given: _flipped(draw(*given)))


def _flipped(draws: Draws) -> Draws:
    return replace(draws, flip=~draws.flip)


def _broken_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tasks.audit.copies.random_keys", lambda ids, seed: random_keys(ids, seed + 1))


Kernel = tuple[str, Callable[[pytest.MonkeyPatch], None], str]
KERNELS: list[Kernel] = [
    (CUSTOMERS, _broken_features, "total_spent"),
    (CHURN, _broken_join, "feature_transaction_count"),
    (IMAGES, _broken_draws, "image"),
    (COPY, _broken_order, "sample_id"),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_makes_something_else_is_found_and_explained_by_what_is_known(
    store: Store, replay: Replay, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    dataset, break_it, column = kernel
    break_it(monkeypatch)
    found = replay(store, dataset)
    assert found.code == 1
    assert column in found.columns
    assert found.reasons == {ALARM.text}
    store.edit_manifest(dataset, code_digest="0" * 64)
    assert replay(store, dataset).kinds == {"code"}
    manifest = store.manifest(dataset)
    store.edit_manifest(dataset, packages={**manifest.packages, "numpy": "0.1"})
    found = replay(store, dataset)
    assert found.kinds == {"code", "library"}
    assert f"libraries aren't the same (numpy 0.1 → {manifest.packages['numpy']})" in found.reasons
    assert found.values["made_by"].endswith("not the same")


# What it was made from is something else


def test_a_changed_row_of_a_source_makes_its_entity_differ(store: Store, replay: Replay) -> None:
    uri = store.source("transactions/b.parquet")
    table = read(uri)
    row = next(number for number, key in enumerate(table["customer_id"].to_pylist()) if key is not None)
    customer = table["customer_id"][row].as_py()
    storage.write_parquet(changed(table, "amount", row, lambda value: value + 1), uri)
    found = replay(store, CUSTOMERS)
    assert found.code == 1
    assert "total_spent" in found.columns
    [reason] = found.reasons
    assert reason.startswith(f"an input of 'transactions' changed: {uri} has changed (blake2b:")
    assert f"customer_id {customer} as of 2024-12-30T00:00:00+00:00" in found.differing
    whose = {name.split()[1] for name, row in found.differing.items() if "total_spent" in str(row["differences"])}
    assert whose == {str(customer)}


def test_a_source_file_that_is_gone_is_named_and_the_rest_is_made_without_it(store: Store, replay: Replay) -> None:
    uri = store.source("transactions/c.parquet")
    storage.delete(uri)
    found = replay(store, CUSTOMERS)
    assert found.reasons == {f"an input of 'transactions' changed: {uri} is gone"}
    for name in ("a", "b"):
        storage.delete(store.source(f"transactions/{name}.parquet"))
    found = replay(store, CUSTOMERS)
    assert len(found.differing) == found.values["total"]
    assert found.columns == {"(row)"}
    assert any("of 'transactions' none of the 3 files under" in reason for reason in found.reasons)


def test_a_new_file_beside_a_source_makes_no_difference(store: Store, replay: Replay) -> None:
    storage.write_parquet(read(store.source("transactions/a.parquet")), store.source("transactions/d.parquet"))
    for dataset in (CUSTOMERS, PRODUCTS, CHURN):
        assert replay(store, dataset).code == 0


def test_a_dimension_that_only_another_group_joins_may_be_gone(store: Store, replay: Replay) -> None:
    storage.delete(store.source("customers/c.csv"))
    found = replay(store, PRODUCTS)
    assert found.code == 0
    [note] = found.values["notes"]
    assert note.startswith("'customers', of which nothing was taken but the types of keys, can't be looked at")
    assert replay(store, CUSTOMERS).kinds == {"input"}


def test_a_spine_or_label_that_changed_is_named(store: Store, replay: Replay) -> None:
    uri = store.source("sold.parquet")
    storage.write_parquet(changed(read(uri), "sold", 0, 1e6), uri)
    found = replay(store, DEMAND)
    assert found.columns == {"target"}
    assert len(found.differing) == 1
    assert found.kinds == {"input"}
    models = store.source("models.yaml")
    storage.write_bytes(models, storage.read_bytes(models).replace(b"days: 30", b"days: 31"))
    found = replay(store, CHURN)
    assert found.reasons <= {"the declaration of 'churn' isn't what it was: spine.label"}
    assert found.values["changed"] == [
        {"kind": "definition", "text": "the declaration of 'churn' isn't what it was: spine.label"}
    ]
    storage.delete(models)
    found = replay(store, CHURN)
    assert len(found.differing) == found.values["total"]
    assert found.kinds == {"definition"}
    assert any("no such file" in reason for reason in found.reasons)


def test_an_input_version_that_was_altered_is_named(store: Store, replay: Replay) -> None:
    _tamper(store, CUSTOMERS, "transaction_count", hide=True)
    found = replay(store, CHURN)
    assert found.reasons == {f"the input {CUSTOMERS} v1 has another manifest: its files have changed"}
    assert found.columns == {"feature_transaction_count"}
    storage.delete(store.uri(CUSTOMERS, layout.MANIFEST))
    found = replay(store, CHURN)
    assert len(found.differing) == found.values["total"]
    assert any(f"the input {CUSTOMERS} v1 can't be read" in reason for reason in found.reasons)


def test_a_copys_source_that_was_altered_is_named(store: Store, replay: Replay) -> None:
    _tamper(store, CHURN, "feature_transaction_count", hide=False)
    found = replay(store, COPY)
    assert found.code == 1
    [reason] = found.reasons
    assert reason.startswith(f"of the input {CHURN} v1, the stored file part-00000-a1.parquet was altered")
    shutil.rmtree(store.uri(CHURN, ""))
    found = replay(store, COPY)
    assert len(found.differing) == found.values["total"]
    assert found.kinds == {"input"}
