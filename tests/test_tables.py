"""The tables that tests make: a result that isn't claimed, or a claim that nobody shows, fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import PROJECT, ran_pytest
from tests.tables import BEGIN, END, claimed, parts, table

PROOFS = [("a disk is full", "publishing", "told; tried again"), ("a disk is full", "publishing", "told at once")]
TESTS = """
import pytest

def test_quick(proven):
    proven("a key is lost", "publishing", "refused")

@pytest.mark.nightly
def test_long(proven):
    proven("a key is lost", "publishing", "refused; named")

@pytest.mark.nightly
def test_of_something_else():
    pass

def test_skipped(proven):
    {skip}
"""
CLAIM = ("a key is lost", "publishing", "refused; named")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text("from tests.tables import proven, pytest_addoption, pytest_configure\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    nightly: x\n")
    write(tmp_path, CLAIM)
    return tmp_path


def write(folder: Path, *claims: tuple[str, str, str], skip: str = "pass") -> None:
    (folder / "README.md").write_text(f"{BEGIN}\n{table(parts(claims))}\n{END}\n")
    (folder / "test_it.py").write_text(TESTS.replace("{skip}", skip))


def run(folder: Path, *options: str) -> tuple[int, str]:
    environment = {"PYTHONPATH": str(PROJECT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    given = ("-p", "xdist.plugin", *options, str(folder))
    done = ran_pytest(*given, timeout=120, cwd=PROJECT, env=environment)
    return done.returncode, done.stdout


QUICK = ("-m", "not nightly")
MORE = ("another", "publishing", "refused")


@pytest.mark.parametrize(
    ("options", "claims", "status", "told"),
    [
        ((), [CLAIM], 0, "2 of 2 results seen"),
        (("-n2",), [CLAIM], 0, "2 of 2 results seen"),
        (QUICK, [CLAIM], 0, "1 of 2 results seen (test_long was left out)"),
        ((*QUICK, "-n2"), [CLAIM], 0, "1 of 2 results seen (test_long was left out)"),
        # One claim too many: found as soon as all have run.
        ((), [CLAIM, MORE], 1, "claimed, not seen: [('another', 'publishing', 'refused')]"),
        (("-n2",), [CLAIM, MORE], 1, "claimed, not seen: [('another', 'publishing', 'refused')]"),
        # One too few: found by whatever runs.
        (QUICK, [MORE], 1, "seen, not claimed: [('a key is lost', 'publishing', 'refused')]"),
    ],
)
def test_a_table_claims_what_was_seen(
    folder: Path, options: tuple[str, ...], claims: list[tuple[str, str, str]], status: int, told: str
) -> None:
    write(folder, *claims)
    found, output = run(folder, *options)
    assert (found, told in output) == (status, True), output


def test_a_skipped_test_leaves_a_note_and_other_files_too(folder: Path) -> None:
    write(folder, CLAIM, skip="pytest.skip('no disk')")
    assert "2 of 2 results seen (test_skipped: skipped)" in run(folder)[1]
    (folder / "test_other.py").write_text("def test_other(): pass\n")
    assert "(test_other.py was left out)" in run(folder / "test_it.py")[1]


def test_a_table_is_written_whole_or_added_to(folder: Path) -> None:
    write(folder, MORE)
    assert run(folder, *QUICK, "--write-tables")[0] == 0
    assert claimed((folder / "README.md").read_text()) == [("a key is lost", "publishing", "refused"), MORE]
    assert run(folder, "--write-tables")[0] == 0
    assert claimed((folder / "README.md").read_text()) == parts([CLAIM])


def test_a_table_can_be_read_back() -> None:
    text = f"# Title\n\n{BEGIN}\n{table(parts(PROOFS))}\n{END}\n"
    assert claimed(text) == [("a disk is full", "publishing", part) for part in ("told", "tried again", "told at once")]
