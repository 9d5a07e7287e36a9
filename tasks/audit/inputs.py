"""Inputs of a version in their present state: files, versions, declaration, and the rows of one key in its files.

Sources are read as the flow reads them (`tasks.features.rows`), but first by the key alone; other columns only from
row groups that have it. Python files of definitions aren't run: a version may name any file.
"""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import polars as pl

from tasks.audit.explanation import Section, is_whole
from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import Definitions, EventSource, FeatureGroup
from tasks.features.loading import declared, is_yaml
from tasks.features.plan import names_in_files, plan_dimension, plan_features, units_of, with_uris
from tasks.features.rows import REASON, KeyType, RowPlan, judge
from tasks.features.sources import ReadUnit, SourceTable, inspect, inspect_files, read
from tasks.features.standard import STANDARD
from tasks.io import storage
from tasks.io.errors import DefinitionError, PipelineError, SourceError
from tasks.io.location import is_transient
from tasks.io.notation import missing_values
from tasks.io.text import plural
from tasks.store.manifest import InputFile, InputRecord, Manifest
from tasks.store.reading import read_manifest
from tasks.store.settings import config_of

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Cause:
    """Reason for a possible difference: its kind, such as 'input' or 'library', and a sentence.

    columns: affected columns; none means any.
    """

    kind: str
    text: str
    columns: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file of an input, compared with its fingerprint.

    Attributes:
        source: URI of the input.
        number: Place of the file among the input's.
        file: The file as recorded.
        info: The present file; None if there is none.
        fingerprint: Its present fingerprint.
    """

    source: str
    number: int
    file: InputFile
    info: storage.FileInfo | None
    fingerprint: str

    @property
    def state(self) -> Literal["unchanged", "changed since", "gone"]:
        """Comparison in words."""
        if self.info is None:
            return "gone"
        return "unchanged" if self.fingerprint == self.file.fingerprint else "changed since"

    def as_row(self) -> dict[str, Any]:
        """Return the file as a row of a table."""
        file = self.file
        return {"file": file.uri, "bytes": file.bytes, "fingerprint": file.fingerprint, "now": self.state}


def check_files(record: InputRecord) -> list[CheckedFile]:
    """Compare the files of an input with their fingerprints, which reads local ones."""

    def check(number: int, file: InputFile) -> CheckedFile:
        info = next(
            (listed for listed in storage.list_files(file.uri, include_hidden=True) if listed.uri == file.uri), None
        )
        return CheckedFile(record.uri, number, file, info, "" if info is None else storage.fingerprint(info))

    return list(storage.in_threads(check, range(len(record.files)), record.files))


def table_of(record: InputRecord, files: Sequence[CheckedFile]) -> SourceTable:
    """Return a source of only these files of an input, if they exist.

    Raises:
        SourceError: none of them exists, or one can't be read.
    """
    infos = [file.info for file in files if file.info is not None]
    if not infos:
        raise SourceError(
            f"of '{record.name}' none of the {plural(len(record.files), 'file')} under {record.uri} is there any more"
        )
    return inspect_files(record.name, record.uri, infos)


def input_causes(record: InputRecord, files: Sequence[CheckedFile]) -> list[Cause]:
    """Return one cause for each changed file of an input; for many the first few, and their number."""
    changed = [file for file in files if file.state != "unchanged"]
    texts = [
        f"{one.file.uri} is gone"
        if one.info is None
        else f"{one.file.uri} has changed ({_short(one.file.fingerprint)} then, {_short(one.fingerprint)} now)"
        for one in changed[:_NAMED]
    ]
    causes = [Cause("input", f"an input of '{record.name}' changed: {text}") for text in texts]
    if more := changed[_NAMED:]:
        causes.append(Cause("input", f"{plural(len(more), 'more file')} of '{record.name}' changed or are gone"))
    return causes


def _short(fingerprint: str) -> str:
    method, _, value = fingerprint.partition(":")
    return f"{method}:{value[:12]}{'…' if value[12:] else ''}"


@dataclass(slots=True)
class Sources:
    """Present source files of a version, by source, and the resulting causes."""

    files: dict[str, list[CheckedFile]] = field(default_factory=dict)
    tables: dict[str, SourceTable] = field(default_factory=dict)
    causes: list[Cause] = field(default_factory=list)


def sources_of(records: Sequence[InputRecord], kept: str | None = None) -> Sources:
    """Compare the files of sources with their fingerprints.

    Args:
        records: Inputs that are raw files.
        kept: Source whose events are kept beside the version: only its unchanged files are used.

    Raises:
        SourceError: a source has no files any more.
    """
    sources = Sources()
    for record in records:
        files = sources.files[record.name] = check_files(record)
        sources.causes += input_causes(record, files)
    for record in records:
        files = sources.files[record.name]
        usable = [file for file in files if record.name != kept or file.state == "unchanged"]
        sources.tables[record.name] = table_of(record, usable)
    return sources


def present(definitions: Definitions, sources: Sources, notes: list[str]) -> Definitions:
    """Leave out unreadable dimensions from which a version took nothing but the types of keys.

    `sources` gets the tables of the others; `notes` lists the omitted ones.
    """
    dimensions = dict(definitions.dimensions)
    for name, dimension in definitions.dimensions.items():
        if dimension.uri is None or name in sources.tables:
            continue
        try:
            sources.tables[name] = inspect(name, dimension.uri)
        except SourceError as fault:
            dimensions[name] = replace(dimension, uri=None)
            notes.append(f"'{name}', of which nothing was taken but the types of keys, can't be looked at: {fault}")
    return replace(definitions, dimensions=dimensions)


def input_version(root: str, record: InputRecord, causes: list[Cause]) -> Manifest | None:
    """Return the manifest of a version that another one was made from, None if it can't be read.

    Add a cause to `causes` if it can't be read, or lists other files than were read.
    """
    assert record.version is not None, "an input that is a version has a number"
    name = f"{record.name} v{record.version}"
    try:
        manifest = read_manifest(root, record.name, record.version)
    except PipelineError as fault:
        causes.append(Cause("input", f"the input {name} can't be read: {fault}"))
        return None
    then = {file.uri.rpartition(f"/v{record.version}/")[2]: file.fingerprint for file in record.files}
    if then != {file.path: file.digest for file in manifest.files}:
        causes.append(Cause("input", f"the input {name} has another manifest: its files have changed"))
    return manifest


def other_declaration(manifest: Manifest, declared: Mapping[str, Any]) -> list[Cause]:
    """Compare a present declaration with the one that a version was made by."""
    then, now = manifest.definition, json.loads(json.dumps(declared))
    names = [name for name in now if then.get(name) != now[name]]
    if not names:
        return []
    inner = [
        f"{name}.{part}"
        for name in names
        if isinstance(then.get(name), Mapping) and isinstance(now[name], Mapping)
        for part in {**then[name], **now[name]}
        if then[name].get(part) != now[name].get(part)
    ]
    named = ", ".join((inner or names)[:_NAMED])
    return [Cause("definition", f"the declaration of '{declared['name']}' isn't what it was: {named}")]


def why_not(fault: Exception) -> Cause:
    """Return the cause that prevents any replay.

    Raises:
        Exception: the fault itself, if it may be transient.
    """
    if is_transient(fault):
        raise fault
    kind = "definition" if isinstance(fault, DefinitionError) else "input"
    return Cause(kind, f"can't be made again: {fault}")


ROW = "row"

_ROWS_AT_ONCE = 1  # row groups are searched one by one


@dataclass(frozen=True, slots=True)
class Declared:
    """Sources declared by a version's configuration, and the reasons for missing ones."""

    definitions: Definitions
    config: FeatureStoreConfig
    note: str = ""


