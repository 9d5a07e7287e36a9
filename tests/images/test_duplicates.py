"""Fingerprints against plain numpy, pairs against all pairs, groups against a walk through the graph."""

from __future__ import annotations

import io
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numba.core.dispatcher import Dispatcher
from PIL import Image

from tasks.images import duplicates
from tasks.images.duplicates import (
    COLOUR_BOUND,
    SIGNATURE_BYTES,
    STRUCTURE_BOUND,
    group_images,
    perceptual_hash,
    similar_pairs,
)
from tasks.io.tensors import Float64Array, Int64Array, UInt8Array, UInt64Array

Filter = Image.Resampling


# Fingerprints


def cell_weights(length: int) -> Float64Array:
    """Part of each pixel in each of 32 cells of equal length; rows sum up to 1."""
    borders = np.arange(33) * length / 32
    pixels = np.arange(length)
    overlap = np.minimum(borders[1:, None], pixels + 1) - np.maximum(borders[:-1, None], pixels)
    return np.maximum(overlap, 0) * 32 / length


def plain_fingerprint(pixels: UInt8Array) -> tuple[Float64Array, Float64Array, float]:
    """Distance of each low frequency's coefficient from the threshold, mean colours of the grid, structure."""
    height, width = pixels.shape[:2]
    cells = np.einsum(
        "iy,yxc,jx->ijc", cell_weights(height), pixels[..., :3].astype(float), cell_weights(width), optimize=True
    )
    angle = np.pi * (2 * np.arange(32) + 1) * np.arange(8)[:, None] / 64
    basis = np.cos(angle) / np.sqrt(np.where(np.arange(8) == 0, 32, 16))[:, None]
    waves = (basis @ (cells @ [0.299, 0.587, 0.114]) @ basis.T).ravel()[1:]
    colours = cells.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3)).ravel()
    return waves - np.median(waves) - 0.5, colours, float(np.sqrt((waves**2).sum()) / 32)


def assert_fingerprint(pixels: UInt8Array, seen: UInt8Array) -> None:
    """The fingerprint of some pixels is the plain one of those that are seen."""
    bits, signature, valid = perceptual_hash(pixels)
    distance, colours, structure = plain_fingerprint(seen)
    assert 0 <= bits < 2**63
    for k, above in enumerate(distance):
        if abs(above) > 1e-6:  # else rounding decides
            assert bool(bits >> k & 1) == (above > 0), f"bit {k}"
    assert signature.dtype == np.uint8
    assert signature.shape == (SIGNATURE_BYTES,)
    np.testing.assert_allclose(signature, colours, atol=0.5 + 1e-6)
    assert valid == (structure >= STRUCTURE_BOUND)


sides = st.integers(1, 70) | st.sampled_from([127, 255, 256, 257, 511, 512])


@settings(max_examples=60)
@given(height=sides, width=sides, channels=st.sampled_from([3, 4]), seed=st.integers(0, 2**32), top=st.integers(0, 255))
def test_the_fingerprint_is_the_plain_one(height: int, width: int, channels: int, seed: int, top: int) -> None:
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, top + 1, (min(height, 9), min(width, 9), channels), dtype=np.uint8)
    pixels = coarse[np.arange(height) % len(coarse)][:, np.arange(width) * coarse.shape[1] // width]
    assert_fingerprint(pixels, pixels)


@pytest.mark.parametrize("shape", [(513, 40, 3), (40, 700, 3), (1, 5000, 4), (5000, 1, 3), (1025, 1400, 3)])
def test_of_a_large_picture_512_rows_and_columns_are_read(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    pixels[: shape[0] // 2] //= 3
    seen = pixels
    for axis in (0, 1):
        count = min(shape[axis], 512)
        seen = seen.take((2 * np.arange(count) + 1) * shape[axis] // (2 * count), axis=axis)
    assert_fingerprint(pixels, seen)


def test_white_is_the_largest_sum() -> None:
    for shape in ((1, 1, 3), (512, 512, 3), (4000, 600, 4)):
        bits, signature, valid = perceptual_hash(np.full(shape, 255, dtype=np.uint8))
        assert bits == 0
        assert set(signature.tolist()) == {255}
        assert not valid


def test_how_pixels_lie_in_memory_makes_no_difference() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (90, 120, 4), dtype=np.uint8)
    bits, signature, _ = perceptual_hash(pixels)
    locked = pixels.copy()
    locked.flags.writeable = False
    wide = np.zeros((180, 120, 8), dtype=np.uint8)
    wide[::2, :, 2:6] = pixels
    for same in (locked, np.asfortranarray(pixels), wide[::2, :, 2:6], pixels[..., :3], pixels[::-1].copy()[::-1]):
        other_bits, other_signature, _ = perceptual_hash(same)
        assert other_bits == bits
        assert np.array_equal(other_signature, signature)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 3), (4, 0, 3), (4, 4, 1), (4, 4, 2)])
