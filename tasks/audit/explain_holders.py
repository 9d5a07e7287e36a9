"""Holders of a row: other versions of its dataset, versions made from its version, and trainings on those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tasks.audit.explain_rows import find_rows, is_whole
from tasks.audit.explain_samples import summary
from tasks.audit.explained import Section
from tasks.io.errors import CorruptVersion, PipelineError
from tasks.io.numerals import plural
from tasks.store import layout
from tasks.store.catalogue import newest
from tasks.store.lineage import trace
from tasks.store.manifest import Manifest
from tasks.store.own_columns import AS_OF, EVENT_TIME
from tasks.store.reading import committed_manifests, latest, list_datasets
from tasks.store.withdrawal import withdrawal_of

MOST_VERSIONS = 30
"""Number of versions of the row's dataset that are searched, the newest."""
MOST_ROWS = 200
"""Maximum rows of a training set whose match is searched."""
Given = Callable[[Manifest, Mapping[str, Any]], bool]
_USES = {
    "train": "learned from it, each epoch",
    "validation": "was measured on it",
    "test": "didn't see its test split",
}


def holders_section(
    root: str, manifest: Manifest, column: str, value: int | str, given: Given | None = None
) -> Section:
    """Return versions that have a key, and trainings on them.

    Args:
        root: Root of the store.
        manifest: The version that the row is of.
        column: Its key column.
        value: Its key.
        given: For a row of features: returns True if it was joined to a row of a training set.

    """
    key = column, value
    rows = list(_own_versions(root, manifest, key))
    below, notes = made_from(root, manifest)
    for one in below:
        holds = _holds(root, one, key, given)
        rows += [_row(root, one, "made from it", holds), *_trainings(root, one, holds)]
    if layout.kind(manifest.dataset) == "streaming-copy":
        rows += _trainings(root, manifest, _holds(root, manifest, key))
    return Section(title="held by", rows=rows, notes=notes if rows else [*notes, "Nothing else has it."])


def _own_versions(root: str, manifest: Manifest, key: tuple[str, int | str]) -> Iterator[dict[str, Any]]:
    """Yield the other versions of the dataset, newest first."""
    versions = [one for one in committed_manifests(root, manifest.dataset) if one.status == "published"]
    served = (newest if layout.kind(manifest.dataset) == "features" else latest)(root, manifest.dataset)
    for one in versions[::-1][:MOST_VERSIONS]:
        what = "this version" if one.version == manifest.version else "other version"
        what += ", the one that readers get" if served is not None and one.version == served.version else ""
        if one.version != manifest.version or served is None or served.version == one.version:
            yield _row(root, one, what, _holds(root, one, key))


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
    """Return trainings on a copy that have a report, and their use of samples that the copy `holds`."""
    if layout.kind(manifest.dataset) != "streaming-copy":
        return []
    used = [what for split, what in _USES.items() if split in holds.partition(";")[0]]
    return [
        {
            "who": one.uri,
            "relation": f"training on {manifest.dataset} v{manifest.version}",
            "status": f"ended {one.created_at:%Y-%m-%d %H:%M}",
            "verdict": one.verdict,
            "holds": " and ".join(used) or "hasn't seen it",
        }
        for one in trace(root, manifest.dataset, manifest.version).trainings
    ]


def made_from(root: str, manifest: Manifest) -> tuple[list[Manifest], list[str]]:
    """Return the published versions made from a version, directly or through others, and notes on unreadable ones."""
    known, notes = [], []
    for dataset in list_datasets(root):
        try:
            known += [one for one in committed_manifests(root, dataset) if one.status == "published"]
        except CorruptVersion as fault:
            notes.append(f"{dataset} can't be looked into: {fault}")
    reached: set[tuple[str, int | None]] = {(manifest.dataset, manifest.version)}
    found: list[Manifest] = []
    while fresh := [
        one
        for one in known
        if (one.dataset, one.version) not in reached
        and any((record.name, record.version) in reached for record in one.inputs)
    ]:
        found += fresh
        reached |= {(one.dataset, one.version) for one in fresh}
    return found, notes


def _holds(root: str, manifest: Manifest, key: tuple[str, int | str], given: Given | None = None) -> str:
    """Count the rows of a key that a version has, in words.

    Args:
        root: Root of the store.
        manifest: The version's.
        key: Key column and key.
        given: As in `holders_section`.

    """
    column, value = key
    if layout.kind(manifest.dataset) == "streaming-copy":
        return summary(root, manifest, str(value))
    names = [one.name for one in manifest.columns]
    if column not in names or is_whole(manifest, column) != isinstance(value, int):
        return f"no rows by {column}"
    time = next((name for name in names if name in (AS_OF, EVENT_TIME)), None)
    given = given if layout.kind(manifest.dataset) == "training-set" else None
    columns = [column, *([time] if time else [])] if given is None else None
    try:
        found = find_rows(root, manifest, column, value, columns=columns)
    except PipelineError as fault:
        return f"can't be told: {fault}"
    rows = found.rows
    told = plural(len(rows), "row") if rows else "no row"
    splits = sorted({path.partition("/")[0] for path, _ in found.places if path.startswith("split=")})
    told += f" in {', '.join(splits)}" if splits else ""
    moments = sorted({row[time] for row in rows} if time else ())
    told += f", {', '.join(f'{moment:%Y-%m-%d}' for moment in moments[:4])}" if moments else ""
    if given is None or not rows:
        return told
    return f"{told}; {sum(given(manifest, row) for row in rows[:MOST_ROWS])} of them have this row's features"
