"""Samples of a streaming-ready copy: explained, from the raw row to the step of a training, and made again.

A replay checks order, ids, labels and values. All rows of the source are read for their ids and splits, since these
decide the place of each sample: about thirty bytes a row are held. Only the rows of the requested samples are encoded.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.audit.explanation import (
    Answer,
    Explanation,
    Section,
    absent,
    closest_keys,
    pick_time,
    read_rows,
    refuse,
    rejected_rows,
    typed_key,
)
from tasks.audit.holders import (
    EntitySamples,
    Sample,
    closing_sections,
    feature_columns,
    find_samples,
    source_version,
    split_row,
)
from tasks.audit.inputs import input_version, why_not
from tasks.audit.replay_rows import (
    ABSENT,
    Again,
    Difference,
    Replayed,
    StoredFiles,
    Unreadable,
    by_file,
    differences,
    missing,
)
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import encoder_of, label_of, weight_column
from tasks.delivery.encoding import sequences
from tasks.delivery.shuffle import bucket_numbers, encode, judge, keys_of, load, places_of, plan_buckets
from tasks.delivery.source import (
    SPLITS,
    TIMES,
    Repeats,
    Source,
    Unit,
    find_repeats,
    random_keys,
    read_pieces,
    read_units,
    sample_ids,
    source_of,
)
from tasks.io import storage
from tasks.io.errors import ConfigError, PipelineError, SourceError
from tasks.io.tensors import AnyArray, Float32Array, Int8Array, Int64Array, to_numpy, to_ragged
from tasks.io.text import plural
from tasks.loader.order import EpochOrder, Share, Sizes, batch_count, step_count
from tasks.loader.samples import (
    BATCH_ID,
    FEATURES,
    IMAGE,
    LABEL,
    LENGTH,
    SEQUENCE,
    WEIGHT,
    SampleFormat,
    batch_ids,
    noted_ids,
    pick,
)
from tasks.loader.version_files import Version
from tasks.store import layout
from tasks.store.lineage import trace
from tasks.store.manifest import FileEntry, Manifest
from tasks.store.reading import data_files, opened
from tasks.store.settings import config_of


class CopyAgain(Again):
    """The samples of one copy, to be made again."""

    unit = "sample"

    def __init__(self, root: str, manifest: Manifest) -> None:
        super().__init__(root, manifest)
        self._form, self._encoder = SampleFormat.of(manifest.definition), encoder_of(manifest)

    def replay(self, chosen: Int64Array) -> list[Replayed]:
        """Make some samples again, and compare them; and compare their batches with the checksums."""
        files = by_file([(entry, entry.rows) for entry in self.manifest.files], chosen)
        made: dict[str, pa.Table] = {}
        try:
            made = self._made({entry.path: numbers for entry, numbers in files})
        except (PipelineError, OSError) as fault:
            self.causes.append(why_not(fault))
        return [one for entry, numbers in files for one in self._compare(entry, numbers, made.get(entry.path))]

    def _made(self, wanted: Mapping[str, Int64Array]) -> dict[str, pa.Table]:
        """Make the samples of some ascending numbers of each file, as far as there are as many."""
        [record] = self.manifest.inputs
        version = input_version(self.root, record, self.causes)
        if version is None:
            raise SourceError(f"the version that it was made from, {record.name} v{record.version}, can't be read")
        self._config = config_of(DeliveryConfig, self.manifest, root=self.root)
        self._source = source_of(self._config, self.root, version)
        self._units = tuple(read_units(self._source))
        ids, splits = _identified(self._units, self._source, self._config)
        order = self._order(np.concatenate(ids), np.concatenate(splits))
        rows: dict[str, Int64Array] = {}
        for path, numbers in wanted.items():
            own = order.get(_place_of(path), np.empty(0, np.int64))
            rows[path] = own[numbers[numbers < len(own)]]
        needed = np.unique(np.concatenate(list(rows.values())))
        samples = [self._form.schema.empty_table(), *self._encoded(needed, ids)]
        return {path: pick(samples, np.searchsorted(needed, own)) for path, own in rows.items()}

    def _order(self, ids: Int64Array, splits: Int8Array) -> dict[tuple[str, int], Int64Array]:
        """Return rows of the source that become samples, by split and file, in the order of their samples.

        Rows are numbered through all units, counting only kept ones.
        """
        drawn = random_keys(ids, self._config.seed)
        counts = np.bincount(splits, minlength=len(SPLITS))
        buckets = plan_buckets(counts, self._form, self._config.file_megabytes * (1 << 20))
        number = bucket_numbers(buckets, splits, drawn)
        order = np.lexsort((drawn, number))
        rows = np.split(order, np.searchsorted(number[order], np.arange(1, len(buckets))))
        return {(SPLITS[bucket.split], bucket.part): own for bucket, own in zip(buckets, rows, strict=False)}

    def _encoded(self, rows: Int64Array, ids: list[Int64Array]) -> list[pa.Table]:
        """Make samples of some rows, ascending, from their units."""
        starts = np.cumsum([0, *(len(own) for own in ids)])
        unit_of = np.searchsorted(starts, rows, side="right") - 1
        columns = self._source.columns + ([IMAGE] if self._source.image else [])
        version = self._source.manifest
        files = StoredFiles(self.root, version, f"of the input {version}, ")
        entries = {layout.join(files.base, entry.path): entry for entry in version.files}
        label = label_of(self.manifest, numbered=self._source.classes is not None)
        parts = []
        for number in np.unique(unit_of).tolist():
            for file, _ in self._units[number].pieces:
                found = files.check(entries[file.uri])
                self.causes += [cause for cause in found if cause not in self.causes]
            loaded = load(self._units[number], self._source, self._config, columns)
            own = rows[unit_of == number] - starts[number]
            rows_again = loaded.rows.take(pa.array(own))
            parts.append(encode(rows_again, ids[number][own], self._form, self._encoder, label, self._source))
        return parts

    def _compare(self, entry: FileEntry, numbers: Int64Array, made: pa.Table | None) -> list[Replayed]:
        """Compare some samples of a file with those made again, the first ones of them, and with their checksums."""
        names = [f"{entry.path} sample {number}" for number in numbers.tolist()]
        size = self._form.batch_size
        batches, batch_of = np.unique(numbers // size, return_inverse=True)
        rows = (batches[:, None] * size + np.arange(size)).ravel()
        try:
            table = self.stored.read(entry, rows[rows < entry.rows])
        except Unreadable as fault:
            return [missing(name, entry, fault.cause) for name in names]
        noted = _noted(layout.join(self.stored.base, entry.path), batches)
        of_batch = [
            () if stored == batch_id else (Difference(BATCH_ID, stored, batch_id),)
            for stored, batch_id in zip(noted, batch_ids(table, size), strict=True)
        ]
        before = table.take(pa.array(np.searchsorted(rows, numbers)))
        now = before.slice(0, 0) if made is None else made
        differing = differences(before, now, [row if row < now.num_rows else None for row in range(len(names))])
        return [
            Replayed(name=name, file=entry.path, differences=(*own, *of_batch[batch]), causes=self.stored.check(entry))
            for name, own, batch in zip(names, differing, batch_of.tolist(), strict=True)
        ]


def _identified(
    units: Sequence[Unit], source: Source, config: DeliveryConfig
) -> tuple[list[Int64Array], list[Int8Array]]:
    """Return the sample ids and the splits of the kept rows of each unit."""
    keys, splits = [], []
    for unit in units:
        loaded = load(unit, source, config, source.columns)
        keys.append(keys_of(loaded.rows, source))
        splits.append(loaded.splits)
    owners = np.repeat(np.arange(len(keys)), [len(own) for own in keys])
    repeats = find_repeats(np.concatenate(keys), owners, np.concatenate([np.arange(len(own)) for own in keys]))
    return [sample_ids(own, repeats.get(unit, Repeats())) for unit, own in enumerate(keys)], splits


def source_rows(root: str, copy: Manifest, ids: Int64Array) -> dict[int, dict[str, Any]]:
    """Return the rows of the source that samples were made of: key columns, file and number there, by sample id.

    All rows of the source are read for their ids.

    Raises:
        VersionNotFound: the source version was deleted.
        CorruptVersion: one of its files is missing or can't be read.
    """
    config, version = config_of(DeliveryConfig, copy, root=root), source_version(root, copy)
    source = source_of(config, root, version)
    base, units = version.uri(root), read_units(source)
    found: dict[int, dict[str, Any]] = {}
    for unit, own in zip(units, _identified(units, source, config)[0], strict=True):
        rows = np.flatnonzero(np.isin(own, ids))
        if not len(rows):
            continue
        read = pa.concat_tables([table for _, table in read_pieces(unit, source.columns)])
        places = np.flatnonzero(judge(read, source, config)[0] == 0)[rows]
        keys = read.select(list(dict.fromkeys([source.entity, *source.keys]))).take(pa.array(places)).to_pylist()
        for row, key, file, number in zip(rows, keys, *places_of(unit, places), strict=True):
            found[int(own[row])] = {**key, "file": file.removeprefix(base + "/"), "row": int(number)}
    return found


def _noted(uri: str, batches: Int64Array) -> list[str]:
    """Return the stored checksums of some batches of a file."""
    with opened(uri) as source:
        noted = noted_ids(pq.read_metadata(source))
    return [noted[batch] if batch < len(noted) else ABSENT for batch in batches.tolist()]


def _place_of(path: str) -> tuple[str, int]:
    """Return split and number of a data file."""
    number = layout.part_number(path)
    assert number is not None, f"{path} isn't named as a part"
    return path.partition("/")[0].removeprefix("split="), number


MOST_ORDERED = 20_000_000
"""Maximum samples of a split for which their order in an epoch is computed."""


def explain_sample(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the origin of samples of a copy, their encoding, and their use in training."""
    definition, config = manifest.definition, config_of(DeliveryConfig, manifest)
    entity: str = definition["entity"]
    names = {entity, definition["keys"][0]}
    rejected = rejected_rows(root, manifest, names, {key})
    if not rejected:
        data_files(root, manifest)  # raises if the gate rejected the version
    try:
        samples = find_samples(root, manifest, config, key)
    except ConfigError:
        if not rejected:
            raise
        samples = None
    if samples is None or not (samples.held or samples.left_out):
        if samples is not None and not rejected:
            close = closest_keys(root, samples.source, entity, typed_key(samples.source, entity, key))
            refuse(manifest, entity, key, close)
        return absent(root, manifest, (entity, key), rejected)
    times = [name for name in definition["keys"][1:] if name in TIMES]
    held = _at(manifest, samples.held, times, key, at)
    if not held:
        reasons = ", ".join(sorted({reason for _, reason in samples.left_out}))
        why, sections = f"left out of the copy: {reasons}", [_left_out(samples)]
        answer: Answer = "rejected" if rejected else "left out"
        return absent(root, manifest, (entity, key), rejected, why, answer=answer, sections=sections)
    value = held[0].source[entity]
    sections = [
        _source(samples, held, times),
        _split(manifest, config, held, value),
        _position(root, manifest, held),
        *(_encoded(root, manifest, sample, several=len(held) > 1) for sample in held),
        *([_left_out(samples)] if samples.left_out else []),
        *closing_sections(root, manifest, (entity, value), _concerned(manifest), rejected),
    ]
    what = f"{plural(len(held), 'sample')} of {entity} {value}"
    return Explanation(manifest, key, "held", f"{what} in {manifest}", sections)


