from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.delivery.order import EpochOrder, Sizes, batch_count, class_runs, mean_displacement, step_count

SIZES = st.builds(
    Sizes,
    chunk=st.sampled_from([1, 2, 8, 16]),
    window=st.sampled_from([1, 2, 4, 16]),
    region=st.sampled_from([16, 32]),
)
SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("sample_bytes", "chunk", "window", "region"),
    [
        (24, 256, 256, 1 << 17),  # a narrow table
        (96, 256, 256, 1 << 15),  # 20 features, label and id
        (4 << 10, 256, 64, 1 << 10),  # a wide one: 1 MiB a chunk
        (150_544, 8, 64, 512),  # an image of 224 × 224
        (20 << 20, 8, 64, 64),  # samples so large that a region is a window
    ],
)
def test_sizes_follow_the_bytes_of_a_sample(sample_bytes: int, chunk: int, window: int, region: int) -> None:
    assert Sizes.of(sample_bytes) == Sizes(chunk, window, region)


@settings(deadline=None)  # the first example compiles
@given(samples=st.integers(1, 500), sizes=SIZES, seed=SEEDS, epoch=st.integers(0, 2**40), shuffled=st.booleans())
def test_an_epoch_has_each_sample_once_and_windows_have_whole_chunks(samples, sizes, seed, epoch, shuffled) -> None:
    order = EpochOrder(samples, sizes, seed, epoch, shuffled)
    found = order.take(0, samples)
    assert np.array_equal(np.sort(found), np.arange(samples))
    for window in {order.window_at(position) for position in range(samples)}:
        here = [position for position in range(samples) if order.window_at(position) == window]
        firsts = order.chunks_from(window, sizes.window)
        assert {sample // sizes.chunk * sizes.chunk for sample in found[here].tolist()} == set(firsts.tolist())
    if not shuffled:
        assert np.array_equal(found, np.arange(samples))


@settings(deadline=None)
@given(samples=st.integers(1, 300), sizes=SIZES, seed=SEEDS, start=st.integers(0, 900), count=st.integers(0, 700))
def test_any_piece_is_the_same_as_in_the_whole_and_begins_anew_at_the_end(samples, sizes, seed, start, count) -> None:
    whole = EpochOrder(samples, sizes, seed, 3).take(0, samples)
    piece = EpochOrder(samples, sizes, seed, 3).take(start, count)
    assert np.array_equal(piece, whole[(start + np.arange(count)) % samples])


def test_the_order_is_what_it_was_when_this_test_was_written() -> None:
    # States of streams live for months: another order needs another number in `ORDER`.
    assert EpochOrder(12, Sizes(2, 2, 4), seed=7, epoch=1).take(0, 12).tolist() == [
        6,
        5,
        7,
        4,
        1,
        0,
        3,
        2,
        10,
        11,
        8,
        9,
    ]


def test_seeds_and_epochs_give_different_orders() -> None:
    sizes = Sizes(8, 4, 16)
    orders = {tuple(EpochOrder(1000, sizes, seed, epoch).take(0, 1000)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_memory_is_that_of_windows_and_of_the_order_of_chunks() -> None:
    order = EpochOrder(1 << 30, Sizes.of(96), 0, 0)
    for position in range(0, 1 << 30, 1 << 25):
        order.take(position, 100)
    held = sum(window.nbytes for window in order._kept.values()) + order._chunks.nbytes
    assert held < 40 << 20  # the whole permutation takes 8 GiB


def test_every_sample_comes_to_every_place() -> None:
    sizes, samples, epochs = Sizes(4, 4, 8), 32, 4000
    counts = np.zeros((samples, samples))
    for epoch in range(epochs):
        counts[np.arange(samples), EpochOrder(samples, sizes, 0, epoch).take(0, samples)] += 1
    # Each cell is binomial; of 1,024 of them the farthest is some 3.5 standard deviations away.
    expected = epochs / samples
    assert np.abs(counts - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize(
    ("sizes", "near"),
    [
        (Sizes(256, 256, 1 << 15), 0.01),  # a table below 1 GiB, one region
        (Sizes(8, 64, 512), 0.15),  # images in 16 regions
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


@given(
    samples=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    world_sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    remainder=st.sampled_from(["pad", "drop"]),
)
@settings(deadline=None, max_examples=300)
def test_workers_together_take_each_batch_once_whoever_they_are(
    samples, batch_size, world_sizes, steps, remainder
) -> None:
    """The number of workers changes after some steps, and the last ones finish the epoch."""
    batches = batch_count(samples, batch_size, remainder)
    taken, place = [], 0
    for turn, world_size in enumerate(world_sizes):
        left = step_count(batches, world_size, remainder, place)
        go = left if turn == len(world_sizes) - 1 else min(left, steps[turn])
        taken += [place + step * world_size + rank for step in range(go) for rank in range(world_size)]
        place = min(place + go * world_size, batches)
    if remainder == "pad":
        assert taken[:batches] == list(range(batches))
        assert len(taken) - batches < max(world_sizes)
        assert place == batches
    else:
        assert taken == list(range(len(taken)))
        assert batches - len(taken) < world_sizes[-1]
