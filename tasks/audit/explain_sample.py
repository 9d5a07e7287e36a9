"""Samples of an entity or an image in a streaming-ready copy: from the raw row to the step of a training."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.audit.explanation import (
    Explanation,
    Section,
    absent,
    gate_section,
    pick_time,
    refuse,
    rejected_rows,
    rejected_sections,
    version_section,
)
from tasks.audit.find_rows import closest_keys, read_row, typed_key
from tasks.audit.holders import Sample, Samples, feature_columns, find_samples, holders_section, source_of, split_row
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import block_format, encoder_of
from tasks.delivery.encoding import Encoder
from tasks.io import storage
from tasks.io.errors import ConfigError, PipelineError
from tasks.io.tensors import to_numpy
from tasks.io.text import plural
from tasks.loader.blocks import CHECKSUM, IMAGE, LABEL, block_checksums
from tasks.loader.order import EpochOrder, Share, Sizes, batch_count, step_count
from tasks.loader.version_files import Version
from tasks.store import layout
from tasks.store.lineage import trace
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files
from tasks.store.settings import config_of

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
        found = find_samples(root, manifest, config, key)
    except ConfigError:
        if not rejected:
            raise
        found = None
    if found is None or not (found.held or found.left_out):
        if found is not None and not rejected:
            close = closest_keys(root, found.source, entity, typed_key(found.source, entity, key))
            refuse(manifest, entity, key, close)
        return absent(root, manifest, (entity, key), "all that it had was rejected", rejected_sections(rejected))
    times = [name for name in definition["keys"][1:] if definition["kind"] == "table"]
    held = _at(manifest, found.held, times, key, at)
    if not held:
        reasons = ", ".join(sorted({reason for _, reason in found.left_out}))
        return absent(
            root,
            manifest,
            (entity, key),
            f"left out of the copy: {reasons}",
            [_left_out(found), *rejected_sections(rejected)],
            answer="rejected" if rejected else "left out",
        )
    value = held[0].source[entity]
    sections = [
        _source(found, held, times),
        _split(manifest, config, held, value),
        _position(root, manifest, held),
        *(_encoded(root, manifest, sample, several=len(held) > 1) for sample in held),
        *([_left_out(found)] if found.left_out else []),
        *rejected_sections(rejected),
        gate_section(manifest, _concerned(manifest)),
        holders_section(root, manifest, entity, value),
        version_section(root, manifest),
    ]
    what = f"{plural(len(held), 'sample')} of {entity} {value}"
    return Explanation(manifest, key, "held", f"{what} in {manifest.dataset} v{manifest.version}", sections)


def _at(manifest: Manifest, held: Sequence[Sample], times: Sequence[str], key: str, at: str | None) -> list[Sample]:
    """Return the samples of one time, if the rows have times."""
    if not times or not held:
        if at is not None and not times:
            raise ConfigError(f"--at names a time, and the rows of {manifest.dataset} have none; leave it out")
        return list(held)
    moments = [sample.source[times[0]].astimezone(dt.UTC) for sample in held]
    wanted = pick_time(manifest, key, moments, at)
    return [sample for sample, moment in zip(held, moments, strict=True) if moment == wanted]


def _source(found: Samples, held: Sequence[Sample], times: Sequence[str]) -> Section:
    source = found.source
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
    others = len(found.held) - len(held)
    notes = [f"{others} samples of other times are in the copy, too: name one with --at."] if others else []
    notes.append(f"What is known of the row itself: explain {source.dataset} v{source.version}.")
    facts = {"source": f"{source.dataset} v{source.version}", "read": found.read}
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
    """Return file, block and place of each sample, and its step in the first epoch."""
    trainings = _trainings(root, manifest)
    rows, notes = [], []
    for sample in held:
        row: dict[str, Any] = {
            "sample id": str(sample.sample_id),
            "split": sample.split,
            "file": sample.file,
            "block": sample.block,
            "place": sample.place,
            "position": sample.position,
        }
        if sample.file is None:
            notes.append(f"Sample {sample.sample_id} isn't in its split's files: the copy isn't what its source says.")
        elif sample.split == "train":
            row |= _first_epoch(root, manifest, sample, trainings[0][1])
        rows.append(row)
    facts = {"samples in split": manifest.definition["samples"].get(held[0].split)}
    if any("step" in row for row in rows):
        told = ", ".join(f"{name} {trainings[0][1][name]}" for name in ("seed", "batch_size", "workers"))
        facts |= {"epoch 0 as of": f"{trainings[0][0]}: {told}"}
    return Section(title="position", facts=facts, rows=rows, notes=notes)


def _trainings(root: str, manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """Return trainings on the copy with their settings, the last first; without one, the settings of its flow run."""
    found = []
    for training in reversed(trace(root, manifest.dataset, manifest.version).trainings):
        report = json.loads(storage.read_bytes(layout.join(training.uri, layout.REPORT_JSON)))
        found.append((training.uri, report["config"]))
    return [*found, ("the flow's settings", manifest.config["training"])]


def _first_epoch(root: str, manifest: Manifest, sample: Sample, training: Mapping[str, Any]) -> dict[str, int | str]:
    """Return step, worker and place in the batch of a sample's delivery in epoch 0."""
    count = int(manifest.definition["samples"]["train"])
    if count > MOST_ORDERED:
        return {}
    batch_size, workers, remainder = int(training["batch_size"]), int(training["workers"]), training["remainder"]
    files = len(Version(root, manifest).files("train"))
    order = EpochOrder(count, Sizes.of(block_format(manifest).sample_bytes, count, files), int(training["seed"]), 0)
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
    """Compare stored values of a sample with its source row, and the checksum of its block."""
    name = f"values of {sample.source.get('image_id', sample.sample_id)}" if several else "values"
    if sample.file is None:
        return Section(title=name, notes=["It isn't there."])
    block = read_row(root, manifest, sample.file, sample.block)
    [noted], [found] = block[CHECKSUM].to_pylist(), block_checksums(block)
    facts = _label(manifest, sample, block)
    intact = "matches" if found == noted else "DOESN'T match"
    facts["checksum of the block"] = f"{intact} ({noted})"
    if manifest.definition["kind"] == "images":
        return Section(title=name, facts=facts | _image_facts(root, manifest, sample, block))
    stored = to_numpy(block, "features")[0][sample.place]
    return Section(
        title=name,
        facts=facts,
        rows=_feature_rows(manifest, sample, stored),
        shown=("feature", "encoding", "raw", "stored", "normalised", "check"),
    )


