"""Tables that the tests make of what they have seen: what happens to which flow when something goes wrong.

A test says `proven(row, column, result)`. If it passes, the README.md of its directory must claim this between its
marks; and if every test of the directory that proves something has passed in this run, it must claim nothing else.
Some tests run in CI and some nightly, so that each run compares what it has seen, and its summary says how much that
is. `--write-tables` writes the table or, where tests were left out, adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

COLUMNS = ("image-augmentation", "feature-store", "training-delivery", "publishing")
BEGIN, END = "<!-- table: made by the tests, --write-tables -->", "<!-- end of table -->"
KEY, PARTS, NOTHING = "proven", "; ", "–"

Proof = tuple[str, str, str]
Proven = Callable[[str, str, str], None]


@pytest.fixture
def proven(request: pytest.FixtureRequest) -> Proven:
    """Note a result (row, column of `COLUMNS`, a few words); it counts if the test passes."""

    def note(row: str, column: str, result: str) -> None:
        assert column in COLUMNS, f"{column} is no column of the table"
        request.node.user_properties.append((KEY, (row, column, result)))

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables in the README.md beside the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tables(config))


class Tables:
    """Collects what is proven, with pytest-xdist from all its workers, and compares it with the tables."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._collected: set[Path] = set()
        self._proofs: dict[Path, list[Proof]] = {}
        self._missing: dict[Path, str] = {}
        """Directories of which not everything has passed, and why."""
        self._told: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self._collected.add(item.path)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if KEY in getattr(item, "fixturenames", ()):
                self._missing[item.path.parent] = f"{item.name} was left out"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        directory = (self._config.rootpath / report.location[0]).parent
        if not report.passed:
            self._missing[directory] = f"{report.location[2]}: {report.outcome}"
        elif report.when == "call":
            proofs: list[Any] = [value for name, value in report.user_properties if name == KEY]
            self._proofs.setdefault(directory, []).extend((row, column, result) for row, column, result in proofs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist has ended: it knows what was left out."""
        told = getattr(node, "workeroutput", {}).get(KEY, {})
        self._missing |= {Path(directory): why for directory, why in told.items()}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for directory in {path.parent for path in self._collected}:
            for path in sorted(set(directory.glob("test_*.py")) - self._collected):
                self._missing[directory] = f"{path.name} was left out"
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput[KEY] = {str(directory): why for directory, why in self._missing.items()}
            return
        for directory, proofs in self._proofs.items():
            if proofs and not self._compare(directory / "README.md", parts(sorted(proofs))):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _compare(self, readme: Path, proofs: list[Proof]) -> bool:
        """Compare the table with what is proven, or write it; False if it claims too much or too little."""
        text = readme.read_text()
        claims, missing = claimed(text), self._missing.get(readme.parent)
        wanted = proofs if missing is None else claims + proofs
        seen = f"{readme}: {len(set(proofs))} of {len(claims)} results seen" + (f" ({missing})" if missing else "")
        if set(claims) == set(wanted):
            self._told.append(seen)
            return True
        if self._config.getoption("--write-tables"):
            readme.write_text(replaced(text, table(wanted)))
            self._told.append(f"{readme}: written")
            return True
        unseen, unclaimed = sorted(set(claims) - set(wanted)), sorted(set(wanted) - set(claims))
        self._told += [seen, f"  claimed, not seen: {unseen}", f"  seen, not claimed: {unclaimed}; --write-tables"]
        return False

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._told:
            terminalreporter.write_line(line)


def parts(proofs: Iterable[Proof]) -> list[Proof]:
    """The single results: several are shown in one cell."""
    return [(row, column, part) for row, column, result in proofs for part in result.split(PARTS)]


def table(proofs: Iterable[Proof]) -> str:
    """A Markdown table: one row a fault, one column a flow; rows by name, '–' where nothing was tried."""
    cells: dict[str, dict[str, dict[str, None]]] = {}
    for row, column, result in proofs:
        cells.setdefault(row, {}).setdefault(column, {})[result] = None
    columns = [column for column in COLUMNS if any(column in row for row in cells.values())]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [name, *(PARTS.join(cells[name].get(column, {NOTHING: None})) for column in columns)] for name in sorted(cells)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claimed(text: str) -> list[Proof]:
    """What the table of a README claims."""
    lines = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    columns = rows[0][1:] if rows else []
    cells = [(name, column, cell) for name, *row in rows[2:] for column, cell in zip(columns, row, strict=True)]
    return parts(proof for proof in cells if proof[2] != NOTHING)


def replaced(text: str, made: str) -> str:
    """A README with this table between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"the README has no {BEGIN} … {END}"
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"
