from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io.tensors import AnyArray, Int64Array
from tasks.loader.order import EpochOrder, Share, Sizes, batch_count, step_count

SIZES = st.builds(
    Sizes,
    chunk=st.sampled_from([1, 2, 8, 16]),
    window=st.sampled_from([1, 2, 4, 16]),
    region=st.sampled_from([16, 21, 32]),
    streams=st.sampled_from([1, 2, 4, 16, 64]),
    ahead=st.just(16),
)
SEEDS = st.integers(0, 2**63 - 1)
REMAINDERS = st.sampled_from(["pad", "drop"])


def mean_displacement(order: Int64Array) -> float:
    """Return the mean distance of samples from their stored place, relative to a full permutation's (a third of them).

    Args:
        order: (n,) a permutation of range(n).
    """
    count = len(order)
    moved = np.abs(order - np.arange(count)).mean()
    return float(moved / ((count * count - 1) / (3 * count)))


def class_runs(labels: AnyArray) -> float:
    """Return the mean length of runs of equal labels, relative to a full permutation's: 1 is equally good.

    Args:
        labels: (n,) classes in the order of delivery, at least two different ones.
    """
    count = len(labels)
    runs = 1 + np.count_nonzero(labels[1:] != labels[:-1])
    _, sizes = np.unique(labels, return_counts=True)
    # Neighbours differ with this probability, n - 1 pairs, and each such pair begins a run.
    differ = 1 - float((sizes * (sizes - 1.0)).sum()) / (count * (count - 1.0))
    return (1 + (count - 1) * differ) / runs


@pytest.mark.parametrize(
    ("sample_bytes", "samples", "files", "sizes"),
    [
        (24, 10**6, 1, Sizes(256, 256, 1 << 17, 1, 1 << 17)),  # a narrow table
        (96, 10**7, 8, Sizes(256, 256, 1 << 15, 1, 1 << 15)),  # 20 features, label and id
        (4 << 10, 10**6, 15, Sizes(256, 64, 1 << 10, 1, 1 << 10)),  # a wide one: 1 MiB a chunk
        (150_544, 6000, 7, Sizes(8, 64, 512, 1, 512)),  # images of 224 × 224
        (20 << 20, 10, 1, Sizes(8, 64, 64, 1, 64)),  # samples so large that a region is a window
        (96, 10**7, 16, Sizes(256, 128, 1 << 14, 2, 1 << 14)),
        (96, 10**7, 64, Sizes(256, 32, 1 << 12, 8, 1 << 12)),
        (96, 10**8, 511, Sizes(256, 8, 1 << 10, 32, 1 << 10)),
        (150_544, 10**6, 10**4, Sizes(8, 1, 13, 64, 8)),  # a region holds as many samples as a file, 100
        (150_544, 500_000, 600, Sizes(8, 1, 105, 64, 8)),
    ],
)
def test_sizes_follow_the_bytes_of_a_sample_and_the_number_of_files(sample_bytes, samples, files, sizes) -> None:
    assert Sizes.of(sample_bytes, samples, files) == sizes


@given(samples=st.integers(1, 500), sizes=SIZES, seed=SEEDS, epoch=st.integers(0, 2**40), shuffled=st.booleans())
def test_an_epoch_has_each_sample_once_and_chunks_are_named_before_they_are_needed(
    samples, sizes, seed, epoch, shuffled
) -> None:
    order = EpochOrder(samples, sizes, seed, epoch, shuffled)
    found = order.take(0, samples)
    assert np.array_equal(np.sort(found), np.arange(samples))
    if not shuffled:
        assert np.array_equal(found, np.arange(samples))
    streams = order.streams_cut(0, samples, 0, samples)
    firsts, ends = order.chunks_of(streams, 0, samples)
    assert sorted(chunk for chunks in map(range, firsts, ends) for chunk in chunks) == list(range(samples))
    assert (ends - firsts).max() <= sizes.chunk
    for number in {order.round_at(position) for position in range(samples)}:
        # A stream may be in its next window, but not before this one.
        firsts, ends = order.chunks_of(streams, number, 2 * sizes.window)
        named = {sample for chunk in map(range, firsts, ends) for sample in chunk}
        here = [position for position in range(samples) if order.round_at(position) == number]
        assert set(found[here].tolist()) <= named


