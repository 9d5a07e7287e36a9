"""What a DataLoader over Parquet files reads: their row groups in random order, some of them shuffled together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tasks.io.tensors import to_numpy

Array = npt.NDArray[Any]
Share = tuple[int, int]
"""Number of a reader, and how many readers there are."""


def shuffled_images(
    files: Sequence[str], share: Share, buffer: int, draw: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """The images and labels of a reader's share, one by one; about `buffer` of them are shuffled together.

    Each is a view of the row group that was read: a DataLoader copies it once, into its batch.
    """
    images: list[Array] = []
    labels: list[Array] = []
    held = 0
    for group_images, group_labels in _groups(files, "image", share, draw):
        images.append(group_images)
        labels.append(group_labels)
        held += len(group_labels)
        if held >= buffer:
            yield from _mixed(images, labels, draw)
            images, labels, held = [], [], 0
    yield from _mixed(images, labels, draw)


def _mixed(images: list[Array], labels: list[Array], draw: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    where = np.array([(part, row) for part, some in enumerate(labels) for row in range(len(some))], np.int64)
    for part, row in draw.permutation(where).tolist():
        yield images[part][row], labels[part][row]


def shuffled_batches(
    files: Sequence[str], share: Share, batch: int, draw: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """The rows of a reader's share in batches; those of a row group are shuffled, and its last batch may be smaller."""
    for features, labels in _groups(files, "features", share, draw):
        order = draw.permutation(len(labels))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            yield features.take(rows, axis=0), labels.take(rows)


def _groups(
    files: Sequence[str], column: str, share: Share, draw: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    """The row groups of a share, in random order: a column and the labels."""
    opened = [pq.ParquetFile(path) for path in files]
    groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
    number, readers = share
    for position in draw.permutation(len(groups))[number::readers]:
        file, group = groups[position]
        table = file.read_row_group(group, columns=[column, "label"])
        yield to_numpy(table, column), to_numpy(table, "label")
