"""Answers of `explain` as values: sections of facts, tables and sentences; and the sections common to all kinds.

The rows of one key are found without reading the version:

    key ── stable hash ──▶ file ── smallest and largest key of its row groups ──▶ row groups ── key column ──▶ rows

A version that isn't partitioned by the key is searched by the footers of its files; without statistics, by the key
column alone. Other columns are read only from row groups that have the key.
"""

from __future__ import annotations

import datetime as dt
import difflib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of
from tasks.features.rows import read_keys
from tasks.io import storage
from tasks.io.errors import ConfigError, InputError
from tasks.io.notation import expand
from tasks.io.tensors import Int64Array
from tasks.io.text import as_json, brief, facts, moment, printable, show
from tasks.store import layout
from tasks.store.layout import AS_OF
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, groups_with, opened, rows_of, withdrawal_of

MOST_KEYS = 2_000_000
"""Maximum number of keys that are searched for the closest ones."""
_CLOSE, _NEAR = 3, 50


@dataclass(frozen=True, slots=True)
class Found:
    """Found rows, with the file and number of each, and the amount read."""

    table: pa.Table
    places: tuple[tuple[str, int], ...]
    files: int = 0
    groups: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def read_of(self, manifest: Manifest) -> str:
        """Return the files and row groups that were read, in words."""
        return f"footers of {self.files} of {len(manifest.files)} data files, {self.groups} row groups"


def is_whole(manifest: Manifest, column: str) -> bool:
    """Return True if a column holds whole numbers."""
    return any(spec.name == column and spec.type.startswith(("int", "uint")) for spec in manifest.columns)


def typed_key(manifest: Manifest, column: str, text: str) -> int | str:
    """Return a key in the column's type.

    Raises:
        ConfigError: the column holds whole numbers, and the text isn't one.
    """
    if not is_whole(manifest, column):
        return text
    try:
        (value,) = read_keys([text], pa.int64(), f"keys of {manifest.dataset}").to_pylist()
    except InputError as fault:
        raise ConfigError(f"'{text}' is no {column} of {manifest}: those are whole numbers, such as 7") from fault
    assert isinstance(value, int), "text that is read is a number"
    return value


def find_rows(
    root: str,
    manifest: Manifest,
    column: str,
    value: int | str,
    *,
    columns: Sequence[str] | None = None,
) -> Found:
    """Return all rows of a version that have a value in a column.

    Args:
        root: Root of the store.
        manifest: The version.
        column: The key column.
        value: The key, in the column's type.
        columns: Columns to return; None for all.

    Raises:
        CorruptVersion: a file is missing.
        VersionNotFound: the gate rejected the version, so that it has no rows.
    """
    entries = list(zip(data_files(root, manifest), manifest.files, strict=True))
    if manifest.partition is not None and manifest.partition.key == column:
        number = int(bucket_of(pa.array([value]), manifest.partition.buckets)[0])
        entries = [(uri, entry) for uri, entry in entries if layout.part_number(entry.path) == number]
    searched = list(storage.in_threads(lambda entry: _search(entry[0], column, value, columns), entries))
    tables = [table for table, _, _ in searched if table is not None and table.num_rows]
    return Found(
        pa.concat_tables(tables) if tables else pa.table({}),
        tuple((entry.path, row) for (_, entry), (_, rows, _) in zip(entries, searched, strict=True) for row in rows),
        files=len(entries),
        groups=sum(groups for _, _, groups in searched),
    )


