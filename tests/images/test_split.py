"""Splits against the same rules in plain Python with exact fractions, and the laws that they promise."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.images import split
from tasks.images.split import SPLITS, TEST, TRAIN, VALIDATION, split_images
from tasks.io.errors import ConfigError
from tasks.io.hashing import stable_hash

Row = tuple[int, int, int]  # key, class, group
Shares = tuple[float, float]

SHARES: list[Shares] = [(0.2, 0.0), (0.0, 0.2), (0.15, 0.15), (0.1, 0.1), (0.2, 0.1), (0.33, 0.33), (0.6, 0.3)]
some_shares = st.sampled_from(SHARES) | st.tuples(st.integers(0, 49), st.integers(0, 49)).map(
    lambda percent: (percent[0] / 100, percent[1] / 100)
)
keys_drawn = st.integers(0, 2**64 - 1) | st.integers(0, 300)


@st.composite
def single_rows(draw: st.DrawFn) -> list[Row]:
    """Images of one group each, of classes of any sizes, of much the same size, or of one image mostly."""
    size = draw(st.integers(1, 31))
    some_sizes = st.integers(1, 31) | st.integers(size, size + 1) | st.integers(1, 3)
    sizes = draw(st.lists(some_sizes, max_size=10) | st.lists(st.just(size), max_size=10))
    keys = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 2**64, sum(sizes), dtype=np.uint64)
    classes = [c for c, count in enumerate(sizes) for _ in range(count)]
    return [(int(key), c, group) for group, (key, c) in enumerate(zip(keys, classes, strict=True))]


@st.composite
def grouped_rows(draw: st.DrawFn) -> list[Row]:
    """Images of which some share a group, within a class or across classes."""
    keys = draw(st.lists(keys_drawn, unique=True, max_size=50))
    classes, groups = draw(st.integers(1, 5)), draw(st.integers(1, 60))
    rows = [(key, draw(st.integers(0, classes - 1)), draw(st.integers(0, groups))) for key in keys]
    if draw(st.booleans()):  # groups of one class each, as copies of pictures mostly are
        rows = [(key, group % classes, group) for key, _, group in rows]
    return rows


def splits_of(rows: list[Row], shares: Shares) -> list[int]:
    keys, classes, groups = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    result = split_images(np.array(keys, dtype=np.uint64), np.array(classes, int), np.array(groups, int), *shares)
    assert result.dtype == np.int8
    assert result.shape == (len(rows),)
    return [int(s) for s in result]


# The rules again


def seats(wanted: dict[int, Fraction], low: dict[int, int], high: dict[int, int], total: int, tie: dict[int, int]):
    """Low numbers, raised for the largest remainders until the total is reached."""
    given_out = dict(low)
    for c in sorted(wanted, key=lambda c: (low[c] - wanted[c], tie[c])):
        if sum(given_out.values()) < total and low[c] < high[c]:
            given_out[c] += 1
    return given_out


def plain_split(rows: list[Row], shares: Shares) -> list[int]:
    validation_share, test_share = (Fraction(str(share)) for share in shares)
    held_out = validation_share + test_share
    members: dict[int, list[int]] = defaultdict(list)
    for row, (_, _, group) in enumerate(rows):
        members[group].append(row)
    images, smallest, groups_of = Counter(c for _, c, _ in rows), {}, defaultdict(set)
    for key, c, group in rows:
        smallest[c] = min(smallest.get(c, key), key)
        groups_of[c].add(group)
    if not rows or not held_out:
        return [TRAIN] * len(rows)

    many = [c for c in images if len(groups_of[c]) > 1]
    wanted = {c: images[c] * held_out for c in many}
    low = {c: floor(wanted[c]) for c in many}
    high = {c: min(ceil(wanted[c]), images[c] - 1) for c in many}
    taken = seats(wanted, low, high, ceil(sum(wanted.values()) - Fraction(1, 2)), smallest)
    wanted = {c: images[c] * validation_share for c in many}
    tests = {c: images[c] * test_share for c in many}
    low = {c: max(floor(wanted[c]), taken[c] - ceil(tests[c])) for c in many}
    high = {c: min(ceil(wanted[c]), taken[c] - floor(tests[c])) for c in many}
    total = floor(sum(taken.values()) * validation_share / held_out + Fraction(1, 2))
    validation = seats(wanted, low, high, total, smallest)
    room = {
        (s, c): {TRAIN: images[c] - taken.get(c, 0), VALIDATION: validation.get(c, 0)}.get(
            s, taken.get(c, 0) - validation.get(c, 0)
        )
        for c in images
        for s in range(3)
    }

    home: dict[int, int] = {}
    larger = [group for group, its in members.items() if len(its) > 1]
    for group in sorted(larger, key=lambda g: (-len(members[g]), min(rows[row][0] for row in members[g]))):
        count = Counter(rows[row][1] for row in members[group])
        chance = int(stable_hash(pa.array([min(rows[row][0] for row in members[group])], pa.uint64()))[0]) / 2**64
        home[group] = VALIDATION if chance < validation_share else TEST if chance < held_out else TRAIN
        if any(room[home[group], c] < n for c, n in count.items()):
            allowed = [TRAIN] + [VALIDATION] * (validation_share > 0) + [TEST] * (test_share > 0)
            excess = {s: sum(max(0, n - room[s, c]) for c, n in count.items()) for s in allowed}
            home[group] = min(allowed, key=lambda s, excess=excess: (excess[s], s))
        for c in count:
            if all(home.get(other) in (VALIDATION, TEST) for other in groups_of[c] - {group}):
                home[group] = TRAIN
        for c, n in count.items():
            room[home[group], c] -= n
    for c in images:
        single = sorted((rows[row][0], g) for g in groups_of[c] if len(members[g]) == 1 for row in members[g])
        most = len(single) - all(home.get(g) != TRAIN for g in groups_of[c])
        front = min(max(room[VALIDATION, c], 0), most)
        back = min(max(room[TEST, c], 0), most - front)
        for place, (_, g) in enumerate(single):
            home[g] = VALIDATION if place < front else TEST if place >= len(single) - back else TRAIN
    return [home[group] for _, _, group in rows]


@settings(max_examples=300)
@given(rows=grouped_rows(), shares=some_shares)
def test_the_split_follows_its_rules(rows: list[Row], shares: Shares) -> None:
    assert splits_of(rows, shares) == plain_split(rows, shares)


@settings(max_examples=150)
@given(rows=single_rows(), shares=some_shares)
def test_the_split_of_single_images_follows_its_rules(rows: list[Row], shares: Shares) -> None:
    assert splits_of(rows, shares) == plain_split(rows, shares)


# What they promise


@settings(max_examples=200)
@given(rows=grouped_rows(), shares=some_shares, data=st.data())
def test_neither_order_nor_labels_matter(rows: list[Row], shares: Shares, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    numbers = st.integers(-(2**63), 2**63 - 1)
    class_names = data.draw(st.lists(numbers, min_size=61, max_size=61, unique=True))
    group_names = data.draw(st.lists(numbers, min_size=61, max_size=61, unique=True))
    renamed = [(rows[i][0], class_names[rows[i][1]], group_names[rows[i][2]]) for i in order]
    whole = splits_of(rows, shares)
    assert splits_of(renamed, shares) == [whole[i] for i in order]


@settings(max_examples=200)
@given(rows=grouped_rows(), shares=some_shares)
def test_no_group_is_in_two_splits(rows: list[Row], shares: Shares) -> None:
    homes: dict[int, int] = {}
    for (_, _, group), s in zip(rows, splits_of(rows, shares), strict=True):
        assert homes.setdefault(group, s) == s


@settings(max_examples=200)
@given(rows=grouped_rows(), shares=some_shares)
def test_every_class_is_in_train_and_a_split_without_a_share_is_empty(rows: list[Row], shares: Shares) -> None:
    splits = splits_of(rows, shares)
    assert {c for (_, c, _), s in zip(rows, splits, strict=True) if s == TRAIN} == {c for _, c, _ in rows}
    assert all(share or s not in splits for s, share in ((VALIDATION, shares[0]), (TEST, shares[1])))


@settings(max_examples=200)
@given(rows=single_rows(), shares=some_shares)
def test_each_class_is_within_one_image_of_its_shares(rows: list[Row], shares: Shares) -> None:
    splits = splits_of(rows, shares)
    counts = Counter((c, s) for (_, c, _), s in zip(rows, splits, strict=True))
    for c, images in Counter(c for _, c, _ in rows).items():
        for s, share in enumerate((1 - sum(shares), *shares)):
            if images > 1:
                assert abs(counts[c, s] - images * share) < 1 + 1e-9
            else:
                assert counts[c, s] == (s == TRAIN)


@settings(max_examples=200)
@given(rows=single_rows(), shares=some_shares.filter(lambda shares: sum(shares) <= 0.5))
def test_all_classes_together_are_within_one_image_of_their_shares(rows: list[Row], shares: Shares) -> None:
    images = Counter(c for _, c, _ in rows)
    splits = [s for (_, c, _), s in zip(rows, splits_of(rows, shares), strict=True) if images[c] > 1]
    for s, share in ((VALIDATION, shares[0]), (TEST, shares[1])):
        assert abs(splits.count(s) - len(splits) * share) < 1 + 1e-9
    assert abs(splits.count(TRAIN) - len(splits) * (1 - sum(shares))) <= 0.5 + 1e-9


@settings(max_examples=100)
@given(sizes=st.lists(st.integers(2, 8), max_size=5), seed=st.integers(0, 2**32), shares=some_shares)
def test_single_images_fill_the_gaps_that_groups_leave(sizes: list[int], seed: int, shares: Shares) -> None:
    """The groups of each class are few enough to fit into any split; counts are then those without groups."""
    draw = np.random.default_rng(seed)
    groups = np.concatenate([np.repeat(np.arange(len(sizes)), sizes).astype(int), np.arange(1000, 2000)])
    classes = np.concatenate([draw.integers(0, 3, sum(sizes)), np.arange(1000) % 3])
    keys = draw.integers(0, 2**64, len(groups), dtype=np.uint64)
    grouped = split_images(keys, classes, groups, *shares)
    for c in range(3):
        images = np.count_nonzero(classes == c)
        for s, share in enumerate((1 - sum(shares), *shares)):
            # Where a share is smaller than the groups, they went elsewhere.
            assert abs(np.count_nonzero(grouped[classes == c] == s) - images * share) < 1 + 1e-9


@settings(max_examples=150)
@given(rows=single_rows(), shares=some_shares, data=st.data())
def test_an_image_more_or_less_moves_few_others(rows: list[Row], shares: Shares, data: st.DataObject) -> None:
    whole = splits_of(rows, shares)
    for gone in data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=5)) if rows else []:
        others = whole[:gone] + whole[gone + 1 :]
        moves = [
            (before, after)
            for before, after in zip(others, splits_of(rows[:gone] + rows[gone + 1 :], shares), strict=True)
            if before != after
        ]
        assert len(moves) <= (8 if all(shares) else 2)
        assert all(TRAIN in move for move in moves)


def test_an_image_more_or_less_moves_few_groups() -> None:
    draw = np.random.default_rng(11)
    count = 6000
    keys, classes = draw.integers(0, 2**64, count, dtype=np.uint64), draw.integers(0, 10, count)
    groups = np.where(draw.random(count) < 0.5, draw.integers(0, 1000, count), np.arange(1000, 1000 + count))
    whole = split_images(keys, classes, groups, 0.2, 0.1)
    moved = []
    for gone in draw.choice(count, 30, replace=False):
        rest = np.arange(count) != gone
        without = split_images(keys[rest], classes[rest], groups[rest], 0.2, 0.1)
        moved.append(np.count_nonzero(whole[rest] != without))
    assert np.mean(moved) < 5
    assert max(moved) < 40


def test_groups_of_all_sizes_come_into_each_split() -> None:
    """Patients with many images aren't kept for train: each split has its share of them."""
    draw = np.random.default_rng(3)
    sizes = np.concatenate([np.full(300, 2), np.full(300, 10)])
    groups = np.repeat(np.arange(600), sizes)
    splits = split_images(draw.integers(0, 2**64, len(groups), dtype=np.uint64), groups % 3, groups, 0.2, 0.2)
    of_group = splits[np.cumsum(sizes) - 1]
    for s, share in enumerate((0.6, 0.2, 0.2)):
        assert abs(np.count_nonzero(of_group[300:] == s) / 300 - share) < 0.08
        assert abs(np.count_nonzero(splits == s) / len(splits) - share) < 0.003


