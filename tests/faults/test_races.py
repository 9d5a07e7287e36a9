"""Publishers that race for a dataset, on a local disk and on S3: numbers are dense, each version is whole."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tasks.io import storage
from tasks.store import layout, versions
from tests.faults.reader import Reader, reader
from tests.store import publishing
from tests.store.publishing import DATASET
from tests.store.test_versions import assert_whole, files_of, run_together
from tests.tables import Proven

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def onlooker(s3_url: str) -> Iterator[Reader]:
    """A reader who looks all the time while others publish."""
    with reader({"AWS_ENDPOINT_URL": s3_url}) as onlooker:
        yield onlooker


RACES = [
    ("local", 5, 100),
    ("s3", 5, 25),
    pytest.param("local", 2, 100, marks=pytest.mark.nightly),
    pytest.param("s3", 2, 100, marks=pytest.mark.nightly),
    pytest.param("s3", 5, 100, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("root", "publishers", "rounds"), RACES, indirect=["root"])
def test_racing_publishers_make_dense_whole_versions(
    root: str, onlooker: Reader, proven: Proven, publishers: int, rounds: int
) -> None:
    onlooker.watch(root)
    times = rounds // publishers
    results = run_together(publishing.race, [(root, f"p{number}", times) for number in range(publishers)])
    seen = onlooker.stop()
    assert not any(isinstance(mine, str) for mine in results), results
    assert not seen.problems, f"a reader met {seen.problems[:3]} in {seen.looks} looks"
    assert seen.latest[0] == 0
    assert seen.latest[-1] == rounds
    assert len(seen.latest) > 2, "the reader hasn't looked while they raced"

    expected = list(range(1, rounds + 1))
    assert sorted(version for mine in results for version in mine) == expected
    assert versions.published_versions(root, DATASET) == expected
    runs = [assert_whole(root, version) for version in expected]
    assert len(set(runs)) == rounds, "a run has published twice"
    for number, mine in enumerate(results):
        assert mine == sorted(mine)
        assert [runs[version - 1] for version in mine] == [f"p{number}-{turn}" for turn in range(times)]
    for version in expected:
        listed = {file.path for file in versions.resolve(root, DATASET, version).files}
        assert files_of(root, version) == listed | {layout.reservation_name(1), layout.MANIFEST}
    place = "on S3" if root.startswith("s3://") else "on a local disk"
    result = f"{rounds} whole versions, v1 to v{rounds}"
    proven(f"{publishers} publishers race, {rounds} rounds {place}", "publishing", result)


def test_five_processes_that_claim_to_be_one_run(root: str, onlooker: Reader, proven: Proven) -> None:
    for turn in range(2):
        place = f"{root}/{turn}"
        onlooker.watch(place)
        results = run_together(publishing.race_for_one_run, [(place,)] * 5)
        assert 1 in results, results
        others = [str(result) for result in results if result != 1]
        assert all(re.search(publishing.LOST_THE_RACE, other) for other in others), others
        assert versions.published_versions(place, DATASET) == [1]
        assert assert_whole(place, 1) == "same"
        seen = onlooker.stop()
        assert not seen.problems, f"a reader met {seen.problems[:3]} in {seen.looks} looks"
        assert seen.latest[-1] == 1
    where = "on S3" if storage.is_s3(root) else "on a local disk"
    proven(f"5 processes claim to be one run {where}", "publishing", "one publishes, the others are told of it")