def declared_sources(manifest: Manifest) -> Declared:
    """Return the sources of a feature version or a training set; Python files aren't run.

    Raises:
        ConfigError: this code can't use the configuration.
    """
    config = config_of(FeatureStoreConfig, manifest)
    definitions, note = STANDARD, ""
    try:
        if config.definitions is None or is_yaml("definitions", config.definitions):
            definitions = declared(config.definitions)
        else:
            note = f"the definitions are in {config.definitions}, a Python file, which isn't run for an answer"
    except PipelineError as fault:
        note = str(fault)
    return Declared(with_uris(definitions, config), config, note)


def files_section(title: str, record: InputRecord, note: str = "") -> Section:
    """Return the files of an input in their present state."""
    rows = [file.as_row() for file in check_files(record)]
    return Section(title=title, rows=rows, notes=[note] if note else [])


def events_section(
    declared: Declared,
    manifest: Manifest,
    record: InputRecord,
    key: tuple[str, int | str],
    spans: Mapping[str, tuple[dt.datetime | None, dt.datetime | None]],
) -> Section:
    """Return files of events, with the key's number of events in each of some spans of time.

    Args:
        declared: Sources of the version.
        manifest: The version's.
        record: The events.
        key: Key column and key.
        spans: Name of a column of the answer → start, exclusive (None: any), end, inclusive (None: any).
    """
    entity, value = key
    title = f"events in {record.name}"
    source = declared.definitions.events.get(record.name)
    if source is None or entity not in source.columns:
        cause = declared.note or f"'{record.name}' isn't declared any more"
        return files_section(title, record, f"Events aren't counted: {cause}.")
    files = check_files(record)
    try:
        plan = _event_plan(declared, source, entity, manifest, table_of(record, files))
        keyed = list(storage.in_threads(lambda file: rows_of_key(file, plan, entity, value), files))
    except PipelineError as fault:
        return files_section(title, record, f"Events can't be counted: {fault}")
    rows = [
        file.as_row()
        | {name: None if events is None else _within(events.kept[source.time], *span) for name, span in spans.items()}
        | {"rejected": None if events is None else events.rejected.total()}
        for file, events in zip(files, keyed, strict=True)
    ]
    totals = {name: sum(row[name] or 0 for row in rows) for name in (*spans, "rejected")}
    groups, of_groups = (sum(getattr(events, name) for events in keyed if events) for name in ("groups", "of_groups"))
    read_of = f"the key column of every file, all of {groups} of {of_groups} row groups"
    notes = _doubts(files)
    if declared.note:
        notes.append(f"As the source is usually declared; {declared.note}.")
    return Section(title=title, facts={"source": record.uri, **totals, "read": read_of}, rows=rows, notes=notes)


