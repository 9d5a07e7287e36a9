"""Sketches and moments are pure functions of the multiset of values; numpy and pandas are the oracles."""

import math
import pickle
import statistics
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tasks.io.hashing import stable_hash
from tasks.io.tensors import Float64Array
from tasks.quality.sketch import DistinctSketch, Moments, QuantileSketch, TopValues

any_floats = npst.arrays(np.float64, st.integers(0, 60), elements=st.floats())
finite_floats = npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=False, allow_infinity=False))
# Values of one sign and a few octaves, as real columns have them: the error bound speaks of normal numbers.
ordinary = npst.arrays(np.float64, st.integers(1, 200), elements=st.floats(1e-3, 1e6) | st.floats(-1e6, -1e-3))
unit = st.floats(0, 1)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Float64Array, list[Float64Array]]:
    """Values, and the same values shuffled and cut into blocks."""
    values = draw(any_floats)
    shuffled = values[draw(st.permutations(range(len(values))))]
    cuts = sorted(draw(st.lists(st.integers(0, len(values)), max_size=5)))
    return values, np.split(shuffled, cuts)


@given(case=partitions(), capacity=st.sampled_from([2, 3, 7, 16384]), chain=st.booleans())
def test_partition_and_order_leave_no_trace(
    case: tuple[Float64Array, list[Float64Array]], capacity: int, chain: bool
) -> None:
    values, blocks = case
    whole = QuantileSketch.of(values, capacity)
    parts = [QuantileSketch.of(block, capacity) for block in blocks]
    merged = QuantileSketch.merge_all(parts)
    if chain:
        merged = parts[0]
        for part in parts[1:]:
            merged = part.merge(merged)
    assert merged == whole
    assert len(merged.counts) <= capacity
    assert merged.count == np.count_nonzero(np.isfinite(values))


@given(arrays=st.tuples(any_floats, any_floats, any_floats), capacity=st.sampled_from([2, 5, 16384]))
def test_merging_is_associative_and_commutative(arrays: tuple[Float64Array, ...], capacity: int) -> None:
    a, b, c = (QuantileSketch.of(array, capacity) for array in arrays)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))


def test_merging_many_blocks_in_groups_changes_nothing() -> None:
    values = np.random.default_rng(3).normal(size=5000)
    parts = [QuantileSketch.of(block, 100) for block in np.array_split(values, 300)]
    assert QuantileSketch.merge_all(reversed(parts)) == QuantileSketch.of(values, 100)


@given(values=finite_floats, levels=st.lists(unit, max_size=9))
def test_exact_quantiles_are_numpys(values: Float64Array, levels: list[float]) -> None:
    sketch = QuantileSketch.of(values)
    assert sketch.is_exact
    assert sketch.level == 0
    with np.errstate(all="ignore"):
        expected = np.quantile(values, levels)
    ours = sketch.quantiles(levels)
    # Where numpy's difference of two huge values overflows, ours stays between the values.
    sound = np.isfinite(np.quantile(values / 4, levels) * 4) & np.isfinite(expected)
    assert np.array_equal(ours[sound], expected[sound])
    assert np.all(np.isfinite(ours))


@given(values=ordinary, capacity=st.sampled_from([150, 16384]), rank=st.integers(0, 199))
def test_order_statistics_stay_within_the_stated_bound(values: Float64Array, capacity: int, rank: int) -> None:
    sketch = QuantileSketch.of(values, capacity)
    expected = np.sort(values)[rank % len(values)]
    found = sketch.order_statistics([rank % len(values)])[0]
    assert sketch.level <= 52
    assert abs(found - expected) <= 2.0 ** (sketch.level - 52) * abs(expected)


def test_a_million_values_are_within_a_thousandth() -> None:
    values = np.random.default_rng(0).lognormal(size=1_000_000)
    sketch = QuantileSketch.of(values)
    levels = np.linspace(0, 1, 1001)
    assert not sketch.is_exact
    assert len(sketch.counts) <= 16384
    np.testing.assert_allclose(sketch.quantiles(levels), np.quantile(values, levels), rtol=1e-3)
    assert sketch.quantiles([0, 1]).tolist() == [values.min(), values.max()]


def test_frequent_values_stay_exact_when_others_are_coarsened() -> None:
    values = np.concatenate([np.zeros(5000), np.full(3000, 12.34), np.random.default_rng(1).random(50_000) + 20])
    sketch = QuantileSketch.of(values, 4096)
    assert sketch.level > 0
    assert sketch.histogram([0, 12.34, 12.34, 20, 21]).tolist() == [5000, 0, 3000, 50_000]


@given(values=finite_floats, edges=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8).map(sorted))
def test_exact_histogram_is_numpys(values: Float64Array, edges: list[float]) -> None:
    assert np.array_equal(QuantileSketch.of(values).histogram(edges), np.histogram(values, edges)[0])


@given(values=finite_floats, edges=st.lists(st.floats(allow_nan=False), max_size=6, unique=True).map(sorted))
def test_open_bins_lose_no_value_even_when_coarse(values: Float64Array, edges: list[float]) -> None:
    inner = [edge for edge in edges if math.isfinite(edge)]
    counts = QuantileSketch.of(values, 8).histogram([-np.inf, *inner, np.inf])
    assert counts.sum() == len(values)
    assert np.all(counts >= 0)


def test_coarse_histogram_is_close() -> None:
    values = np.random.default_rng(5).normal(size=200_000)
    edges = np.linspace(-3, 3, 21)
    error = QuantileSketch.of(values).histogram(edges) - np.histogram(values, edges)[0]
    assert np.abs(error).max() <= 20  # of 200,000