@given(samples=st.integers(1, 300), sizes=SIZES, seed=SEEDS, start=st.integers(0, 900), count=st.integers(0, 700))
def test_any_piece_is_the_same_as_in_the_whole_and_begins_anew_at_the_end(samples, sizes, seed, start, count) -> None:
    whole = EpochOrder(samples, sizes, seed, 3).take(0, samples)
    piece = EpochOrder(samples, sizes, seed, 3).take(start, count)
    assert np.array_equal(piece, whole[(start + np.arange(count)) % samples])


@given(samples=st.integers(64, 2000), sizes=SIZES, seed=SEEDS)
def test_samples_that_follow_one_another_come_from_all_streams(samples, sizes, seed) -> None:
    streams = sizes.streams
    bits = streams.bit_length() - 1
    found = EpochOrder(samples, sizes, seed, 0).take(0, samples)
    lengths = [len(found[turn::streams]) for turn in range(streams)]
    assert max(lengths) - min(lengths) <= 1
    first = 0
    for stream in range(streams):
        turn = int(f"{stream:0{bits}b}"[::-1], 2) if bits else 0
        assert np.array_equal(np.sort(found[turn::streams]), first + np.arange(lengths[turn]))
        first += lengths[turn]


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        (Sizes(2, 2, 4, 1, 4), [6, 5, 7, 4, 1, 0, 3, 2, 10, 11, 8, 9]),
        (Sizes(2, 2, 2, 4, 2), [2, 10, 8, 14, 1, 9, 5, 15, 3, 13, 6, 17, 0, 11, 7, 16, 4, 12]),
    ],
)
def test_the_order_is_what_it_was_when_this_test_was_written(sizes: Sizes, order: list[int]) -> None:
    # States of streams live for months: another order needs another number in `ORDER`.
    assert EpochOrder(len(order), sizes, seed=7, epoch=1).take(0, len(order)).tolist() == order


def test_seeds_and_epochs_give_different_orders() -> None:
    sizes = Sizes(8, 4, 16, 2, 16)
    orders = {tuple(EpochOrder(1000, sizes, seed, epoch).take(0, 1000)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_streams_are_shuffled_by_draws_of_their_own() -> None:
    found = EpochOrder(1 << 12, Sizes(8, 4, 16, 4, 16), 0, 0).take(0, 1 << 12)
    assert len({tuple(found[turn::4] % (1 << 10)) for turn in range(4)}) == 4


@pytest.mark.parametrize("files", [1, 512])
def test_memory_is_that_of_windows_and_of_the_order_of_chunks(files: int) -> None:
    order = EpochOrder(1 << 30, Sizes.of(96, 1 << 30, files), 0, 0)
    for position in range(0, 1 << 30, 1 << 25):
        order.take(position, 100)
    held = order._windows.nbytes + sum(stream._order.nbytes for stream in order._streams.values())
    assert held < 40 << 20  # the whole permutation takes 8 GiB


@pytest.mark.parametrize("streams", [1, 2])
def test_every_sample_comes_to_every_place_of_its_stream(streams: int) -> None:
    sizes, samples, epochs = Sizes(4, 4 // streams, 8 // streams, streams, 8), 32, 4000
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), EpochOrder(samples, sizes, 0, epoch).take(0, samples)] += 1
    # Each cell is binomial; of 1,024 of them the farthest is some 3.5 standard deviations away.
    place, sample = np.indices(counts.shape)
    expected = np.where(place % streams == sample * streams // samples, epochs * streams / samples, 0)
    assert (np.abs(counts - expected) <= 5 * expected**0.5).all()


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        (Sizes(256, 256, 1 << 15, 1, 1 << 15), 0.01),  # a table below 1 GiB, one region
        (Sizes(8, 64, 512, 1, 512), 0.15),  # images in 16 regions
        (Sizes(256, 4, 64, 64, 64), 0.01),
        (Sizes(8, 1, 16, 64, 8), 0.01),
    ],
)
def test_the_shuffle_is_nearly_as_good_as_a_full_permutation(sizes: Sizes, near: float) -> None:
    samples, epochs = 1 << 16, 8
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, samples)  # files are in a random order to begin with
    orders = [EpochOrder(samples, sizes, 1, epoch).take(0, samples) for epoch in range(epochs)]
    assert np.mean([mean_displacement(order) for order in orders]) == pytest.approx(1, abs=near)
    assert np.mean([class_runs(labels[order]) for order in orders]) == pytest.approx(1, abs=0.01)


