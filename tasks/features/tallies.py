"""Counts and reports of the feature job's tasks. Small values that add up."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.features.plan import SourcePlan
from tasks.features.sources import ReadUnit
from tasks.quality.profile import TableProfile
from tasks.quality.sketch import QuantileSketch
from tasks.store.conservation import check_equal
from tasks.store.manifest import FileEntry, RowBalance


@dataclass(slots=True)
class Tally:
    """Row counts of one source in one unit; adds up over units."""

    rows_in: int = 0
    rows_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.rejected += other.rejected
        self.filtered += other.filtered
        self.deduplicated += other.deduplicated

    def pass_on(self, later: Tally) -> None:
        """Add the later treatment of the kept rows."""
        self.rows_out = later.rows_out
        self.rejected += later.rejected
        self.filtered += later.filtered
        self.deduplicated += later.deduplicated

    def balance(self, name: str) -> RowBalance:
        """Return the counts in the manifest's form."""
        return RowBalance(
            name=name,
            rows_in=self.rows_in,
            rows_out=self.rows_out,
            rejected=dict(sorted(self.rejected.items())),
            filtered=dict(sorted(self.filtered.items())),
            deduplicated=self.deduplicated,
        )


@dataclass(slots=True)
class UnitNote:
    """Report of a scatter task: its source's tally, and by group the rows without entity and the rejected file."""

    tally: Tally
    without_entity: dict[int, int] = field(default_factory=dict)
    rejected_files: dict[int, FileEntry] = field(default_factory=dict)


@dataclass(slots=True)
class EventTally:
    """Events of a bucket: those read and, in an incremental run, those kept by earlier versions.

    new_late, kept_late: of these, after the last as-of time, so that they don't count (a run that isn't incremental
    has filtered them before). newest: time of the newest that counts. file: file of the new kept ones; by_file:
    their number by the number of their source file.
    """

    new: int = 0
    new_late: int = 0
    kept: int = 0
    kept_late: int = 0
    newest: dt.datetime | None = None
    file: FileEntry | None = None
    by_file: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class BucketSummary:
    """Report of a gather task on its bucket; entities are counted once for each as-of time.

    suspects: keys that look like missing values. profile: of the numeric features, until it is added to the others;
    quantiles: theirs at each as-of time, where there are several.
    """

    group: int
    events: EventTally
    dimension: Tally
    entities: Tally
    duplicate_keys: int
    suspects: list[str]
    unmatched: int
    rejected_files: list[FileEntry]
    profile: TableProfile | None
    quantiles: list[dict[str, QuantileSketch]]


def check_rows_read(source: SourcePlan, units: Sequence[ReadUnit], tally: Tally) -> None:
    """Compare the number of read rows with the files' footers; for a CSV file with the count from its cutting.

    The rows of uncut CSV files aren't counted before.

    Raises:
        BalanceError: they differ.

    """
    if all(unit.format == "parquet" or unit.piece is not None for unit in units):
        said = sum(unit.rows for unit in units)
        check_equal(source.name, said, tally.rows_in, "stand in the files, {} were read")


def check_way(name: str, sent: int, carried: int, taken: int) -> None:
    """Compare the rows sent to the buckets, those carried there by the shuffle, and those taken from it.

    Raises:
        BalanceError: they differ.

    """
    check_equal(name, sent, carried, "were sent to their buckets, {} were carried there")
    check_equal(name, carried, taken, "were carried to their buckets, {} were taken there")
