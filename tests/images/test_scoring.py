"""Each issue is found where it is and nowhere else; the score follows from the issues alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.images.config import ImageThresholds
from tasks.images.engines import FATAL, ISSUES, ISSUES_TYPE, MINOR, Measured, Scored, measure, score
from tasks.io.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def judge(count: int = 1, classes: int = 3, **changes: Any) -> Scored:
    """Judge good variants, but for the changes."""
    figures: dict[str, Any] = {"mean": 120.0, "std": 50.0, "finite": True}
    found = {
        name: np.full(count, changes.pop(name, value), bool if name == "finite" else np.float32)
        for name, value in figures.items()
    }
    measured = Measured(**found, levels=changes.pop("levels", True))
    magnification = np.full(count, changes.pop("magnification", 1.0), np.float32)
    class_ids = np.full(count, changes.pop("class_id", 0), np.int32)
    thresholds = ImageThresholds(**changes.pop("thresholds", {}))
    assert not changes
    return score(measured, magnification, class_ids, classes, thresholds)


CASES: list[tuple[str, dict[str, Any], list[str], float]] = [
    # why, what is changed, issues, score
    ("good", {}, [], 1.0),
    ("a NaN among the values", {"finite": False}, ["not_finite"], 0.0),
    ("a NaN among the figures", {"mean": np.nan}, ["not_finite"], 0.0),
    ("an infinite figure", {"std": np.inf}, ["not_finite"], 0.0),
    ("constant: that its contrast is low goes without saying", {"std": 1.9}, ["constant"], 0.0),
    ("just not constant", {"std": 2.0}, ["low_contrast"], 0.625),
    ("constant and black", {"std": 0.0, "mean": 0.0}, ["constant", "dark"], 0.0),
    ("no class", {"class_id": -1}, ["bad_label"], 0.0),
    ("a class too many", {"class_id": 3}, ["bad_label"], 0.0),
    ("the last class", {"class_id": 2}, [], 1.0),
    ("low contrast", {"std": 9.9}, ["low_contrast"], 0.625),
    ("enough contrast", {"std": 10.0}, [], 1.0),
    ("dark", {"mean": 15.9}, ["dark"], 0.625),
    ("not quite dark", {"mean": 16.0}, [], 1.0),
    ("bright", {"mean": 239.1}, ["bright"], 0.625),
    ("not quite bright", {"mean": 239.0}, [], 1.0),
    ("magnified", {"magnification": 4.1}, ["magnified"], 0.75),
    ("not quite magnified", {"magnification": 4.0}, [], 1.0),
    ("a policy doesn't tell", {"magnification": np.nan}, [], 1.0),
    ("dark, and magnified", {"mean": 3, "magnification": 9}, ["dark", "magnified"], 0.375),
    ("dark, and low in contrast", {"mean": 3, "std": 3}, ["low_contrast", "dark"], 0.25),
    ("all that is minor", {"mean": 3, "std": 3, "magnification": 9}, ["low_contrast", "dark", "magnified"], 0.0),
    ("values of unknown scale: neither dark nor of low contrast", {"levels": False, "mean": 0.0, "std": 0.5}, [], 1.0),
    ("values of unknown scale, all the same", {"levels": False, "mean": 9.0, "std": 0.0}, ["constant"], 0.0),
]


@pytest.mark.parametrize(("why", "changes", "issues", "expected"), CASES, ids=[case[0] for case in CASES])
def test_issues(why: str, changes: dict[str, Any], issues: list[str], expected: float) -> None:
    found = judge(**changes)
    assert found.issues.to_pylist() == [issues]
    assert found.score.tolist() == [expected]
    assert found.passed.tolist() == [not set(issues) & set(FATAL)]
    assert found.ready.tolist() == [expected >= 0.5]
    assert (found.score.dtype, found.passed.dtype, found.ready.dtype) == (np.float32, bool, bool)
    assert found.issues.type == ISSUES_TYPE


def test_every_issue_has_a_case() -> None:
    assert {issue for _, _, issues, _ in CASES for issue in issues} == set(ISSUES)


def test_one_minor_issue_leaves_a_variant_ready_and_any_two_do_not() -> None:
    weights = list(MINOR.values())
    assert all(1 - weight >= 0.5 for weight in weights)
    assert all(1 - one - two < 0.5 for n, one in enumerate(weights) for two in weights[n + 1 :])


def test_a_bound_of_zero_takes_all_but_the_invalid() -> None:
    lenient = {"thresholds": {"score": 0.0}}
    assert judge(mean=3, std=3, magnification=9, **lenient).ready.tolist() == [True]
    assert judge(finite=False, **lenient).ready.tolist() == [False]


odd = st.sampled_from([np.nan, np.inf, 0.0, 1.0, 2.5, 12.0, 128.0, 250.0, 1e30])


@given(rows=st.lists(st.tuples(odd, odd, odd, st.integers(-2, 5)), max_size=12), cut=st.integers(0, 12))
def test_each_variant_is_judged_alone(rows: list[tuple[float, float, float, int]], cut: int) -> None:
    def judged(part: list[tuple[float, float, float, int]]) -> list[tuple[Any, ...]]:
        mean, std, magnification, ids = (np.array([row[n] for row in part], np.float32) for n in range(4))
        found = score(Measured(mean=mean, std=std), magnification, ids.astype(np.int32), 4, ImageThresholds())
        return list(
            zip(
                found.score.tolist(), found.passed.tolist(), found.issues.to_pylist(), found.ready.tolist(), strict=True
            )
        )

    together = judged(rows)
    assert together == judged(rows[:cut]) + judged(rows[cut:])
    for value, passed, issues, ready in together:
        assert passed == (not set(issues) & set(FATAL))
        assert value == (1 - sum(MINOR[name] for name in issues) if passed else 0)
        assert ready == (passed and value >= 0.5)
        assert issues == [name for name in ISSUES if name in issues]


uint8 = hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.just(3), st.integers(1, 5), st.integers(1, 5)))
floats = hnp.arrays(np.float32, (2, 3, 3, 4), elements=st.floats(-1e6, 1e6, width=32))


@given(images=uint8)
def test_figures_of_levels_agree_with_numpy(images: np.ndarray) -> None:
    found = measure(images)
    for row, image in enumerate(images):
        assert found.mean[row] == np.float32(image.mean(dtype=np.float64))
        assert found.std[row] == pytest.approx(image.std(dtype=np.float64), rel=1e-6, abs=1e-6)
    assert len(found.mean) == len(images)
    assert found.levels


@given(images=floats)
def test_figures_of_floats_agree_with_numpy(images: np.ndarray) -> None:
    found = measure(images)
    assert not found.levels
    for row, image in enumerate(images):
        wanted = (image.mean(dtype=np.float64), image.std(dtype=np.float64))
        assert (found.mean[row], found.std[row]) == pytest.approx(wanted, rel=1e-5)
    assert found.finite is not None
    assert found.finite.all()


def test_normalised_values_are_measured_in_levels() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    normalised = ((levels / 255 - mean) / std).astype(np.float32)
    found, wanted = measure(normalised, MEAN, STD), measure(levels)
    assert found.levels
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-5)
    np.testing.assert_allclose(found.std, wanted.std, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("constants", [(None, None), (MEAN, STD)])
def test_one_value_that_is_not_finite_is_found(value: float, constants: tuple[Any, Any]) -> None:
    images = np.zeros((3, 3, 8, 8), np.float32)
    images[1, 2, 7, 7] = value
    found = measure(images, *constants)
    assert found.finite is not None
    assert found.finite.tolist() == [True, False, True]
    judged = score(found, np.ones(3, np.float32), np.zeros(3, np.int32), 1, ImageThresholds())
    assert ["not_finite" in issues for issues in judged.issues.to_pylist()] == [False, True, False]
    assert judged.issues.to_pylist()[1] == ["not_finite"]


def test_the_largest_floats_dont_overflow() -> None:
    found = measure(np.full((1, 3, 8, 8), np.finfo(np.float32).max, np.float32))
    assert found.mean.tolist() == [np.finfo(np.float32).max]
    assert found.std.tolist() == [0.0]


def test_real_pictures_of_one_colour_are_constant() -> None:
    images = np.full((3, 3, 8, 8), 200, np.uint8)
    images[1, 0, 0, 0] = 0  # one pixel of dirt: standard deviation 14
    images[2] = np.random.default_rng(0).integers(0, 256, images[2].shape)
    judged = score(measure(images), np.ones(3, np.float32), np.zeros(3, np.int32), 1, ImageThresholds())
    assert judged.issues.to_pylist() == [["constant"], [], []]


def test_no_variants() -> None:
    judged = score(measure(np.empty((0, 3, 8, 8), np.uint8)), *[np.empty(0, np.float32)] * 2, 3, ImageThresholds())
    assert [len(judged.score), len(judged.passed), len(judged.issues), len(judged.ready)] == [0] * 4
    assert len(measure(np.empty((0, 3, 8, 8), np.float32)).mean) == 0


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: measure(np.zeros((3, 8, 8), np.uint8)), r"variants of shape \(3, 8, 8\)"),
    (lambda: measure(np.zeros((2, 3, 0, 8), np.uint8)), r"variants of shape \(2, 3, 0, 8\)"),
    (lambda: measure(np.zeros((2, 3, 8, 8))), "variants of float64; they must be uint8 or float32"),
    (lambda: labelled(1), "figures of .1, 2. variants"),
    (lambda: labelled(3), "figures of .2, 3. variants"),
]


def labelled(labels: int) -> Scored:
    """Two variants with another number of labels."""
    measured = measure(np.zeros((2, 3, 8, 8), np.uint8))
    return score(measured, np.ones(2, np.float32), np.zeros(labels, np.int32), 3, ImageThresholds())


@pytest.mark.parametrize(("act", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()
