"""Near-duplicates of pictures: perceptual fingerprints, and the search for pairs and groups of similar ones.

A fingerprint is a perceptual hash of a picture's shapes and its coarse colours. Copies whose bytes differ
(recompressed, resized, converted) have hashes that differ in few bits, and colours that agree: such images are linked;
connected images form a group.

Bits of the hash that copies change, measured on 146 photographs of about 500 × 375 pixels:

| copy | mean | most | at most 6 |
|---|---|---|---|
| JPEG of quality 30 to 95, WebP of quality 30 and 75 | 0.2 | 3 | 100 % |
| resized to 10 … 400 % by a bilinear, bicubic, Lanczos or box filter | 0.3 | 5 | 100 % |
| resized to 50 … 400 % by the nearest pixel | 0.5 | 8 | 99.7 % |
| resized to 30 % by the nearest pixel | 1.3 | 8 | 97.3 % |
| made grey, 10 % brighter, or to 128 colours | 0.4 | 6 | 100 % |
| cut by 1 % on each side | 2.3 | 15 | 98.6 % |
| cut by 2 % on each side | 4.6 | 25 | 80.1 % |
| mirrored | 31 | 38 | none |

Two different ones of them differ in 16 bits or more, in 32 on average. Their colours (the mean absolute difference of
the signatures) differ by 14.8 of 255 or more; those of recompressed and resized copies by less than 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np

from tasks.io.compiled import Compiled
from tasks.io.tensors import AnyArray, BoolArray, Float64Array, Int32Array, Int64Array, UInt8Array, UInt64Array

SIGNATURE_BYTES = 48
STRUCTURE_BOUND = 2.0  # standard deviation of the hashed frequencies, of 255
COLOUR_BOUND = 8  # mean absolute difference of signatures: copies of photographs stay below 3, others above 14

_CELLS = 32
_FREQUENCIES = 8
_GRID = 4
_MOST_SAMPLES = 512
_DEAD_ZONE = 0.5
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114  # luminance, ITU-R BT.601
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: Fibonacci hashing
_MOST_BUCKET_BITS = 22
_MOST_TABLES = 5000
_SORT_COST, _PAIR_COST = 20.0, 2.0  # nanoseconds: to put a hash into a bucket, to compare two


_jit = Compiled(globals())


def perceptual_hash(pixels: UInt8Array) -> tuple[int, UInt8Array, bool]:
    """Return the hash of a picture's coarse shapes, its coarse colours, and True if the hash is meaningful.

    The hash is pHash: luminance, averaged to 32 × 32, 2-D DCT-II, and for each low frequency one bit: 1 if its
    coefficient is above their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions"; pHash.org). Two details differ. The frequencies are 0 to 7, not 1 to 8, which are blind to stripes; the
    mean itself has no bit. And a bit requires half a level above the median: most coefficients of a plain gradient are
    zero, and noise would set their bits.

    Averages are exact for any size, from 1 × 1 on. Where a side has more than 512 pixels, only 512 evenly spread
    rows or columns are read, so that the cost is bounded.

    Args:
        pixels: RGB, or RGB and more channels, which are ignored; shape (height, width, ≥ 3).

    Returns:
        The hash, in [0, 2**63). The mean RGB of each cell of a 4 × 4 grid, row by row; shape (48,), uint8. True if the
        low frequencies have a standard deviation of 2 of 255 or more: other pictures have no meaningful hash.
    """
    assert pixels.ndim == 3, f"a picture has three axes, not the shape {pixels.shape}"
    assert pixels.size, f"a picture has pixels, not the shape {pixels.shape}"
    assert pixels.shape[2] >= 3, f"a picture has red, green and blue, not the shape {pixels.shape}"
    bits, signature, structure = _hash_picture(np.ascontiguousarray(pixels), _COSINES)
    return int(bits), signature, bool(structure >= STRUCTURE_BOUND)


def _cosines() -> Float64Array:
    """Return the orthonormal DCT-II (Ahmed, Natarajan & Rao 1974) of the low frequencies; shape (32, 8)."""
    place, frequency = np.arange(_CELLS)[:, None], np.arange(_FREQUENCIES)
    basis = np.cos(np.pi * (2 * place + 1) * frequency / (2 * _CELLS)) * math.sqrt(2 / _CELLS)
    basis[:, 0] = math.sqrt(1 / _CELLS)
    return basis


_COSINES = _cosines()


@_jit
def _hash_picture(pixels: UInt8Array, cosines: Float64Array) -> tuple[np.uint64, UInt8Array, float]:
    """Return hash, signature and structure of a C-contiguous picture."""
    height, width = min(pixels.shape[0], _MOST_SAMPLES), min(pixels.shape[1], _MOST_SAMPLES)
    is_whole = pixels.shape[:2] == (height, width)
    sums = _cell_sums(pixels) if is_whole else _cell_sums(_sampled(pixels, height, width))
    total = height * width  # weight of each cell

    side = _CELLS // _GRID
    weight = total * side * side
    signature = np.empty(SIGNATURE_BYTES, dtype=np.uint8)
    for k in range(SIGNATURE_BYTES):
        i, j, channel = k // (3 * _GRID), k // 3 % _GRID, k % 3
        mean = sums[i * side : (i + 1) * side, j * side : (j + 1) * side, channel].sum()
        signature[k] = (2 * mean + weight) // (2 * weight)

    # The DCT of columns, then of rows. Each sum has one fixed order, so that its bits are the same everywhere.
    half = np.zeros((_FREQUENCIES, _CELLS))
    for i in range(_CELLS):
        light = (_RED * sums[i, :, 0] + _GREEN * sums[i, :, 1] + _BLUE * sums[i, :, 2]) / total
        for u in range(_FREQUENCIES):
            for j in range(_CELLS):
                half[u, j] += light[j] * cosines[i, u]
    coefficients = np.zeros((_FREQUENCIES, _FREQUENCIES))
    for j in range(_CELLS):
        for u in range(_FREQUENCIES):
            for v in range(_FREQUENCIES):
                coefficients[u, v] += half[u, j] * cosines[j, v]
    waves = coefficients.ravel()[1:]
    structure = math.sqrt((waves * waves).sum()) / _CELLS
    threshold = np.sort(waves)[len(waves) // 2] + _DEAD_ZONE
    bits = np.uint64(0)
    for k in range(len(waves)):
        if waves[k] > threshold:
            bits |= np.uint64(1) << np.uint64(k)
    return bits, signature, structure


@_jit
def _sampled(pixels: UInt8Array, rows: int, columns: int) -> UInt8Array:
    """Return some rows and columns of a picture, evenly spread; shape (rows, columns, 3)."""
    height, width = pixels.shape[:2]
    sampled = np.empty((rows, columns, 3), dtype=np.uint8)
    for i in range(rows):
        y = (2 * i + 1) * height // (2 * rows)
        for j in range(columns):
            x = (2 * j + 1) * width // (2 * columns)
            for channel in range(3):
                sampled[i, j, channel] = pixels[y, x, channel]
    return sampled


@_jit
def _cell_sums(pixels: UInt8Array) -> Int64Array:
    """Return sums over 32 × 32 cells of equal area; a pixel on a border counts for each cell by its part in it.

    Lengths are in 1/32 pixel: a side of n pixels has 32 n of them, and each of its cells has n, a whole number. So
    the weights of a cell's pixels sum up to height × width, and the sums are exact. Shape (32, 32, 3), int64.
    """
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, width * channels)
    inner = np.zeros(width * channels, dtype=np.uint16)  # at most 17 rows of 255
    column = np.zeros(width * channels, dtype=np.uint32)
    sums = np.empty((_CELLS, _CELLS, 3), dtype=np.int64)
    for i in range(_CELLS):
        top, bottom = i * height // _CELLS, ((i + 1) * height - 1) // _CELLS
        inner[:] = 0
        y = top + 1
        while y + 4 <= bottom:  # four rows at a time are one pass over the sums
            a, b, c, d = flat[y], flat[y + 1], flat[y + 2], flat[y + 3]
            for x in range(width * channels):
                inner[x] += np.uint16(a[x]) + np.uint16(b[x]) + np.uint16(c[x]) + np.uint16(d[x])
            y += 4
        while y < bottom:
            a = flat[y]
            for x in range(width * channels):
                inner[x] += a[x]
            y += 1
        first, last = (top + 1) * _CELLS - i * height, (i + 1) * height - bottom * _CELLS
        if top == bottom:
            first, last = height, 0
        a, b, of_a, of_b = flat[top], flat[bottom], np.uint32(first), np.uint32(last)
        for x in range(width * channels):
            column[x] = np.uint32(inner[x]) * np.uint32(_CELLS) + np.uint32(a[x]) * of_a + np.uint32(b[x]) * of_b
        for j in range(_CELLS):
            left, right = j * width // _CELLS, ((j + 1) * width - 1) // _CELLS
            first, last = (left + 1) * _CELLS - j * width, (j + 1) * width - right * _CELLS
            if left == right:
                first, last = width, 0
            red, green, blue = 0, 0, 0
            for x in range((left + 1) * channels, right * channels, channels):
                red += column[x]
                green += column[x + 1]
                blue += column[x + 2]
            left, right = left * channels, right * channels
            sums[i, j, 0] = red * _CELLS + column[left] * first + column[right] * last
            sums[i, j, 1] = green * _CELLS + column[left + 1] * first + column[right + 1] * last
            sums[i, j, 2] = blue * _CELLS + column[left + 2] * first + column[right + 2] * last
    return sums


def similar_pairs(
    hashes: UInt64Array,
    signatures: UInt8Array,
    max_bits: int,
    part: int = 0,
    parts: int = 1,
    *,
    valid: BoolArray | None = None,
) -> Int64Array:
    """Return enough pairs of similar images to connect all that are connected by similar pairs.

    Two images are similar if their hashes differ in at most `max_bits` bits and their signatures by at most
    `COLOUR_BOUND` a byte on average. Every returned pair is similar, and the connected components of the
    returned pairs, over all parts together, are exactly those of all similar pairs; but there are fewer pairs than
    images in each part, even where 100,000 copies of one picture have 5 billion pairs.

    Not all pairs are compared (pigeonhole principle; Norouzi, Punjani & Fleet 2012, "Fast search in Hamming space with
    multi-index hashing"): of max_bits + k bands of bits, two similar hashes agree in at least k. So for each choice of
    k bands there is a table, and only hashes that agree on its bands are compared (Manku, Jain & Das Sarma 2007,
    "Detecting near-duplicates for web crawling"). k is the cheapest for this many hashes. An image is compared with
    the members of a component only until one is similar, so that big clusters cost little. Many images of one
    hash and different colours, and max_bits above 10 or so, cost a comparison a pair.

    Args:
        hashes: shape (n,).
        signatures: shape (n, 48).
        max_bits: 0 to 64.
        part: this part of the work, in [0, parts).
        parts: number of parts of the work; each part gets all images.
        valid: True for images with a meaningful hash, shape (n,); others are in no pair. If None, all are.

    Returns:
        Indices i < j of similar images; shape (fewer than n, 2).
    """
    count = len(hashes)
    assert signatures.shape == (count, SIGNATURE_BYTES), f"{count} hashes, but signatures of {signatures.shape}"
    assert 0 <= max_bits <= 64, f"hashes have 64 bits, of which {max_bits} can't differ"
    assert 0 <= part < parts, f"there is no part {part} of {parts}"
    assert count < 2**31, "indices are 32-bit"
    hashes, signatures = np.ascontiguousarray(hashes), np.ascontiguousarray(signatures)
    images = np.arange(count) if valid is None else np.flatnonzero(valid)
    is_first, chain = _equal_images(images, hashes, signatures)
    images = images[is_first]
    hashes, signatures = hashes[images], signatures[images]

    masks = _tables(len(images), max_bits, parts)
    splits = math.ceil(4 * parts / len(masks))  # of each table, for parts of about one size
    bucket_bits = min(max(len(images).bit_length(), 1), _MOST_BUCKET_BITS)
    parent = np.arange(len(images), dtype=np.int32)
    links = np.empty((len(images), 2), dtype=np.int32)
    found = 0
    for unit in range(part, len(masks) * splits, parts):
        mask, split = masks[unit // splits], unit % splits
        order, bounds = _buckets(hashes, mask, bucket_bits, split, splits)
        found = _link_buckets(hashes, signatures, max_bits, order, bounds, parent, links, found)
    pairs = images[links[:found]]
    if part == 0:
        pairs = np.concatenate([chain, pairs])
    return np.sort(pairs, axis=1)


def group_images(n: int, pairs: Iterable[Int64Array], exact: Int64Array | None = None) -> Int64Array:
    """Return the connected components of images: a function of the links alone, in any order of pairs.

    Args:
        n: number of images.
        pairs: arrays of linked indices, each of shape (m, 2).
        exact: index of the first image with the same bytes, shape (n,).

    Returns:
        The smallest index of the image's component; shape (n,).
    """
    parent = np.arange(n)
    links = pairs if exact is None else (*pairs, np.stack([np.arange(n), exact], axis=1))
    for some in links:
        assert not some.size or (some.min() >= 0 and some.max() < n), f"a link to an image that isn't one of {n}"
        _connect(parent, some)
    _flatten(parent)
    return parent


def _equal_images(images: Int64Array, hashes: UInt64Array, signatures: UInt8Array) -> tuple[BoolArray, Int64Array]:
    """Return a mask of the first image of each hash and signature, and pairs that chain equal images."""
    key = hashes[images]
    words = signatures.view("<u8")
    for word in range(words.shape[1]):
        key = (key ^ words[images, word]) * _GOLDEN
        key ^= key >> np.uint64(32)
    order = np.argsort(key, kind="stable")
    ordered = images[order]
    before, after = ordered[:-1], ordered[1:]
    # Equal keys nearly always mean equal images; otherwise an image may count as first once more, which is harmless.
    equal = (hashes[before] == hashes[after]) & (words[before] == words[after]).all(axis=1)
    is_first = np.ones(len(images), dtype=np.bool_)
    is_first[order[1:][equal]] = False
    return is_first, np.stack([before[equal], after[equal]], axis=1)


def _tables(count: int, max_bits: int, parts: int) -> UInt64Array:
    """Return bit masks; any two hashes within max_bits agree on all bits of at least one of them."""

    def cost(chosen: int) -> float:
        if not chosen:  # one table without bits: all pairs, in one part
            return count * count / 2 * _PAIR_COST
        bands = max_bits + chosen
        alike = max(math.exp2(-64 * chosen / bands), 1 / min(max(count, 1), 1 << _MOST_BUCKET_BITS))
        return math.comb(bands, chosen) * (count * _SORT_COST + count * count / 2 * alike * _PAIR_COST) / parts

    choices = [k for k in range(5) if not k or (max_bits + k <= 64 and math.comb(max_bits + k, k) <= _MOST_TABLES)]
    chosen = min(choices, key=cost)
    bands = max_bits + chosen
    # Each band takes every `bands`-th bit, so that all have some of the low frequencies, where pictures differ most.
    band = [sum(1 << bit for bit in range(start, 64, bands)) for start in range(bands)]
    return np.array([sum(choice) for choice in combinations(band, chosen)], dtype=np.uint64)


@_jit
def _bucket(bits: np.uint64, mask: np.uint64, bucket_bits: int) -> np.int64:
    return np.int64(((bits & mask) * _GOLDEN) >> np.uint64(64 - bucket_bits))


@_jit
def _buckets(
    hashes: UInt64Array, mask: np.uint64, bucket_bits: int, split: int, splits: int
) -> tuple[Int32Array, Int64Array]:
    """Return this part's hashes by bucket: their indices, and the start of each bucket."""
    bounds = np.zeros((1 << bucket_bits) + 1, dtype=np.int64)
    for i in range(len(hashes)):
        bucket = _bucket(hashes[i], mask, bucket_bits)
        if bucket % splits == split:
            bounds[bucket + 1] += 1
    bounds = np.cumsum(bounds)
    ends = bounds.copy()
    order = np.empty(bounds[-1], dtype=np.int32)
    for i in range(len(hashes)):
        bucket = _bucket(hashes[i], mask, bucket_bits)
        if bucket % splits == split:
            order[ends[bucket]] = i
            ends[bucket] += 1
    return order, bounds


@_jit
def _link_buckets(  # noqa: PLR0917 - compiled functions take arguments by place
    hashes: UInt64Array,
    signatures: UInt8Array,
    max_bits: int,
    order: Int32Array,
    bounds: Int64Array,
    parent: Int32Array,
    links: Int32Array,
    found: int,
) -> int:
    """Link similar images of each bucket that aren't connected yet; appends to `links` and returns their number.

    Within a bucket, the images seen so far form one linked list for each component. The next image walks each list
    of every other component until it meets a similar one; then the lists are merged.
    """
    most = 0
    for bucket in range(len(bounds) - 1):
        most = max(most, bounds[bucket + 1] - bounds[bucket])
    local = np.empty(most, dtype=np.uint64)  # hashes of the bucket
    after = np.empty(most, dtype=np.int32)  # next of the list, -1 at its end
    head, tail = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int32)
    root_of = np.empty(most, dtype=np.int32)
    list_of = np.full(len(parent), -1, dtype=np.int32)  # by root
    for bucket in range(len(bounds) - 1):
        start, size = bounds[bucket], bounds[bucket + 1] - bounds[bucket]
        if size < 2:
            continue
        lists = 0
        for a in range(size):
            image = order[start + a]
            local[a] = hashes[image]
            root = _root(parent, image)
            own = list_of[root]
            if own < 0:
                own = lists
                lists += 1
                head[own], tail[own], after[a] = a, a, -1
                root_of[own], list_of[root] = root, own
            else:
                after[a], head[own] = head[own], a
            other = 0
            while other < lists:
                b = head[other] if other != own else np.int32(-1)
                while b >= 0 and not (
                    _differing_bits(local[a], local[b]) <= max_bits
                    and _same_colours(signatures, image, order[start + b])
                ):
                    b = after[b]
                if b < 0:
                    other += 1
                    continue
                links[found, 0], links[found, 1] = image, order[start + b]
                found += 1
                # The other list joins this one, and the last list takes its place.
                parent[root_of[other]] = root_of[own]
                after[tail[own]], tail[own] = head[other], tail[other]
                lists -= 1
                if other < lists:
                    head[other], tail[other], root_of[other] = head[lists], tail[lists], root_of[lists]
                    list_of[root_of[other]] = other
                    own = other if own == lists else own
        for other in range(lists):
            list_of[root_of[other]] = -1
    return found


