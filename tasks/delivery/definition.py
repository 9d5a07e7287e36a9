"""Encoder, label and files of a streaming-ready version: fitted to its rows, and defined in its manifest. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import (
    Encoder,
    Feature,
    Label,
    LabelVector,
    fit_encoder,
    fit_label,
    label_names,
)
from tasks.delivery.shuffle import Look, Shuffle, UnitNote, WrittenBucket, plan_buckets
from tasks.delivery.source import CLASS_ID, SPLITS, Source, sequence_dtype
from tasks.io.errors import ConfigError
from tasks.io.hashing import stable_hash
from tasks.io.tensors import ANY_LENGTH, Int64Array
from tasks.loader.samples import IMAGE, SampleFormat
from tasks.quality.profile import ColumnPartial, TableProfile
from tasks.quality.sketch import DistinctSketch, TopValues
from tasks.store.manifest import Manifest


def samples_of(notes: Sequence[UnitNote]) -> Int64Array:
    """Return the samples of each split."""
    counts: Int64Array = np.sum([note.samples for note in notes], axis=0)
    return counts


def fit(look: Look, notes: Sequence[UnitNote], profile: TableProfile) -> Shuffle:
    """Fit on the train split, and plan the files."""
    config, source = look.config, look.source
    encoder = fit_encoder(profile, source.features, config) if source.kind == "table" else None
    label = _label(config, source, notes, profile)
    samples, elements = int(samples_of(notes).sum()), sum(note.elements for note in notes)
    dtype = "uint8"
    shape: tuple[int, ...] = ANY_LENGTH
    if encoder is not None:
        shape = (len(encoder.features),)
    elif source.sequence is not None:
        dtype = str(sequence_dtype(source.schema.field(source.sequence).type))
    else:
        assert source.image is not None, "images have a shape"
        shape = source.image.shape
    form = SampleFormat(
        kind=source.kind,
        shape=shape,
        label=label.dtype if label else None,
        weight=source.weight is not None,
        batch_size=1 if source.kind == "images" else config.batch_size,
        labels=len(label.parts) if isinstance(label, LabelVector) else None,
        dtype=dtype,
        encoding=source.encoding,
        mean_length=-(-elements // max(samples, 1)),
    )
    return Shuffle(
        config=config,
        source=source,
        reservation=look.reservation,
        units=look.units,
        form=form,
        encoder=encoder,
        label=label,
        buckets=plan_buckets(samples_of(notes), form, config.file_megabytes * (1 << 20)),
        longest=max(note.longest for note in notes),
    )


def _label(
    config: DeliveryConfig, source: Source, notes: Sequence[UnitNote], profile: TableProfile
) -> Label | LabelVector | None:
    parts = []
    for name in notes[0].label_columns:
        counts = [found for note in notes for found in note.labels.get(name, ())]
        classes = source.classes if name == CLASS_ID else None
        found = TopValues.merge_all(counts) if counts else None
        parts.append(fit_label(name, found, profile.partial(name), classes, config.target_kind))
    if not parts or tuple(part.column for part in parts) == source.targets[:1]:
        return parts[0] if parts else None
    if len({part.kind for part in parts}) > 1:
        kinds = ", ".join(f"{part.column} ({part.kind})" for part in parts)
        raise ConfigError(
            f"target = '{','.join(source.targets)}' mixes classes and numbers: {kinds}; name columns of one kind, or "
            "make whole numbers of either with target_kind"
        )
    return LabelVector(source.targets, tuple(parts))


def class_counts(label: Label | LabelVector | None, written: Sequence[WrittenBucket]) -> dict[str, dict[str, int]]:
    """Return the samples by split, then class; empty without classes."""
    if not isinstance(label, Label) or label.kind != "class":
        return {}
    counts = {}
    for split, name in enumerate(SPLITS):
        own = [made.class_counts for made in written if made.split == split and made.class_counts is not None]
        if own:
            counts[name] = dict(zip(label.classes, np.sum(own, axis=0).tolist(), strict=True))
    return counts


NORMALISE_IMAGES: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": 255}
"""ImageNet's constants, for images whose version declares none."""


