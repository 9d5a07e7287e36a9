"""Sequences of any length, delivered: padded, cut, and the same for any number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.errors import ConfigError, CorruptVersion, InputError
from tasks.loader.dataset import read_version
from tasks.loader.kernel import fill_rows
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamLoader
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


@settings(max_examples=20)
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


BUCKETS = (3, 9, 20)


def bucket_of(batch: Any) -> set[int]:
    return {int(np.searchsorted(BUCKETS, length)) for length in batch["length"].tolist()}


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 2), st.booleans())
def test_the_samples_of_a_step_are_of_one_bucket_and_each_comes_once(
    version: str, world: int, size: int, epoch: int, shuffle: bool
) -> None:
    options: dict[str, Any] = {"length_buckets": BUCKETS, "shuffle": shuffle, "seed": epoch}
    seen: list[int] = []
    kinds = []
    for batches, _ in steps(version, world, size, **options):
        assert {batch["sequence"].shape[0] for batch in batches} == {size}
        [width] = {batch["sequence"].shape[1] for batch in batches}
        own = set.union(*map(bucket_of, batches))
        assert width == BUCKETS[max(own)]
        kinds.append(len(own))
        for batch in batches:
            for row, length, number in zip(
                batch["sequence"], batch["length"], batch["sample_id"].tolist(), strict=True
            ):
                assert row[:length].tolist() == VALUES[number]
                assert not row[length:].any()
        seen += ids(batches)
    assert sorted(seen) == sorted(VALUES)
    assert len(kinds) == -(-len(VALUES) // (world * size))
    # Fewer samples than a step of each bucket are left to the end.
    mixed = -(-len(BUCKETS) * (world * size - 1) // (world * size)) + 1
    assert all(kind == 1 for kind in kinds[: max(len(kinds) - mixed, 0)])


@settings(max_examples=15)
@given(st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3)]), st.sampled_from([{"length_buckets": BUCKETS}, {"pack": 24}]))
def test_grouped_steps_are_those_of_any_number_of_workers(
    version: str, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    def found(world: int, size: int) -> list[list[int]]:
        return [sorted(packed_ids(batches)) for batches, _ in steps(version, world, size, **options)]

    assert found(*shape) == found(1, 12)


def packed_ids(batches: Any) -> list[int]:
    """The ids of real samples, of rows of one or of several."""
    found: list[int] = []
    for batch in batches:
        mask = batch.get("mask", slice(None))
        numbers, lengths = np.asarray(batch["sample_id"])[mask], np.asarray(batch["length"])[mask]
        found += numbers.tolist() if numbers.ndim == 1 else numbers[lengths > 0].tolist()
    return found


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["pad", "drop"]), st.sampled_from(["length_buckets", "pack"]))
def test_an_epoch_goes_on_exactly_with_any_number_of_workers(
    filled: str, data: st.DataObject, remainder: str, how: str
) -> None:
    options = {how: (4, 9, 20) if how == "length_buckets" else 24, "remainder": remainder}
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for part in range(data.draw(st.integers(1, 4))):
        world, most = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)) if part < 3 else None
        for one in itertools.islice(steps(filled, world, 3, state, **options), most):
            state = one[1]
            if state["epoch"] and (state["epoch"], state["batches"]) != (1, 0):
                break  # what was left of the first epoch was too small for a step of these workers
            seen += packed_ids(one[0])
        assert state is not None
        if state["epoch"]:
            break
    assert len(seen) == len(set(seen))
    if state is not None and state["epoch"] and remainder == "pad":
        assert sorted(seen) == sorted(FILLED)


@pytest.mark.parametrize("options", [{"length_buckets": (4, 9, 20)}, {"pack": 24}])
def test_the_same_workers_go_on_as_if_nothing_had_been(filled: str, options: dict[str, Any]) -> None:
    whole = [([packed_ids([batch]) for batch in batches], state) for batches, state in steps(filled, 2, 3, **options)]
    for done in (1, 4, len(whole) - 1):
        rest = steps(filled, 2, 3, whole[done - 1][1], **options)
        assert [([packed_ids([batch]) for batch in batches], state) for batches, state in rest] == whole[done:]


TEXTS = sequence_samples(80, seed=5, lengths=np.random.default_rng(5).integers(1, 21, 80).tolist())
FILLED = {int(number): value.tolist() for number, value in zip(TEXTS["sample_id"], TEXTS["sequence"], strict=True)}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sequences none of which is empty, in many files: of several streams."""
    return sequence_version(str(tmp_path_factory.mktemp("filled")), *[5] * 16, samples=TEXTS, batch_size=2)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(20, 60), st.sampled_from([0, -7 % 256]))