def _at(manifest: Manifest, held: Sequence[Sample], times: Sequence[str], key: str, at: str | None) -> list[Sample]:
    """Return the samples of one time, if the rows have times."""
    if not times or not held:
        if at is not None and not times:
            raise ConfigError(f"--at names a time, and the rows of {manifest.dataset} have none; leave it out")
        return list(held)
    moments = [sample.source[times[0]].astimezone(dt.UTC) for sample in held]
    wanted = pick_time(manifest, key, moments, at)
    return [sample for sample, moment in zip(held, moments, strict=True) if moment == wanted]


def _source(samples: EntitySamples, held: Sequence[Sample], times: Sequence[str]) -> Section:
    source = samples.source
    rows = [
        {
            **{name: sample.source[name] for name in times},
            **({"image": sample.source["image_id"]} if "image_id" in sample.source else {}),
            "file": sample.source_file,
            "row": sample.source_row,
            "sample id": str(sample.sample_id),
        }
        for sample in held
    ]
    others = len(samples.held) - len(held)
    notes = [f"{others} samples of other times are in the copy, too: name one with --at."] if others else []
    notes.append(f"What is known of the row itself: explain {source}.")
    facts = {"source": str(source), "read": samples.read}
    return Section(title="source", facts=facts, rows=rows, notes=notes)


