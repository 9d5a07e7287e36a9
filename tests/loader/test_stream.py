from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint
from torch.distributed.checkpoint.stateful import Stateful

from tasks.io.errors import ConfigError, CorruptVersion, InputError, PipelineError
from tasks.loader.order import Sizes
from tasks.loader.stream import TrainingStream
from tasks.loader.version_files import MappedFile
from tests.conftest import new_bucket
from tests.delivery.making import damage, image_samples, image_version, publish, table_samples, table_version
from tests.processes import PROJECT

SAMPLES = 1234
MANY = [20 + number * 7 % 11 for number in range(64)]
"""Samples of files, of which a version has so many that its order has eight streams."""
PART = "split=train/part-00000-a1.parquet"


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 1,234 samples, enough for some chunks of 256."""
    return table_version(str(tmp_path_factory.mktemp("root")), 900, 1, 333, batch_size=100)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 images: chunks of 256 of such small ones."""
    return image_version(str(tmp_path_factory.mktemp("root")), 30, 20)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    return table_version(str(tmp_path_factory.mktemp("root")), *MANY)


def workers(uri: str, count: int, state=None, **options: Any) -> list[TrainingStream]:
    """One stream a worker, all at the same place."""
    options = {"batch_size": 32, "as_numpy": True, **options}
    streams = [TrainingStream(uri, rank=rank, world_size=count, **options) for rank in range(count)]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(state)
    return streams


def run(streams: list[TrainingStream], steps: int | None = None) -> list[list[int]]:
    """Samples of each global batch in turn, real ones only, as all workers take some steps of the current epoch."""
    batches = []
    iterations = [iter(stream) for stream in streams]
    for _ in itertools.count() if steps is None else range(steps):
        step = [next(iteration, None) for iteration in iterations]
        if step[0] is None:
            assert step == [None] * len(step), "one worker has more batches than another"
            break
        for batch in step:
            real = batch.get("mask", slice(None))
            batches.append(batch["sample_id"][real].tolist())
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def steps_of(batches: list[list[int]], count: int) -> list[list[int]]:
    """Samples of each step of some workers, sorted."""
    return [sorted(flat(batches[at : at + count])) for at in range(0, len(batches), count)]


def digest(samples: list[int]) -> str:
    return xxhash.xxh3_128_hexdigest(np.array(samples, np.int64).tobytes())


