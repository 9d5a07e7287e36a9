"""Decisions after the first look at all rows: encoder, label, files, and number of samples. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.encoding import fit_encoder
from tasks.delivery.keys import SPLITS
from tasks.delivery.label import Label, fit_label
from tasks.delivery.source import Source
from tasks.delivery.stages import Look, Shuffle, UnitNote, WrittenBucket, plan_buckets
from tasks.loader.blocks import BlockFormat
from tasks.quality.profile import TableProfile
from tasks.quality.sketch import TopValues


def samples_of(notes: Sequence[UnitNote]) -> npt.NDArray[np.int64]:
    """Return the samples of each split."""
    counts: npt.NDArray[np.int64] = np.sum([note.samples for note in notes], axis=0)
    return counts


def fit(look: Look, notes: Sequence[UnitNote], profile: TableProfile) -> Shuffle:
    """Fit on the train split, and plan the files."""
    config, source = look.config, look.source
    encoder = fit_encoder(profile, source.features, config) if source.kind == "table" else None
    label = _label(config, source, notes, profile)
    if encoder is not None:
        shape: tuple[int, ...] = (len(encoder.features),)
    else:
        assert source.image is not None, "images have a shape"
        shape = source.image.shape
    form = BlockFormat(
        kind=source.kind,
        shape=shape,
        label=label.dtype if label else None,
        block_size=config.batch_size if source.kind == "table" else 1,
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
    )


def _label(config: DeliveryConfig, source: Source, notes: Sequence[UnitNote], profile: TableProfile) -> Label | None:
    if source.target is None:
        return None
    counts = [found for note in notes for found in note.labels or ()]
    return fit_label(
        source.target,
        TopValues.merge_all(counts) if counts else None,
        profile.partial(source.target),
        source.classes,
        config.target_kind,
    )


def class_counts(label: Label | None, written: Sequence[WrittenBucket]) -> dict[str, dict[str, int]]:
    """Return the samples by split, then class; empty without classes."""
    if label is None or label.kind != "class":
        return {}
    counts = {}
    for split, name in enumerate(SPLITS):
        own = [made.class_counts for made in written if made.split == split and made.class_counts is not None]
        if own:
            counts[name] = dict(zip(label.classes, np.sum(own, axis=0).tolist(), strict=True))
    return counts