def test_displacement_and_runs_are_one_for_a_full_permutation_and_tell_what_is_none() -> None:
    draw = np.random.default_rng(0)
    assert mean_displacement(draw.permutation(100_000)) == pytest.approx(1, abs=0.01)
    assert mean_displacement(np.arange(100)) == 0
    labels = np.repeat([0, 1, 2], [50_000, 30_000, 20_000])
    assert class_runs(draw.permutation(labels)) == pytest.approx(1, abs=0.02)
    assert class_runs(labels) > 10_000


@settings(max_examples=200)
@given(
    samples=st.integers(1, 400),
    sizes=SIZES,
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 7),
    place=st.integers(0, 400),
    seed=SEEDS,
)
def test_the_batches_of_a_step_are_its_samples_whoever_takes_them(
    *, samples, sizes, batch_size, world_size, place, seed
) -> None:
    start = place % batch_count(samples, batch_size, "pad") * batch_size
    size = world_size * batch_size
    whole = EpochOrder(samples, sizes, seed, 2)
    expected, real = whole.take(start, size), min(samples - start, size)
    alone, kept = EpochOrder(samples, sizes, seed, 2).part(start, Share(0, 1, size))
    assert kept == real
    assert sorted(alone[:real]) == sorted(expected[:real])
    assert sorted(alone) == sorted(expected)
    # Each worker has an order of its own, which begins in mid-epoch.
    shares = [Share(rank, world_size, batch_size) for rank in range(world_size)]
    parts = [EpochOrder(samples, sizes, seed, 2).part(start, share) for share in shares]
    assert {len(batch) for batch, _ in parts} == {batch_size}
    assert sorted(np.concatenate([batch[:mine] for batch, mine in parts])) == sorted(expected[:real])
    assert sorted(np.concatenate([batch for batch, _ in parts])) == sorted(expected)
    if sizes.streams == 1:
        assert np.array_equal(np.concatenate([batch for batch, _ in parts]), expected)
    if real == size:
        assert np.array_equal(np.concatenate([batch for batch, _ in parts]), alone)


@settings(max_examples=200)
@given(
    samples=st.integers(1, 300),
    sizes=SIZES,
    batch_size=st.integers(1, 40),
    world_sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    remainder=REMAINDERS,
)
def test_workers_together_take_each_sample_once_whoever_they_are(
    *, samples, sizes, batch_size, world_sizes, steps, remainder
) -> None:
    """The number of workers changes after some steps, and the last ones finish the epoch."""
    batches = batch_count(samples, batch_size, remainder)
    taken, place = [], 0
    order = EpochOrder(samples, sizes, 5, 0)
    for turn, world_size in enumerate(world_sizes):
        left = step_count(batches, world_size, remainder, place)
        go = left if turn == len(world_sizes) - 1 else min(left, steps[turn])
        for step in range(go):
            for rank in range(world_size):
                share = Share(rank, world_size, batch_size)
                batch, real = order.part((place + step * world_size) * batch_size, share)
                taken += batch[:real].tolist()
        place = min(place + go * world_size, batches)
    if remainder == "pad":
        assert sorted(taken) == list(range(samples))
        assert place == batches
    else:
        assert sorted(taken) == sorted(order.take(0, place * batch_size))
        assert batches - place < world_sizes[-1]


@pytest.mark.parametrize(("world_size", "most"), [(2, 32), (3, 24), (4, 16), (8, 9)])
@pytest.mark.parametrize("batch_size", [8, 24, 32, 64, 100, 256, 1000])
def test_a_worker_takes_from_few_streams(world_size: int, most: int, batch_size: int) -> None:
    samples = 64 * 1000 + 13
    order = EpochOrder(samples, Sizes(8, 4, 16, 64, 16), 0, 0)
    homes = np.searchsorted(order.bounds, np.arange(samples), side="right") - 1
    for rank in range(world_size):
        share = Share(rank, world_size, batch_size)
        starts = range(0, samples, share.step)
        batches = [order.part(start, share)[0] for start in starts]
        touched = set(homes[np.concatenate(batches[:-1])].tolist())
        assert touched <= set(order.streams_cut(0, share.step, *share.bounds).tolist())
        assert len(order.streams_cut(0, share.step, *share.bounds)) <= most
        # The samples that fill the last step are others than those that would follow.
        assert len(touched | set(homes[batches[-1]].tolist())) <= most + 2
