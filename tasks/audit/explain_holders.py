"""Who has a row now: other versions of its dataset, what was made from its version, and trainings on that."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.audit.explain_matches import matches
from tasks.audit.explain_rows import find_rows, is_whole
from tasks.audit.explain_samples import summary
from tasks.audit.explained import Section
from tasks.core import layout
from tasks.core.errors import CorruptVersion, PipelineError
from tasks.core.lineage import trace
from tasks.core.manifest import Manifest
from tasks.core.own_columns import AS_OF, EVENT_TIME
from tasks.core.reading import committed_manifests, latest, list_datasets
from tasks.core.withdrawal import withdrawal_of
from tasks.serving.catalogue import newest

MOST_VERSIONS = 30
"""Versions of the row's own dataset that are looked into, the newest."""
_USES = {
    "train": "learned from it, each epoch",
    "validation": "was measured on it",
    "test": "didn't see its test split",
}
MOST_ROWS = 200
"""Rows of a training set whose match is looked for."""


def holders_section(
    root: str, manifest: Manifest, column: str, value: int | str, moment: dt.datetime | None = None
) -> Section:
    """Versions that have a key, and trainings on them.

    Args:
        root: Root of the store.
        manifest: The version that the row is of.
        column: Its key column.
        value: Its key.
        moment: As-of time of a row of features: which rows of training sets were given exactly it.

    """
    rows = list(_own_versions(root, manifest, column, value))
    below, notes = made_from(root, manifest)
    for one in below:
        holds = _holds(root, manifest, one, (column, value), moment)
        rows.append(_row(root, one, "made from it", holds))
        rows += _trainings(root, one, holds)
    if layout.kind(manifest.dataset) == "streaming-copy":
        rows += _trainings(root, manifest, _count(root, manifest, column, value))
    count = len(rows)
    return Section(title="held by", rows=rows, notes=[*notes, *([] if count else ["Nothing else has it."])])


def _own_versions(root: str, manifest: Manifest, column: str, value: int | str) -> Iterator[dict[str, Any]]:
    """The other versions of the dataset, newest first."""
    versions = [one for one in committed_manifests(root, manifest.dataset) if one.status == "published"]
    read = newest if layout.kind(manifest.dataset) == "features" else latest
    served = read(root, manifest.dataset)
    for one in versions[::-1][:MOST_VERSIONS]:
        what = "this version" if one.version == manifest.version else "other version"
        what += ", the one that readers get" if served is not None and one.version == served.version else ""
        if one.version != manifest.version or served is None or served.version == one.version:
            yield _row(root, one, what, _count(root, one, column, value))


def _row(root: str, manifest: Manifest, relation: str, holds: str) -> dict[str, Any]:
    status = "withdrawn" if withdrawal_of(root, manifest.dataset, manifest.version) else manifest.status
    return {
        "who": f"{manifest.dataset} v{manifest.version}",
        "relation": relation,
        "status": status,
        "verdict": manifest.gate.verdict,
        "holds": holds,
    }


def _trainings(root: str, manifest: Manifest, holds: str) -> list[dict[str, Any]]:
    """Trainings on a copy that have a report, and what they did with samples that the copy `holds`."""
    if layout.kind(manifest.dataset) != "streaming-copy":
        return []
    lineage = trace(root, manifest.dataset, manifest.version)
    used = [what for split, what in _USES.items() if split in holds.partition(";")[0]]
    return [
        {
            "who": one.uri,
            "relation": f"training on {manifest.dataset} v{manifest.version}",
            "status": f"ended {one.created_at:%Y-%m-%d %H:%M}",
            "verdict": one.verdict,
            "holds": " and ".join(used) or "hasn't seen it",
        }
        for one in lineage.trainings
    ]


def made_from(root: str, manifest: Manifest) -> tuple[list[Manifest], list[str]]:
    """Published versions that were made from a version, directly or through others; and what couldn't be read."""
    known, notes = [], []
    for dataset in list_datasets(root):
        try:
            known += [one for one in committed_manifests(root, dataset) if one.status == "published"]
        except CorruptVersion as fault:
            notes.append(f"{dataset} can't be looked into: {fault}")
    reached, found, grown = {(manifest.dataset, manifest.version)}, [], True
    while grown:
        fresh = [
            one
            for one in known
            if (one.dataset, one.version) not in reached
            and any((record.name, record.version) in reached for record in one.inputs)
        ]
        grown = bool(fresh)
        found += fresh
        reached |= {(one.dataset, one.version) for one in fresh}
    return found, notes


def _count(root: str, manifest: Manifest, column: str, value: int | str) -> str:
    """How many rows of a key a version has, in words."""
    if layout.kind(manifest.dataset) == "streaming-copy":
        return summary(root, manifest, str(value))
    if column not in {one.name for one in manifest.columns} or is_whole(manifest, column) != isinstance(value, int):
        return f"no rows by {column}"
    try:
        found = find_rows(root, manifest, column, value, columns=[column, *_times(manifest)])
    except PipelineError as fault:
        return f"can't be told: {fault}"
    return _rows_told(found.rows, _times(manifest), found.places)


def _times(manifest: Manifest) -> list[str]:
    return [one.name for one in manifest.columns if one.name in (AS_OF, EVENT_TIME)]


def _rows_told(rows: Sequence[dict[str, Any]], times: Sequence[str], places: Sequence[tuple[str, int]]) -> str:
    told = f"{len(rows)} row{'s' if len(rows) != 1 else ''}" if rows else "no row"
    moments = sorted({row[name] for row in rows for name in times[:1]})
    splits = sorted({path.partition("/")[0] for path, _ in places if path.startswith("split=")})
    told += f" in {', '.join(splits)}" if splits else ""
    return told + (f", {', '.join(f'{moment:%Y-%m-%d}' for moment in moments[:4])}" if moments else "")


def _holds(root: str, manifest: Manifest, one: Manifest, key: tuple[str, int | str], moment: dt.datetime | None) -> str:
    """What a version that was made from another has of a key."""
    column, value = key
    told = _count(root, one, column, value)
    if moment is None or layout.kind(one.dataset) != "training-set" or told.startswith(("no", "can't")):
        return told
    rows = find_rows(root, one, column, value).rows[:MOST_ROWS]
    mine = sum(
        match.version == manifest.version and match.as_of == moment
        for row in rows
        for match in matches(root, one, row)
        if layout.feature_dataset(match.group) == manifest.dataset
    )
    return f"{told}; {mine} of them have this row's features"