@_jit
def _root(parent: AnyArray, image: Any) -> Any:
    """Return the root of an image's tree, with path halving (Tarjan & van Leeuwen 1984)."""
    while parent[image] != image:
        parent[image] = parent[parent[image]]
        image = parent[image]
    return image


@_jit
def _connect(parent: Int64Array, links: Int64Array) -> None:
    """Join the trees of linked images; a tree's root is its smallest index."""
    for k in range(len(links)):
        a, b = _root(parent, links[k, 0]), _root(parent, links[k, 1])
        parent[max(a, b)] = min(a, b)


@_jit
def _flatten(parent: Int64Array) -> None:
    for i in range(len(parent)):  # a parent has the smaller index, so its parent is its root by now
        parent[i] = parent[parent[i]]


@_jit
def _differing_bits(a: np.uint64, b: np.uint64) -> np.int64:
    """Return the Hamming distance; compiled to the machine's instruction (Warren, "Hacker's Delight", 5-1)."""
    x = a ^ b
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_jit
def _same_colours(signatures: UInt8Array, a: int, b: int) -> bool:
    one, other = signatures[a], signatures[b]
    difference = np.uint16(0)  # at most 48 × 255; in this form it compiles to instructions on 16 bytes at once
    for k in range(SIGNATURE_BYTES):
        difference = np.uint16(difference + (max(one[k], other[k]) - min(one[k], other[k])))
    return bool(difference <= COLOUR_BOUND * SIGNATURE_BYTES)
