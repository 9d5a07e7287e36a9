"""Train, validation and test: each image is in one, and so are all images of its group.

Number of images of each class in a split:

- A class of one group is wholly train's: otherwise it couldn't be learned. The other rules are for the other classes.
- Each class gives the floor or the ceiling of its share to validation and test together, and keeps at least one image.
  The largest remainders are rounded up, as many as make the sum over all classes right to half an image; a half goes
  to train. So of 1,000 classes of 2 images, a share of 0.2 takes one image from each of 400.
- These images are divided between validation and test in the same way; a half goes to validation.
- Equal remainders are ordered by the smallest key of their class.

Each split is thus within one image of its share of each class, and also of its share of all (unless so little is left
for train that many classes must keep more than their share).

| images of a single class | 1 | 2 | 3 | 4 | 5 | 8 |
|---|---|---|---|---|---|---|
| train, validation, test at 0.8, 0.2, 0 | 1, 0, 0 | 2, 0, 0 | 2, 1, 0 | 3, 1, 0 | 4, 1, 0 | 6, 2, 0 |
| train, validation, test at 0.7, 0.15, 0.15 | 1, 0, 0 | 1, 1, 0 | 2, 1, 0 | 3, 1, 0 | 4, 1, 0 | 6, 1, 1 |

Choice of the images: groups of several images come first, the largest before the others, and of equal ones that with
the smallest key. Each draws a split by its smallest key, the shares being the probabilities, and gets it if there is
room for it in each of its classes; else it goes where it exceeds the room least, and first to train. The last group of
a class goes to train if no other did. Then the single images of each class are ordered by their keys: the first ones
fill the room of validation, the last ones that of test, and all between are train's.

So the counts are as above if single images are enough to fill the gaps that groups leave. And one image more or
less moves few others (of single images 2 at most in two splits and 8 in three), none from validation to test or back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tasks.io.errors import ConfigError
from tasks.io.hashing import stable_hash
from tasks.io.tensors import BoolArray, Float64Array, Int8Array, Int64Array, UInt64Array

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)

_DIGITS = 9  # decimals of a quota that count: 0.1 × 30 is 3, despite floating point


def split_images(
    keys: UInt64Array, classes: Int64Array, groups: Int64Array, validation_share: float, test_share: float
) -> Int8Array:
    """Return the split of each image, as an index into `SPLITS`; shape (n,).

    A pure function of the set of images: neither their order nor the numbers of classes and groups matter.

    Args:
        keys: uniform hash of each image's id and the seed, distinct; shape (n,).
        classes: class of each image, any number; shape (n,).
        groups: group of each image, any number; images of a group share a split. Shape (n,).
        validation_share: share of the images for validation.
        test_share: share of the images for test.

    Raises:
        ConfigError: shares below 0, or of 1 and more together.
    """
    assert len(keys) == len(classes) == len(groups), "each image has a key, a class and a group"
    shares = np.round(np.array([1 - validation_share - test_share, validation_share, test_share]), _DIGITS)
    if not (validation_share >= 0 and test_share >= 0 and shares[TRAIN] > 0):
        raise ConfigError(
            f"validation_share = {validation_share:g} and test_share = {test_share:g} leave nothing to train on, or "
            "are no shares; give two numbers from 0 on that sum up to less than 1"
        )
    splits = np.full(len(keys), TRAIN, dtype=np.int8)
    if not len(keys) or shares[TRAIN] == 1:
        return splits
    class_of = np.searchsorted(np.unique(classes), classes)
    _, group_of, size = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.lexsort((keys, class_of))
    images = np.bincount(class_of)
    smallest = keys[order[np.cumsum(images) - images]]
    is_alone = size[group_of] == 1
    alone = np.bincount(class_of[is_alone], minlength=len(images))

    multiple = np.flatnonzero(~is_alone)
    larger = _larger_groups(keys[multiple], class_of[multiple], group_of[multiple], shares)
    left = alone + np.bincount(larger.class_of, minlength=len(images))  # groups of each class
    room = _rooms(images, left > 1, smallest, shares)
    split_of_group, in_train = _place(larger, room, left, [split for split in range(3) if shares[split]])
    splits[multiple] = split_of_group[np.searchsorted(larger.labels, group_of[multiple])]

    # The single images of each class, in the order of their keys.
    single = order[is_alone[order]]
    owner = class_of[single]
    rank = np.arange(len(single)) - (np.cumsum(alone) - alone)[owner]
    most = alone - ~in_train  # one must stay for train if no group is in it
    front = np.clip(room[VALIDATION], 0, most)
    back = np.clip(room[TEST], 0, most - front)
    splits[single[rank < front[owner]]] = VALIDATION
    splits[single[rank >= (alone - back)[owner]]] = TEST
    return splits


@dataclass(frozen=True, slots=True, kw_only=True)
class _LargerGroups:
    """Groups of several images.

    labels: ascending. order: of their placement. drawn: split that each draws. starts, class_of, count: group i
    has count[j] images of class class_of[j] for each j from starts[i] to starts[i + 1].
    """

    labels: Int64Array
    order: Int64Array
    drawn: Int8Array
    starts: Int64Array
    class_of: Int64Array
    count: Int64Array


def _larger_groups(
    keys: UInt64Array, class_of: Int64Array, group_of: Int64Array, shares: Float64Array
) -> _LargerGroups:
    order = np.lexsort((class_of, group_of))
    group_of, class_of = group_of[order], class_of[order]
    is_start = np.diff(group_of, prepend=-1) != 0
    is_run = is_start | (np.diff(class_of, prepend=-1) != 0)
    first, run = np.flatnonzero(is_start), np.flatnonzero(is_run)
    smallest = np.minimum.reduceat(keys[order], first) if len(first) else keys[:0]
    size = np.diff(first, append=len(order))
    # A smallest key isn't uniform, its hash is.
    chance = stable_hash(pa.array(smallest)) / 2.0**64
    held_out = shares[VALIDATION] + shares[TEST]
    drawn = np.select([chance < shares[VALIDATION], chance < held_out], [VALIDATION, TEST], TRAIN)
    return _LargerGroups(
        labels=group_of[first],
        order=np.lexsort((smallest, -size)),
        drawn=drawn.astype(np.int8),
        starts=np.append(np.searchsorted(run, first), len(run)),
        class_of=class_of[run],
        count=np.diff(run, append=len(order)),
    )


def _rooms(images: Int64Array, is_splittable: BoolArray, smallest: UInt64Array, shares: Float64Array) -> Int64Array:
    """Return the target number of images of each class in each split; shape (3, classes)."""
    quota = np.where(is_splittable, np.round(shares[:, None] * images, _DIGITS), 0)
    held_out = np.round(quota[VALIDATION] + quota[TEST], _DIGITS)
    floor, ceiling = np.floor(quota), np.ceil(quota)
    taken = _rounded(
        held_out,
        np.floor(held_out),
        np.minimum(np.ceil(held_out), images - 1),
        np.ceil(np.round(held_out.sum(), 6) - 0.5),
        smallest,
    )
    part = shares[VALIDATION] / (shares[VALIDATION] + shares[TEST])
    validation = _rounded(
        quota[VALIDATION],
        np.maximum(floor[VALIDATION], taken - ceiling[TEST]),
        np.minimum(ceiling[VALIDATION], taken - floor[TEST]),
        np.floor(np.round(taken.sum() * part, 6) + 0.5),
        smallest,
    )
    return np.stack([images - taken, validation, taken - validation]).astype(np.int64)


def _rounded(
    quota: Float64Array, low: Float64Array, high: Float64Array, total: float, smallest: UInt64Array
) -> Float64Array:
    """Return each class's low or high number, high for the largest remainders: as many as the total requires."""
    open_classes = np.flatnonzero(high > low)
    remainder = np.round(quota - low, _DIGITS)
    order = open_classes[np.lexsort((smallest[open_classes], -remainder[open_classes]))]
    rounded = low.copy()
    rounded[order[: max(int(total - low.sum()), 0)]] += 1
    return rounded


def _place(groups: _LargerGroups, room: Int64Array, left: Int64Array, splits: list[int]) -> tuple[Int8Array, BoolArray]:
    """Return each larger group's split, and a mask of classes with one in train; reduce the room by their images."""
    rooms, remaining = room.tolist(), left.tolist()
    in_train = [False] * len(remaining)
    starts, class_of, count = groups.starts.tolist(), groups.class_of.tolist(), groups.count.tolist()
    placed = groups.drawn.tolist()
    for group in groups.order.tolist():
        members = range(starts[group], starts[group + 1])
        split = placed[group]
        for j in members:
            if remaining[class_of[j]] == 1 and not in_train[class_of[j]]:
                split = TRAIN
                break
        else:
            for j in members:
                if rooms[split][class_of[j]] < count[j]:
                    split = min(splits, key=lambda s: sum(max(0, count[j] - rooms[s][class_of[j]]) for j in members))
                    break
        placed[group] = split
        for j in members:
            rooms[split][class_of[j]] -= count[j]
            remaining[class_of[j]] -= 1
            in_train[class_of[j]] |= split == TRAIN
    room[:] = rooms
    return np.array(placed, dtype=np.int8), np.array(in_train, dtype=np.bool_)