def _split(manifest: Manifest, config: DeliveryConfig, held: Sequence[Sample], value: int | str) -> Section:
    definition = manifest.definition
    splits = sorted({sample.split for sample in held})
    if definition["kind"] == "images" or "/" in held[0].source_file:
        why = f"kept from the source, whose file is in {held[0].source_file.rpartition('/')[0]}"
        return Section(title="split", facts={"split": ", ".join(splits), "why": why})
    drawn = split_row(config, definition["entity"], value, "this copy")
    return Section(title="split", facts={name: drawn[name] for name in ("split", "draw", "why")})


def _position(root: str, manifest: Manifest, held: Sequence[Sample]) -> Section:
    """Return file and row of each sample, and its step in the first epoch."""
    trainings = trainings_on(root, manifest)
    rows, notes = [], []
    for sample in held:
        row: dict[str, Any] = {
            "sample id": str(sample.sample_id),
            "split": sample.split,
            "file": sample.file,
            "row": sample.row,
            "position": sample.position,
        }
        if sample.file is None:
            notes.append(f"Sample {sample.sample_id} isn't in its split's files: the copy isn't what its source says.")
        elif sample.split == "train":
            row |= _first_epoch(root, manifest, sample, trainings[0][1])
        rows.append(row)
    facts = {"samples in split": manifest.definition["samples"].get(held[0].split)}
    if any("step" in row for row in rows):
        settings = ", ".join(f"{name} {trainings[0][1][name]}" for name in ("seed", "batch_size", "workers"))
        facts |= {"epoch 0 as of": f"{trainings[0][0]}: {settings}"}
    return Section(title="position", facts=facts, rows=rows, notes=notes)


