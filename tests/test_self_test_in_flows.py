"""What a flow makes of its self-test: it loses no version, and tells the one who ran it what the gate can't see."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tasks import publication
from tasks.by_hand import summary
from tasks.store.manifest import FaultResult, Manifest
from tests.features.test_self_test import data, written

BLIND = FaultResult(
    fault="nulls", injected="60% were made null.", outcome="blind", message="'nulls of a' still passes."
)
SEEN = FaultResult(fault="shift", injected="Shifted.", outcome="refused", caught_by=("drift of a",), message="PSI.")


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Manifest:
    monkeypatch.setattr(publication, "get_run_logger", lambda: logging.getLogger("run"))
    caplog.set_level(logging.INFO)
    return written(tmp_path, data(10))


def test_what_the_gate_notices_is_kept_and_logged(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    tested = publication.proven(manifest, lambda: (SEEN,))
    assert tested.self_test == (SEEN,)
    assert tested.gate == manifest.gate
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == "feature-store/spending: self-test: 1 of 1 fault refused"
    assert publication.published("root", tested).notes == ()


def test_a_blind_gate_is_a_warning_and_a_line_of_the_summary(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    tested = publication.proven(manifest, lambda: (SEEN, BLIND))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("self-test: 1 of 2 faults refused, blind to 1 (nulls)")
    lines = summary([publication.published("root", tested)]).splitlines()
    assert "  blind    the gate doesn't notice these faults: nulls; the report says why" in lines


def test_a_self_test_that_crashes_costs_no_version(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    def crash() -> tuple[FaultResult, ...]:
        raise RuntimeError("the disk is gone")

    tested = publication.proven(manifest, crash)
    assert (tested.status, tested.gate) == ("published", manifest.gate)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("self-test: The self-test failed: RuntimeError: the disk is gone")
    lines = summary([publication.published("root", tested)]).splitlines()
    assert "  blind    The self-test failed: RuntimeError: the disk is gone" in lines