def dimension_section(declared: Declared, manifest: Manifest, record: InputRecord, value: int | str) -> Section:
    """Return rows of the dimension that have the key: the first is joined, others are copies or contradict it."""
    title = f"rows of {record.name}"
    source = declared.definitions.dimensions.get(record.name)
    if source is None:
        return files_section(title, record, declared.note)
    keys, missing = {source.key: key_type_in(manifest, source.key)}, missing_values(declared.config.null_values)
    files = check_files(record)
    try:
        plan = plan_dimension(source, table_of(record, files), keys, (), missing=missing).rows
        keyed = [rows_of_key(file, plan, source.key, value) for file in files]
    except PipelineError as fault:
        return files_section(title, record, str(fault))
    numbers = [None if held is None else held.kept[ROW].to_list() for held in keyed]
    rows = [file.as_row() | {"rows": held} for file, held in zip(files, numbers, strict=True)]
    many = sum(len(held or ()) for held in numbers) > 1
    note = ["Of several rows the first counts: copies of it are dropped, others are rejected."] if many else []
    return Section(title=title, rows=rows, notes=[*note, *_doubts(files)])


def _doubts(files: Sequence[CheckedFile]) -> list[str]:
    """Return reasons why the counts may differ from those of the version."""
    states: Counter[str] = Counter(file.state for file in files)
    texts = {"gone": "are gone", "changed since": "have changed since, and are counted as they are now"}
    doubts = [f"{states[state]} of {len(files)} files {text}" for state, text in texts.items() if states[state]]
    return ["; ".join(doubts) + "."] if doubts else []


