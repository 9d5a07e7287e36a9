"""Holders of a row: versions made from its version, samples of streaming-ready copies, and trainings.

The place of each sample is found too. A sample's id, split and place in the order are functions of its row in the
source version, so they are computed from there; then the one file that must have it is checked, by its column of ids
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explanation import (
    Found,
    Section,
    find_rows,
    gate_section,
    is_whole,
    rejected_sections,
    rejected_sources,
    typed_key,
    version_section,
)
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import weight_column
from tasks.delivery.shuffle import admit, judge, keys_of, plan_buckets
from tasks.delivery.source import (
    SPLITS,
    Repeats,
    Source,
    bucket_of,
    entity_splits,
    find_repeats,
    random_keys,
    sample_ids,
    split_draws,
    split_of,
)
from tasks.io.errors import ConfigError, CorruptVersion, PipelineError
from tasks.io.hashing import stable_hash
from tasks.io.tensors import to_numpy
from tasks.io.text import plural
from tasks.loader.samples import SAMPLE_ID, SampleFormat
from tasks.loader.version_files import files_of
from tasks.store import layout
from tasks.store.catalogue import newest
from tasks.store.layout import AS_OF, EVENT_TIME, READY
from tasks.store.lineage import trace
from tasks.store.manifest import Manifest
from tasks.store.reading import (
    latest,
    list_datasets,
    opened,
    overview,
    read_committed,
    read_manifest,
    withdrawal_of,
)
from tasks.store.settings import config_of
from tasks.store.version_index import IndexedVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of a copy.

    Attributes:
        source: Its row in the source version; without the pixels.
        table: The same as a table of one row, for an encoder.
        source_file: File of that row.
        source_row: Its number there.
        sample_id: Its id.
        split: Its split.
        file: Its file; None if it isn't in the expected place.
        row: Its number there.
        position: Its number among the samples of the split, in the order of the files.
    """

    source: dict[str, Any]
    table: pa.Table
    source_file: str
    source_row: int
    sample_id: int
    split: str
    file: str | None = None
    row: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class EntitySamples:
    """Outcome of an entity's rows: samples, and omitted rows, each with the reason."""

    source: Manifest
    held: tuple[Sample, ...]
    left_out: tuple[tuple[dict[str, Any], str], ...]
    read: str


def source_version(root: str, copy: Manifest) -> Manifest:
    """Return the version that a copy is of.

    Raises:
        VersionNotFound: it was deleted.
    """
    source = copy.definition["source"]
    return read_manifest(root, source["dataset"], source["version"])


def feature_columns(copy: Manifest) -> list[str]:
    """Return the columns of the source that became features."""
    return list(dict.fromkeys(feature["column"] for feature in copy.definition.get("features", ())))


def find_samples(root: str, copy: Manifest, config: DeliveryConfig, key: str) -> EntitySamples:
    """Return the samples of an entity, or of an image or one of its variants.

    Args:
        root: Root of the store.
        copy: A streaming-ready version.
        config: Its configuration.
        key: The entity's key; for images the id of an original or of a variant.

    Raises:
        VersionNotFound: the source version was deleted.
        CorruptVersion: a file is missing.
        ConfigError: the key is invalid.
    """
    version = source_version(root, copy)
    source = _taken(root, copy, version, config)
    judged_by = ("quality_issues", "data_quality_score") if source.kind == "images" else ()
    taken = Found(pa.table({}), ())
    for column in dict.fromkeys([source.entity, source.keys[0]]):
        value = typed_key(version, column, key)
        taken = find_rows(root, version, column, value, columns=[*source.columns, *judged_by])
        if taken.places:
            break
    left_out: list[tuple[dict[str, Any], str]] = []
    held: list[Sample] = []
    if taken.places:
        rows = taken.table.to_pylist()
        judged = judge(taken.table, source, config)
        codes, reasons = judged
        left_out = [(row, reasons[code]) for row, code in zip(rows, codes.tolist(), strict=True) if code]
        given = [split_of(path) for path, _ in taken.places]
        splits = np.array([-1 if split is None else split for split in given], np.int8)
        kept = admit(taken.table, splits, judged, source, config, rejected=taken.table.slice(0, 0))
        keys = keys_of(kept.rows, source)
        one_unit = np.zeros(len(keys), np.int64)
        ids = sample_ids(keys, find_repeats(keys, one_unit, np.arange(len(keys))).get(0, Repeats()))
        good = np.flatnonzero(codes == 0).tolist()
        for number, sample_id, split in zip(good, ids.tolist(), kept.splits.tolist(), strict=True):
            path, row = taken.places[number]
            place = _locate(root, copy, SPLITS[split], sample_id, config)
            values = {"source": rows[number], "table": taken.table.slice(number, 1)}
            sample = {"source_file": path, "source_row": row, "sample_id": sample_id, "split": SPLITS[split]}
            held.append(Sample(**values, **sample, **place))
    return EntitySamples(version, tuple(held), tuple(left_out), taken.read_of(version))


