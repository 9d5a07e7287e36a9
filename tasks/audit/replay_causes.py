"""What may be otherwise than it was when a version was made: its inputs, its declaration, the code, the libraries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.audit.replay_rows import Cause
from tasks.core import layout, storage
from tasks.core.errors import DefinitionError, PipelineError, SourceError
from tasks.core.manifest import InputFile, InputRecord, Manifest
from tasks.core.numerals import plural
from tasks.core.provenance import code_digest, package_versions
from tasks.core.reading import read_manifest
from tasks.core.transient import is_transient
from tasks.features.sources import SourceTable, inspect_files

_TASKS = Path(__file__).parent.parent
_PARTS = {
    "images": ("core", "images"),
    "features": ("core", "features"),
    "training-set": ("core", "features", "serving"),
    "streaming-copy": ("core", "delivery"),
}
OWN_PACKAGE = "training-data-pipelines"
"""This project itself: its code is compared by digest, which says more than its version."""

_OF_THE_VERSION = ("newest_event", "state", "columns")
"""What stands in a definition beside what was declared."""

_READERS = 16
_NAMED = 3


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file of an input and what is known of it now; info is None if it is gone. changed: whether it isn't the same.

    number: its place among the input's files.
    """

    number: int
    file: InputFile
    info: storage.FileInfo | None
    changed: bool
    text: str = ""


def digest_now(manifest: Manifest) -> str:
    """Digest of the code as it is now, made as the version's was, with the version's own declaration."""
    kind = layout.kind(manifest.dataset)
    extra = ""
    if kind in ("features", "training-set"):
        declared = {name: value for name, value in manifest.definition.items() if name not in _OF_THE_VERSION}
        extra = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()
    return code_digest(*(_TASKS / part for part in _PARTS[kind]), extra=extra)


def other_libraries(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Libraries of other versions than the manifest says: name → (then, now)."""
    now = package_versions()
    then = {name: version for name, version in manifest.packages.items() if name != OWN_PACKAGE}
    return {
        name: (version, now.get(name, "not recorded")) for name, version in then.items() if now.get(name) != version
    }


def other_declaration(manifest: Manifest, declared: Mapping[str, Any]) -> list[Cause]:
    """Where a declaration as it is now differs from the one that the version was made by."""
    then = manifest.definition
    differing = [name for name, value in declared.items() if _plain(value) != _plain(then.get(name))]
    if not differing:
        return []
    inner = [f"{name}.{part}" for name in differing for part in _differing(then.get(name), declared[name])]
    names = ", ".join((inner or differing)[:_NAMED])
    return [Cause("definition", f"the declaration of '{declared['name']}' isn't what it was: {names}")]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value))


def _differing(then: Any, now: Any) -> list[str]:
    if not (isinstance(then, Mapping) and isinstance(now, Mapping)):
        return []
    return [name for name in dict.fromkeys([*then, *now]) if _plain(then.get(name)) != _plain(now.get(name))]


def check_files(record: InputRecord) -> list[CheckedFile]:
    """Compare the files of an input with their fingerprints, which reads local ones."""
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_check_file, range(len(record.files)), record.files))


def _check_file(number: int, file: InputFile) -> CheckedFile:
    infos = [info for info in storage.list_files(file.uri, include_hidden=True) if info.uri == file.uri]
    if not infos:
        return CheckedFile(number, file, None, True, f"{file.uri} is gone")
    found = storage.fingerprint(infos[0])
    if found == file.fingerprint:
        return CheckedFile(number, file, infos[0], False)
    text = f"{file.uri} has changed ({_short(file.fingerprint)} then, {_short(found)} now)"
    return CheckedFile(number, file, infos[0], True, text)


def _short(fingerprint: str) -> str:
    method, _, value = fingerprint.partition(":")
    return f"{method}:{value[:12]}{'…' if value[12:] else ''}"


def input_causes(record: InputRecord, files: Sequence[CheckedFile]) -> list[Cause]:
    """One cause for each file of an input that isn't the same; of many the first few, and how many there are."""
    changed = [file for file in files if file.changed]
    causes = [Cause("input", f"an input of '{record.name}' changed: {file.text}") for file in changed[:_NAMED]]
    if more := changed[_NAMED:]:
        causes.append(Cause("input", f"{plural(len(more), 'more file')} of '{record.name}' changed or are gone"))
    return causes


def table_of(record: InputRecord, files: Sequence[CheckedFile]) -> SourceTable:
    """A source of just these files of an input, as far as they are there.

    Raises:
        SourceError: none of them is there, or one can't be read.

    """
    infos = [file.info for file in files if file.info is not None]
    if not infos:
        raise SourceError(
            f"of '{record.name}' none of the {plural(len(record.files), 'file')} under {record.uri} is there any more"
        )
    return inspect_files(record.name, record.uri, infos)


def input_version(root: str, record: InputRecord) -> tuple[Manifest | None, list[Cause]]:
    """The manifest of a version that another one was made from, and whether it is still the same.

    Returns:
        None where it is gone; and what isn't as it was.

    """
    assert record.version is not None, "an input that is a version has a number"
    name = f"{record.name} v{record.version}"
    try:
        manifest = read_manifest(root, record.name, record.version)
    except PipelineError as fault:
        return None, [Cause("input", f"the input {name} can't be read: {fault}")]
    then = {file.uri.rpartition(f"/v{record.version}/")[2]: file.fingerprint for file in record.files}
    now = {file.path: file.digest for file in manifest.files}
    causes = [] if then == now else [Cause("input", f"the input {name} has another manifest: its files have changed")]
    return manifest, causes


def why_not(fault: Exception) -> Cause:
    """The cause of what can't be made again at all.

    Raises:
        Exception: the fault itself, if it may pass.

    """
    if is_transient(fault):
        raise fault
    kind = "definition" if isinstance(fault, DefinitionError) else "input"
    return Cause(kind, f"can't be made again: {fault}")
