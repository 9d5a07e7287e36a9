"""Notes of finished units: the outcome of each image, and the files that hold it.

A note is written after its files, so an existing note means complete files. A later attempt of the same version reuses
a unit whose note has the planned digest, and doesn't repeat it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.images.fingerprint import SIGNATURE_BYTES
from tasks.images.plan import ImagePlan
from tasks.io import storage
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

OUTCOMES = pa.schema(
    [
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("content", pa.string()),
        ("format", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("hash", pa.uint64()),
        ("structured", pa.bool_()),
        ("colours", pa.binary(SIGNATURE_BYTES)),
        ("scores", pa.list_(pa.float32())),
        ("passed", pa.int32()),
        ("ready", pa.int32()),
        ("issues", pa.list_(pa.string())),
    ]
)
"""A row an image of the unit, in the plan's order. reason, detail: of its rejection; null if it was augmented, and
then the rest is set. content: XXH3-128 of the file's bytes. scores: of its variants. issues: of any of them."""

_META = b"unit"
_NAME = re.compile(r"unit-([0-9]{5,})-a([0-9]+)\.parquet")
_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitNote:
    """Summary of a finished unit, without its single images."""

    unit: int
    uri: str
    digest: str
    images: int
    augmented: int
    rejected: dict[str, int]
    files: dict[str, FileEntry]
    """Files by split."""
    rejected_file: FileEntry | None
    seconds: dict[str, float]
    """Wall time of each stage."""


def write_note(note: UnitNote, outcomes: pa.Table) -> None:
    """Write a unit's note; `outcomes` has the columns of `OUTCOMES`."""
    described = {
        "digest": note.digest,
        "images": note.images,
        "augmented": note.augmented,
        "rejected": note.rejected,
        "files": {split: entry.model_dump() for split, entry in note.files.items()},
        "rejected_file": note.rejected_file.model_dump() if note.rejected_file is not None else None,
        "seconds": note.seconds,
    }
    storage.write_parquet(outcomes.replace_schema_metadata({_META: json.dumps(described).encode()}), note.uri)


def note_uri(reservation: Reservation, unit: int) -> str:
    """Return the place of an attempt's note of a unit."""
    return layout.join(reservation.uri, layout.work_name("unit", unit, reservation.attempt))


def finished_units(plan: ImagePlan) -> dict[int, UnitNote]:
    """Return units of the plan that this attempt or an earlier one has finished, whose files all exist."""
    reservation = plan.reservation
    infos = storage.list_files(reservation.uri, include_hidden=True)
    sizes = {info.uri.removeprefix(f"{reservation.uri}/"): info.bytes for info in infos}
    notes = [(int(match[1]), info.uri) for info in infos if (match := _NAME.fullmatch(info.uri.rpartition("/")[2]))]
    with ThreadPoolExecutor(_READERS) as readers:
        read = list(readers.map(_read_note, notes))
    return {
        note.unit: note
        for note in read
        if note is not None
        and note.unit < plan.units
        and note.digest == plan.digests[note.unit]
        and all(sizes.get(entry.path) == entry.bytes for entry in _entries(note))
    }


def read_outcomes(notes: Sequence[UnitNote], columns: Sequence[str]) -> Iterable[pa.Table]:
    """Yield some columns of the images of each unit, unit by unit in their order."""
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(lambda note: _read_table(note.uri, columns), notes)


def _read_table(uri: str, columns: Sequence[str]) -> pa.Table:
    with storage.open_input(uri) as source:
        return pq.ParquetFile(source).read(columns=list(columns))


def _read_note(found: tuple[int, str]) -> UnitNote | None:
    """Return a note, or None if it isn't complete: then its unit is repeated."""
    unit, uri = found
    try:
        with storage.open_input(uri) as source:
            metadata = pq.ParquetFile(source).schema_arrow.metadata or {}
    except (pa.ArrowInvalid, FileNotFoundError):
        return None
    return _parsed(unit, uri, json.loads(metadata[_META])) if _META in metadata else None


def _parsed(unit: int, uri: str, described: Mapping[str, object]) -> UnitNote:
    files = described["files"]
    rejected_file = described["rejected_file"]
    assert isinstance(files, dict), "written by `write_note`"
    return UnitNote(
        unit=unit,
        uri=uri,
        digest=str(described["digest"]),
        images=int(str(described["images"])),
        augmented=int(str(described["augmented"])),
        rejected=described["rejected"],  # type: ignore[arg-type]
        files={split: FileEntry.model_validate(entry) for split, entry in files.items()},
        rejected_file=FileEntry.model_validate(rejected_file) if rejected_file is not None else None,
        seconds=described["seconds"],  # type: ignore[arg-type]
    )


def _entries(note: UnitNote) -> list[FileEntry]:
    return [*note.files.values(), *([note.rejected_file] if note.rejected_file is not None else [])]