def _within(times: pl.Series, after: dt.datetime | None, until: dt.datetime | None) -> int:
    if after is not None:
        times = times.filter(times > after)
    if until is not None:
        times = times.filter(times <= until)
    return len(times)


def key_type_in(manifest: Manifest, column: str) -> KeyType:
    """Return the type of the keys of a version's column."""
    return "int64" if is_whole(manifest, column) else "string"


def _event_plan(
    declared: Declared, source: EventSource, entity: str, manifest: Manifest, table: SourceTable
) -> RowPlan:
    """Plan the reading of a source's events, as far as it decides which rows of an entity count."""
    config = declared.config
    features = {"found": pl.len()}
    if config.negative_amounts == "reject" and table.has(names_in_files(source, table).get("amount", "amount")):
        features["amounts"] = pl.col("amount").sum()
    group = FeatureGroup(name="explained", entity=entity, source=source.name, features=features)
    only = Definitions(events=declared.definitions.events, dimensions={}, groups={group.name: group})
    [plan] = plan_features(only, config.model_copy(update={"groups": ()}), (manifest.created_at,), {source.name: table})
    rows, kind = plan.events.rows, key_type_in(manifest, entity)
    columns = tuple(replace(column, key_type=kind) if column.name == entity else column for column in rows.columns)
    return replace(rows, columns=columns, as_of=None)


@dataclass(slots=True)
class KeyedRows:
    """The rows of a key in one file.

    Attributes:
        kept: Typed rows under our names, with `row`, their number in the file.
        rejected: Number of rows by reason.
        groups: Pieces of the file whose other columns were read.
        of_groups: Pieces of the file.
    """

    kept: pl.DataFrame
    rejected: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    of_groups: int = 0


def rows_of_key(checked: CheckedFile, plan: RowPlan, key: str, value: int | str) -> KeyedRows | None:
    """Read the rows of a key in a file, each kept or rejected by the flow's rules; None for a deleted file.

    Args:
        checked: The file.
        plan: Rules for reading the source.
        key: Our name of the key column.
        value: The key.

    Raises:
        SourceError: the file can't be read.
    """
    if checked.info is None:
        return None
    (file,) = inspect_files(plan.source, checked.source, [checked.info]).files
    key_column = next(column for column in plan.columns if column.name == key)
    by_key = replace(plan, columns=(replace(key_column, required=False),), time=None, as_of=None, reject_negative=())
    nothing = pl.DataFrame(schema={column.source_name: pl.String for column in plan.columns})
    parts = [judge(nothing, plan).kept.with_columns(pl.Series(ROW, [], pl.Int64))]
    keyed = KeyedRows(parts[0])
    for unit in units_of(SourceTable(plan.source, checked.source, (file,)), plan, _ROWS_AT_ONCE):
        keyed.of_groups += 1
        if not _has(unit, by_key, key_column.source_name, key, value):
            continue
        keyed.groups += 1
        for raw in read(unit):
            mine = (judge(raw.frame, by_key).kept[key] == value).fill_null(False)
            numbers = pl.Series(ROW, range(raw.first_row, raw.first_row + raw.frame.height), pl.Int64).filter(mine)
            judged = judge(raw.frame.filter(mine), plan)
            keyed.rejected.update(judged.rejected[REASON].to_list())
            good = ~pl.Series(range(len(numbers)), dtype=pl.Int64).is_in(judged.rejected_rows.implode())
            parts.append(judged.kept.with_columns(numbers.filter(good)))
    keyed.kept = pl.concat(parts, how="vertical_relaxed")
    return keyed


def _has(unit: ReadUnit, by_key: RowPlan, source_name: str, key: str, value: int | str) -> bool:
    if unit.format == "csv":  # text is read as a whole anyway
        return True
    rows = read(replace(unit, columns=(source_name,)))
    return any((judge(raw.frame, by_key).kept[key] == value).any() for raw in rows)