def test_what_is_no_colour_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="a picture has"):
        perceptual_hash(np.zeros(shape, dtype=np.uint8))


def natural(height: int, width: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as that of photographs does (Field 1987)."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width))
    planes = np.fft.fft2(draw.normal(size=(3, height, width))) / np.maximum(frequency, 1)
    colours = np.fft.ifft2(planes).real
    colours += 2 * colours[:1]
    colours *= 45 / colours.std()
    return Image.fromarray(np.clip(128 + colours, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def stored(picture: Image.Image, form: str, **options: Any) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def resized(picture: Image.Image, percent: int, resampling: Filter) -> Image.Image:
    return picture.resize((picture.width * percent // 100, picture.height * percent // 100), resampling)


def fingerprints(pictures: list[Image.Image]) -> tuple[UInt64Array, UInt8Array, npt.NDArray[np.bool_]]:
    hashes, signatures, valid = zip(*(perceptual_hash(np.asarray(picture)) for picture in pictures), strict=True)
    return np.array(hashes, dtype=np.uint64), np.array(signatures), np.array(valid)


def test_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [natural(150, 200, seed) for seed in range(12)]
    copies = [
        copy
        for picture in originals
        for copy in (
            picture,
            *(stored(picture, "JPEG", quality=quality) for quality in (30, 60, 95)),
            stored(picture, "WEBP", quality=50),
            stored(picture, "PNG"),
            *(resized(picture, percent, Filter.BILINEAR) for percent in (30, 75, 200)),
            *(resized(picture, percent, Filter.LANCZOS) for percent in (30, 130)),
            resized(picture, 50, Filter.BOX),
            resized(picture, 200, Filter.NEAREST),
            picture.resize((128, 128), Filter.BICUBIC),
            stored(resized(picture, 50, Filter.BICUBIC), "JPEG", quality=40),
        )
    ]
    hashes, signatures, valid = fingerprints(copies)
    assert valid.all()
    groups = group_images(len(copies), [similar_pairs(hashes, signatures, 6)])
    each = len(copies) // len(originals)
    assert groups.tolist() == [number // each * each for number in range(len(copies))]


@pytest.mark.parametrize(("height", "width"), [(1200, 1600), (1025, 1025), (600, 3000)])
def test_copies_of_large_pictures_are_found(height: int, width: int) -> None:
    """Of these only some rows and columns are read, of their smaller copies all."""
    picture = natural(height, width, 5)
    copies = [picture, *(resized(picture, percent, Filter.BOX) for percent in (10, 25, 40, 60))]
    hashes, signatures, _ = fingerprints(copies)
    assert len(similar_pairs(hashes, signatures, 6)) == len(copies) - 1


def test_the_same_shapes_in_other_colours_are_no_copy() -> None:
    mask = np.asarray(natural(120, 160, 3).convert("L"), dtype=float)[..., None] / 255
    red, blue = (np.round(mask * colour).astype(np.uint8) for colour in ((250, 20, 20), (20, 100, 250)))
    hashes, signatures, valid = fingerprints([Image.fromarray(red), Image.fromarray(blue)])
    assert valid.all()
    assert int(hashes[0] ^ hashes[1]).bit_count() <= 3
    assert len(similar_pairs(hashes, signatures, 6)) == 0


def plain(kind: str) -> UInt8Array:
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 160)
    return np.broadcast_to(
        {
            "one colour": np.full((120, 160), 77.0),
            "faint noise": draw.normal(100, 10, (120, 160)),
            "a faint ramp": np.broadcast_to(ramp / 64 + 100, (120, 160)),
            "the finest checks": np.indices((120, 160)).sum(axis=0) % 2 * 255,
            "a ramp": np.broadcast_to(ramp, (120, 160)),
            "wide stripes": np.broadcast_to(ramp // 40 % 2 * 255, (120, 160)),
            "a square": np.pad(np.full((40, 60), 255), ((30, 50), (70, 30))),
        }[kind][..., None],
        (120, 160, 3),
    ).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "has_structure"),
    [
        ("one colour", False),
        ("faint noise", False),
        ("a faint ramp", False),
        ("the finest checks", False),  # its cells are all alike
        ("a ramp", True),
        ("wide stripes", True),
        ("a square", True),
    ],
)
def test_a_picture_without_structure_has_no_valid_hash(kind: str, has_structure: bool) -> None:
    assert perceptual_hash(plain(kind))[2] == has_structure


@pytest.mark.parametrize("kind", ["a ramp", "wide stripes", "a square"])
def test_most_coefficients_of_a_plain_picture_are_zero_and_stay_so(kind: str) -> None:
    picture = Image.fromarray(plain(kind))
    bits = perceptual_hash(np.asarray(picture))[0]
    for copy in (resized(picture, 50, Filter.BILINEAR), resized(picture, 70, Filter.BOX), stored(picture, "PNG")):
        assert (perceptual_hash(np.asarray(copy))[0] ^ bits).bit_count() <= 2


def test_a_fingerprint_never_changes() -> None:
    """Golden: other bits could put an image into another split of the next version."""
    y, x = np.indices((45, 70))
    pixels = np.stack([(x * y) % 251, (x * x + 3 * y) // 20 % 256, 255 - 3 * x], axis=-1).astype(np.uint8)
    bits, signature, valid = perceptual_hash(pixels)
    assert (hex(bits), valid) == ("0x470f1e1e7e7c600a", True)
    assert signature[:12].tolist() == [42, 5, 230, 104, 35, 178, 109, 95, 125, 108, 186, 73]


# Pairs


def is_similar(hashes: UInt64Array, signatures: UInt8Array, max_bits: int, i: int, j: int) -> bool:
    difference = np.abs(signatures[i].astype(int) - signatures[j].astype(int)).sum()
    bits = (int(hashes[i]) ^ int(hashes[j])).bit_count()
    return bits <= max_bits and bool(difference <= COLOUR_BOUND * SIGNATURE_BYTES)


def walked_groups(count: int, links: list[tuple[int, int]]) -> list[int]:
    """Smallest index that can be reached from each image."""
    neighbours: dict[int, set[int]] = {i: set() for i in range(count)}
    for a, b in links:
        neighbours[a].add(b)
        neighbours[b].add(a)
    group = [-1] * count
    for start in range(count):
        stack = [start] if group[start] < 0 else []
        while stack:
            image = stack.pop()
            if group[image] < 0:
                group[image] = start
                stack.extend(neighbours[image])
    return group


@st.composite
def crowds(draw: st.DrawFn) -> tuple[UInt64Array, UInt8Array]:
    """Images near a few hashes and a few colours, so that chains, forks and near misses come often."""
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(0, 40))
    flips, spread = draw(st.integers(0, 12)), draw(st.sampled_from([0, 8, 9, 16, 17, 60]))
    bases, tints = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, bases, dtype=np.uint64)[random.integers(0, bases, count)]
    for _ in range(flips):
        flipped = np.uint64(1) << random.integers(0, 64, count, dtype=np.uint64)
        hashes ^= np.where(random.random(count) < 0.4, flipped, np.uint64(0))
    base = random.integers(0, 196, (tints, SIGNATURE_BYTES))[random.integers(0, tints, count)]
    # One shift of a whole signature: the differences are small multiples, some at the very bound.
    signatures = base + np.where(random.random(count) < 0.5, spread, 0)[:, None]
    signatures[:, 0] += random.integers(0, 2, count)
    return hashes, signatures.astype(np.uint8)


@settings(max_examples=300)
@given(
    crowd=crowds(),
    max_bits=st.integers(0, 16) | st.sampled_from([40, 60, 63, 64]),
    parts=st.integers(1, 7),
    masked=st.booleans(),
)
def test_the_pairs_connect_what_all_similar_pairs_connect(
    crowd: tuple[UInt64Array, UInt8Array], max_bits: int, parts: int, masked: bool
) -> None:
    hashes, signatures = crowd
    count = len(hashes)
    valid = np.arange(count) % 5 != 3 if masked else None
    found = [similar_pairs(hashes, signatures, max_bits, part, parts, valid=valid) for part in range(parts)]
    for pairs in found:
        assert pairs.dtype == np.int64
        assert pairs.shape == (len(pairs), 2)
        assert len(pairs) <= max(count - 1, 0)
        for i, j in pairs.tolist():
            assert i < j
            assert is_similar(hashes, signatures, max_bits, i, j)
            assert valid is None or (valid[i] and valid[j])
    similar = [
        (i, j)
        for i, j in combinations(range(count), 2)
        if (valid is None or (valid[i] and valid[j])) and is_similar(hashes, signatures, max_bits, i, j)
    ]
    assert group_images(count, found).tolist() == walked_groups(count, similar)


@settings(max_examples=200)
@given(places=npst.arrays(np.uint8, st.tuples(st.integers(0, 60), st.just(2)), elements=st.integers(0, 70)))
def test_chains_of_colours_are_followed(places: UInt8Array) -> None:
    """Equal hashes, and colours in a plane: whether two images belong together hangs on those between."""
    hashes, signatures = np.zeros(len(places), dtype=np.uint64), np.repeat(places, SIGNATURE_BYTES // 2, axis=1)
    similar = [(i, j) for i, j in combinations(range(len(places)), 2) if is_similar(hashes, signatures, 0, i, j)]
    pairs = similar_pairs(hashes, signatures, 0)
    assert group_images(len(places), [pairs]).tolist() == walked_groups(len(places), similar)


def with_copies(count: int, seed: int, max_bits: int) -> tuple[UInt64Array, UInt8Array, Int64Array]:
    """Random images, most of them a copy of an earlier one with max_bits other bits; and the first of each group."""
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 2**64, count, dtype=np.uint64)
    signatures = draw.integers(0, 256, (count, SIGNATURE_BYTES), dtype=np.uint8)
    places = draw.permuted(np.tile(np.arange(64, dtype=np.uint64), (count, 1)), axis=1)[:, :max_bits]
    flips = np.bitwise_or.reduce(np.uint64(1) << places, axis=1, initial=np.uint64(0))
    group = np.arange(count)
    for image in range(1, count):
        if draw.random() < 0.8:
            source = draw.integers(image)
            hashes[image] = hashes[source] ^ flips[image]
            signatures[image] = np.where(signatures[source] < 128, signatures[source] + 7, signatures[source] - 7)
            group[image] = group[source]
    return hashes, signatures, group


@pytest.mark.parametrize(
    ("count", "max_bits", "parts"),
    [(60_000, 6, 1), (60_000, 6, 5), (30_000, 0, 3), (30_000, 3, 1), (20_000, 12, 2), (3_000, 16, 3)],
)
def test_every_copy_among_many_images_is_found(count: int, max_bits: int, parts: int) -> None:
    hashes, signatures, group = with_copies(count, 7, max_bits)
    found = [similar_pairs(hashes, signatures, max_bits, part, parts) for part in range(parts)]
    assert np.array_equal(group_images(count, found), group)


@pytest.mark.parametrize("count", [1, 100, 10_000, 1_000_000, 100_000_000])
@pytest.mark.parametrize("max_bits", [0, 1, 6, 10, 16, 40, 63, 64])
@pytest.mark.parametrize("parts", [1, 16])
def test_similar_hashes_meet_in_a_table(count: int, max_bits: int, parts: int) -> None:
    masks = duplicates._tables(count, max_bits, parts)
    draw = np.random.default_rng(max_bits)
    for _ in range(20):
        places = draw.choice(64, max_bits, replace=False).astype(np.uint64)
        difference = np.bitwise_or.reduce(np.uint64(1) << places, initial=np.uint64(0))
        assert (masks & difference == 0).any()


def test_no_hash_is_compared_with_all_others_where_they_are_many() -> None:
    for count, max_bits in ((1_000_000, 6), (10_000_000, 6), (1_000_000, 0), (1_000_000, 10)):
        masks = duplicates._tables(count, max_bits, 1)
        compared = sum(count / 2.0 ** int(mask).bit_count() for mask in masks)
        assert compared < count / 50


def test_100_000_copies_of_one_picture_make_few_pairs() -> None:
    count = 100_000
    draw = np.random.default_rng(4)
    equal = np.full(count, 12345, dtype=np.uint64), np.full((count, SIGNATURE_BYTES), 9, dtype=np.uint8)
    # Recompressed copies: a few bits are open, and no two have the same colours.
    near = equal[0] ^ draw.integers(0, 2**6, count, dtype=np.uint64), equal[1] + draw.integers(0, 5, equal[1].shape)
    for hashes, signatures in (equal, near):
        pairs = similar_pairs(hashes, signatures.astype(np.uint8), 6)
        assert len(pairs) == count - 1
        assert not group_images(count, [pairs]).any()


def test_colours_decide_among_equal_hashes() -> None:
    """Images in a row, each within the bound of the next: one group, until the middle is taken away."""
    hashes = np.full(9, 5, dtype=np.uint64)
    signatures = np.repeat(np.arange(9, dtype=np.uint8)[:, None] * COLOUR_BOUND, SIGNATURE_BYTES, axis=1)
    assert len(similar_pairs(hashes, signatures, 6)) == 8
    middle = np.arange(9) != 4
    pairs = similar_pairs(hashes, signatures, 6, valid=middle)
    assert group_images(9, [pairs]).tolist() == [0, 0, 0, 0, 4, 5, 5, 5, 5]
    signatures[5:, 7] += 1  # a single step of a single byte beyond the bound
    assert group_images(9, [similar_pairs(hashes, signatures, 6)]).tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 5]


@pytest.mark.parametrize("count", [0, 1])
def test_no_pair_without_two_images(count: int) -> None:
    hashes, signatures = np.zeros(count, dtype=np.uint64), np.zeros((count, SIGNATURE_BYTES), dtype=np.uint8)
    for part in range(3):
        assert similar_pairs(hashes, signatures, 6, part, 3).shape == (0, 2)
    nothing = np.zeros(count, dtype=np.bool_)
    assert similar_pairs(hashes, signatures, 6, valid=nothing).shape == (0, 2)


def test_columns_of_a_table_will_do() -> None:
    """Hashes and signatures that are strided, read-only or at odd addresses, as those of Arrow buffers may be."""
    hashes, signatures, _ = with_copies(500, 1, 4)
    expected = similar_pairs(hashes, signatures, 4)
    strided = np.repeat(signatures, 2, axis=0)[::2]
    odd = np.zeros(signatures.size + 1, dtype=np.uint8)[1:].reshape(signatures.shape)
    odd[:] = signatures
    locked = signatures.copy()
    locked.flags.writeable = False
    for same in (strided, odd, locked):
        assert np.array_equal(similar_pairs(np.repeat(hashes, 2)[::2], same, 4), expected)


# Groups

links = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40)


@given(links=links, cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 2**32))
def test_groups_are_what_can_be_reached(links: list[tuple[int, int]], cuts: list[int], seed: int) -> None:
    expected = walked_groups(30, links)
    pairs = np.array(links, dtype=np.int64).reshape(-1, 2)
    assert group_images(30, np.split(pairs, sorted(min(cut, len(pairs)) for cut in cuts))).tolist() == expected
    # Neither the order of the pairs nor of their ends matters, nor that some come twice.
    shuffled = np.random.default_rng(seed).permutation(np.concatenate([pairs, pairs[::-1, ::-1]]))
    assert group_images(30, (part for part in [shuffled])).tolist() == expected


@given(links=links, contents=npst.arrays(np.int64, 30, elements=st.integers(0, 12)))
def test_equal_bytes_are_links_too(links: list[tuple[int, int]], contents: Int64Array) -> None:
    exact = np.array([int(np.flatnonzero(contents == content)[0]) for content in contents])
    pairs = np.array(links, dtype=np.int64).reshape(-1, 2)
    expected = walked_groups(30, [*links, *enumerate(exact.tolist())])
    assert group_images(30, [pairs], exact).tolist() == expected


def test_groups_of_nothing() -> None:
    assert group_images(0, []).tolist() == []
    assert group_images(3, []).tolist() == [0, 1, 2]
    assert group_images(3, [np.empty((0, 2), dtype=np.int64)], np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("link", [(0, 3), (-1, 0)])
def test_a_link_to_no_image_is_refused(link: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="isn't one of 3"):
        group_images(3, [np.array([link])])


def test_a_long_chain_is_one_group() -> None:
    count = 200_000
    order = np.random.default_rng(0).permutation(count)
    assert not group_images(count, [np.stack([order[:-1], order[1:]], axis=1)]).any()


def test_compiled_code_is_kept_for_the_next_process() -> None:
    compiled = [value for value in vars(duplicates).values() if isinstance(value, Dispatcher)]
    assert compiled
    assert all(function.stats.cache_path for function in compiled)
    assert all(function.targetoptions["nogil"] for function in compiled)
