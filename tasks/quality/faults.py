"""Catalogue of faults that datasets of several kinds can have. Pure.

A kind of dataset is a subclass of `Trial`: it computes the figures of changed rows as its job does, and its gate judges
them. Its `faults` takes faults from the catalogue, names the checks that must notice them, and adds its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa

from tasks.quality import injection
from tasks.quality.injection import BAD, DOUBLED, LOST, NULLS, ODD, ONE_CLASS, SHIFT, BoolArray
from tasks.quality.self_test import Fault, inject
from tasks.store.manifest import ColumnSpec, FaultResult, GateResult, Manifest

MOST_FEATURES = 64
"""Most features of a sample, the first ones: with a thousand, more would only take longer."""
ALIKE = "No feature is a number that differs between rows."

Aims = str | tuple[str, ...]
Faults = Iterator[Fault]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows and settings that a fault changes; a kind of dataset adds more.

    Attributes:
        table: The rows.
        bad: Share of the rows that the job rejects because of their source.
        lost: Share of the rows that vanish between computing and writing.
    """

    table: pa.Table
    bad: float = 0.0
    lost: float = 0.0


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True, kw_only=True)
class Trial(ABC, Generic[S]):
    """Self-test of one version.

    Attributes:
        sample: Unchanged rows of the version.
        features: Columns of its table whose values can go wrong.
        before: The last published version; the version itself, if it is the first.
        noun: Name of a row to a person.
        splits: Column of a row's split, and its values for train and validation; of kinds with splits.
    """

    sample: S
    features: Sequence[str]
    before: Manifest
    noun: ClassVar[str] = "row"
    splits: ClassVar[tuple[str, Any, Any]]

    @abstractmethod
    def figures(self, rows: S) -> Any:
        """Compute the gate's input as the job does, with the `schema` and `profile` of its output."""

    @abstractmethod
    def judge(self, rows: S) -> GateResult:
        """Judge the figures of some rows against `previous`."""

    @abstractmethod
    def faults(self) -> Faults:
        """Yield the faults, in the order of the report."""

    def results(self) -> tuple[FaultResult, ...]:
        """Inject each fault and compare with the verdict on the unchanged sample."""
        return inject(self.judge(self.sample), self.faults())

    @cached_property
    def known(self) -> Any:
        """Figures of the unchanged sample."""
        return self.figures(self.sample)

    @cached_property
    def previous(self) -> Manifest:
        """Version `before` with the sample's columns and values, for the checks that compare with the last version."""
        columns = tuple(ColumnSpec(name=field.name, type=str(field.type)) for field in self.known.schema)
        return self.before.model_copy(update={"columns": columns, "profile": self.known.profile.columns()})

    @property
    def table(self) -> pa.Table:
        """Unchanged rows of the sample."""
        return self.sample.table

    @property
    def copies(self) -> pa.Table:
        """Share of the rows to duplicate."""
        return self.table.filter(pa.array(injection.some(self.table.num_rows, DOUBLED)))

    @cached_property
    def numbers(self) -> list[str]:
        """Names of the features that are numbers."""
        return [name for name in self.features if injection.is_number(self.table.schema.field(name).type)]

    @cached_property
    def number(self) -> str:
        """First number that differs between rows, '' without any."""
        return next((name for name in self.numbers if injection.spread(self.table, name) > 0), "")

    @property
    def first(self) -> str:
        """Feature whose values the faults change, '' without any."""
        return self.number or next(iter(self.features), "")

    @property
    def real(self) -> str:
        """First feature that is a floating-point number, '' without any."""
        return next((name for name in self.numbers if pa.types.is_floating(self.table.schema.field(name).type)), "")

    def fault(self, name: str, injected: str, aims: Aims, why_not: str = "", **changes: Any) -> Fault:
        """Return a fault that replaces fields of the sample; with a reason why not, the fault is not applicable."""
        judge = None if why_not else lambda: self.judge(replace(self.sample, **changes))
        aims = (aims,) if isinstance(aims, str) else aims
        return Fault(name=name, injected=injected, aims=aims, judge=judge, why_not=why_not)

    def values(
        self, name: str, aims: Aims, column: str, value: Any, share: float = 1.0, *, words: str = "", why_not: str = ""
    ) -> Fault:
        """Return a fault that puts a value (None: null) into a share of a column; not applicable without a column."""
        part, what = "All" if share == 1.0 else f"{share:.0%}", "null" if value is None else value
        words = words or f"{part} of {column or 'a column'} were made {what}."
        table = injection.with_values(self.table, [column] if column else [], value, share)
        return self.fault(name, words, aims, "" if column else why_not, table=table)

    def no_rows(self) -> Fault:
        """Remove every row."""
        return self.fault("no rows", f"Every {self.noun} was taken away.", "rows", table=self.table.slice(0, 0))

    def duplicates(self, aims: str) -> Fault:
        """Put rows in twice: the copies follow at the end."""
        words = f"{DOUBLED:.0%} of the {self.noun}s were put in twice."
        table = pa.concat_tables([self.table, self.copies]).combine_chunks()
        return self.fault("duplicates", words, aims, table=table)

    def lost_rows(self, balance: str) -> Fault:
        """Lose rows between computing and writing."""
        words = f"{LOST:.0%} of the {self.noun}s were lost before they were written."
        return self.fault("lost rows", words, f"balance of {balance}", lost=LOST)

    def bad_rows(self, name: str, what: str, source: str) -> Fault:
        """Give the job rows that it must reject."""
        return self.fault(name, f"{BAD:.0%} of {what}.", f"rejected of {source}", bad=BAD)

    def schema(self, column: str) -> Fault:
        """Rename a column."""
        names = [f"{name}_renamed" if name == column else name for name in self.table.column_names]
        words, aims = f"Column {column} was given another name.", ("schema", f"schema of {column}")
        return self.fault("schema", words, aims, table=self.table.rename_columns(names))

    def nulls(self, *more: str, why_not: str = "") -> Fault:
        """Make a feature null; `more` names further checks that may notice it."""
        return self.values("nulls", (f"nulls of {self.first}", *more), self.first, None, NULLS, why_not=why_not)

    def not_finite(self) -> Fault:
        """Make a feature infinite."""
        why_not = "No feature is a floating-point number."
        return self.values("not finite", f"finite of {self.real}", self.real, math.inf, ODD, why_not=why_not)

    def out_of_range(self, name: str, aims: str, column: str, value: float, why_not: str = "") -> Fault:
        """Give a column a forbidden value."""
        words = f"{ODD:.0%} of {column or 'a number'} were made {value}, which is out of bounds."
        return self.values(name, aims, column, value, ODD, words=words, why_not=why_not)

    def shift(
        self, *more: str, name: str = "shift", check: str = "drift", where: str = "", hit: BoolArray | None = None
    ) -> Fault:
        """Shift a number in all rows, or in those of a mask, which `where` names; `more` as in `nulls`."""
        words = f"{self.number or 'A number'}{where} was shifted by {SHIFT:g} standard deviations."
        aims = (f"{check} of {self.number}", *more)
        if not self.number:
            return self.fault(name, words, aims, ALIKE)
        distance = SHIFT * injection.spread(self.table, self.number)
        return self.fault(name, words, aims, table=injection.shifted(self.table, self.number, distance, hit))

    def one_class(self, column: str, value: Any, why_not: str) -> Fault:
        """Give most rows one class."""
        words = f"{ONE_CLASS:.0%} of the {self.noun}s were given class {value}."
        return self.values("shift", f"drift of {column}", column, value, ONE_CLASS, words=words, why_not=why_not)

    def rare_class(self, column: str, name: str, own: BoolArray, good: BoolArray, why_not: str) -> Fault:
        """Remove the rows of a class except its first good one; without a class name it is not applicable."""
        others = own.copy()
        others[np.flatnonzero(own & good)[:1]] = False
        words, table = f"All {self.noun}s but one of class {name} were taken away.", injection.lost(self.table, others)
        return self.fault("rare class", words, f"class balance of {column}", "" if name else why_not, table=table)

    def split_overlap(self, injected: str, aims: str, copies: pa.Table) -> Fault:
        """Put copies of rows into validation, and all others into train."""
        column, train, validation = self.splits
        parts = [(self.table, train), (copies, validation)]
        table = pa.concat_tables(injection.with_values(part, [column], split, 1.0) for part, split in parts)
        return self.fault("split overlap", injected, aims, table=table)

    def no_train_rows(self) -> Fault:
        """Put every row into the validation split."""
        column, _, validation = self.splits
        words = f"Every {self.noun} was put into the validation split."
        return self.values("no train rows", "split of train", column, validation, words=words)


def rarest(counts: Mapping[str, int]) -> str:
    """Return the class with the fewest rows, '' unless there are two."""
    return min(counts, key=lambda name: (counts[name], name)) if len(counts) > 1 else ""