def describe(shuffle: Shuffle, samples: dict[str, int]) -> dict[str, Any]:
    """Return `manifest.definition` of the version: JSON."""
    source, form = shuffle.source, shuffle.form
    described: dict[str, Any] = {
        "kind": form.kind,
        "batch_size": form.batch_size,
        "seed": shuffle.config.seed,
        "samples": samples,
        "entity": source.entity,
        "keys": list(source.keys),
        "label": shuffle.label.describe() if shuffle.label else None,
        "source": {"dataset": source.manifest.dataset, "version": source.manifest.version},
        **({"weight": {"column": source.weight}} if source.weight is not None else {}),
    }
    if source.sequence is not None:
        lengths = {"mean_length": form.mean_length, "longest": shuffle.longest}
        sequence = {"column": source.sequence, "dtype": form.dtype, **lengths}
        return described | {"sequence": sequence, "normalise": {"mean": [], "std": []}}
    if shuffle.encoder is None:
        image: dict[str, Any] = {"shape": list(form.shape), "dtype": form.columns[IMAGE].dtype}
        if form.encoding is not None:
            image |= {"encoding": form.encoding, "mean_length": form.mean_length, "longest": shuffle.longest}
        return described | {"image": image, "normalise": _image_constants(shuffle)}
    features = [feature.describe() for feature in shuffle.encoder.features]
    return described | {
        "feature_count": len(features),
        "features": features,
        "normalise": shuffle.encoder.normalise(),
    }


def encoder_of(manifest: Manifest) -> Encoder | None:
    """Return the encoder of a version's features; None for images and sequences."""
    features = manifest.definition.get("features")
    return None if features is None else Encoder(tuple(Feature(**described) for described in features))


def label_of(manifest: Manifest, numbered: bool = False) -> Label | LabelVector | None:
    """Return the label of a version's samples; None without one.

    Args:
        manifest: The version's.
        numbered: True if the source numbers its classes itself, so that its column holds the numbers.
    """
    described = manifest.definition.get("label")
    if described is None or described["kind"] == "number":
        return None if described is None else Label(**described)
    names = label_names(described)
    if described["kind"] == "class":
        return _classes_of(names[0], described["classes"], numbered)
    if described["kind"] == "classes":
        known = zip(names, described["classes"], strict=True)
        parts = [_classes_of(name, classes, numbered and name == CLASS_ID) for name, classes in known]
    else:
        scales = zip(names, described["mean"], described["std"], strict=True)
        parts = [Label(column=name, kind="number", mean=mean, std=std) for name, mean, std in scales]
    return LabelVector(tuple(described["columns"]), tuple(parts))


def _classes_of(column: str, names: Sequence[str], numbered: bool) -> Label:
    classes = tuple(names)
    values = tuple(map(str, range(len(classes)))) if numbered else classes
    return Label(column=column, kind="class", values=values, classes=classes)


def weight_column(definition: Mapping[str, Any]) -> str | None:
    """Return the column of the source that has the samples' weights, from `manifest.definition`; None without."""
    weight = definition.get("weight")
    return None if weight is None else str(weight["column"])


def named_profile(profile: TableProfile, label: Label | LabelVector | None, notes: Sequence[UnitNote]) -> TableProfile:
    """Return the profile of the train split's features and target, with classes by name, of any type."""
    if isinstance(label, LabelVector):
        for part in label.parts:
            profile = named_profile(profile, part, notes)
        return profile
    if label is None or label.kind != "class":
        return profile
    counts = TopValues.merge_all([note.labels[label.column][0] for note in notes])  # of the train split
    named = dict(zip(label.values, label.classes, strict=True))
    classes = {named[value]: rows for value, rows in (counts.counts or {}).items()}
    rows = sum(classes.values())
    top = TopValues(dict(sorted(classes.items())), counts.capacity, counts.longest)
    distinct = DistinctSketch.of(stable_hash(pa.array(list(classes), pa.string())))
    partial = ColumnPartial("string", "string", rows, 0, top=top, distinct=distinct)
    return TableProfile(profile.rows, {**profile.partials, label.column: partial})


def _image_constants(shuffle: Shuffle) -> dict[str, Any]:
    """Return the constants of the source, for one or more channels."""
    channels = shuffle.form.shape[0]
    found: dict[str, Any] = shuffle.source.manifest.definition.get("normalise") or NORMALISE_IMAGES
    if len(found["mean"]) != channels:
        return {"mean": [0.0] * channels, "std": [1.0] * channels, "scale": 255}
    std = [float(value) or 1.0 for value in found["std"]]
    return {"mean": list(found["mean"]), "std": std, "scale": found.get("scale", 255)}
