"""Draws depend on (seed, id, variant) alone, and are distributed as torchvision's own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.images.config import Augmentation
from tasks.images.draws import Draws, draw, image_keys, policy_seeds

MANY = 20_000
SMALLEST_P = 1e-3


def rows(draws: Draws) -> list[tuple[bytes, ...]]:
    """Each variant's parameters, as bytes."""
    columns = [getattr(draws, field.name) for field in dataclasses.fields(draws)]
    return [tuple(column[row].tobytes() for column in columns) for row in range(len(draws.flip))]


def drawn(ids: list[str], sizes: list[tuple[int, int]], augmentation: Augmentation, seed: int = 0) -> Draws:
    heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return draw(image_keys(ids, seed), heights, widths, augmentation)


def many(count: int, size: tuple[int, int] = (480, 640), **bounds: Any) -> Draws:
    """Draws of so many images of one size, a variant each."""
    return drawn([f"image-{i}" for i in range(count)], [size] * count, Augmentation(variants=1, **bounds))


sizes_of_images = st.tuples(
    st.one_of(st.sampled_from([1, 2, 65_000]), st.integers(1, 2_000)),
    st.one_of(st.sampled_from([1, 2, 65_000]), st.integers(1, 2_000)),
)


def test_pinned() -> None:
    """Published versions were drawn with these numbers: they may change only knowingly, with the version's recipe."""
    keys = image_keys(["img-000000", "naïve/café"], 7)
    assert keys.tolist() == [0xCBB27C164A8E8283, 0xB76EF7A4C660BEA4]
    draws = draw(keys, np.array([480, 1]), np.array([640, 65_000]), Augmentation(variants=2))
    assert draws.crop.tolist() == [[67, 71, 413, 517], [14, 203, 445, 426], [0, 32499, 1, 1], [0, 32499, 1, 1]]
    assert draws.flip.tolist() == [True, True, True, False]
    assert draws.order.tolist() == [[0, 3, 2, 1], [2, 0, 1, 3], [0, 2, 1, 3], [1, 2, 0, 3]]
    np.testing.assert_array_equal(draws.angle, np.float32([9.219853, -2.3844528, -4.6312423, 8.829339]))
    np.testing.assert_array_equal(draws.jitter[0], np.float32([0.83712596, 0.9707297, 0.90458196, -0.063440584]))
    np.testing.assert_array_equal(draws.jitter[3], np.float32([1.0413121, 0.9958952, 0.88803804, 0.08575242]))
    assert policy_seeds(keys, 2).tolist() == [
        0x79F5CC2BC70F3D33,
        0x189249C43E258C93,
        0xBDFC34B4950B73C7,
        0x94BD4D063B3B34FC,
    ]


def test_types_and_shapes() -> None:
    draws = many(5)
    expected = {
        "crop": (np.int32, (5, 4)),
        "flip": (np.bool_, (5,)),
        "angle": (np.float32, (5,)),
        "jitter": (np.float32, (5, 4)),
        "order": (np.uint8, (5, 4)),
    }
    for name, (dtype, shape) in expected.items():
        column = getattr(draws, name)
        assert (column.dtype, column.shape) == (dtype, shape), name
        assert column.flags.c_contiguous, name


@settings(max_examples=100)
@given(data=st.data())
def test_a_draw_depends_on_nothing_else_in_its_batch(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.text(max_size=8), min_size=1, max_size=12, unique=True))
    sizes = data.draw(st.lists(sizes_of_images, min_size=len(ids), max_size=len(ids)))
    variants = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**63 - 1))
    together = rows(drawn(ids, sizes, Augmentation(variants=variants), seed))
    order = data.draw(st.permutations(range(len(ids))))
    cut = data.draw(st.integers(0, len(ids)))
    fewer = data.draw(st.integers(1, variants))
    for batch in (order[:cut], order[cut:]):
        alone = rows(
            drawn([ids[i] for i in batch], [sizes[i] for i in batch], Augmentation(variants=fewer, size=64), seed)
        )
        assert alone == [together[i * variants + v] for i in batch for v in range(fewer)]


