"""Sample ids, splits and random keys: stable, unique, uniform."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.delivery.source import (
    Repeats,
    bucket_of,
    entity_splits,
    find_repeats,
    merge_repeats,
    random_keys,
    sample_ids,
    sample_keys,
    split_entities,
)
from tasks.io.hashing import stable_hash


def test_the_id_of_a_sample_with_one_key_is_the_keys_hash() -> None:
    column = pa.array(["a", "b", "c"])
    assert sample_ids(sample_keys([column]), Repeats()).view(np.uint64).tolist() == stable_hash(column).tolist()


def test_every_key_column_counts_and_so_does_its_place() -> None:
    one, two = pa.array([1, 2, 1]), pa.array([5, 5, 6])
    keys = sample_keys([one, two])
    assert len(set(keys.tolist())) == 3
    assert not set(keys.tolist()) & set(sample_keys([two, one]).tolist())
    assert sample_keys([one.cast(pa.int32()), two]).tolist() == keys.tolist()


def test_rows_that_share_a_key_get_ids_of_their_own_in_the_sources_order() -> None:
    keys = np.array([9, 4, 9, 9, 4, 1], np.uint64)
    units, rows = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2])
    found = find_repeats(keys, units, rows)
    ordinals = {(unit, row): n for unit, own in found.items() for row, n in zip(own.rows, own.ordinals, strict=True)}
    assert ordinals == {(0, 2): 1, (1, 0): 2, (1, 1): 1}
    ids = np.concatenate([sample_ids(keys[units == unit], found.get(unit, Repeats())) for unit in (0, 1)])
    assert len(set(ids.tolist())) == 6


@settings(max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 10), st.integers(1, 4))
def test_ids_are_the_same_however_rows_are_cut_into_units_and_parts(keys: list[int], size: int, parts: int) -> None:
    column = np.array(keys, np.uint64)

    def ids(size: int, parts: int) -> list[int]:
        units, rows = np.arange(len(keys)) // size, np.arange(len(keys)) % size
        found = merge_repeats(
            find_repeats(column[own], units[own], rows[own])
            for part in range(parts)
            for own in [column % parts == part]
        )
        return [
            one
            for unit in np.unique(units).tolist()
            for one in sample_ids(column[units == unit], found.get(unit, Repeats())).tolist()
        ]

    assert ids(size, parts) == ids(1000, 1)
    assert len(set(ids(size, parts))) == len(keys)
    expected = pd.Series(keys).groupby(keys).cumcount()
    firsts = np.flatnonzero(expected == 0)
    assert [ids(size, parts)[row] for row in firsts] == column[firsts].view(np.int64).tolist()


@pytest.mark.parametrize(("validation", "test"), [(0.2, 0.0), (0.1, 0.3), (0.0, 0.0), (0.0, 0.5)])
def test_splits_have_their_shares_and_depend_on_nothing_but_entity_and_seed(validation: float, test: float) -> None:
    entities = stable_hash(pa.array(range(40_000)))
    splits = entity_splits(entities, 3, validation, test)
    shares = np.bincount(splits, minlength=3) / len(splits)
    assert shares == pytest.approx([1 - validation - test, validation, test], abs=0.01)
    assert entity_splits(entities[::-1], 3, validation, test).tolist() == splits[::-1].tolist()
    if validation:
        other = entity_splits(entities, 4, validation, test)
        assert np.corrcoef(splits == 1, other == 1)[0, 1] == pytest.approx(0, abs=0.03)


def test_a_larger_validation_split_holds_the_smaller_one() -> None:
    entities = stable_hash(pa.array(range(5_000)))
    small, large = (entity_splits(entities, 0, share, 0.0) == 1 for share in (0.1, 0.3))
    assert (large[small]).all()


def test_random_keys_are_uniform_unrelated_to_ids_and_between_seeds_and_to_splits() -> None:
    ids = np.arange(20_000)
    keys = random_keys(ids, 1)
    assert len(np.unique(keys)) == len(keys)
    counts = np.bincount(bucket_of(keys, 20), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # χ² with 19 degrees of freedom: once in a thousand
    ranks = np.argsort(np.argsort(keys))
    assert np.corrcoef(ranks, ids)[0, 1] == pytest.approx(0, abs=0.03)
    assert np.corrcoef(ranks, np.argsort(np.argsort(random_keys(ids, 2))))[0, 1] == pytest.approx(0, abs=0.03)
    splits = entity_splits(ids.view(np.uint64), 1, 0.5, 0.0)
    assert np.corrcoef(ranks, splits)[0, 1] == pytest.approx(0, abs=0.03)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30), st.integers(1, 2**32))
def test_buckets_ascend_with_the_keys(keys: list[int], buckets: int) -> None:
    found = bucket_of(np.sort(np.array(keys, np.uint64)), buckets)
    assert (np.diff(found.astype(np.int64)) >= 0).all()
    assert found.max() < buckets


def test_entities_are_counted_by_split_and_those_in_several_are_found() -> None:
    entities, splits = np.array([1, 1, 2, 3, 3, 4], np.uint64), np.array([0, 0, 1, 0, 2, 1], np.int8)
    counts, leaking = split_entities(entities, splits)
    assert counts.tolist() == [2, 2, 1]
    assert leaking == 1