EVERY = sorted(table_samples(SAMPLES)["sample_id"].tolist())


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    stored=st.sampled_from([1, 3, 10]),
    batch_size=st.integers(1, 50),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_each_sample_comes_once_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, *, sizes, stored, batch_size, count, seed, shuffle
) -> None:
    root = str(tmp_path_factory.mktemp("root"))
    streams = workers(
        table_version(root, *sizes, batch_size=stored), count, batch_size=batch_size, seed=seed, shuffle=shuffle
    )
    found = flat(run(streams))
    assert sorted(found) == sorted(table_samples(sum(sizes))["sample_id"].tolist())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_all_workers_together_have_each_sample_once_an_epoch(version: str, count: int, remainder) -> None:
    streams = workers(version, count, remainder=remainder, batch_size=16)
    assert {len(stream) for stream in streams} == {-(-78 // count) if remainder == "pad" else 77 // count}
    epochs = [flat(run(streams)) for _ in range(3)]
    for found in epochs:
        if remainder == "pad":
            assert sorted(found) == EVERY
        else:
            assert len(found) == len(set(found)) == len(streams[0]) * count * 16
            assert set(found) <= set(EVERY)
    assert len({digest(found) for found in epochs}) == 3
    assert {stream.stats.batches for stream in streams} == {3 * len(streams[0])}
    assert sum(stream.stats.samples for stream in streams) == sum(len(found) for found in epochs)


def test_padded_samples_are_the_first_of_the_epoch_and_masked(version: str) -> None:
    streams = workers(version, 3, batch_size=100)
    batches = [batch for step in zip(*map(list, streams), strict=True) for batch in step]
    assert {len(batch["mask"]) for batch in batches} == {100}
    mask, found = (np.concatenate([batch[name] for batch in batches]) for name in ("mask", "sample_id"))
    assert np.array_equal(np.flatnonzero(mask), np.arange(SAMPLES))
    assert np.array_equal(found[SAMPLES:], found[: 15 * 100 - SAMPLES])
    assert "mask" not in next(iter(workers(version, 1, remainder="drop")[0]))


def test_the_order_depends_on_seed_and_epoch_alone(version: str) -> None:
    def order(count: int, epoch: int = 2, **options) -> str:
        streams = workers(version, count, **options)
        for stream in streams:
            stream.set_epoch(epoch)
        return digest(flat(run(streams)))

    expected = order(1)
    assert {order(2), order(3), order(7)} == {expected}
    assert {order(1, prefetch=0), order(2, prefetch=1), order(3, prefetch=30), order(1, verify=False)} == {expected}
    assert order(2, batch_size=7) == expected  # cut otherwise, the same order
    assert order(1, as_numpy=False) == expected
    assert order(1, columns=["sample_id"]) == expected
    assert len({expected, order(1, seed=1), order(1, epoch=3), order(1, shuffle=False)}) == 4


def test_a_slow_worker_changes_nothing(version: str) -> None:
    streams = workers(version, 2)
    first = [batch["sample_id"][batch["mask"]].tolist() for batch in streams[0]]
    second = [batch["sample_id"][batch["mask"]].tolist() for batch in streams[1]]
    turns = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert turns[:39] == run(workers(version, 1))


def test_without_a_shuffle_samples_come_as_they_are_stored(version: str) -> None:
    (stream,) = workers(version, 1, shuffle=False, normalise=False)
    for _ in range(2):
        batches = list(stream)
        for name, expected in table_samples(SAMPLES).items():
            assert np.array_equal(np.concatenate([b[name][b["mask"]] for b in batches]), expected)


@pytest.mark.parametrize("point", range(10))
def test_a_killed_run_goes_on_where_its_state_was_saved(version: str, point: int) -> None:
    """States survive as JSON; prefetched batches that nobody got aren't lost."""
    draw = np.random.default_rng(point)
    count, step = int(draw.integers(1, 4)), int(draw.integers(0, 60))
    options = {"batch_size": int(draw.integers(8, 40)), "seed": point, "remainder": ["pad", "drop"][point % 2]}
    undisturbed = workers(version, count, **options)
    expected = [run(undisturbed) for _ in range(3)]

    streams = workers(version, count, **options)
    epoch, within = divmod(step, len(streams[0]))
    found = [run(streams) for _ in range(epoch)]
    before = run(streams, within)
    states = [json.dumps(stream.state_dict()) for stream in streams]
    assert len(set(states)) == 1
    del streams

    resumed = workers(version, count, json.loads(states[0]), **options)
    assert {stream.epoch for stream in resumed} == {epoch}
    found.append(before + run(resumed))
    while len(found) < 3:
        found.append(run(resumed))
    assert found[:3] == expected


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_the_number_of_workers_may_change_within_an_epoch(version: str, remainder) -> None:
    found, state = [], None
    for count, steps in ((2, 5), (3, 4), (1, None)):
        streams = workers(version, count, state, remainder=remainder, batch_size=16)
        found += run(streams, steps)
        state = streams[-1].state_dict()
    assert state["epoch"] == 1
    assert found == run(workers(version, 1, remainder=remainder, batch_size=16))
    assert run(workers(version, 3, state, remainder=remainder, batch_size=16)) != found


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_a_version_of_many_files_gives_each_step_the_same_samples_whoever_takes_them(many: str, remainder) -> None:
    options = {"remainder": remainder, "batch_size": 16}
    (alone,) = workers(many, 1, **options, prefetch=0)
    assert alone._sizes.streams == 8
    batches = [run([alone]) for _ in range(2)]
    for count in (2, 3, 8):
        streams = workers(many, count, **options)
        for expected in batches:
            assert steps_of(run(streams), count) == steps_of(expected, count)[: len(streams[0])]
    found, state = [], None
    for count, steps in ((2, 5), (3, 4), (8, 2), (1, None)):
        streams = workers(many, count, state, **options)
        found += flat(run(streams, steps))
        state = streams[-1].state_dict()
    assert (state["epoch"], state["batches"]) == (1, 0)
    assert sorted(found) == sorted(flat(batches[0]))
    again = workers(many, 3, **options)
    run(again, 4)
    expected = run(again)
    (first,) = workers(many, 1, **options)
    run([first], 12)  # as many samples as four steps of three workers
    assert run(workers(many, 3, first.state_dict(), **options)) == expected


def test_a_version_of_many_files_comes_as_it_is_stored_without_a_shuffle(many: str) -> None:
    streams = workers(many, 2, shuffle=False)
    assert streams[0]._sizes.streams == 1
    assert flat(run(streams)) == table_samples(sum(MANY))["sample_id"].tolist()


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_an_epoch_ends_with_its_last_batch(version: str, remainder) -> None:
    """Loops of `len(stream)` batches, as those of Lightning, get one epoch after the other, and none is empty."""
    expected = workers(version, 2, remainder=remainder)
    streams = workers(version, 2, remainder=remainder)
    for epoch in range(3):
        assert {stream.epoch for stream in streams} == {epoch}
        assert run(streams, len(streams[0])) == run(expected)
        states = [stream.state_dict() for stream in streams]
        assert [(state["epoch"], state["batches"]) for state in states] == [(epoch + 1, 0)] * 2
        assert run(workers(version, 3, states[0], remainder=remainder), 4) == run(
            workers(version, 1, states[1], remainder=remainder), 12
        )


def test_an_iteration_after_its_last_batch_has_ended_whatever_the_stream_does(version: str) -> None:
    (stream,) = workers(version, 1)
    iteration = iter(stream)
    for _ in range(len(stream)):
        next(iteration)
    assert len(list(stream)) == len(stream)
    assert next(iteration, None) is None
    assert stream.epoch == 2


def test_the_place_is_kept_in_a_distributed_checkpoint_of_torch(version: str, tmp_path: Path) -> None:
    with TrainingStream(version, batch_size=32, as_numpy=True) as stream:
        assert isinstance(stream, Stateful)
        batches = iter(stream)
        for _ in range(5):
            next(batches)
        checkpoint.save({"data": stream}, checkpoint_id=tmp_path)
        rest = [batch["sample_id"].tolist() for batch in batches]
    with TrainingStream(version, batch_size=32, as_numpy=True) as again:
        checkpoint.load({"data": again}, checkpoint_id=tmp_path)
        assert [batch["sample_id"].tolist() for batch in again] == rest


def test_a_state_with_too_little_left_for_a_step_leads_to_the_next_epoch(version: str) -> None:
    (stream,) = workers(version, 1, remainder="drop")
    run([stream], len(stream) - 1)  # a batch is left: too little for two workers
    for resumed in workers(version, 2, stream.state_dict(), remainder="drop"):
        assert (resumed.epoch, resumed.state_dict()["batches"]) == (1, 0)
        assert len(list(resumed)) == len(resumed)
    whole = {**stream.state_dict(), "batches": len(stream)}
    assert workers(version, 1, whole, remainder="drop")[0].epoch == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, r"seed 0 \(here 1\)"),
        ({"batch_size": 8}, r"batch_size 32 \(here 8\)"),
        ({"shuffle": False}, r"shuffle True \(here False\)"),
        ({"remainder": "drop"}, r"remainder 'pad' \(here 'drop'\)"),
        ({"seed": 3, "batch_size": 5}, r"seed 0 \(here 3\), batch_size 32 \(here 5\); open the stream as it was"),
    ],
)
def test_a_state_of_another_stream_is_refused(version: str, options, message: str) -> None:
    (state,) = [stream.state_dict() for stream in workers(version, 1)]
    with pytest.raises(InputError, match=message):
        workers(version, 1, state, **options)