def _taken(root: str, copy: Manifest, version: Manifest, config: DeliveryConfig) -> Source:
    """Return the parts of its source that a copy uses, by its definition."""
    definition, known = copy.definition, [column.name for column in version.columns]
    label = definition.get("label")
    return Source(
        root=root,
        manifest=version,
        kind=definition["kind"],
        files=(),
        schema=pa.schema([]),
        features=tuple(feature_columns(copy)),
        targets=() if label is None else tuple(label.get("columns") or [label["column"]]),
        entity=definition["entity"],
        keys=tuple(definition["keys"]),
        ready=READY if config.ready_only and READY in known else None,
        weight=weight_column(definition),
        sequence=(definition.get("sequence") or {}).get("column"),
    )


def _locate(root: str, copy: Manifest, split: str, sample_id: int, config: DeliveryConfig) -> dict[str, Any]:
    """Return the place of a sample in its split; search first by its random key, then everywhere."""
    form, entries = SampleFormat.of(copy.definition), files_of(copy, split)
    total = int(copy.definition["samples"].get(split, 0))
    parts = len(plan_buckets(np.array([total]), form, config.file_megabytes * (1 << 20)))
    key = random_keys(np.array([sample_id], np.int64), config.seed)
    part = int(bucket_of(key, max(parts, 1))[0])
    for entry in sorted(entries, key=lambda entry: layout.part_number(entry.path) != part):
        uri = copy.uri(root, entry.path)
        with opened(uri) as source:
            ids = to_numpy(pq.ParquetFile(source).read(columns=[SAMPLE_ID]), SAMPLE_ID)
        (hits,) = np.nonzero(ids == sample_id)
        if len(hits):
            row = int(hits[0])
            before = sum(earlier.rows for earlier in entries[: entries.index(entry)])
            return {"file": entry.path, "row": row, "position": before + row}
    return {}


def split_row(config: DeliveryConfig, entity: str, value: int | str, copy: str) -> dict[str, Any]:
    """Return the split of an entity under the settings of a copy, with the draw that decides it."""
    hashed = stable_hash(pa.array([value]))
    share = float(split_draws(hashed, config.seed)[0])
    split = SPLITS[int(entity_splits(hashed, config.seed, config.validation_share, config.test_share)[0])]
    test = config.validation_share + config.test_share
    bounds = f"validation below {config.validation_share:g}" + (f", test below {test:g}" if config.test_share else "")
    why = f"the hash of {entity} and seed {config.seed} draws {share:.4f}; {bounds}, else train"
    return {"copy": copy, "split": split, "draw": round(share, 6), "why": why}


def summary(root: str, copy: Manifest, key: str) -> str:
    """Return the number of a key's samples in a copy, in words."""
    try:
        config = config_of(DeliveryConfig, copy)
    except ConfigError as fault:
        return f"can't be told: {fault}"
    try:
        found = find_samples(root, copy, config, key)
    except ConfigError:
        return "no sample"
    except PipelineError as fault:
        return f"can't be told: {fault}"
    held = [sample for sample in found.held if sample.file is not None]
    splits, reasons = ({sample.split for sample in held}, {reason for _, reason in found.left_out})
    text = plural(len(held), "sample") if held else "no sample"
    text += f" in {' and '.join(sorted(splits))}" if splits else ""
    return text + (f"; {len(found.left_out)} rows left out ({', '.join(sorted(reasons))})" if reasons else "")


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
    for version in below:
        holds = _holds(root, version, key, given)
        rows += [_row(root, version, "made from it", holds), *_trainings(root, version, holds)]
    if layout.kind(manifest.dataset) == "streaming-copy":
        rows += _trainings(root, manifest, _holds(root, manifest, key))
    return Section(title="held by", rows=rows, notes=notes if rows else [*notes, "Nothing else has it."])


