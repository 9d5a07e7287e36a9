"""Self-test of a gate: sample a version, inject faults of a stated size, and judge each copy again.

A gate that passes proves nothing unless it would fail on bad data. So each kind of dataset has faults, and
this module finds the checks that notice them. Each fault is aimed at a check: if the
verdict of that check doesn't get worse, the gate is blind to the fault on this data, whatever other check noticed it.

    sample ─┬─ as it is ──── the pipeline's own functions ─ gate ─ baseline ─┐
            └─ with a fault ─ the pipeline's own functions ─ gate ────────────┴─ refused, warned or blind

A kind of dataset has a subclass of `Trial`: it computes the figures of changed rows as its job does, for its gate. Its
`faults` takes faults from the catalogue (`Faults`), names the checks that must notice them, and adds its own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from tasks.io.errors import PipelineError
from tasks.io.hashing import stable_hash
from tasks.io.tensors import BoolArray
from tasks.io.text import plural
from tasks.quality.rules import SEVERITY
from tasks.store.manifest import CheckResult, ColumnSpec, FaultResult, GateResult, Manifest, Outcome
from tasks.store.reading import opened

SAMPLE_ROWS = 5000
MOST_FILES = 16
MOST_READ = 50_000
"""Rows that are read for a sample, not counting the last row group; all rows of a smaller version."""


class RowGroup(NamedTuple):
    """Row group of a file, and its rows."""

    uri: str
    number: int
    rows: int


def sample_rows(
    uris: Sequence[str],
    columns: Sequence[str],
    key: str,
    convert: Callable[[str, pa.Table], pa.Table] = lambda _, table: table,
) -> pa.Table:
    """Sample rows of a version, in the order of their files: those whose keys have the lowest hashes.

    Either all read rows of a key are taken, or none, except for a key with more rows than `SAMPLE_ROWS`. Of a version
    of more than `MOST_READ` rows, or `MOST_FILES` files, only some files and row groups are read, by their hashes.

    Args:
        uris: Parquet files of one schema, at least one.
        columns: Columns to read.
        key: Column among them whose hashes decide.
        convert: Function that changes the rows of a file by its name, such as to add a column derived from its
            directory.
    """
    tables = []
    for uri, number, _ in chosen_groups(uris) or [RowGroup(uris[0], 0, 0)]:
        with opened(uri) as source:
            file = pq.ParquetFile(source)
            groups = range(file.num_row_groups)[number : number + 1]  # no group in a file without rows
            table = file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        tables.append(convert(uri, table.select(list(columns))))
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows <= SAMPLE_ROWS:
        return table.combine_chunks()
    hashes = stable_hash(table[key])
    chosen = np.flatnonzero(hashes < np.partition(hashes, SAMPLE_ROWS)[SAMPLE_ROWS])
    if len(chosen) < SAMPLE_ROWS // 2:  # a key with more rows than fit
        chosen = np.argsort(hashes, kind="stable")[:SAMPLE_ROWS]
    return table.take(pa.array(np.sort(chosen))).combine_chunks()


def chosen_groups(uris: Sequence[str]) -> list[RowGroup]:
    """Choose the row groups that a sample is taken from, in the order of the files."""
    groups = []
    for uri in (uris[place] for place in sorted(_by_hash(uris)[:MOST_FILES])):
        with opened(uri) as source:
            metadata = pq.read_metadata(source)
        groups += [
            RowGroup(uri, number, metadata.row_group(number).num_rows) for number in range(metadata.num_row_groups)
        ]
    places = _by_hash([f"{group.uri}:{group.number}" for group in groups])
    read = np.cumsum([groups[place].rows for place in places])
    return [groups[place] for place in sorted(places[: np.searchsorted(read, MOST_READ) + 1])]


def _by_hash(names: Sequence[str]) -> list[int]:
    """Return the indices of names in the order of their last parts' hashes, independent of the store's path."""
    hashes = stable_hash(pa.array(["/".join(name.split("/")[-2:]) for name in names], pa.string()))
    places: list[int] = np.argsort(hashes, kind="stable").tolist()
    return places


NULLS, DOUBLED, ODD, LOST, BAD, ONE_CLASS = 0.6, 0.2, 0.01, 0.1, 0.4, 0.9
"""Shares: of values made null, and of rows put in twice, given odd values, lost, made unusable, put into one class.

