"""A flow by hand: its command, and what it says of a run that ends well, fails or is stopped."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tasks.by_hand import FAILED, one_sentence, run_by_hand, summary
from tasks.core import versions
from tasks.core.errors import GateFailed, SourceError
from tasks.core.manifest import RowBalance
from tasks.publication import PublishedVersion
from tests.processes import own_home, shell_environment

FEATURES = ("flows.feature_store:feature_store", "tasks.features.config:FeatureStoreConfig")
Finished = subprocess.CompletedProcess[str]
ANSI = "\x1b["


@pytest.fixture
def shell(prefect_home: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Run the flow's command as somebody does in a shell, in an empty directory."""

    def run(*argv: str) -> Finished:
        home = tmp_path / "home"
        return subprocess.run(
            [sys.executable, "-m", "flows.feature_store", *argv],
            env=shell_environment(home if home.exists() else own_home(prefect_home, home)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    return run


def test_the_command_shows_its_help(shell: Callable[..., Finished]) -> None:
    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m flows.feature_store ")


# The end of a run


def test_a_failure_is_one_sentence_with_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = SourceError("x.parquet has no column\n 'amount'")
    fault.add_note("in groups.yaml")
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = fault
    assert one_sentence(wrapped) == "x.parquet has no column 'amount' (in groups.yaml)"
    assert one_sentence(ValueError("first\nlast")) == "ValueError: last"
    assert one_sentence(ValueError()) == "ValueError: ValueError"
    lost = RuntimeError("no slots")
    lost.__cause__ = httpx.ConnectError("refused")
    monkeypatch.setenv("PREFECT_API_URL", "http://away/api")
    assert one_sentence(lost).startswith("the Prefect API at http://away/api can't be reached (ConnectError); start it")
    circle = RuntimeError("round")
    circle.__cause__ = circle
    assert one_sentence(circle) == "RuntimeError: round"
    assert one_sentence(GateFailed("The gate failed.")) == "The gate failed."


def test_the_summary_says_where_how_many_and_why_not_more() -> None:
    balance = RowBalance(
        name="transactions",
        rows_in=1_234,
        rows_out=1_200,
        rejected={"null_amount": 30},
        filtered={"after_as_of": 3},
        deduplicated=1,
    )
    version = PublishedVersion("feature-store/x", 3, "/data/x/v3", "/data/x/v3/_report.html", "warn", 1_200, (balance,))
    assert summary([version]).splitlines() == [
        "feature-store/x v3: 1,200 rows, verdict warn",
        "  data     /data/x/v3",
        "  report   /data/x/v3/_report.html",
        "  balance  transactions: 1,234 in, 1,200 out, 30 rejected (30 null_amount), 3 filtered (3 after_as_of), "
        "1 deduplicated",
    ]


def assert_tidy(done: Finished) -> None:
    for name, text in (("stdout", done.stdout), ("stderr", done.stderr)):
        assert ANSI not in text, f"colour codes in {name}, which is no terminal"
        assert "pid=" not in text, f"Ray's prefixes in {name}"
        assert "Traceback" not in text, f"a traceback in {name}"
        assert "Warning: " not in text, f"a warning of a library in {name}:\n{text}"
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)), f"a line is there twice:\n{done.stderr}"


QUICK = ["--sample-transactions", "1000", "--groups", "product-features"]


@pytest.mark.slow
def test_what_a_person_sees_of_a_good_run_and_of_one_that_fails(shell: Callable[..., Finished], tmp_path: Path) -> None:
    good = shell(*QUICK)
    assert good.returncode == 0, good.stderr
    assert_tidy(good)
    assert good.stdout.startswith("feature-store/product-features v1: 10 rows, verdict ")
    assert "  balance  transactions: 1,000 in, " in good.stdout
    assert re.search(r"\nfinished in \d+ s\n$", good.stdout)
    assert "http" not in good.stderr, "the address of a server that is gone"
    assert versions.published_versions(str(tmp_path / "data"), "feature-store/product-features") == [1]

    refused = shell(*QUICK, "--thresholds.rejected-warn", "0", "--thresholds.rejected-fail", "0")
    assert (refused.returncode, refused.stdout) == (FAILED, "")
    assert_tidy(refused)
    told = [line for line in refused.stderr.splitlines() if "The quality gate failed" in line]
    assert told == refused.stderr.splitlines()[-1:], "the sentence is there more than once, or isn't the last line"
    assert re.match(r"failed: The quality gate failed, nothing was published\. .*_report\.html$", told[0])
    assert refused.stderr.count("Finished in state Failed\n") == 2, "of the task and of the flow"


def test_a_run_that_fails_ends_with_one_sentence(stack: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "--root", str(tmp_path), "--transactions", str(tmp_path / "nowhere.parquet")]
    assert run_by_hand(*FEATURES, argv) == FAILED
    told = capfd.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    sentences = re.findall(r"^failed: (.*)$", told.err, re.MULTILINE)
    assert len(sentences) == 1, told.err
    assert re.match(r"transactions '\S+nowhere\.parquet': no \.parquet or \.csv file found .*; give a", sentences[0])
    with pytest.raises(SourceError, match="file found"):
        run_by_hand(*FEATURES, [*argv, "--debug"])
    assert "failed: " not in capfd.readouterr().err, "the traceback tells it"


def test_an_interrupted_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.local_api.local_stack", interrupted)
    assert run_by_hand(*FEATURES, []) == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was published\n"


def test_every_cure_of_a_failed_gate_names_an_option_that_exists() -> None:
    from tasks.feature_store import _CURES
    from tasks.features.config import Thresholds

    options = {f"--thresholds.{name.replace('_', '-')}" for name in Thresholds.model_fields} | {"--allow-schema-change"}
    named = {option for cure in _CURES.values() for option in re.findall(r"--[a-z.-]+[a-z]", cure)}
    assert named
    assert named <= options
