"""Options of every stream, and what a stream counts."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tasks.loader.batches import Made
from tasks.loader.order import Remainder
from tasks.loader.shards import OnCorrupt


@dataclass(slots=True)
class StreamStats:
    """Statistics of a stream since it was opened.

    Attributes:
        batches: batches of this worker.
        samples: real samples in them.
        bytes_read: bytes gathered for them, as stored.
        wait_seconds: time in which the consumer waited for a batch.
        seconds: time of iterations, including waiting, up to the last request or delivery of a batch.
        cache_hits: files of S3 that were in the cache.
        cache_misses: files that were downloaded.
        cache_bytes_read: their bytes.
        skipped_samples: damaged samples of this worker that were skipped.
        skipped_files: files skipped as a whole.
        cut_samples: sequences of this worker that were cut to `max_length`.
        source_samples: real samples of each source, in the order of the sources.
    """

    batches: int = 0
    samples: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes_read: int = 0
    skipped_samples: int = 0
    skipped_files: int = 0
    cut_samples: int = 0
    source_samples: tuple[int, ...] = ()

    def add(self, made: Made, waited: float) -> None:
        """Count a batch, and the time in which it was waited for."""
        self.batches += 1
        self.samples += sum(made.samples)
        self.source_samples = tuple(map(operator.add, self.source_samples, made.samples))
        self.bytes_read += made.bytes
        self.wait_seconds += waited
        self.skipped_samples += made.skipped
        self.cut_samples += made.cut


class Options(TypedDict, total=False):
    """Options of every stream: arguments of `BatchStream`."""

    split: str
    seed: int
    rank: int | None
    world_size: int | None
    shuffle: bool
    remainder: Remainder
    columns: Sequence[str] | None
    normalise: bool
    dtype: Any
    channels_last: bool
    device: Any
    on_corrupt: OnCorrupt
    verify: bool
    prefetch: int
    cache_dir: str | os.PathLike[str] | None
    cache_bytes: int | None
    as_numpy: bool
    transform: Any
    mixup: float | None
    cutmix: float | None
    transform_threads: int | None
    max_length: int | None
    pad_value: float