def test_packed_rows_have_exactly_the_samples(filled: str, world: int, size: int, row: int, pad: int) -> None:
    seen: list[int] = []
    count = 0
    for batches, _ in steps(filled, world, size, pack=row, pad_value=pad):
        count += 1
        for batch in batches:
            most = batch["length"].shape[1]
            assert batch["sequence"].shape == batch["segment"].shape == batch["position"].shape == (size, row)
            assert batch["label"].shape == batch["sample_id"].shape == (size, most)
            assert (batch["segment"].dtype, batch["position"].dtype) == (np.int32, np.int32)
            assert batch["segment"].max() == most
            for n in range(size):
                segments, at = batch["segment"][n], 0
                for number, length in enumerate(batch["length"][n].tolist(), 1):
                    own = slice(at, at + length)
                    at += length
                    if not length:
                        assert not batch["sample_id"][n, number - 1]
                        continue
                    assert set(segments[own].tolist()) == {number}
                    assert batch["position"][n, own].tolist() == list(range(length))
                    sample = int(batch["sample_id"][n, number - 1])
                    assert batch["sequence"][n, own].tolist() == FILLED[sample]
                    place = TEXTS["sample_id"].tolist().index(sample)
                    assert batch["label"][n, number - 1] == TEXTS["label"][place]
                assert not segments[at:].any()
                assert (batch["sequence"][n, at:] == pad).all()
        seen += packed_ids(batches)
    assert sorted(seen) == sorted(FILLED)
    with TrainingStream(filled, batch_size=size, rank=0, world_size=world, pack=row, as_numpy=True) as stream:
        assert len(stream) == count


@settings(max_examples=100)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.integers(10, 15), st.integers(1, 5))
def test_rows_are_filled_by_first_fit_among_the_open_ones(lengths: list[int], size: int, limit: int) -> None:
    out = np.empty(len(lengths), np.int64)
    count = fill_rows(np.array(lengths), size, limit, out)
    rows: list[int] = []
    for length, row in zip(lengths, out.tolist(), strict=True):
        open_rows = range(max(len(rows) - limit, 0), len(rows))
        fitting = [number for number in open_rows if rows[number] + length <= size]
        assert row == (fitting[0] if fitting else len(rows))
        if not fitting:
            rows.append(0)
        rows[row] += length
    assert count == len(rows)
    assert max(rows) <= size


def test_epochs_of_rows_differ_and_follow_one_another(filled: str) -> None:
    with TrainingStream(filled, batch_size=4, pack=30, as_numpy=True) as stream:
        epochs = []
        for epoch in range(3):
            expected = len(stream)
            batches = list(stream)
            assert (len(batches), stream.epoch) == (expected, epoch + 1)
            epochs.append([packed_ids([batch]) for batch in batches])
            assert stream.stats.samples == len(FILLED) * (epoch + 1)
        assert epochs[0] != epochs[1]
        stream.set_epoch(1)
        assert [packed_ids([batch]) for batch in stream] == epochs[1]