def test_many_small_classes_give_their_share_together() -> None:
    """A fifth of two images is less than half an image; rounded class by class, nothing would be left to validate."""
    keys = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    splits = split_images(keys, np.arange(2000) // 2, np.arange(2000), 0.2, 0.0)
    assert np.count_nonzero(splits == VALIDATION) == 400
    assert np.bincount(np.arange(2000)[splits == VALIDATION] // 2).max() == 1


def test_equal_remainders_are_told_apart_by_the_smallest_key() -> None:
    """Classes of 2 and of 7 images have 0.4 left of a fifth; 0.4 and 1.4 - 1 differ as floats."""
    classes = np.repeat([0, 1, 2, 3], [2, 7, 2, 7])
    keys = np.arange(18, dtype=np.uint64)
    for first in range(4):
        turned = np.where(classes == first, keys, keys + np.uint64(100))
        splits = split_images(turned, classes, np.arange(18), 0.2, 0.0)
        held_out = np.bincount(classes[splits == VALIDATION], minlength=4) - np.array([0, 1, 0, 1])
        assert held_out.sum() == 2  # 18 / 5 - 2 is 1.6
        assert held_out[first] == 1


def test_a_class_whose_groups_fit_nowhere_exceeds_as_little_as_it_can() -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, 10, dtype=np.uint64)
    groups = np.repeat([0, 1], 5)
    assert split_images(keys, np.zeros(10, int), groups, 0.2, 0.0).tolist() == [TRAIN] * 10
    halves = split_images(keys, np.zeros(10, int), groups, 0.5, 0.0)
    assert sorted(halves[::5].tolist()) == [TRAIN, VALIDATION]


@pytest.mark.parametrize("shares", SHARES)
def test_copies_in_two_classes_count_for_both(shares: Shares) -> None:
    """Each group is a picture that two people labelled differently."""
    keys = np.random.default_rng(2).integers(0, 2**64, 400, dtype=np.uint64)
    classes, groups = np.arange(400) % 2, np.arange(400) // 2
    splits = split_images(keys, classes, groups, *shares)
    assert np.array_equal(splits[::2], splits[1::2])
    for s, share in enumerate((1 - sum(shares), *shares)):
        assert abs(np.count_nonzero(splits == s) - 400 * share) <= 2


@pytest.mark.parametrize("seed", range(20))
def test_the_last_group_of_a_class_goes_to_train(seed: int) -> None:
    """Class 1 has two images, each in a group of class 0, whose room in train a larger group has taken."""
    keys = np.random.default_rng(seed).integers(0, 2**64, 32, dtype=np.uint64)
    groups = np.repeat([0, 1, 2], [20, 6, 6])
    classes = np.zeros(32, int)
    classes[[20, 26]] = 1
    splits = split_images(keys, classes, groups, 0.5, 0.0)
    assert sorted(splits[[20, 26]].tolist()) == [TRAIN, VALIDATION]


@pytest.mark.parametrize("seed", range(10))
def test_a_split_without_a_share_stays_empty_though_all_others_are_full(seed: int) -> None:
    """Class 0 is full in train, class 1 in validation; to group 3, which has both, test would seem the least full."""
    groups = np.repeat([0, 1, 2, 3, 4, 5], [30, 25, 20, 2, 1, 1])
    classes = np.repeat([2, 1, 2, 0, 0, 1, 0, 1], [30, 20, 5, 20, 1, 1, 1, 1])
    keys = np.random.default_rng(seed).integers(0, 2**64, 79, dtype=np.uint64)
    assert TEST not in split_images(keys, classes, groups, 0.5, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_class_without_a_larger_group_in_train_keeps_a_single_image_there(seed: int) -> None:
    """Class 1 has four images in a group, for which only validation or test has room, and one by itself."""
    groups = np.concatenate([np.repeat([0, 1], [60, 24]), np.arange(2, 23)])
    classes = np.repeat([0, 1, 0, 1], [60, 4, 40, 1])
    keys = np.random.default_rng(seed).integers(0, 2**64, 105, dtype=np.uint64)
    splits = split_images(keys, classes, groups, 0.3, 0.3)
    assert splits[60] in (VALIDATION, TEST)
    assert splits[104] == TRAIN


@pytest.mark.parametrize("size", range(2, 14))
@pytest.mark.parametrize("shares", SHARES)
def test_classes_of_one_size(size: int, shares: Shares) -> None:
    """All have the same remainder, and only some are rounded up."""
    for classes in range(1, 9):
        keys = np.random.default_rng(classes).integers(0, 2**64, classes * size, dtype=np.uint64).tolist()
        rows = [(key, group % classes, group) for group, key in enumerate(keys)]
        assert splits_of(rows, shares) == plain_split(rows, shares)


@pytest.mark.parametrize(("sizes", "shares"), [([24], (0.3, 0.1)), ([31, 23, 11], (0.15, 0.15)), ([30], (0.1, 0.1))])
def test_halves_are_halves_whatever_the_floats_say(sizes: list[int], shares: Shares) -> None:
    rows = [(7919 * group % 101, c, group) for group, c in enumerate(np.repeat(range(len(sizes)), sizes).tolist())]
    assert splits_of(rows, shares) == plain_split(rows, shares)


def test_the_table_of_the_rules_is_true() -> None:
    doc = split.__doc__ or ""
    sizes = [int(size) for size in re.findall(r"\d+", doc.split("images of a single class")[1].split("\n")[0])]
    found = re.findall(r"\| train, validation, test at ([\d., ]+) \|(.*)\|\n", doc)
    assert len(found) == 2
    for shares, cells in found:
        _, validation_share, test_share = (float(share) for share in shares.split(","))
        for size, cell in zip(sizes, cells.split("|"), strict=True):
            rows = [(key * 7919 % 101, 0, key) for key in range(size)]
            counts = Counter(splits_of(rows, (validation_share, test_share)))
            assert [counts[s] for s in range(3)] == [int(n) for n in cell.split(",")], (shares, size)


def test_a_split_never_changes() -> None:
    """Golden: images of a published version must not change sides in the next."""
    rows = [(key * 0x9E3779B97F4A7C15 % 2**64, key % 3, key // 2 if key < 12 else key) for key in range(30)]
    letters = "".join(SPLITS[s][0] if s != TEST else "T" for s in splits_of(rows, (0.2, 0.15)))
    assert letters == "TTtttttttttttvtvttvttTtvttvtvT"


def test_nothing_is_split_into_nothing() -> None:
    assert splits_of([], (0.2, 0.1)) == []
    assert splits_of([(5, 3, 1)], (0.9, 0.0)) == [TRAIN]
    assert splits_of([(key, key, key) for key in range(50)], (0.3, 0.3)) == [TRAIN] * 50  # one image a class
    assert splits_of([(key, key % 2, 7) for key in range(50)], (0.3, 0.3)) == [TRAIN] * 50  # one group


@pytest.mark.parametrize("share", [1e-12, 1e-3, 0.999])
def test_extreme_shares(share: float) -> None:
    rows = [(key * 7919 % 10007, key % 4, key) for key in range(4000)]
    counts = Counter(splits_of(rows, (share, 0.0)))
    assert abs(counts[VALIDATION] - 4000 * share) <= 0.5 + 1e-6
    assert splits_of(rows, (0.0, 0.0)) == [TRAIN] * 4000


@pytest.mark.parametrize("shares", [(-0.1, 0.0), (0.0, -0.1), (0.5, 0.5), (1.0, 0.0), (0.9, 0.3), (float("nan"), 0.1)])
def test_shares_that_leave_no_train_are_refused(shares: Shares) -> None:
    with pytest.raises(ConfigError, match="leave nothing to train on, or are no shares; give two numbers"):
        splits_of([(1, 0, 0)], shares)