Chosen so that any sound gate refuses them, or at least warns.
"""
SHIFT = 3.0
"""Standard deviations of a shift, chosen for the same reason."""


def some(rows: int, share: float) -> BoolArray:
    """Choose a share of some rows, rounded up and spread by a hash; shape (rows,)."""
    hit = np.zeros(rows, dtype=np.bool_)
    count = int(np.ceil(round(share * rows, 6)))
    hit[np.argsort(stable_hash(pa.array(np.arange(rows))), kind="stable")[:count]] = True
    return hit


def with_values(table: pa.Table, columns: Sequence[str], value: Any, where: float | BoolArray) -> pa.Table:
    """Put a value (None: null) into columns, of their type: in a share of the rows, or in those of a mask."""
    hit = pa.array(_mask(table, where))
    for name in columns:
        kind = table.schema.field(name).type
        table = with_column(table, name, pc.if_else(hit, pa.scalar(value, kind), table[name]))
    return table


def shifted(table: pa.Table, column: str, distance: float, hit: BoolArray | None = None) -> pa.Table:
    """Move a number by a distance in some rows, or in all; integers are rounded and stay within their type."""
    kind = table.schema.field(column).type
    values = table[column].combine_chunks()
    known = values.is_valid().to_numpy(zero_copy_only=False)
    numbers = values.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False).copy()
    numbers[slice(None) if hit is None else hit] += distance
    if pt.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        edge = min(float(limits.max), 2.0**62)
        numbers = np.clip(np.round(numbers), max(float(limits.min), -(2.0**62)), edge)
    return with_column(table, column, pa.array(numbers, mask=~known).cast(kind, safe=False))


def lost(table: pa.Table, where: float | BoolArray) -> pa.Table:
    """Remove rows: a share of them, or those of a mask."""
    return table.filter(pa.array(~_mask(table, where)))


def _mask(table: pa.Table, where: float | BoolArray) -> BoolArray:
    return some(table.num_rows, where) if isinstance(where, float) else where


def with_column(table: pa.Table, column: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replace the values and type of a column; its position stays."""
    return table.set_column(table.schema.get_field_index(column), pa.field(column, values.type), values)


def is_number(kind: pa.DataType) -> bool:
    """Check that a column of this type can be shifted."""
    return bool(pt.is_integer(kind) or pt.is_floating(kind))


def spread(table: pa.Table, column: str) -> float:
    """Return the standard deviation of a number's finite values, 0 without any."""
    values = table[column].drop_null().cast(pa.float64(), safe=False).to_numpy()
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) else 0.0


ORDER: dict[Outcome, int] = {"blind": 0, "warned": 1, "refused": 2, "not applicable": 3}
ITSELF = "self-test"
"""Name of the only fault of a self-test that could not be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Fault that data can have.

    Attributes:
        name: Short name, the same in all kinds: 'nulls', 'shift', 'label copy', 'split overlap', 'range', ….
        injected: Change of the sample, one sentence for a person.
        aims: Checks that must notice it, by name or by 'name of column'; one of them is enough.
        judge: Function that injects it into a copy of the sample and judges that; None if the fault isn't applicable to
            the data.
        why_not: Reason why there is none, one sentence.
        raises: Pipeline errors that may refuse the fault before the gate sees it.
    """

    name: str
    injected: str
    aims: tuple[str, ...]
    judge: Callable[[], GateResult] | None
    why_not: str = ""
    raises: tuple[type[PipelineError], ...] = ()


def inject(baseline: GateResult, faults: Iterable[Fault]) -> tuple[FaultResult, ...]:
    """Judge each fault and compare with the verdicts on the unchanged sample.

    Args:
        baseline: The gate's verdict on the sample without any fault.
        faults: The faults, each made when the one before is judged.
    """
    before = {_title(check): SEVERITY[check.verdict] for check in baseline.checks}
    results = []
    for fault in faults:
        outcome, message, caught = _outcome(before, fault)
        result = FaultResult(
            fault=fault.name, injected=fault.injected, outcome=outcome, caught_by=caught, message=message
        )
        results.append(result)
    return tuple(results)


def failed(error: BaseException) -> FaultResult:
    """Return the result of a self-test that could not be made: it proves nothing, and has a note of that."""
    reason = " ".join(str(error).split()) or "no reason is given"
    return FaultResult(
        fault=ITSELF,
        injected="Nothing: no fault was injected.",
        outcome="blind",
        message=f"The self-test failed: {type(error).__name__}: {reason}",
    )


def blind(results: Sequence[FaultResult]) -> tuple[str, ...]:
    """Name the faults that the gate is blind to."""
    return tuple(result.fault for result in results if result.outcome == "blind")


def unproven(gate: GateResult, results: Sequence[FaultResult]) -> tuple[str, ...]:
    """Name the checks that no fault made worse: nothing shows that they can fail."""
    caught = {title.partition(" of ")[0] for result in results for title in result.caught_by}
    return tuple(dict.fromkeys(check.name for check in gate.checks if check.name not in caught))


def summary(results: Sequence[FaultResult]) -> str:
    """Return one line: '9 of 10 faults refused, 1 warned', and the faults that the gate is blind to."""
    if [result.fault for result in results] == [ITSELF]:
        return results[0].message
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in ORDER}
    tried = len(results) - counts["not applicable"]
    parts = [f"{counts['refused']} of {plural(tried, 'fault')} refused"]
    parts += [f"{counts['warned']} warned"] if counts["warned"] else []
    parts += [f"blind to {counts['blind']} ({', '.join(blind(results))})"] if counts["blind"] else []
    return ", ".join(parts)