def test_damaged_samples_leave_their_rows_to_others(tmp_path: Path) -> None:
    version = sequence_version(str(tmp_path), *[5] * 16, samples=TEXTS, batch_size=2)
    damage(version, "split=train/part-00003-a1.parquet", 30)
    for options in ({"pack": 40}, {"length_buckets": (10, 20)}):
        seen = [n for batches, _ in steps(version, 2, 3, on_corrupt="skip", **options) for n in packed_ids(batches)]
        assert sorted(seen) == sorted(set(FILLED) - set(TEXTS["sample_id"][15:17].tolist()))


def test_files_of_groups_come_from_s3(s3_root: str, tmp_path: Path) -> None:
    version = sequence_version(s3_root, *[5] * 16, samples=TEXTS, batch_size=2)
    for options in ({"pack": 40}, {"length_buckets": (10, 20)}):
        found = steps(version, 2, 3, cache_dir=tmp_path, **options)
        assert sorted(n for batches, _ in found for n in packed_ids(batches)) == sorted(FILLED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_buckets": (9, 9, 20)}, r"length_buckets = \(9, 9, 20\): give the longest length of each bucket, asc"),
        ({"length_buckets": ()}, r"length_buckets = \(\): give the longest"),
        ({"length_buckets": 64}, "length_buckets = 64: give the longest"),
        ({"length_buckets": (1.5,)}, r"length_buckets = 1\.5: give the longest"),
        ({"pack": 0}, "pack = 0: give the elements of a row, at least 1"),
        ({"pack": 30, "length_buckets": (30,)}, r"length_buckets = \(30,\) and pack = 30: give one of them"),
        ({"pack": 30, "repeat": 2}, "leave out weights, balance, epoch_size, repeat"),
        (
            {"pack": 10},
            "pack = 10: .* of 80 sequences are longer, up to 20; give a larger row, or cut them with max_le",
        ),
        ({"length_buckets": (5, 19)}, "are longer, up to 20; give a further bucket, or cut them with max_length=19"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(filled: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingStream(filled, batch_size=5, **options)


def test_sequences_are_cut_before_they_are_grouped(filled: str) -> None:
    with TrainingStream(filled, batch_size=5, pack=10, max_length=8, as_numpy=True) as stream:
        cut = sorted(packed_ids(list(stream)))
        assert stream.stats.cut_samples == sum(len(value) > 8 for value in FILLED.values())
        state = stream.state_dict()
    assert cut == sorted(FILLED)
    other = TrainingStream(filled, batch_size=5, pack=10, max_length=9)
    with other, pytest.raises(InputError, match=r"max_length 8 \(here 9\)"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "stretches", [[], [[1, 15]], [[0, 15], [0, 15]], [[0, 15], [9, 15]], [[0, 7]], [[0, "x"]], "x", None]
)
def test_a_state_of_other_parts_is_refused(filled: str, stretches: Any) -> None:
    with TrainingStream(filled, batch_size=5, length_buckets=(20,)) as stream:
        state = {**stream.state_dict(), "batches": 3, "stretches": stretches}
        with pytest.raises(InputError, match=r"the state's stretches = .* are no parts of 3 batches: give what"):
            stream.load_state_dict(state)


def test_a_table_has_nothing_to_group(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 30)
    for options in ({"pack": 5}, {"length_buckets": (5,)}):
        with pytest.raises(ConfigError, match="the version has no sequences; leave it out"):
            TrainingStream(version, batch_size=5, **options)


def test_groups_come_from_the_processes_of_a_data_loader(filled: str) -> None:
    for options in ({"pack": 24}, {"length_buckets": (10, 20)}):
        with TrainingStream(filled, batch_size=5, device="cpu", **options) as stream:
            whole = [[packed_ids([batch]) for batch in stream] for _ in range(2)]
        with TrainingStream(filled, batch_size=5, device="cpu", **options) as stream:
            loader = StreamLoader(stream, num_workers=2)
            assert [[packed_ids([batch]) for batch in loader] for _ in range(2)] == whole
