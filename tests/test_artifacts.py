"""Keys and values as tables; then artifacts written by real runs and read back from a real API."""

import datetime as dt
import json
import logging
import math
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State

from tasks import artifacts
from tasks.artifacts import artifact_slug, json_safe, progress, publish_report, read_artifacts, show_progress
from tasks.io.errors import ConfigError
from tasks.runner import ray_runner


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("feature-store/customer-features", "feature-store-customer-features"),
        ("Images", "images"),
        ("a__b//c..d", "a-b-c-d"),
        ("/leading/", "leading"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert artifact_slug(name) == slug


def test_names_that_lose_letters_stay_apart() -> None:
    slugs = {artifact_slug(name) for name in ("größe", "grosse", "grobe", "画像", "特徴", "///")}
    assert len(slugs) == 6
    assert all(slug.isascii() and slug == slug.lower() and slug.strip("-") == slug for slug in slugs)


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        artifact_slug(" ")


@pytest.mark.parametrize(
    ("value", "safe"),
    [
        (math.nan, None),
        (math.inf, "inf"),  # JSON has no infinity, and the UI then shows no table at all
        (-math.inf, "-inf"),
        (np.float32("nan"), None),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array([1.0, math.nan]), [1.0, None]),
        (np.datetime64("2024-02-29T12:00:00.000000001"), "2024-02-29T12:00:00.000000001"),
        (dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC), "2024-02-29T12:00:00+00:00"),
        (dt.date(2024, 2, 29), "2024-02-29"),
        (dt.timedelta(seconds=90), "0:01:30"),
        (Decimal("1.10"), "1.10"),
        (Path("a/b"), "a/b"),
        ({1: {"x": math.inf}}, {"1": {"x": "inf"}}),
        ((1, {3, 2}), [1, [2, 3]]),
        ("x" * 501, "x" * 499 + "…"),
        (None, None),
    ],
    ids=repr,
)
def test_values_that_json_can_hold(value: object, safe: object) -> None:
    assert json_safe(value) == safe
    json.dumps(json_safe(value), allow_nan=False)


def by_key(flow_run_id: UUID) -> dict[str | None, Any]:
    return {artifact.key: artifact for artifact in read_artifacts(flow_run_id)}


def run_id(state: State) -> UUID:
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


def test_a_report_is_read_back_as_it_was_published(prefect_api: str) -> None:
    checks = [{"check": "nulls", "figure": math.nan, "bound": math.inf, "at": dt.date(2024, 1, 1), "n": np.int64(3)}]

    @task
    def report() -> None:
        publish_report("store/Customers", "# Passed", checks, "https://example.org/report.html")

    @flow
    def reporting() -> None:
        report()

    flow_run_id = run_id(reporting(return_state=True))
    found = by_key(flow_run_id)
    assert set(found) == {"store-customers-report", "store-customers-checks", "store-customers-link"}
    assert found["store-customers-report"].data.startswith("# Passed\n")
    assert "https://example.org/report.html" in found["store-customers-link"].data
    table = json.loads(found["store-customers-checks"].data)
    assert table == [{"check": "nulls", "figure": None, "bound": "inf", "at": "2024-01-01", "n": 3}]
    assert all(artifact.task_run_id is not None for artifact in found.values())


def test_a_place_that_no_browser_opens_is_named_in_the_text(prefect_api: str) -> None:
    @flow
    def reporting() -> None:
        publish_report("images", "fine", [{"check": n} for n in range(501)], "s3://bucket/images/v1/_report.html")

    found = by_key(run_id(reporting(return_state=True)))
    assert set(found) == {"images-report", "images-checks"}
    assert "Full report: `s3://bucket/images/v1/_report.html`" in found["images-report"].data
    assert len(json.loads(found["images-checks"].data)) == 500
    assert "the first 500 of 501" in found["images-checks"].description


def test_long_reports_lose_their_pictures_first_then_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "MAX_MARKDOWN_BYTES", 300)
    pictured = artifacts._capped("# Title\n![histogram](data:image/png;base64," + "A" * 400 + ")\nend")
    assert "data:image" not in pictured
    assert "histogram" in pictured
    assert pictured.endswith("end")
    long = artifacts._capped("\n".join(f"zeile {n} größer" for n in range(100)))
    assert len(long.encode()) <= 300
    assert long.startswith("zeile 0 größer\nzeile 1")
    assert "cut for its size" in long


def test_progress_of_a_job_in_a_ray_task(stack: str) -> None:
    @task
    def job(rows: int, fails: bool) -> None:
        with progress("Counting", total=rows) as advance:
            for _ in range(rows):
                advance()
                if fails:
                    raise ValueError("no")

    @flow(task_runner=ray_runner())
    def counting() -> None:
        job.submit(1000, False).result()
        job.submit(1000, True).wait()

    done, failed = read_artifacts(run_id(counting(return_state=True)), kind="progress")
    assert (float(done.data), float(failed.data)) == (100, 0.1)
    assert done.description.startswith("Counting: 1,000 of 1,000 rows")
    assert failed.description.endswith("stopped by ValueError")


def test_progress_is_written_at_most_every_other_second(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def write(percent: float, description: str) -> UUID:
        shown.append((percent, description))
        return UUID(int=1)

    monkeypatch.setattr(artifacts, "create_progress_artifact", write)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, *args, **named: write(*args, **named))

    @flow
    def counting() -> None:
        clock = iter(np.arange(0, 1e6, 0.5))
        monkeypatch.setattr(artifacts.time, "monotonic", lambda: float(next(clock)))
        with progress("Counting", total=100) as advance:
            for _ in range(100):
                advance()
        monkeypatch.undo()

    counting()
    assert shown[0] == (0, "Counting: started")
    assert shown[-1][0] == 100
    assert 20 < len(shown) < 50  # 100 calls, half a second or more apart


def test_progress_outside_a_run_or_without_an_api_stops_nothing(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with progress("Alone") as advance:
        advance(3)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise artifacts.httpx.ConnectError("no API")

    monkeypatch.setattr(artifacts, "create_progress_artifact", unreachable)

    @flow
    def counting() -> int:
        with progress("Lost", unit="files") as advance:
            advance(3)
            return advance.done

    with caplog.at_level(logging.WARNING):
        assert counting() == 3
    assert "Progress of 'Lost' isn't shown: no API" in caplog.text


def test_the_terminal_shows_what_the_artifacts_say(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import time

    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.2)

    @flow
    def counting() -> None:
        from prefect.runtime import flow_run

        with artifacts._bars(UUID(flow_run.id)), progress("Counting", total=10) as advance:
            advance(4)
            advance.show("Counting: 4 of 10 rows")
            time.sleep(1)

    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws bars only on what looks like a terminal
    counting()
    assert "Counting: 4 of 10 rows" in capsys.readouterr().err
    with show_progress(UUID(int=0)):
        pass  # stderr is no terminal here: nothing is polled, or this would ask for an unknown run