def test_odd_values() -> None:
    sketch = QuantileSketch.of(np.array([-0.0, 0.0, np.nan, np.inf, -np.inf, 5e-324, -5e-324]))
    assert sketch.count == 4
    assert sketch.lows.tolist() == [-5e-324, 0.0, 5e-324]
    assert not np.signbit(sketch.lows[1])
    empty = QuantileSketch.of(np.empty(0))
    assert np.isnan(empty.quantiles([0.5])).all()
    assert empty.histogram([0, 1]).tolist() == [0]
    assert empty.merge(sketch) == sketch == QuantileSketch.merge_all([sketch])
    assert QuantileSketch.merge_all([]) == empty


def test_input_is_left_alone_and_pickles_are_small() -> None:
    values = np.random.default_rng(2).normal(size=100_000)
    before = values.copy()
    sketch = QuantileSketch.of(values)
    assert np.array_equal(values, before)
    pickled = pickle.dumps(sketch)
    assert len(pickled) < 300_000
    assert pickle.loads(pickled) == sketch


@pytest.mark.parametrize(
    "make",
    [QuantileSketch.of, lambda values: DistinctSketch.of(values.astype(np.uint64))],
    ids=["quantile", "distinct"],
)
def test_sketches_compare_by_content(make: Callable[[Any], Any]) -> None:
    assert make(np.array([1.0, 2.0])) == make(np.array([2.0, 1.0]))
    assert make(np.array([1.0, 2.0])) != make(np.array([1.0]))
    assert make(np.array([1.0])) != 1


@given(values=st.lists(st.integers(0, 300)), cut=st.integers(0, 50), k=st.sampled_from([8, 64, 2048]))
def test_distinct_partition_leaves_no_trace(values: list[int], cut: int, k: int) -> None:
    hashes = stable_hash(pa.array(values, pa.int64()))
    whole = DistinctSketch.of(hashes, k)
    parts = [DistinctSketch.of(hashes[cut:], k), DistinctSketch.of(hashes[:cut], k)]
    assert DistinctSketch.merge_all(parts) == DistinctSketch.merge_all(parts[::-1]) == whole
    if len(set(values)) < k:
        assert whole.is_exact
        assert whole.count == len(set(values))


@pytest.mark.parametrize("distinct", [2047, 2048, 10_000, 300_000])
@pytest.mark.parametrize("repeats", [1, 3])
def test_distinct_estimate_is_within_four_sigma(distinct: int, repeats: int) -> None:
    hashes = np.repeat(stable_hash(pa.array(np.arange(distinct))), repeats)
    sketch = DistinctSketch.of(hashes)
    assert sketch.is_exact == (distinct < 2048)
    assert abs(sketch.count - distinct) <= (0 if sketch.is_exact else 4 * distinct / math.sqrt(2046))


def test_distinct_of_one_value_repeated_often() -> None:
    assert DistinctSketch.of(np.full(100_000, 7, dtype=np.uint64)).count == 1


def top(values: list[str], capacity: int = 3) -> TopValues:
    distinct, counts = pa.array(values, pa.string()).value_counts().flatten()
    return TopValues.of(distinct, counts, capacity=capacity, longest=4)


TOP_CASES = [
    (["a", "b", "a"], {"a": 2, "b": 1}),
    ([], {}),
    (["a", "b", "c", "d"], None),  # one distinct value too many
    (["a", "ééé"], None),  # six bytes: too long
]


@pytest.mark.parametrize(("values", "counts"), TOP_CASES)
def test_top_values(values: list[str], counts: dict[str, int] | None) -> None:
    assert top(values).counts == counts


@given(values=st.lists(st.sampled_from("abcdefg")), cut=st.integers(0, 20))
def test_top_values_partition_leaves_no_trace(values: list[str], cut: int) -> None:
    parts = [top(values[:cut], 5), top(values[cut:], 5)]
    assert TopValues.merge_all(parts) == TopValues.merge_all(parts[::-1]) == top(values, 5)


def test_top_ties_are_ordered_by_value() -> None:
    assert top(["b", "a", "c", "c"]).top(2) == (("c", 2), ("a", 1))


@given(case=partitions())
def test_moments_partition_leaves_no_trace(case: tuple[Float64Array, list[Float64Array]]) -> None:
    values, blocks = case
    whole = Moments.of(values[np.isfinite(values)])
    assert Moments.merge_all(Moments.of(block[np.isfinite(block)]) for block in blocks) == whole


@given(values=finite_floats)
def test_moments_are_exact(values: Float64Array) -> None:
    exact = [Fraction(value) for value in values.tolist()]
    moments = Moments.of(values)
    assert moments.mean == float(sum(exact) / len(exact))
    if len(exact) > 1:
        root = math.isqrt(int(statistics.variance(exact) * 4**1200))
        assert moments.std == pytest.approx(root / 2**1200 if root < 2**2224 else math.inf, rel=1e-15)
    else:
        assert moments.std is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_moments_of_many_values(seed: int) -> None:
    values = np.random.default_rng(seed).normal(1e9, 1e-3, size=600_000)
    moments = Moments.of(values)
    assert moments.mean == pytest.approx(math.fsum(values) / len(values), rel=2e-16)
    assert moments.std == pytest.approx(np.std(values - 1e9, ddof=1), rel=1e-9)


def test_moments_of_nothing() -> None:
    assert Moments.of(np.empty(0)) == Moments() == Moments.merge_all([])
    assert Moments().mean is None
    assert Moments().std is None
    assert Moments.of(np.full(3, 0.1)).std == 0.0