def read_rows(
    root: str, manifest: Manifest, path: str, rows: Int64Array, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read some rows of a data file by their ascending numbers.

    Raises:
        CorruptVersion: the file is missing or can't be read.
    """
    uri = manifest.uri(root, path)
    with opened(uri) as source:
        return rows_of(pq.ParquetFile(source), rows, columns)


def _search(
    uri: str, column: str, value: int | str, columns: Sequence[str] | None
) -> tuple[pa.Table | None, list[int], int]:
    """Return the rows of one file, their numbers in it, and the number of row groups read."""
    with opened(uri) as source:
        file = pq.ParquetFile(source, pre_buffer=True)
        metadata, wanted = file.metadata, None if columns is None else list(columns)
        starts = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(file.num_row_groups))])
        tables, numbers, groups = [], [], groups_with(file, column, [value])
        for group in groups:
            hits = pc.equal(file.read_row_group(group, columns=[column])[column], value).fill_null(False)
            rows = np.flatnonzero(hits.to_numpy())
            if len(rows):
                tables.append(file.read_row_group(group, columns=wanted).take(pa.array(rows)))
                numbers += (starts[group] + rows).tolist()
    return (pa.concat_tables(tables) if tables else None), numbers, len(groups)


def closest_keys(root: str, manifest: Manifest, column: str, value: int | str) -> list[str]:
    """Return the keys of a version that are closest to another; for very large versions, from the first files."""
    keys: set[Any] = set()
    for uri in data_files(root, manifest):
        if len(keys) >= MOST_KEYS:
            break
        with opened(uri) as source:
            keys.update(pq.read_table(source, columns=[column])[column].unique().drop_null().to_pylist())
    return closest_of(keys, value)


def closest_of(keys: Iterable[Any], value: int | str) -> list[str]:
    """Return the closest of some keys: by difference for numbers, by likeness for text."""
    if isinstance(value, int):
        return [str(key) for key in sorted(keys, key=lambda key: (abs(key - value), key))[:_CLOSE]]
    ordered = sorted(map(str, keys))
    if len(ordered) > 20_000:  # comparing with all is too slow: those beside it, and those that contain it
        place = bisect_left(ordered, value)
        near = ordered[max(place - _NEAR, 0) : place + _NEAR]
        ordered = list(dict.fromkeys([*near, *(key for key in ordered if value in key)][: 4 * _NEAR]))
    begun = [key for key in ordered if key.startswith(value)]
    return [*begun, *difflib.get_close_matches(value, ordered, n=_CLOSE, cutoff=0.5)][:_CLOSE]


_WIDEST = 120
_STYLES = (("_reason", "_file", "_row", "_detail"), ("reason", "uri", "row", "detail"))
"""Columns of rejected rows with reason, file, row and detail: of features' sources and copies; of images and labels."""

Answer = Literal["held", "rejected", "left out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the answer.

    Attributes:
        title: Its name; programs find it under this name in lower case.
        facts: Names and values.
        rows: A table, one mapping a row; all have the same names.
        shown: Names of the columns that people see; empty for all.
        notes: Sentences.
    """

    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    rows: Sequence[Mapping[str, object]] = ()
    shown: tuple[str, ...] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Answer about one row.

    Attributes:
        manifest: The version's.
        key: Requested key.
        answer: 'held' by the version; 'rejected' on the way to it; 'left out' of it on purpose.
        headline: The answer in a sentence.
        sections: The sections.
    """

    manifest: Manifest
    key: str
    answer: Answer
    headline: str
    sections: Sequence[Section]

    def to_json(self) -> str:
        """Return the answer for programs: sections by their names, every value in its original unit."""
        sections = {
            section.title.replace(" ", "_"): {
                "facts": dict(section.facts),
                "rows": list(section.rows),
                "notes": list(section.notes),
            }
            for section in self.sections
        }
        return as_json(
            {
                "dataset": self.manifest.dataset,
                "version": self.manifest.version,
                "kind": layout.kind(self.manifest.dataset),
                "key": self.key,
                "answer": self.answer,
                "headline": self.headline,
                "sections": sections,
            }
        )

    def show(self) -> None:
        """Print the answer for people."""
        print(printable(self.headline))
        for section in self.sections:
            print(f"\n{printable(section.title.upper())}")
            facts({name: _plain(value) for name, value in section.facts.items()})
            if section.rows:
                if section.facts:
                    print()
                names = section.shown or tuple(section.rows[0])
                rows = [[_cell(row.get(name)) for name in names] for row in section.rows]
                numbers = [
                    name for name in names if all(isinstance(row.get(name), int | float | None) for row in section.rows)
                ]
                show([printable(name) for name in names], rows, right=numbers)
            for note in section.notes:
                print(printable(note))


def _plain(value: object) -> object:
    """Return lists and mappings in one line, and numbers of the data with all their digits."""
    match value:
        case dt.datetime():
            return moment(value)
        case list() | tuple() | set():
            return ", ".join(str(_plain(item)) for item in value)
        case dict():
            return ", ".join(f"{name} {'–' if item is None else _plain(item)}" for name, item in value.items())
        case float():
            return str(value)
    return value


def _cell(value: object) -> object:
    """Shorten a value of a table; programs get all of it."""
    plain = _plain(value)
    return brief(plain, _WIDEST) if isinstance(plain, str) else plain


def version_section(root: str, manifest: Manifest) -> Section:
    """Return the state of the version, and the run and the code that made it."""
    withdrawal = withdrawal_of(root, manifest.dataset, manifest.version)
    facts = {
        "version": str(manifest),
        "status": "withdrawn" if withdrawal else manifest.status,
        "withdrawn": None if withdrawal is None else str(withdrawal),
        "data": manifest.uri(root),
        "created": manifest.created_at,
        "run": manifest.run.flow_run_name or manifest.run.flow_run_id,
        "code": manifest.code_digest,
    }
    return Section(title="version", facts={name: value for name, value in facts.items() if value is not None})


def gate_section(manifest: Manifest, concerned: Mapping[str, str]) -> Section:
    """Return the verdict of the gate, and the checks that didn't pass.

    Args:
        manifest: The version.
        concerned: Columns (and names of sources) related to the row, and how.
    """
    open_checks = [check for check in manifest.gate.checks if check.verdict != "pass"]
    rows = [
        {
            "check": check.name,
            "column": check.column,
            "verdict": check.verdict,
            "concerns": "the version as a whole"
            if check.column is None
            else concerned.get(check.column, "not this row"),
            "message": check.message,
        }
        for check in sorted(open_checks, key=lambda check: check.column not in concerned)
    ]
    facts = {"verdict": manifest.gate.verdict, "checks": len(manifest.gate.checks), "not passed": len(open_checks)}
    return Section(title="gate", facts=facts, rows=rows)


def rejected_rows(
    root: str, manifest: Manifest, columns: Collection[str], keys: Collection[str]
) -> list[dict[str, Any]]:
    """Return rejected rows that have one of some keys in one of some columns, with the reason and their place.

    Args:
        root: Root of the store.
        manifest: The version.
        columns: Columns that may have the key, by the names of the sources.
        keys: The key, as sources may spell it.

    Raises:
        CorruptVersion: a file of rejected rows is missing.
    """
    rejected = []
    for entry in manifest.rejected_files:
        uri = manifest.uri(root, entry.path)
        with opened(uri) as source:
            file = pq.ParquetFile(source)
            named = [name for name in file.schema_arrow.names if name in columns]
            if named and pc.any(matching(file.read(columns=named), keys)).as_py():
                table = file.read()
                rows = table.filter(matching(table.select(named), keys)).to_pylist()
                rejected += [_rejected(row, entry.path) for row in rows]
    return rejected


def matching(table: pa.Table, keys: Collection[str]) -> pa.Array:
    """Mark the rows that have one of some keys in any column, of any type; '7.0' is 7."""
    hits = pa.array([False] * table.num_rows)
    for column in table.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pc.utf8_trim_whitespace(column.cast(kind).cast(pa.string()))
        plain = pc.replace_substring_regex(text, r"\.0$", "")
        wanted = pa.array(list(keys), pa.string())
        hit = pc.or_(pc.is_in(text, wanted), pc.is_in(plain, wanted))
        hits = pc.or_(hits, hit.combine_chunks() if isinstance(hit, pa.ChunkedArray) else hit)
    return hits


def _rejected(row: Mapping[str, Any], path: str) -> dict[str, Any]:
    style = _STYLES[0] if "_reason" in row else _STYLES[1]
    reason, file, number, detail = (row.get(name) for name in style)
    return {
        "reason": reason,
        "source file": file,
        "source row": number,
        "detail": detail or _meaning(str(reason)),
        "values": {name: value for name, value in row.items() if name not in style},
        "kept in": path,
    }


def _meaning(reason: str) -> str | None:
    """Return a reason in words."""
    if reason in _MEANINGS:
        return _MEANINGS[reason]
    if reason.startswith("no_") and reason.endswith("_row"):
        return f"{reason[3:-4]} has no row of this key, and join = inner"
    kind = next((prefix for prefix in _PREFIXES if reason.startswith(f"{prefix}_")), None)
    return None if kind is None else _PREFIXES[kind].format(reason.removeprefix(f"{kind}_"))


_MEANINGS = {"malformed_row": "the line has another number of fields than the header"}
_PREFIXES = {
    "null": "{} is missing",
    "unparsable": "{} can't be read as what it should be",
    "not_finite": "{} is NaN or infinite",
    "negative": "{} is negative, and negative_amounts = reject",
    "too_early": "{} is before the setting `earliest`",
    "conflicting": "a row before it has the same {} and says something else",
}


def rejected_sections(rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> list[Section]:
    """Return rejected rows as a section, none if there are none; people see their values as text."""
    names = ("reason", "source file", "source row", "detail", "values", "kept in")
    shown = tuple(name for name in names if any(row[name] is not None for row in rows))
    return [Section(title="rejected", rows=rows, shown=shown, notes=notes)] if rows else []


def rejected_sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the sources of rejected rows, by the names of the files that keep these, and how they are concerned."""
    names = (row["kept in"].partition("/")[2].rsplit("-", 2)[0].removesuffix("-conflicts") for row in rows)
    return dict.fromkeys(names, "has rejected rows of it")


def refuse(manifest: Manifest, what: str, key: str, close: Sequence[str]) -> NoReturn:
    """Raise an error for a missing key of a version.

    Raises:
        InputError: always; its message names the closest keys.
    """
    cure = f"closest: {', '.join(close)}" if close else "none is like it; see `describe` for what the version holds"
    raise InputError(f"{manifest} has no {what} '{key}', among its rows or its rejected ones; {cure}")


def pick_time(manifest: Manifest, key: str, times: Sequence[dt.datetime], at: str | None) -> dt.datetime:
    """Return one of the times of a key's rows: the newest, unless one is given.

    Raises:
        ConfigError: the text isn't a time.
        InputError: there is no row of that time; the message names the available ones.
    """
    if at is None:
        return max(times)
    try:
        (wanted,) = expand((at,))
    except ValueError as fault:
        raise ConfigError(f"--at: {str(fault).removesuffix('.')}") from fault
    if wanted not in times:
        near = sorted(times, key=lambda time: abs(time - wanted))[:3]
        known = ", ".join(time.isoformat() for time in sorted(near))
        raise InputError(f"{manifest} has no row of '{key}' at {wanted.isoformat()}; closest: {known}")
    return wanted


def absent(
    root: str,
    manifest: Manifest,
    what: tuple[str, str],
    rejected: Sequence[Mapping[str, Any]],
    why: str = "all that it had was rejected",
    *,
    answer: Answer = "rejected",
    sections: Sequence[Section] = (),
    concerned: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Explanation:
    """Return the answer about something that a version doesn't hold.

    Args:
        root: Root of the store.
        manifest: The version's.
        what: Kind of thing, and its key.
        rejected: Rows of it that were rejected.
        why: Reason for its absence.
        answer: Kind of the answer.
        sections: Sections to show first.
        concerned: As in `gate_section`; besides the sources of the rejected rows.
        notes: Notes on the rejected rows.
    """
    headline = f"{what[0]} {what[1]} isn't in {manifest}: {why}"
    gate = gate_section(manifest, {**rejected_sources(rejected), **(concerned or {})})
    sections = [*sections, *rejected_sections(rejected, notes), gate, version_section(root, manifest)]
    return Explanation(manifest, what[1], answer, headline, sections)


@dataclass(frozen=True, slots=True)
class Held:
    """A row of an entity in a version.

    Attributes:
        key: The entity.
        moment: Time of the row.
        row: Its values.
        rejected: Rows of the entity that were rejected.
        section: Its place.
    """

    key: int | str
    moment: dt.datetime
    row: dict[str, Any]
    rejected: list[dict[str, Any]]
    section: Section


def look_for(
    root: str, manifest: Manifest, key: str, at: str | None, *, time: str, spellings: Collection[str]
) -> Held | Explanation:
    """Return an entity's row, or the whole answer if there are only rejected ones.

    Args:
        root: Root of the store.
        manifest: The version's, which names its entity.
        key: The entity's key, as it was typed.
        at: The requested time; None: the newest.
        time: Column of the rows' times.
        spellings: Names of the key's column in the files of rejected rows.

    Raises:
        InputError: the version has no such row, and has rejected none.
        ConfigError: the key or the time is invalid.
    """
    entity: str = manifest.definition["entity"]
    rejected = rejected_rows(root, manifest, spellings, {key})
    try:
        value = typed_key(manifest, entity, key)
    except ConfigError:
        if not rejected:
            raise
        return absent(root, manifest, (entity, key), rejected)
    if manifest.status == "rejected" and rejected:
        return absent(root, manifest, (entity, key), rejected)
    searched = find_rows(root, manifest, entity, value)
    if not searched.places:
        if not rejected:
            refuse(manifest, entity, key, closest_keys(root, manifest, entity, value))
        return absent(root, manifest, (entity, key), rejected)
    times = [when.astimezone(dt.UTC) for when in searched.table[time].to_pylist()]
    picked = pick_time(manifest, key, times, at)
    number = times.index(picked)
    path, place = searched.places[number]
    facts = {
        entity: value,
        "as of" if time == AS_OF else "event time": picked,
        "times held": sorted(times),
        "rows of this time": times.count(picked) if times.count(picked) > 1 else None,
        "file": path,
        "row": place,
        "read": searched.read_of(manifest),
    }
    section = Section(title="row", facts={name: fact for name, fact in facts.items() if fact is not None})
    return Held(value, picked, searched.rows[number] | {time: picked}, rejected, section)