def test_a_state_of_another_version_or_split_or_of_nothing_is_refused(version: str, tmp_path: Path) -> None:
    samples = [table_samples(40)]
    other = publish(str(tmp_path), {"train": samples, "validation": samples}, batch_size=10)
    (stream,) = workers(other, 1)
    with pytest.raises(InputError, match=r"samples 1234 \(here 40\)"):
        stream.load_state_dict(workers(version, 1)[0].state_dict())
    with pytest.raises(InputError, match=r"split 'train' \(here 'validation'\)"):
        workers(other, 1, stream.state_dict(), split="validation")
    again = publish(str(tmp_path), {"train": samples}, batch_size=10)
    with pytest.raises(InputError, match=r"version 1 \(here 2\)"):
        workers(again, 1, stream.state_dict())
    with pytest.raises(InputError, match=r"the state lacks dataset, .*epoch, batches"):
        stream.load_state_dict({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "the state's epoch = -1 is no place in an epoch of 39 batches: give what state_dict"),
        ({"epoch": 1.0}, "the state's epoch = 1.0 is no place"),
        ({"epoch": 2**63}, "the state's epoch = 9223372036854775808 is no place"),
        ({"batches": -1}, "the state's batches = -1 is no place"),
        ({"batches": 40}, "the state's batches = 40 is no place in an epoch of 39 batches"),
        ({"batches": "3"}, "the state's batches = '3' is no place"),
        ({"batches": True}, "the state's batches = True is no place"),
        ({"seed": False}, r"seed False \(here 0\)"),
        ({"order": 1}, r"order 1 \(here 2\)"),
    ],
)
def test_a_place_that_there_is_not_is_refused(version: str, change, message: str) -> None:
    (stream,) = workers(version, 1)
    run([stream], 3)
    before = stream.state_dict()
    with pytest.raises(InputError, match=message):
        stream.load_state_dict({**before, **change})
    assert stream.state_dict() == before
    with pytest.raises(InputError, match="the state is a list: give what state_dict"):
        stream.load_state_dict([before])  # type: ignore[arg-type]