def trainings_on(root: str, manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """Return trainings on the copy with their settings, the last first; without one, the settings of its flow run."""
    trainings = []
    for training in reversed(trace(root, manifest.dataset, manifest.version).trainings):
        report = json.loads(storage.read_bytes(layout.join(training.uri, layout.REPORT_JSON)))
        trainings.append((training.uri, report["config"]))
    return [*trainings, ("the flow's settings", manifest.config["training"])]


def _first_epoch(root: str, manifest: Manifest, sample: Sample, training: Mapping[str, Any]) -> dict[str, int | str]:
    """Return step, worker and place in the batch of a sample's delivery in epoch 0."""
    count = int(manifest.definition["samples"]["train"])
    if count > MOST_ORDERED:
        return {}
    batch_size, workers, remainder = int(training["batch_size"]), int(training["workers"]), training["remainder"]
    files = len(Version(root, manifest).files("train"))
    sizes = Sizes.of(SampleFormat.of(manifest.definition).sample_bytes, count, files)
    order = EpochOrder(count, sizes, int(training["seed"]), 0)
    position = int(np.flatnonzero(order.take(0, count) == sample.position)[0])
    step = position // (workers * batch_size)
    if step >= step_count(batch_count(count, batch_size, remainder), workers, remainder):
        return {"step": "none: it is in the remainder, which is dropped"}
    for rank in range(workers):
        share = Share(rank, workers, batch_size)
        batch, real = order.part(step * share.step, share)
        if sample.position in batch[:real]:
            place = int(np.flatnonzero(batch == sample.position)[0])
            return {"step": step, "worker": rank, "in batch": place}
    raise AssertionError("a step's samples are in its workers' batches")


def _encoded(root: str, manifest: Manifest, sample: Sample, *, several: bool) -> Section:
    """Compare stored values of a sample with its source row, and its batch with the checksum."""
    name = f"values of {sample.source.get('image_id', sample.sample_id)}" if several else "values"
    if sample.file is None:
        return Section(title=name, notes=["It isn't there."])
    number, place = divmod(sample.row, size := SampleFormat.of(manifest.definition).batch_size)
    [end] = [min((number + 1) * size, entry.rows) for entry in manifest.files if entry.path == sample.file]
    batch = read_rows(root, manifest, sample.file, np.arange(number * size, end))
    [found] = batch_ids(batch, size)
    [noted] = _noted(manifest.uri(root, sample.file), np.array([number]))
    stored = batch.slice(place, 1)
    facts = _label(manifest, sample, stored) | _weight(manifest, sample, stored)
    facts["checksum of its batch"] = f"{'matches' if found == noted else 'DOES NOT match'} ({noted})"
    if manifest.definition["kind"] == "sequences":
        return Section(title=name, facts=facts | _sequence_facts(manifest, sample, to_ragged(stored, SEQUENCE)[0]))
    if manifest.definition["kind"] == "images":
        return Section(title=name, facts=facts | _image_facts(root, manifest, sample, stored))
    return Section(
        title=name,
        facts=facts,
        rows=_feature_rows(manifest, sample, to_numpy(stored, FEATURES)[0]),
        shown=("feature", "encoding", "raw", "stored", "normalised", "check"),
    )


def _label(manifest: Manifest, sample: Sample, row: pa.Table) -> dict[str, Any]:
    described = manifest.definition.get("label")
    if described is None:
        return {}
    stored = np.atleast_1d(to_numpy(row, LABEL)[0]).tolist()
    classes = described.get("classes") or [None] * len(stored)
    if described["kind"] == "class":
        classes = [classes]
    named = [f"{one} ({names[one]})" if names else f"{one}" for one, names in zip(stored, classes, strict=True)]
    columns = described.get("columns") or [described["column"]]
    made_of = ", ".join(f"{column} = {sample.source[column]}" for column in columns)
    return {"label": f"{', '.join(named)}, of {made_of}"}


def _weight(manifest: Manifest, sample: Sample, row: pa.Table) -> dict[str, Any]:
    column = weight_column(manifest.definition)
    if column is None:
        return {}
    return {"weight": f"{to_numpy(row, WEIGHT)[0]}, of {column} = {sample.source[column]}"}


def _feature_rows(manifest: Manifest, sample: Sample, stored: Float32Array) -> list[dict[str, Any]]:
    """Return each feature: raw value, stored value, the model's input, and the result of encoding again."""
    encoder = encoder_of(manifest)
    assert encoder is not None, "tables are encoded"
    again = encoder.encode(sample.table)[0]
    mean, std = (manifest.definition["normalise"][name] for name in ("mean", "std"))
    return [
        {
            "feature": feature.name,
            "encoding": feature.encoding,
            "raw": sample.source[feature.column],
            "stored": float(stored[number]),
            "mean": mean[number],
            "std": std[number],
            "normalised": round((float(stored[number]) - mean[number]) / std[number], 6),
            "check": "as encoded" if again[number] == stored[number] else "DIFFERS from its encoding",
        }
        for number, feature in enumerate(encoder.features)
    ]


def _image_facts(root: str, manifest: Manifest, sample: Sample, stored: pa.Table) -> dict[str, Any]:
    """Compare the picture with that of the source; return this and the constants for normalising."""
    constants, form = manifest.definition["normalise"], SampleFormat.of(manifest.definition)
    facts: dict[str, Any] = {
        "shape": " × ".join(map(str, form.shape)),
        "stored as": f"{form.encoding or form.dtype}, as in the source",
        "normalised by": f"(x / {constants['scale']} - {constants['mean']}) / {constants['std']}",
    }
    if form.encoding is None:
        means = to_numpy(stored, IMAGE)[0].mean(axis=(1, 2))
        facts["mean of the channels"] = [round(float(mean), 3) for mean in means]
    else:
        facts["bytes"] = to_numpy(stored, LENGTH)[0].item()
    source = manifest.definition["source"]
    try:
        version, place = source_version(root, manifest), np.array([sample.source_row])
        row = read_rows(root, version, sample.source_file, place, [IMAGE])
        same = row[IMAGE][0].as_py() == stored[IMAGE][0].as_py()
        what = "pixels" if form.encoding is None else "bytes"
        facts["check"] = f"the same {what} as in the source" if same else f"OTHER {what} than in the source"
    except PipelineError as fault:
        facts["check"] = f"can't be compared with {source['dataset']} v{source['version']}: {fault}"
    return facts


def _sequence_facts(manifest: Manifest, sample: Sample, stored: AnyArray) -> dict[str, Any]:
    """Compare the sequence with that of the source."""
    column = manifest.definition["sequence"]["column"]
    same = np.array_equal(sequences(sample.table[column]).values, stored)
    return {
        "length": len(stored),
        "stored as": f"{stored.dtype}, of {column}",
        "begins with": repr(sample.source[column][:40]),
        "check": "the same elements as in the source" if same else "OTHER elements than in the source",
    }


def _left_out(samples: EntitySamples) -> Section:
    rows = [{"reason": reason, "values": row} for row, reason in samples.left_out]
    note = ["Rows that aren't marked as training-ready are left out by ready_only; others are rejected, and counted."]
    return Section(title="left out", rows=rows, notes=note)


def _concerned(manifest: Manifest) -> dict[str, str]:
    label = manifest.definition.get("label")
    concerned = dict.fromkeys(feature_columns(manifest), "a column of this row")
    weight = weight_column(manifest.definition)
    concerned |= {weight: "its weight"} if weight else {}
    return concerned | (dict.fromkeys(label.get("columns") or [label["column"]], "its label") if label else {})
