"""Examples for a person: originals beside their variants, rejected images, and distributions of classes and sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.images.decode import Decoded, Decoder
from tasks.images.rows import decode_images
from tasks.images.sheets import SheetRow, class_balance_chart, contact_sheet, reject_sheet, size_chart, thumbnail
from tasks.io import storage
from tasks.report.report import DataTable, Picture
from tasks.store import layout
from tasks.store.manifest import FileEntry
from tasks.store.reservation import Reservation

UInt8Array = npt.NDArray[np.uint8]

EXAMPLES = 12
DOUBTFUL = 4
"""Number of examples whose variants have issues."""
REJECTS = 18
SIDE = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An image to show, and the files of its unit, one of which holds its variants."""

    image_id: str
    uri: str
    class_name: str
    split: str
    file: str


def choose_examples(
    keys: npt.NDArray[np.uint64], class_ids: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> list[int]:
    """Choose images to show: some of as many classes as possible, and some whose variants are doubtful.

    Args:
        keys: Key of each image; they decide among equals. Shape (n,).
        class_ids: Class of each image, shape (n,).
        scores: Mean quality score of its variants, shape (n,).

    Returns:
        Rows, at most `EXAMPLES`, by class.

    """
    order = np.lexsort((keys, scores))
    doubtful = [int(row) for row in order[:DOUBTFUL] if scores[row] < 1]
    by_key = np.lexsort((keys, class_ids))
    # The number of an image within its class, in the order of keys: first one of every class, then a second.
    starts = np.flatnonzero(np.diff(class_ids[by_key], prepend=-1))
    turn = np.arange(len(by_key)) - np.repeat(starts, np.diff(np.append(starts, len(by_key))))
    chosen = by_key[np.lexsort((keys[by_key], turn))]
    usual = [int(row) for row in chosen if int(row) not in doubtful][: EXAMPLES - len(doubtful)]
    return sorted([*usual, *doubtful], key=lambda row: (class_ids[row], keys[row]))


def contact_picture(
    examples: Sequence[Example], config: ImageAugmentationConfig, max_bytes: int | None = None
) -> Picture | None:
    """Draw originals beside their variants, as they were stored."""
    decoder = Decoder(config.max_pixels, config.background)
    rows = list(_sheet_rows(examples, config, decoder))
    if not rows:
        return None
    data = contact_sheet(rows) if max_bytes is None else contact_sheet(rows, max_bytes=max_bytes)
    caption = "Originals, and beside each its variants as they are stored; a coloured border names an issue."
    return Picture.of("Contact sheet", caption, "image/webp", data)


def _sheet_rows(examples: Sequence[Example], config: ImageAugmentationConfig, decoder: Decoder) -> Iterator[SheetRow]:
    for example in examples:
        decoded = decoder.decode(storage.read_bytes(example.uri))
        if not isinstance(decoded, Decoded):
            continue  # the file has changed since it was augmented
        rows = _stored_rows(example)
        yield SheetRow(
            image_id=example.image_id,
            class_name=example.class_name,
            split=example.split,
            original=thumbnail(decoded.pixels[:, :, :3], SIDE),
            variants=[thumbnail(levels(image, config.augmentation), SIDE) for image in decode_images(rows)],
            issues=rows["quality_issues"].to_pylist(),
        )


def _stored_rows(example: Example) -> pa.Table:
    with storage.open_input(example.file) as source:
        return pq.read_table(source, filters=[("original_image_id", "=", example.image_id)])


def levels(image: npt.NDArray[np.generic], augmentation: Augmentation) -> UInt8Array:
    """Return a stored image as RGB rows of uint8, shape (height, width, 3)."""
    rows = np.moveaxis(np.asarray(image), 0, 2)
    if rows.dtype == np.uint8:
        return np.ascontiguousarray(rows)
    mean, std = np.array(augmentation.mean), np.array(augmentation.std)
    return np.ascontiguousarray(np.clip((rows * std + mean) * 255 + 0.5, 0, 255).astype(np.uint8))


def reject_picture(
    entries: Sequence[FileEntry], reservation: Reservation, config: ImageAugmentationConfig
) -> Picture | None:
    """Draw some of the rejected images of each reason, if they can be decoded."""
    decoder = Decoder(config.max_pixels, config.background)
    items: list[tuple[str, str, UInt8Array | None]] = []
    shown: Counter[str] = Counter()
    for row in _rejected(entries, reservation):
        if len(items) == REJECTS:
            break
        shown[row["reason"]] += 1
        if shown[row["reason"]] > REJECTS // 4:
            continue
        items.append((row["image_id"] or row["path"], row["reason"], _thumbnail_of(row["uri"], decoder)))
    if not items:
        return None
    caption = "Rejected images; all of them, with the reason, are in _rejected/. A grey tile can't be decoded."
    return Picture.of("Rejected images", caption, "image/webp", reject_sheet(items))


def _rejected(entries: Sequence[FileEntry], reservation: Reservation) -> Iterator[dict[str, str]]:
    for entry in entries:
        with storage.open_input(layout.join(reservation.uri, entry.path)) as source:
            table = pq.read_table(source)
        if "uri" in table.column_names:  # the others are labels
            yield from table.to_pylist()


def _thumbnail_of(uri: str, decoder: Decoder) -> UInt8Array | None:
    try:
        decoded = decoder.decode(storage.read_bytes(uri))
    except (OSError, ValueError):
        return None
    return thumbnail(decoded.pixels[:, :, :3], SIDE) if isinstance(decoded, Decoded) else None


def charts(counts: Mapping[str, Mapping[str, int]], sizes: npt.NDArray[np.int32]) -> list[Picture]:
    """Return charts of the classes by split, and of the sizes of the originals.

    Args:
        counts: Images by class, then split.
        sizes: Height and width of each original, shape (n, 2).

    """
    if not len(sizes):
        return []
    return [
        Picture.of(
            "Classes", "Images of each class by split, before augmentation.", "image/png", class_balance_chart(counts)
        ),
        Picture.of(
            "Sizes", "Width and height of the originals, pixels.", "image/png", size_chart(sizes[:, 0], sizes[:, 1])
        ),
    ]


def reject_table(rejected: Mapping[str, int], images: int) -> DataTable | None:
    """Return the number of rejected images for each reason."""
    if not rejected:
        return None
    rows = tuple(
        (reason, count, round(count / max(images, 1), 4))
        for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    )
    return DataTable(title="Rejected images", columns=("reason", "images", "share"), rows=rows)