def test_tensors_have_the_values_of_the_version_normalised_by_its_constants(version: str, images: str) -> None:
    by_id = {}
    for samples, name in ((table_samples(SAMPLES), "features"), (image_samples(50), "image")):
        by_id[name] = {int(i): n for n, i in enumerate(samples["sample_id"])}, samples
    for uri, name in ((version, "features"), (images, "image")):
        place, samples = by_id[name]
        stream = TrainingStream(uri, batch_size=7)
        constants = stream.definition["normalise"]
        mean, std = (np.array(constants[key]) for key in ("mean", "std"))
        for batch in stream:
            assert {key: value.dtype for key, value in batch.items()} == {
                name: torch.float32,
                "label": torch.int64,
                "sample_id": torch.int64,
                "mask": torch.bool,
            }
            rows = [place[int(sample)] for sample in batch["sample_id"]]
            stored = samples[name][rows].astype(np.float64)
            if name == "image":
                stored, shape = stored / 255, (-1, 1, 1)
            else:
                shape = (-1,)
            expected = (stored - mean.reshape(shape)) / std.reshape(shape)
            np.testing.assert_allclose(batch[name].numpy(), expected, rtol=1e-5, atol=2e-6)
            assert batch["label"].tolist() == samples["label"][rows].tolist()


def test_images_can_be_had_as_they_are_stored_and_in_other_types(images: str) -> None:
    first = next(iter(TrainingStream(images, batch_size=4, normalise=False, channels_last=True)))
    assert first["image"].dtype == torch.uint8
    assert first["image"].is_contiguous(memory_format=torch.channels_last)
    half = next(iter(TrainingStream(images, batch_size=4, dtype=torch.bfloat16, columns=["image"], remainder="drop")))
    assert {name: value.dtype for name, value in half.items()} == {"image": torch.bfloat16}


def test_a_version_without_labels_has_none(tmp_path: Path) -> None:
    samples = table_samples(10)
    del samples["label"]
    batch = next(iter(TrainingStream(publish(str(tmp_path), {"train": [samples]}), batch_size=4)))
    assert batch.keys() == {"features", "sample_id", "mask"}


@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_batch_belongs_to_whoever_has_it(version: str, as_numpy: bool) -> None:
    """Kept batches stay as they were, however many there are; those that were dropped give their memory back."""
    stream = TrainingStream(version, batch_size=32, as_numpy=as_numpy, prefetch=2)
    kept = list(stream)
    copies = [{name: np.asarray(value).copy() for name, value in batch.items()} for batch in kept]
    for batch in kept:
        batch["features"][:] = -1  # nor does anybody else see what is written to it
    second = [np.asarray(batch["features"]).copy() for batch in stream]
    for batch, copy in zip(kept, copies, strict=True):
        assert np.array_equal(np.asarray(batch["sample_id"]), copy["sample_id"])
        assert (np.asarray(batch["features"]) == -1).all()
    assert not any((features == -1).any() for features in second)
    del kept, batch
    stream.set_epoch(0)
    assert all(
        np.array_equal(np.asarray(batch["features"]), copy["features"])
        for batch, copy in zip(stream, copies, strict=True)
    )


def test_memory_is_used_again_while_batches_are_dropped(version: str) -> None:
    stream = TrainingStream(version, batch_size=32, prefetch=2)
    places = {batch["features"].data_ptr() for _ in range(3) for batch in stream}
    assert len(places) <= 2 + 4


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_leaving_the_loop_ends_the_thread_and_going_on_loses_nothing(version: str) -> None:
    (stream,) = workers(version, 1)
    found = []
    for batch in stream:
        found.append(batch["sample_id"][batch["mask"]].tolist())
        if len(found) == 5:
            break
    assert threads() == 0
    assert stream.state_dict()["batches"] == 5
    assert found + run([stream]) == run(workers(version, 1))


def test_an_error_in_the_loop_ends_the_thread(version: str) -> None:
    def loop(stream: TrainingStream) -> None:
        for _ in stream:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop(*workers(version, 1))
    gc.collect()
    assert threads() == 0


def test_a_stream_that_nobody_has_any_more_is_gone_with_its_thread(version: str) -> None:
    (stream,) = workers(version, 1)
    iteration = iter(stream)
    next(iteration)
    there = weakref.ref(stream)
    del stream, iteration
    gc.collect()
    assert there() is None
    assert threads() == 0


