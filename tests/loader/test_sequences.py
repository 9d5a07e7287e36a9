"""Sequences of any length, delivered: padded, cut, and the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.errors import ConfigError, CorruptVersion
from tasks.loader.dataset import read_version
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tests.delivery.making import damage, publish, sequence_samples, sequence_version, table_version

FILES = (50, 1, 30, 22)
SAMPLES = sequence_samples(sum(FILES), dtype="int32")
VALUES = {int(number): value.tolist() for number, value in zip(SAMPLES["sample_id"], SAMPLES["sequence"], strict=True)}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sequence_version(str(tmp_path_factory.mktemp("sequences")), *FILES, samples=SAMPLES)


def steps(uri: str, world: int, size: int, state: dict[str, Any] | None = None, **options: Any) -> Iterator[list[Any]]:
    """The batches of all workers, step by step, and the state after each."""
    streams = [
        TrainingStream(uri, batch_size=size, rank=rank, world_size=world, as_numpy=True, prefetch=0, **options)
        for rank in range(world)
    ]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(state)
    try:
        for batches in zip(*streams, strict=True):
            states = [stream.state_dict() for stream in streams]
            assert all(one == states[0] for one in states)
            yield [batches, states[0]]
    finally:
        for stream in streams:
            stream.close()


def ids(batches: Any) -> list[int]:
    """The ids of real samples."""
    return [number for batch in batches for number in batch["sample_id"][batch["mask"]].tolist()]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.none() | st.integers(1, 25), st.sampled_from([0, -1, 7]))
def test_each_comes_once_an_epoch_in_its_row_whatever_the_workers(
    version: str, world: int, size: int, max_length: int | None, pad: int
) -> None:
    seen: list[int] = []
    for batches, _ in steps(version, world, size, max_length=max_length, pad_value=pad, seed=world):
        for batch in batches:
            rows, lengths = batch["sequence"], batch["length"]
            assert (rows.dtype, lengths.dtype, rows.shape) == (np.int32, np.int64, (size, max(lengths)))
            for row, length, number in zip(rows, lengths.tolist(), batch["sample_id"].tolist(), strict=True):
                assert row[:length].tolist() == VALUES[number][:max_length]
                assert (row[length:] == pad).all()
        seen += ids(batches)
    assert sorted(seen) == sorted(VALUES)


def test_the_order_is_that_of_any_number_of_workers_and_goes_on_in_mid_epoch(version: str) -> None:
    whole = [ids(batches) for batches, _ in steps(version, 1, 6)]
    for world, size in ((2, 3), (3, 2)):
        assert [sorted(ids(batches)) for batches, _ in steps(version, world, size)] == [sorted(one) for one in whole]
    state = [state for _, state in steps(version, 1, 6)][4]
    rest = [number for batches, _ in steps(version, 3, 6, state) for number in ids(batches)]
    assert sorted(rest) == sorted(number for one in whole[5:] for number in one)


def test_columns_are_picked_and_a_sample_is_found(version: str) -> None:
    number = int(SAMPLES["sample_id"][7])
    for columns in (["sequence"], ["length"], ["label", "sequence"], ["sample_id", "length", "sequence"]):
        with TrainingStream(version, batch_size=5, columns=columns, max_length=4, as_numpy=True) as stream:
            batch = next(iter(stream))
            assert list(batch) == [*columns, "mask"]
            one = stream.sample(number)
            assert list(one) == columns
        if "sequence" in columns:
            assert one["sequence"].tolist() == VALUES[number][:4]
        if "length" in columns:
            assert one["length"] == min(len(VALUES[number]), 4)
            assert max(batch["length"]) <= 4


def test_tensors_are_of_the_stored_type_and_stay_the_receivers(version: str) -> None:
    with TrainingStream(version, batch_size=7, device="cpu") as stream:
        batches = list(stream)
        stats = stream.stats
    assert {(batch["sequence"].dtype, batch["length"].dtype) for batch in batches} == {(torch.int32, torch.int64)}
    for batch in batches:
        for row, length, number in zip(batch["sequence"], batch["length"], batch["sample_id"].tolist(), strict=True):
            assert row[:length].tolist() == VALUES[number]
    assert (stats.samples, stats.cut_samples) == (len(VALUES), 0)


def test_cut_samples_are_counted_once(version: str) -> None:
    with TrainingStream(version, batch_size=7, max_length=6, as_numpy=True) as stream:
        list(stream)
        assert stream.stats.cut_samples == sum(len(value) > 6 for value in VALUES.values())


def test_a_mix_takes_sequences_of_one_type(version: str, tmp_path: Path) -> None:
    more = sequence_samples(20, seed=9, dtype="int32")
    other = publish(str(tmp_path), {"train": [more]}, batch_size=5)
    texts = sequence_version(str(tmp_path / "texts"), 20)
    known = VALUES | {
        int(number): value.tolist() for number, value in zip(more["sample_id"], more["sequence"], strict=True)
    }
    with MixedStream({version: 1, other: 1}, batch_size=6, as_numpy=True, by="repeat") as stream:
        seen = []
        for batch in stream:
            for row, length, number in zip(
                batch["sequence"], batch["length"], batch["sample_id"].tolist(), strict=True
            ):
                assert row[:length].tolist() == known[number]
            seen += ids([batch])
    assert sorted(seen) == sorted(known)
    with pytest.raises(ConfigError, match="element type is 'uint8' and 'int32'; publish it anew"):
        MixedStream({version: 1, texts: 1}, batch_size=6)


def test_damaged_sequences_are_named_or_left_out(tmp_path: Path) -> None:
    version = sequence_version(str(tmp_path), *FILES, samples=SAMPLES)
    damage(version, "split=train/part-00000-a1.parquet", 100)
    with pytest.raises(CorruptVersion, match=r"part-00000-a1\.parquet: batch 0 has not the checksum"):
        list(steps(version, 1, 9))
    seen = [number for batches, _ in steps(version, 2, 9, on_corrupt="skip") for number in ids(batches)]
    assert sorted(seen) == sorted(SAMPLES["sample_id"][10:].tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length = 0: give the elements after which sequences are cut, at least 1"),
        ({"max_length": 2.5}, r"max_length = 2\.5: give"),
        ({"pad_value": 0.5}, r"pad_value = 0\.5 is no int32, as the sequences are: give one"),
        ({"pad_value": 2**40}, "pad_value = 1099511627776 is no int32"),
        ({"pad_value": "x"}, "pad_value = 'x' is no int32"),
        ({"pad_value": None}, "pad_value = None is no int32"),
        ({"dtype": "float32"}, "dtype = 'float32': sequences are delivered as they are stored; leave it out"),
        ({"mixup": 0.2}, r"mixup = 0\.2: sequences are delivered as they are stored"),
        ({"columns": ["features"]}, "give a list of some of 'sequence', 'length', 'label', 'sample_id'"),
    ],
)
def test_what_does_not_go_with_sequences_is_refused(version: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingStream(version, batch_size=5, **options)


def test_options_of_sequences_are_refused_for_others(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 30)
    for options in ({"max_length": 5}, {"pad_value": 1}):
        with pytest.raises(ConfigError, match="the version has no sequences; leave it out"):
            TrainingStream(version, batch_size=5, **options)


@pytest.mark.usefixtures("ray_cluster")
def test_ray_reads_lists(version: str) -> None:
    rows = read_version(version).take_all()
    assert {row["sample_id"]: list(row["sequence"]) for row in rows} == VALUES