def _label(manifest: Manifest, sample: Sample, block: pa.Table) -> dict[str, Any]:
    described = manifest.definition.get("label")
    if described is None:
        return {}
    stored = to_numpy(block, LABEL).reshape(-1)[sample.place].item()
    classes = described.get("classes")
    told = f"{stored} ({classes[stored]})" if classes else f"{stored}"
    return {"label": f"{told}, of {described['column']} = {sample.source[described['column']]}"}


def _feature_rows(manifest: Manifest, sample: Sample, stored: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return each feature: raw value, stored value, the model's input, and the result of encoding again."""
    encoder = encoder_of(manifest)
    assert encoder is not None, "tables are encoded"
    raw = {name: sample.source[name] for name in feature_columns(manifest)}
    again = encoder.encode(_table(raw, encoder))[0]
    mean, std = (manifest.definition["normalise"][name] for name in ("mean", "std"))
    return [
        {
            "feature": feature.name,
            "encoding": feature.encoding,
            "raw": raw[feature.column],
            "stored": float(stored[number]),
            "mean": mean[number],
            "std": std[number],
            "normalised": round((float(stored[number]) - mean[number]) / std[number], 6),
            "check": "as encoded" if again[number] == stored[number] else "DIFFERS from its encoding",
        }
        for number, feature in enumerate(encoder.features)
    ]


def _table(raw: Mapping[str, Any], encoder: Encoder) -> pa.Table:
    """Return a raw row as a table for the encoder: a column without a value has no type of its own."""
    texts = {feature.column for feature in encoder.features if feature.encoding == "category"}
    return pa.table(
        {
            name: pa.chunked_array(
                [pa.array([value], (pa.string() if name in texts else pa.float64()) if value is None else None)]
            )
            for name, value in raw.items()
        }
    )


def _image_facts(root: str, manifest: Manifest, sample: Sample, block: pa.Table) -> dict[str, Any]:
    """Compare the picture with that of the source; return this and the constants for normalising."""
    image, constants = to_numpy(block, IMAGE)[0], manifest.definition["normalise"]
    facts = {
        "shape": " × ".join(map(str, image.shape)),
        "stored as": f"{image.dtype}, as in the source",
        "mean of the channels": [round(float(one), 3) for one in image.mean(axis=(1, 2))],
        "normalised by": f"(x / {constants['scale']} - {constants['mean']}) / {constants['std']}",
    }
    source = manifest.definition["source"]
    try:
        found = read_row(root, source_of(root, manifest), sample.source_file, sample.source_row, [IMAGE])
        same = np.array_equal(to_numpy(found, IMAGE)[0], image)
        facts["check"] = "the same pixels as in the source" if same else "OTHER pixels than in the source"
    except PipelineError as fault:
        facts["check"] = f"can't be compared with {source['dataset']} v{source['version']}: {fault}"
    return facts


def _left_out(found: Samples) -> Section:
    rows = [{"reason": reason, "values": row} for row, reason in found.left_out]
    note = ["Rows that aren't marked as training-ready are left out by ready_only; others are rejected, and counted."]
    return Section(title="left out", rows=rows, notes=note)


def _concerned(manifest: Manifest) -> dict[str, str]:
    label = manifest.definition.get("label")
    concerned = dict.fromkeys(feature_columns(manifest), "a column of this row")
    return concerned | ({label["column"]: "its label"} if label else {})
