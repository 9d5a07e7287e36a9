"""Tables that the tests make of what they have seen: what happens to which flow when something goes wrong.

A test says at its end `proven(row, column, result)`. When every test of a directory has passed, its README.md must
have exactly this table between its marks; `--write-tables` writes it there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import pytest

COLUMNS = ("image-augmentation", "feature-store", "training-delivery", "publishing")
BEGIN, END = "<!-- table: made by the tests, --write-tables -->", "<!-- end of table -->"

Proof = tuple[str, str, str]
Proven = Callable[[str, str, str], None]

_OF_TEST = pytest.StashKey[list[Proof]]()
_SEEN = pytest.StashKey[dict[Path, list[Proof]]]()
_INCOMPLETE = pytest.StashKey[set[Path]]()


@pytest.fixture
def proven(request: pytest.FixtureRequest) -> Proven:
    """Note a result (row, column of `COLUMNS`, a few words); it counts if the test passes."""

    def note(row: str, column: str, result: str) -> None:
        assert column in COLUMNS, f"{column} is no column of the table"
        request.node.stash.setdefault(_OF_TEST, []).append((row, column, result))

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables in the README.md beside the tests")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):  # such as the same test with more examples
            continue
        item.config.stash.setdefault(_INCOMPLETE, set()).add(item.path.parent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.passed:
        item.config.stash.setdefault(_INCOMPLETE, set()).add(item.path.parent)
    elif report.when == "call":
        item.config.stash.setdefault(_SEEN, {}).setdefault(item.path.parent, []).extend(item.stash.get(_OF_TEST, []))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    seen, incomplete = session.config.stash.get(_SEEN, {}), session.config.stash.get(_INCOMPLETE, set())
    collected = {item.path for item in session.items}
    for directory, proofs in seen.items():
        whole = directory not in incomplete and set(directory.glob("test_*.py")) <= collected
        if not proofs or not whole:
            continue
        readme = directory / "README.md"
        before = readme.read_text()
        after = replaced(before, table(proofs))
        if session.config.getoption("--write-tables"):
            readme.write_text(after)
        elif before != after:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print(
                f"\n{readme} has another table than the tests have seen; --write-tables writes this:\n{table(proofs)}"
            )


def table(proofs: Iterable[Proof]) -> str:
    """A Markdown table: one row a fault, one column a flow; rows by name, '–' where nothing was tried."""
    cells: dict[str, dict[str, dict[str, None]]] = {}
    for row, column, result in sorted(proofs):
        cells.setdefault(row, {}).setdefault(column, {})[result] = None
    columns = [column for column in COLUMNS if any(column in row for row in cells.values())]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *("; ".join(row.get(column, {"–": None})) for column in columns)] for name, row in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replaced(text: str, made: str) -> str:
    """A README with this table between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"the README has no {BEGIN} … {END}"
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"