def _outcome(before: Mapping[str, int], fault: Fault) -> tuple[Outcome, str, tuple[str, ...]]:
    """Return the outcome of a fault, the reason, and the checks that noticed it."""
    if fault.judge is None:
        return "not applicable", fault.why_not, ()
    try:
        checks = fault.judge().checks
    except fault.raises as refusal:
        return "refused", str(refusal), fault.aims
    worse = [check for check in checks if SEVERITY[check.verdict] > before.get(_title(check), 0)]
    # First the checks that the fault is aimed at, then the worst.
    worse.sort(key=lambda check: (not _is_aimed(check, fault), -SEVERITY[check.verdict]))
    caught = tuple(dict.fromkeys(map(_title, worse)))
    if worse and _is_aimed(worse[0], fault):
        return "refused" if worse[0].verdict == "fail" else "warned", worse[0].message, caught
    aimed = [check for check in checks if _is_aimed(check, fault)]
    bad = next((check for check in aimed if check.verdict != "pass"), None)
    if bad is not None:
        word = "fails" if bad.verdict == "fail" else "warns"
        message = f"'{_title(bad)}' {word} on the sample as it is, so that the fault can't make it worse."
        return "not applicable", message, caught
    message = f"'{_title(aimed[0])}' still passes: {aimed[0].message}" if aimed else "No check looks at it."
    if worse:
        message += f" It was noticed elsewhere, by {', '.join(caught[:3])}."
    return "blind", message, caught


def _is_aimed(check: CheckResult, fault: Fault) -> bool:
    return check.name in fault.aims or _title(check) in fault.aims


def _title(check: CheckResult) -> str:
    """Return a check's name for a person: 'nulls of age'."""
    return check.name if check.column is None else f"{check.name} of {check.column}"


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
        config: The version's configuration.
        gate: Function that judges figures by the configuration against another version.
        noun: Name of a row to a person.
        splits: Column of a row's split, and its values for train and validation; of kinds with splits.
    """

    sample: S
    features: Sequence[str]
    before: Manifest
    config: Any
    gate: Callable[[Any, Any, Manifest | None], GateResult]
    noun: ClassVar[str] = "row"
    splits: ClassVar[tuple[str, Any, Any]]

    @abstractmethod
    def figures(self, rows: S) -> Any:
        """Compute the gate's input as the job does."""

    @abstractmethod
    def faults(self) -> Faults:
        """Yield the faults, in the order of the report."""

    def judge(self, rows: S) -> GateResult:
        """Judge the figures of some rows against `previous`."""
        return self.gate(self.config, self.figures(rows), self.previous)

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
        return self.table.filter(pa.array(some(self.table.num_rows, DOUBLED)))

    @cached_property
    def numbers(self) -> list[str]:
        """Names of the features that are numbers."""
        return [name for name in self.features if is_number(self.table.schema.field(name).type)]

    @cached_property
    def number(self) -> str:
        """First number that differs between rows, '' without any."""
        return next((name for name in self.numbers if spread(self.table, name) > 0), "")

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
        table = with_values(self.table, [column] if column else [], value, share)
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
        distance = SHIFT * spread(self.table, self.number)
        return self.fault(name, words, aims, table=shifted(self.table, self.number, distance, hit))

    def one_class(self, column: str, value: Any, why_not: str) -> Fault:
        """Give most rows one class."""
        words = f"{ONE_CLASS:.0%} of the {self.noun}s were given class {value}."
        return self.values("shift", f"drift of {column}", column, value, ONE_CLASS, words=words, why_not=why_not)

    def rare_class(self, column: str, name: str, own: BoolArray, good: BoolArray, why_not: str) -> Fault:
        """Remove the rows of a class except its first good one; without a class name it is not applicable."""
        others = own.copy()
        others[np.flatnonzero(own & good)[:1]] = False
        words, table = f"All {self.noun}s but one of class {name} were taken away.", lost(self.table, others)
        return self.fault("rare class", words, f"class balance of {column}", "" if name else why_not, table=table)

    def split_overlap(self, injected: str, aims: str, copies: pa.Table) -> Fault:
        """Put copies of rows into validation, and all others into train."""
        column, train, validation = self.splits
        parts = [(self.table, train), (copies, validation)]
        table = pa.concat_tables(with_values(part, [column], split, 1.0) for part, split in parts)
        return self.fault("split overlap", injected, aims, table=table)

    def no_train_rows(self) -> Fault:
        """Put every row into the validation split."""
        column, _, validation = self.splits
        words = f"Every {self.noun} was put into the validation split."
        return self.values("no train rows", "split of train", column, validation, words=words)


def rarest(counts: Mapping[str, int]) -> str:
    """Return the class with the fewest rows, '' unless there are two."""
    return min(counts, key=lambda name: (counts[name], name)) if len(counts) > 1 else ""
