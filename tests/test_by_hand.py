"""A flow by hand: its command, and what it says of a run that ends well, fails or is stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest

from tasks.by_hand import one_sentence, run_by_hand, stops_unwind, summary
from tasks.io.errors import FAILED, GateFailed, SourceError
from tasks.kinds import kind_of
from tasks.publication import PublishedVersion
from tasks.store import layout, versions
from tasks.store.manifest import RowBalance
from tests.processes import own_home, ran, shell_environment

FEATURES = ("flows.feature_store:feature_store", "tasks.features.config:FeatureStoreConfig")
Finished = subprocess.CompletedProcess[str]
ANSI = "\x1b["


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Finished]:
    """Run the flow's command as somebody does in a shell, in an empty directory."""

    def run(*argv: str) -> Finished:
        home = tmp_path / "home"
        environment = shell_environment(home if home.exists() else own_home(home))
        return ran([sys.executable, "-m", "flows.feature_store", *argv], 180, env=environment, cwd=tmp_path)

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


STOPPED_IN_IMPORTS = """
import os, signal, sys
from tasks.by_hand import run_by_hand

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "prefect_ray":
            os.kill(os.getpid(), signal.{number})

sys.meta_path.insert(0, Stop())
sys.exit(run_by_hand("flows.feature_store:feature_store", "tasks.features.config:FeatureStoreConfig", []))
"""


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_stop_while_libraries_are_imported(number: str, code: int, word: str, tmp_path: Path) -> None:
    program = STOPPED_IN_IMPORTS.format(number=number)
    done = ran([sys.executable, "-c", program], 60, cwd=tmp_path, env=shell_environment(tmp_path / "home"))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(f"\n{word}: nothing was published\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_signal_that_another_thread_receives_ends_the_wait_for_a_task() -> None:
    """The kernel may choose any thread; a wait without end in the main thread wouldn't hear of it."""
    outcome = Future[object]()
    from tasks.runner import RayJobFuture

    future = RayJobFuture(uuid4(), SimpleNamespace(future=lambda: outcome), task=None, flow_run=None)
    future.wait(0.01)
    assert future._final_state is None
    stop = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    give_up = threading.Timer(10, outcome.set_result, [None])
    stop.start()
    give_up.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        future.wait()
    give_up.cancel()
    assert time.monotonic() - started < 8


def stop_at_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.runner import RayJobFuture

    wait = RayJobFuture.wait

    def stopped(self: RayJobFuture, timeout: float | None = None) -> None:
        if self.task.name == "compute-features" and timeout is None:
            signal.raise_signal(signal.SIGINT)
        wait(self, timeout)

    monkeypatch.setattr(RayJobFuture, "wait", stopped)


def stop_at_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = versions.commit

    def stopped(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return commit(*arguments)

    monkeypatch.setattr("tasks.publication.versions.commit", stopped)


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize(
    ("arm", "told"),
    [
        (stop_at_compute, "nothing was published"),
        (stop_at_commit, "feature-store/product-features v1 was published, nothing else"),
    ],
)
def test_a_stop_of_a_run(
    arm: Callable[[pytest.MonkeyPatch], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arm(monkeypatch)
    monkeypatch.setattr("tasks.by_hand.stops_unwind", partial(stops_unwind, grace=300))  # a busy machine takes longer
    assert run_by_hand(*FEATURES, [*QUICK, "--no-self-test", "--root", str(tmp_path)]) == 130
    errors = capfd.readouterr().err
    assert errors.endswith(f"\ninterrupted: {told}\n")
    assert "Traceback" not in errors
    published = versions.published_versions(str(tmp_path), "feature-store/product-features")
    assert published == ([1] if "v1" in told else [])


@pytest.mark.parametrize("place", layout.KINDS)
def test_every_cure_of_a_failed_gate_names_an_option_that_exists(place: str) -> None:
    kind = kind_of(f"{place}/x")
    options = {f"--{name}" for name in kind.config.model_fields}
    for part in ("thresholds", "label_thresholds"):
        if part in kind.config.model_fields:
            options |= {f"--{part}.{name}" for name in type(getattr(kind.config(), part)).model_fields}
    # Of a kind that is published from Python, arguments: thresholds.drift_fail.
    spelled = re.findall(r"--([a-z.-]+[a-z])|(thresholds\.[a-z_]+|[a-z_]+(?==))", " ".join(kind.cures.values()))
    named = {f"--{option or argument}".replace("_", "-") for option, argument in spelled}
    assert named
    assert named <= {option.replace("_", "-") for option in options}