def closing_sections(
    root: str,
    manifest: Manifest,
    key: tuple[str, int | str],
    concerned: Mapping[str, str],
    rejected: Sequence[Mapping[str, Any]] = (),
    *,
    splits: Sequence[Section] = (),
    given: Given | None = None,
) -> list[Section]:
    """Return the sections at the end of every answer: rejected rows, the gate, the holders, and the version.

    Args:
        root: Root of the store.
        manifest: The version that the row is of.
        key: Its key column and key.
        concerned: As in `gate_section`; besides the sources of the rejected rows.
        rejected: Rows of the key that were rejected.
        splits: Sections to show before the holders.
        given: As in `holders_section`.
    """
    return [
        *rejected_sections(rejected),
        gate_section(manifest, {**rejected_sources(rejected), **concerned}),
        *splits,
        holders_section(root, manifest, *key, given),
        version_section(root, manifest),
    ]


def _own_versions(root: str, manifest: Manifest, key: tuple[str, int | str]) -> Iterator[dict[str, Any]]:
    """Yield the other versions of the dataset, newest first."""
    numbers = [one.version for one in _published(root, manifest.dataset)][::-1][:MOST_VERSIONS]
    served = (newest if layout.kind(manifest.dataset) == "features" else latest)(root, manifest.dataset)
    for version in reversed([*read_committed(root, manifest.dataset, numbers).warned().versions.values()]):
        what = "this version" if version.version == manifest.version else "other version"
        what += ", the one that readers get" if served is not None and version.version == served.version else ""
        if version.version != manifest.version or served is None or served.version == version.version:
            yield _row(root, version, what, _holds(root, version, key))


def _row(root: str, manifest: Manifest, relation: str, holds: str) -> dict[str, Any]:
    status = "withdrawn" if withdrawal_of(root, manifest.dataset, manifest.version) else manifest.status
    return {
        "who": str(manifest),
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
            "who": training.uri,
            "relation": f"training on {manifest}",
            "status": f"ended {training.created_at:%Y-%m-%d %H:%M}",
            "verdict": training.verdict,
            "holds": " and ".join(used) or "hasn't seen it",
        }
        for training in trace(root, manifest.dataset, manifest.version).trainings
    ]


def made_from(root: str, manifest: Manifest) -> tuple[list[Manifest], list[str]]:
    """Return the published versions made from a version, directly or through others, and notes on unreadable ones."""
    known: dict[tuple[str, int], IndexedVersion] = {}
    notes: list[str] = []
    for dataset in list_datasets(root):
        try:
            known |= {(dataset, one.version): one for one in _published(root, dataset)}
        except CorruptVersion as fault:
            notes.append(f"{dataset} can't be looked into: {fault}")
    reached = {(manifest.dataset, manifest.version)}
    below: list[tuple[str, int]] = []
    while fresh := [key for key, one in known.items() if key not in reached and reached & {*one.made_from}]:
        below += fresh
        reached |= {*fresh}
    read = (read_committed(root, dataset, [version]).warned().versions for dataset, version in below)
    return [version for versions in read for version in versions.values()], notes


def _published(root: str, dataset: str) -> list[IndexedVersion]:
    """Return the published versions of a dataset, withdrawn ones too, ascending."""
    versions = overview(root, dataset).warned().versions.values()
    return [one for one in versions if one.status == "published"]


def _holds(root: str, manifest: Manifest, key: tuple[str, int | str], given: Given | None = None) -> str:
    """Count the rows of a key that a version has, in words."""
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
    text = plural(len(rows), "row") if rows else "no row"
    splits = sorted({path.partition("/")[0] for path, _ in found.places if path.startswith("split=")})
    text += f" in {', '.join(splits)}" if splits else ""
    moments = sorted({row[time] for row in rows} if time else ())
    text += f", {', '.join(f'{moment:%Y-%m-%d}' for moment in moments[:4])}" if moments else ""
    if given is None or not rows:
        return text
    return f"{text}; {sum(given(manifest, row) for row in rows[:MOST_ROWS])} of them have this row's features"
