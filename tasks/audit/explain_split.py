"""Why an image stands in its split: the rules of `tasks.images.split`, applied to all originals of its version anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.audit.explained import Section
from tasks.core.hashing import stable_hash
from tasks.images.config import ImageAugmentationConfig
from tasks.images.draws import image_keys
from tasks.images.split import SPLITS, split_images

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
_MEMBERS = 50


def split_section(config: ImageAugmentationConfig, known: pa.Table, original: Mapping[str, Any]) -> Section:
    """The split of an image, those that share it because they belong together, and what decides.

    Args:
        config: The version's configuration.
        known: image_id, class_id, alike and split of all of its originals.
        original: The image, with its perceptual hash.

    """
    keys = image_keys(known["image_id"].to_pylist(), config.seed)
    groups, classes = _groups(known), known["class_id"].to_numpy().astype(np.int64)
    mine = pc.index(known["image_id"], original["image_id"]).as_py()
    again = split_images(keys, classes, groups, config.validation_share, config.test_share)
    members = np.flatnonzero(groups == groups[mine])
    shares = f"validation {config.validation_share:g}, test {config.test_share:g}, the rest train"
    if len(members) == 1:
        why = f"class '{original['class_name']}': {_alone(keys, classes, groups, again, mine)}"
    else:
        why = _together(keys, members, again[mine], config)
    facts: dict[str, Any] = {"split": original["split"], "shares": shares, "why": why}
    agrees = SPLITS[again[mine]] == original["split"]
    facts["computed again"] = f"{SPLITS[again[mine]]}, {'as it was' if agrees else 'NOT as it was'}"
    rows = [_member(known, row, original, mine) for row in members[:_MEMBERS].tolist()] if len(members) > 1 else []
    left_out = len(members) - _MEMBERS
    notes = [f"{left_out} more belong with it."] if left_out > 0 and rows else []
    return Section(title="split", facts=facts, rows=rows, notes=notes)


def _groups(known: pa.Table) -> Int64Array:
    """A number for each image's group: of the first image that it is alike to, or its own."""
    ids = known["image_id"].combine_chunks()
    first = pc.fill_null(pc.index_in(known["alike"].combine_chunks(), value_set=ids), -1).to_numpy()
    return np.where(first < 0, np.arange(len(ids)), first).astype(np.int64)


def _alone(
    keys: UInt64Array,
    classes: Int64Array,
    groups: Int64Array,
    splits: npt.NDArray[np.int8],
    mine: int,
) -> str:
    """A single image: its place among those of its class, in the order of their keys."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    single = np.flatnonzero((classes == classes[mine]) & (sizes[group_of] == 1))
    order = single[np.argsort(keys[single])]
    place = int(np.flatnonzero(order == mine)[0]) + 1
    counts = np.bincount(splits[single], minlength=len(SPLITS))
    taken = f"the first {counts[1]} are validation's" + (f", the last {counts[2]} test's" if counts[2] else "")
    return (
        f"by the hash of its id and the seed it is number {place} of its {len(single)} images that stand alone; "
        f"{taken}, the others train's"
    )


def _together(keys: UInt64Array, members: Int64Array, split: int, config: ImageAugmentationConfig) -> str:
    """A group: what its smallest key draws, and whether it got it."""
    draw = float(stable_hash(pa.array([keys[members].min()]))[0] / 2.0**64)
    test = config.validation_share + config.test_share
    drawn = 1 if draw < config.validation_share else 2 if draw < test else 0
    told = (
        f"it shares a split with {len(members) - 1} more, as they belong together; the smallest hash of them draws "
        f"{draw:.4f}: {SPLITS[drawn]}"
    )
    if drawn == split:
        return told
    return f"{told}, which had no room for them in their classes (or train would have had none of a class)"


def _member(known: pa.Table, row: int, original: Mapping[str, Any], mine: int) -> dict[str, Any]:
    one = {name: known[name][row].as_py() for name in ("image_id", "split")}
    return {
        "belongs with": one["image_id"],
        "split": one["split"],
        "which is": "this image" if row == mine else _likeness(known, row, original),
    }


def _likeness(known: pa.Table, row: int, original: Mapping[str, Any]) -> str:
    """What two images of a group have to do with each other, as far as their contents tell."""
    if known["content_xxh3"][row].as_py() == original["content_xxh3"]:
        return "the same bytes"
    bits = (known["perceptual_hash"][row].as_py() ^ original["perceptual_hash"]).bit_count()
    return f"{bits} of 64 bits of the perceptual hash differ"
