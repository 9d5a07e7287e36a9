"""Inputs of a version in their present state: its source files, the versions that it read, its declaration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tasks.features.definitions import Definitions
from tasks.features.sources import SourceTable, inspect, inspect_files
from tasks.io import storage
from tasks.io.errors import DefinitionError, PipelineError, SourceError
from tasks.io.numerals import plural
from tasks.io.transient import is_transient
from tasks.store.manifest import InputFile, InputRecord, Manifest
from tasks.store.reading import read_manifest

_READERS = 16
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
        info = next((one for one in storage.list_files(file.uri, include_hidden=True) if one.uri == file.uri), None)
        return CheckedFile(record.uri, number, file, info, "" if info is None else storage.fingerprint(info))

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(check, range(len(record.files)), record.files))


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
    names = _differing(manifest.definition, declared, declared)
    if not names:
        return []
    inner = [
        f"{name}.{part}"
        for name in names
        if isinstance(then := manifest.definition.get(name), Mapping) and isinstance(now := declared[name], Mapping)
        for part in _differing(then, now, [*then, *now])
    ]
    named = ", ".join((inner or names)[:_NAMED])
    return [Cause("definition", f"the declaration of '{declared['name']}' isn't what it was: {named}")]


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], names: Any) -> list[str]:
    """Return the names whose values differ as JSON."""
    pairs = ((name, json.dumps(then.get(name)), json.dumps(now.get(name))) for name in dict.fromkeys(names))
    return [name for name, before, after in pairs if json.loads(before) != json.loads(after)]


def why_not(fault: Exception) -> Cause:
    """Return the cause that prevents any replay.

    Raises:
        Exception: the fault itself, if it may be transient.

    """
    if is_transient(fault):
        raise fault
    kind = "definition" if isinstance(fault, DefinitionError) else "input"
    return Cause(kind, f"can't be made again: {fault}")