def test_a_closed_stream_says_so_and_its_batches_stay(version: str) -> None:
    with TrainingStream(version, batch_size=32) as stream:
        iteration = iter(stream)
        batch = next(iteration)
        copy = batch["features"].clone()
    assert threads() == 0
    assert torch.equal(batch["features"], copy)
    with pytest.raises(PipelineError, match="this iteration can't go on"):
        next(iteration)
    with pytest.raises(PipelineError, match="the stream is closed"):
        next(iter(stream))


def test_only_the_later_of_two_iterations_goes_on(version: str) -> None:
    (stream,) = workers(version, 1)
    first, second = iter(stream), iter(stream)
    next(first)
    next(second)
    with pytest.raises(PipelineError, match="iterated over anew"):
        next(first)
    assert len(list(second)) == len(stream) - 2
    third = iter(stream)
    next(third)
    stream.set_epoch(5)
    with pytest.raises(PipelineError, match="the stream was moved"):
        next(third)


def test_what_fails_in_the_thread_is_raised_in_the_loop_with_its_traceback(version: str, monkeypatch) -> None:
    (stream,) = workers(version, 1)
    monkeypatch.setattr(stream._joined, "gather", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(iter(stream))
    assert "make_batches" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert threads() == 0


def test_damage_is_named_or_skipped_and_counted_alike_by_all_workers(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 100, 50)
    with (Path(version) / PART).open("rb") as file:
        mapped = MappedFile(file, PART)
    damage(version, PART, int(mapped.columns["features"].offsets[0]))  # batch 0: samples 0 to 9
    (stream,) = workers(version, 1)
    with pytest.raises(CorruptVersion, match=f"{PART}: batch 0 has not the checksum"):
        list(stream)
    good = sorted(table_samples(150)["sample_id"][10:].tolist())
    for count in (1, 2, 3):
        streams = workers(version, count, on_corrupt="skip", batch_size=16)
        for _ in range(2):
            assert sorted(flat(run(streams))) == good
        assert sum(stream.stats.skipped_samples for stream in streams) == 20
        assert {stream.stats.skipped_files for stream in streams} == {0}
    damaged = workers(version, 1, verify=False)
    assert len(flat(run(damaged))) == 150


@pytest.mark.parametrize("harm", ["missing", "shorter"])
def test_a_bad_file_is_named_or_skipped(tmp_path: Path, harm: str) -> None:
    version = image_version(str(tmp_path), 20, 30)
    path = Path(version) / PART
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptVersion, match=PART):
        workers(version, 1)
    streams = workers(version, 2, on_corrupt="skip", batch_size=4)
    found = flat(run(streams))
    assert sorted(found) == sorted(image_samples(50)["sample_id"][20:].tolist())
    assert [stream.stats.skipped_files for stream in streams] == [1, 1]
    assert sum(stream.stats.skipped_samples for stream in streams) == 20


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_to_skip_everything_is_an_error(tmp_path: Path, harm: str) -> None:
    version = table_version(str(tmp_path), 60, 40)
    parts = [PART, PART.replace("00000", "00001")]
    for part in parts:
        path = Path(version) / part
        if harm == "missing":
            path.unlink()
        else:
            with path.open("rb") as file:
                mapped = MappedFile(file, part)
            places = mapped.columns["label"]
            for first in range(0, mapped.samples, mapped.batch_size):
                group = int(np.searchsorted(mapped.starts, first, side="right")) - 1
                row = first - int(mapped.starts[group])
                damage(version, part, int(places.offsets[group]) + row * places.spec.width)
    with pytest.raises(CorruptVersion, match=r"all 100 samples are damaged or missing; the last: .*part-0000"):
        list(workers(version, 1, on_corrupt="skip", batch_size=16)[0])
    if harm == "damaged":  # none of several workers sees all batches
        for stream in workers(version, 7, on_corrupt="skip", batch_size=5):
            with pytest.raises(CorruptVersion, match=rf"no sample for worker {stream.rank} of 7: all of its 3"):
                list(stream)


def test_what_is_written_to_a_mapped_file_is_compared_anew(tmp_path: Path, monkeypatch) -> None:
    version = table_version(str(tmp_path), 60)
    monkeypatch.setattr("tasks.loader.shards._LOOK_SECONDS", 0)
    monkeypatch.setattr("tasks.loader.shards._TIMES_SECONDS", 0)
    monkeypatch.setattr("tasks.loader.shards._LOOK_SHARE", float("inf"))
    (stream,) = workers(version, 1, prefetch=0)
    expected = run([stream])
    path = Path(version) / PART
    os.utime(path, (0, 0))  # nothing but its times
    assert flat(expected) != flat(run([stream]))
    with path.open("r+b") as file:
        offset = int(MappedFile(file, PART).columns["features"].offsets[0])
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptVersion, match=f"{PART}: batch 0 has not the checksum"):
        list(stream)