@settings(max_examples=200)
@given(
    size=sizes_of_images,
    scale=st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)).map(sorted),
    ratio=st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)).map(sorted),
    spreads=st.tuples(st.floats(0, 180), st.floats(0, 100), st.floats(0, 0.5)),
)
def test_every_draw_keeps_within_its_bounds(
    size: tuple[int, int], scale: Any, ratio: Any, spreads: tuple[float, float, float]
) -> None:
    degrees, brightness, hue = spreads
    augmentation = Augmentation(
        variants=20, scale=scale, ratio=ratio, degrees=degrees, brightness=brightness, hue=hue, flip=1
    )
    draws = drawn(["a"], [size], augmentation)
    top, left, height, width = draws.crop.T
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    assert draws.flip.all()
    assert (abs(draws.angle) <= np.float32(degrees)).all()
    assert (draws.jitter[:, 0] >= np.float32(max(0, 1 - brightness))).all()
    assert (draws.jitter[:, 0] <= np.float32(1 + brightness)).all()
    assert (abs(draws.jitter[:, 3]) <= np.float32(hue)).all()
    assert (np.sort(draws.order) == np.arange(4)).all()


@pytest.mark.parametrize("ratio", [(5e-324, 5e-324), (1e6, 1e6), (5e-324, 1e6)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 65_000), (65_000, 1), (65_000, 65_000)], ids=str)
def test_absurd_ratios_still_give_a_crop(ratio: tuple[float, float], size: tuple[int, int]) -> None:
    top, left, height, width = drawn(["a"], [size], Augmentation(variants=50, ratio=ratio)).crop.T
    assert ((height >= 1) & (width >= 1) & (top + height <= size[0]) & (left + width <= size[1])).all()


def test_no_images_give_no_draws() -> None:
    assert rows(drawn([], [], Augmentation())) == []
    assert len(policy_seeds(image_keys([], 0), 3)) == 0


def test_operations_without_a_range_are_not_applied() -> None:
    draws = many(100, degrees=0, brightness=0, contrast=0, saturation=0, hue=0, flip=0)
    assert (draws.jitter == [1, 1, 1, 0]).all()
    assert not draws.flip.any()
    assert (draws.angle == 0).all()
    assert not np.signbit(draws.angle).any()
    assert not np.signbit(draws.jitter).any()


def test_one_ratio_and_the_whole_area_give_the_middle() -> None:
    draws = many(10, size=(300, 400), scale=(1, 1), ratio=(1, 1))  # 346 × 346 never fits
    assert (draws.crop == [0, 50, 300, 300]).all()


def test_seed_id_and_variant_each_make_a_difference() -> None:
    sizes = [(480, 640)] * 2
    augmentation = Augmentation(variants=3)
    draws = [drawn(["img-1", "img-2"], sizes, augmentation, seed) for seed in (0, 1, 2**62)]
    for name in ("crop", "angle", "jitter"):
        found = [row.tobytes() for some in draws for row in getattr(some, name)]
        assert len(set(found)) == len(found) == 18
    keys = [image_keys([name], seed)[0] for name in ("", "a", "A", "a ", "b" * 1000) for seed in (0, 1, 2, 2**63 - 1)]
    assert len(set(keys)) == len(keys)


def test_draws_are_not_correlated() -> None:
    """Between purposes, between variants of an image, and between ids that differ by one character."""
    augmentation = Augmentation(variants=2)
    count = MANY // 2
    draws = drawn([f"image-{i}" for i in range(count)], [(2_000, 2_000)] * count, augmentation)
    top, left, height, width = draws.crop.T.astype(np.float64)
    columns = np.stack(
        (
            height * width,
            width / height,
            top / (2_001 - height),
            left / (2_001 - width),
            draws.flip,
            draws.angle,
            *draws.jitter.T,
            *draws.order[:, :3].T,
        )
    )
    purposes = len(columns)
    by_variant = columns.reshape(purposes, count, 2)
    previous = np.roll(by_variant, 1, axis=1)
    together = np.concatenate((by_variant[..., 0], by_variant[..., 1], previous[..., 0], previous[..., 1]))
    found = np.corrcoef(together)
    np.fill_diagonal(found, 0)
    for block in range(4):  # a permutation's places do depend on each other
        end = (block + 1) * purposes
        found[end - 3 : end, end - 3 : end] = 0
    # The largest of some 1,300 coefficients of 10,000 pairs: 0.05 is five standard deviations.
    assert abs(found).max() < 0.05


# Ours against torchvision's own.


def torchvision_crops(size: tuple[int, int], augmentation: Augmentation, count: int) -> npt.NDArray[np.int64]:
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(1)
    transform = v2.RandomResizedCrop(8, scale=augmentation.scale, ratio=augmentation.ratio)
    image = torch.empty(1, dtype=torch.uint8).expand(3, *size)
    made = (transform.make_params([image]) for _ in range(count))
    return np.array([[one["top"], one["left"], one["height"], one["width"]] for one in made])


CROPS = [
    ((480, 640), {}, MANY),  # a photograph
    ((31, 29), {}, MANY // 4),  # few possible sizes
    ((200, 1_000), {}, MANY // 4),  # large areas never fit
    ((1_000, 400), {"scale": (0.3, 0.9), "ratio": (0.5, 3.0)}, MANY // 4),
    ((40, 3_000), {"scale": (0.2, 0.5)}, 1_000),  # nothing fits: always the middle
]


@pytest.mark.parametrize(("size", "bounds", "count"), CROPS, ids=[str(case[0]) for case in CROPS])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], bounds: dict[str, Any], count: int) -> None:
    ours = many(count, size, **bounds).crop.astype(np.int64)
    theirs = torchvision_crops(size, Augmentation(**bounds), count)
    for what in ("area", "log ratio", "top", "left"):
        samples = []
        for top, left, height, width in (ours.T, theirs.T):
            room = {"top": size[0] - height, "left": size[1] - width}
            samples.append(
                {
                    "area": height * width / (size[0] * size[1]),
                    "log ratio": np.log(width / height),
                    "top": top / np.maximum(1, room["top"]),
                    "left": left / np.maximum(1, room["left"]),
                }[what]
            )
        assert stats.ks_2samp(*samples).pvalue > SMALLEST_P, what


def test_the_middle_is_taken_as_often_as_by_torchvision() -> None:
    size, bounds = (250, 1_000), {"scale": (0.2, 0.8)}  # an attempt fits only at a third of the area or less
    middle = [0, (1_000 - 333) // 2, 250, 333]
    ours = (many(8_000, size, **bounds).crop == middle).all(axis=1)
    theirs = (torchvision_crops(size, Augmentation(**bounds), 8_000) == middle).all(axis=1)
    assert 0.1 < ours.mean() < 0.9
    table = [[each.sum(), (~each).sum()] for each in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > SMALLEST_P


def test_angles_and_factors_are_distributed_as_torchvisions() -> None:
    import torch
    from torchvision.transforms import v2

    torch.manual_seed(1)
    ours = many(MANY, degrees=30, brightness=0.4, contrast=1.5, saturation=0.1, hue=0.3)
    rotation = v2.RandomRotation(30)
    jitter = v2.ColorJitter(0.4, 1.5, 0.1, 0.3)
    angles = [rotation.make_params([])["angle"] for _ in range(MANY)]
    assert stats.ks_2samp(ours.angle, angles).pvalue > SMALLEST_P
    made = [jitter.make_params([]) for _ in range(MANY)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        theirs = [one[f"{name}_factor"] for one in made]
        assert stats.ks_2samp(ours.jitter[:, column], theirs).pvalue > SMALLEST_P, name


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_flips_are_as_often_as_asked(probability: float) -> None:
    flips = int(many(MANY, flip=probability).flip.sum())
    assert stats.binomtest(flips, MANY, probability).pvalue > SMALLEST_P


def test_the_24_orders_are_equally_frequent() -> None:
    orders = many(MANY).order @ np.array([64, 16, 4, 1])
    found, counts = np.unique(orders, return_counts=True)
    assert sorted(found) == sorted(64 * a + 16 * b + 4 * c + d for a, b, c, d in itertools.permutations(range(4)))
    assert stats.chisquare(counts).pvalue > SMALLEST_P