CUT = """
import os, sys
from tasks.io.errors import CorruptVersion
from tasks.loader import shards
from tasks.loader.stream import TrainingStream
shards._LOOK_SECONDS, shards._LOOK_SHARE = 0, float("inf")
for action in ("skip", "raise"):
    stream = TrainingStream(sys.argv[1], batch_size=10, as_numpy=True, prefetch=0, on_corrupt=action, shuffle=False)
    loop = iter(stream)
    next(loop)
    path = sys.argv[1] + "/" + sys.argv[2]
    whole = open(path, "rb").read()
    os.truncate(path, 100)
    try:
        print(sum(int(batch["mask"].sum()) for batch in loop), stream.stats.skipped_files)
    except CorruptVersion as error:
        print(error)
    with open(path, "wb") as file:
        file.write(whole)
"""


def test_a_file_that_is_cut_while_it_is_mapped_is_named_or_skipped(tmp_path: Path) -> None:
    """In a process of its own, as it would end by SIGBUS."""
    version = table_version(str(tmp_path), 5000, 60, batch_size=100)
    done = subprocess.run(
        [sys.executable, "-c", CUT, version, PART], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    skipped, named = done.stdout.splitlines()
    assert skipped == "60 1"
    assert re.search(rf"{PART} was cut from \d+ to 100 bytes while it was read: publish a new version", named)


def test_files_of_s3_come_through_the_cache(s3_root: str, tmp_path: Path) -> None:
    version = table_version(s3_root, 500, 400, 334)
    options = {"cache_dir": tmp_path / "cache", "batch_size": 64}
    streams = workers(version, 2, **options)
    assert sorted(flat(run(streams))) == EVERY
    counts = [stream.stats for stream in streams]
    assert sum(one.cache_misses for one in counts) == 3
    assert sum(one.cache_hits for one in counts) == 3
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.parquet"))
    assert sum(one.cache_bytes_read for one in counts) == sizes
    (again,) = workers(version, 1, **options)
    assert sorted(flat(run([again]))) == EVERY
    assert (again.stats.cache_hits, again.stats.cache_misses) == (3, 0)
    again.close()


@pytest.fixture(scope="module")
def many_on_s3(s3_url: str) -> str:
    return table_version(new_bucket(s3_url), *MANY)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_each_worker_downloads_its_share_of_the_files(many_on_s3: str, tmp_path: Path, count: int) -> None:
    found, most = [], len(MANY) // count + 2 * 8  # two streams more
    for rank in range(count):  # each with a cache of its own, as on a node of its own
        with TrainingStream(
            many_on_s3,
            batch_size=16,
            rank=rank,
            world_size=count,
            as_numpy=True,
            cache_dir=tmp_path / str(rank),
            columns=["sample_id"],
        ) as stream:
            found += [sample for batch in stream for sample in batch["sample_id"][batch["mask"]].tolist()]
            assert stream.stats.cache_misses <= most
    assert sorted(found) == sorted(table_samples(sum(MANY))["sample_id"].tolist())


@pytest.mark.parametrize(
    "cut",
    [
        Sizes(8, 64, 64, 1, 64),  # a region is a window, of 512 images in 4 files
        Sizes(8, 8, 16, 2, 16),  # a region of each stream is a file
    ],
    ids=["one stream", "two"],
)
def test_a_small_cache_serves_a_large_version_region_by_region(
    s3_root: str, tmp_path: Path, monkeypatch, cut: Sizes
) -> None:
    sizes = [128] * 16
    version = image_version(s3_root, *sizes, group_batches=64)
    whole = 16 * 128 * (3 * 4 * 5 + 16)
    stream = TrainingStream(version, batch_size=64, as_numpy=True, cache_dir=tmp_path, cache_bytes=whole * 3 // 4)
    monkeypatch.setattr(stream, "_sizes", cut)
    for _ in range(2):
        found = [sample for batch in stream for sample in batch["sample_id"][batch["mask"]].tolist()]
        assert sorted(found) == sorted(image_samples(sum(sizes))["sample_id"].tolist())
    stats = stream.stats
    # Each file is needed in one region of each epoch, and is downloaded at most once for it.
    assert 16 < stats.cache_misses <= 32
    assert sum(path.stat().st_size for path in tmp_path.rglob("[!.]*.parquet")) <= whole * 3 // 4
    stream.close()


def test_damage_on_s3_is_named_or_skipped(s3_root: str, tmp_path: Path) -> None:
    from tasks.io import storage

    version = table_version(s3_root, 100, 50)
    data = bytearray(storage.read_bytes(f"{version}/{PART}"))
    data[50] ^= 1
    storage.write_bytes(f"{version}/{PART}", bytes(data))
    (stream,) = workers(version, 1, cache_dir=tmp_path)
    with pytest.raises(CorruptVersion, match=f"{PART} differs from its manifest"):
        list(stream)
    (stream,) = workers(version, 1, cache_dir=tmp_path, on_corrupt="skip")
    assert sorted(flat(run([stream]))) == sorted(table_samples(150)["sample_id"][100:].tolist())
    assert (stream.stats.skipped_files, stream.stats.skipped_samples) == (1, 100)


TORCHRUN = """
import json, sys, torch.distributed as dist
from tasks.loader.stream import TrainingStream
dist.init_process_group("gloo")
stream = TrainingStream(sys.argv[1], batch_size=32)
mine = [batch["sample_id"][batch["mask"]].tolist() for batch in stream]
assert "ray" not in sys.modules and "prefect" not in sys.modules
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, mine)
if dist.get_rank() == 0:
    print(json.dumps([batch for step in zip(*everyone, strict=True) for batch in step]))
dist.destroy_process_group()
"""


def test_it_runs_under_torchrun(version: str, tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(TORCHRUN)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), version]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found[:39] == run(workers(version, 1))
    assert found[39:] == [[]]


ALONE = """
import sys
import tasks.loader.mixed
from tasks.loader.stream import TrainingStream

def imported(*names):
    return set(names) & sys.modules.keys()

stream = TrainingStream(sys.argv[1], batch_size=32, as_numpy=True)
found = imported("torch", "ray", "prefect", "numba", "llvmlite", "scipy", "fsspec", "s3fs", "polars", "pandas", "PIL")
assert not found, found
for batch in stream:
    pass
found = imported("torch", "ray", "prefect", "fsspec", "polars", "pandas")
assert not found, found
assert imported("numba")
"""


def test_it_needs_numpy_and_pyarrow_numba_for_batches_and_pytorch_only_for_tensors(version: str) -> None:
    subprocess.run([sys.executable, "-c", ALONE, version], cwd=PROJECT, check=True, timeout=60)


def test_a_process_that_ends_in_the_middle_of_a_loop_ends_well(version: str) -> None:
    code = (
        "import sys; from tasks.loader.stream import TrainingStream; "
        "loop = iter(TrainingStream(sys.argv[1], batch_size=2, as_numpy=True)); next(loop)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, version], cwd=PROJECT, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


FORKED = """
import os, sys
from tasks.io.errors import PipelineError
from tasks.loader.stream import TrainingStream
stream = TrainingStream(sys.argv[1], batch_size=32, as_numpy=True)
loop = iter(stream)
next(loop)
child = os.fork()
if not child:
    for use in (lambda: next(loop), lambda: next(iter(stream))):
        try:
            use()
        except PipelineError as error:
            print(error)
    sys.exit()
print(os.waitpid(child, 0)[1], len(list(loop)))
"""


def test_a_fork_in_mid_iteration_says_so_and_its_parent_goes_on(version: str) -> None:
    """The fork has no thread that would make the batches it waits for."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, version],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second, parent = done.stdout.splitlines()
    assert re.match(r"this stream was opened in process \d+, of which process \d+ is a fork: open one in each", first)
    assert (second, parent) == (first, "0 38")


AROUND = """
import sys
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tasks.io.errors import PipelineError
from tasks.loader.stream import TrainingStream

class Around(IterableDataset):  # what people write around a stream
    def __init__(self, open_stream):
        self.open = open_stream

    def __iter__(self):
        return iter(self.open(get_worker_info()))

def loaded(open_stream, processes):
    loader = DataLoader(Around(open_stream), batch_size=None, num_workers=processes)
    return [batch["sample_id"][batch["mask"]].tolist() for batch in loader]

version = sys.argv[1]
stream = TrainingStream(version, batch_size=32)
for shared in (lambda _: stream, lambda _: TrainingStream(version, batch_size=32)):
    try:
        loaded(shared, 2)
    except PipelineError as error:
        print(" ".join(str(error).split()))
expected = [batch["sample_id"][batch["mask"]].tolist() for batch in TrainingStream(version, batch_size=32)]
own = loaded(lambda info: TrainingStream(version, batch_size=32, rank=info.id, world_size=info.num_workers), 2)
alone = loaded(lambda _: stream, 0)
print(len(expected), [batch for batch in own if batch] == expected, alone == expected, stream.epoch)
"""


def test_processes_of_a_data_loader_deliver_nothing_twice(version: str, monkeypatch) -> None:
    """In a process of its own: torch's handler of dying children raises wherever it finds this one, even in a lock."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-W", "ignore", "-c", AROUND, version]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    forked, several, figures = done.stdout.splitlines()
    assert re.search(r"of which process \d+ is a fork: open one in each process", forked)
    assert re.search(r"opened in process 0 of a DataLoader's 2, .* over .*StreamLoader, .* or give", several)
    assert figures == f"{len(run(workers(version, 1)))} True True 1"


def test_a_stream_is_not_copied_or_sent_elsewhere(version: str) -> None:
    for send in (pickle.dumps, deepcopy):
        with pytest.raises(PipelineError, match="can't be copied or sent to another process: open one there"):
            send(workers(version, 1)[0])


def test_rank_and_number_of_workers_come_from_whatever_started_the_process(version: str, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    stream = TrainingStream(version, batch_size=32, as_numpy=True)
    assert (stream.rank, stream.world_size) == (1, 3)

    class Context:
        def get_world_rank(self) -> int:
            return 4

        def get_world_size(self) -> int:
            return 7

    class Train:
        get_context = staticmethod(Context)

    monkeypatch.setitem(sys.modules, "ray.train", Train)
    stream = TrainingStream(version, batch_size=32, as_numpy=True)
    assert (stream.rank, stream.world_size) == (4, 7)
    stream = TrainingStream(version, batch_size=32, as_numpy=True, rank=0, world_size=2)
    assert (stream.rank, stream.world_size) == (0, 2)


def test_the_real_ray_train_outside_of_a_worker_is_no_world(version: str, monkeypatch) -> None:
    import ray.train

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ray.train
    stream = TrainingStream(version, batch_size=32, as_numpy=True)
    assert (stream.rank, stream.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: a batch has at least one sample"),
        ({"batch_size": 2.5}, "batch_size = 2.5: a batch has at least one sample"),
        ({"batch_size": True}, "batch_size = True: a batch has at least one sample"),
        ({"batch_size": 10**15}, "batch_size = 1000000000000000: .* is more than this machine's memory; use smaller"),
        ({"seed": -1}, "seed = -1: use one from 0"),
        ({"seed": 1.0}, "seed = 1.0: use one from 0"),
        ({"prefetch": -1}, "prefetch = -1: use 0 for none"),
        (
            {"prefetch": 10**9},
            "prefetch = 1000000000: .* or the number of batches to make ahead, below 10",
        ),
        ({"shuffle": "no"}, "shuffle = 'no': use True or False"),
        ({"verify": None}, "verify = None: use True or False"),
        ({"remainder": ["pad"]}, r"remainder = \['pad'\]: use 'pad' or 'drop'"),
        ({"dtype": {"a": 1}}, "dtype = {'a': 1} isn't for inputs: use one of float32"),
        ({"device": 10**30, "as_numpy": False}, "device = 1000000000000000000000000000000 is no device: use 'cpu'"),
        ({"cache_bytes": 2.5}, "cache_bytes = 2.5: give the bytes that files may use"),
        ({"cache_dir": b"x"}, "cache_dir = b'x': name a directory on a local disk"),
        ({"split": None}, "has no samples in split None: use 'train'"),
        ({"remainder": "keep"}, "remainder = 'keep': use 'pad' or 'drop'"),
        ({"on_corrupt": "ignore"}, "on_corrupt = 'ignore': use 'raise' or 'skip'"),
        ({"columns": ["image"]}, r"columns = \['image'\]: give a list of some of 'features', 'label', 'sample_id'"),
        ({"columns": "label"}, "columns = 'label': give a list"),
        ({"columns": []}, r"columns = \[\]: give a list"),
        ({"columns": 5}, "columns = 5: give a list"),
        ({"columns": [["label"]]}, r"columns = \[\['label'\]\]: give a list"),
        ({"rank": 1}, "rank = 1 and world_size = None: give both"),
        ({"split": "test"}, "has no samples in split 'test': use 'train'"),
        ({"remainder": "drop", "batch_size": 2000}, "has 1234 samples, less than a batch of 2000 for each of 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(version: str, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingStream(version, **{"batch_size": 32, "as_numpy": True, **options})
    (stream,) = workers(version, 1)
    with pytest.raises(ConfigError, match="epoch = -1"):
        stream.set_epoch(-1)
