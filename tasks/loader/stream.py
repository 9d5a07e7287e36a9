"""The loader: a published version as batches for one of several workers, in a reproducible order.

    with TrainingStream("s3://bucket/data/training-datasets/streaming-ready/customers", batch_size=1024) as stream:
        for epoch in range(10):
            for batch in stream:                                # {"features": …, "label": …, "sample_id": …, "mask": …}
                …
                checkpoint = {…, "stream": stream.state_dict()}

Guarantees:

- Over all workers each sample comes exactly once an epoch, and each worker gets as many batches as the others.
- The order depends on the version, the seed and the epoch alone. A worker's part of a step follows from its
  number: each reads about its share of the files.
- A state is the place of all workers together: any of them can save it, and any number of workers can resume from it,
  without losing or repeating a sample.
- A batch belongs to its receiver: nothing writes to it later.

A stream belongs to the process that opened it, which alone knows its place: it can't be sent to another one, a forked
copy raises an error instead of waiting for a missing thread, and processes of a torch DataLoader are refused, unless
each opens a stream with a separate rank and world_size. It is a loader itself and needs no DataLoader.

It runs in Ray Train's workers, under torchrun, and alone; it needs neither Ray nor, for numpy, PyTorch.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tasks.io.errors import ConfigError, CorruptVersion, InputError, PipelineError
from tasks.io.tensors import TensorSpec
from tasks.loader.arguments import LIMIT, one_of, picked_columns, place_in_world, truth_values, whole_number
from tasks.loader.cache import FileCache, limit_of, local_directory
from tasks.loader.order import ORDER, EpochOrder, Remainder, Share, Sizes, batch_count, step_count
from tasks.loader.placement import Constants, Placement, placement
from tasks.loader.shards import OnCorrupt, Shards, memory_bytes, open_version

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


class _End:
    """Marker after the last item."""


class Prefetch(Generic[Item]):
    """Iterator over items made by a thread; the thread's error is raised here, with its traceback.

    The thread ends with the items, with an error, with `close`, and when this object is no longer in use.

    Args:
        items: Source of the items; it must not refer to this object, or to its holder.
        depth: Maximum number of ready items, at least 1.

    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        assert depth > 0, "nothing can be made ahead"
        self._ready: queue.SimpleQueue[Item | _Failure | _End] = queue.SimpleQueue()
        # A semaphore made of a queue, as threading's is Python code and takes several times as long.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        stop = threading.Event()
        arguments = (items, self._ready, self._room, stop)
        thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        # Also at the exit of the interpreter, which must not find the thread in compiled code.
        self._end = weakref.finalize(self, _finish, stop, self._room, thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._end.alive:
            raise StopIteration
        item = self._ready.get()
        self._room.put(None)
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        if isinstance(item, _End):
            self.close()
            raise StopIteration
        return item

    def close(self) -> None:
        """End the thread after its current item; drop the ready items."""
        self._end()


def _produce(
    items: Iterator[Item],
    ready: queue.SimpleQueue[Item | _Failure | _End],
    room: queue.SimpleQueue[None],
    stop: threading.Event,
) -> None:
    try:
        while True:
            room.get()
            if stop.is_set():
                return
            ready.put(next(items))
    except StopIteration:
        ready.put(_End())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer must hear of it
        ready.put(_Failure(error))


def _finish(stop: threading.Event, room: queue.SimpleQueue[None], thread: threading.Thread) -> None:
    stop.set()
    room.put(None)
    # A garbage collection may run in the thread itself.
    if thread is not threading.current_thread():
        thread.join()


Batch = dict[str, Any]

MASK = "mask"
_MASK_SPEC = TensorSpec((), "bool")
_MOST_AHEAD = 10_000
_OF_A_STATE = "give what state_dict() of a TrainingStream gave"


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


class _Made(NamedTuple):
    """A batch on its way from the producing thread to the consumer."""

    placed: Any
    samples: int
    bytes: int
    skipped: int


class TrainingStream:
    """Batches of one split of a streaming-ready version for one worker.

    An iteration yields the rest of the current epoch. With its last batch the stream is at the start of the next one,
    even if no further batch is requested. Of two iterations at the same time only the later one continues.

    Args:
        uri: Directory of a version (…/v3), or of a dataset for its latest version.
        batch_size: Samples of a batch of each worker.
        split: 'train', 'validation' or 'test'.
        seed: Determines the order, together with the epoch; in [0, 2**63).
        rank: Number of this worker from 0; None: from Ray Train, torch.distributed, torchrun, mpirun or SLURM's srun,
            else 0.
        world_size: Number of workers, with the same default.
        shuffle: False: each epoch has the order of the files (which is random, but always the same).
        remainder: Treatment of an epoch's rest: 'pad' repeats the epoch's first samples to fill all workers'
            last batches, and adds a boolean column 'mask' to each batch, False for the repeated ones; 'drop' leaves
            out an incomplete batch of each worker.
        columns: Some of 'features' or 'image', 'label', 'sample_id'; None: all available ones.
        normalise: True for inputs as (x - mean) / std with the version's constants, and pixels as x / 255 before.
        dtype: Element type of the inputs, of torch, of numpy or by its name: float32, float16, bfloat16, float64. None:
            float32 if they are normalised, else as stored.
        channels_last: True to store images pixel by pixel, in tensors of the same shape.
        device: Device of the batches; None: the current GPU if there is one, else the CPU.
        on_corrupt: 'raise' on damaged or missing data, or 'skip' the samples concerned: batches have fewer samples.
        verify: True to check each block's checksum before its first use in this process.
        prefetch: Batches that are made ahead in a thread; 0: none, and no thread.
        cache_dir: Parent of the cache's directory, for files of S3; None: the user's cache directory.
        cache_bytes: Bytes of all files kept there; None: 50 GB.
        as_numpy: Arrays instead of tensors, for any other library.

    Raises:
        ConfigError: an argument is invalid, or it isn't a streaming-ready version.
        VersionNotFound: there is no such published version.
        CorruptVersion: a file is missing or differs from the manifest, here or while iterating; or everything is to be
            skipped, at the latest by the end of a worker's epoch.

    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        remainder: Remainder = "pad",
        columns: Sequence[str] | None = None,
        normalise: bool = True,
        dtype: Any = None,
        channels_last: bool = False,
        device: Any = None,
        on_corrupt: OnCorrupt = "raise",
        verify: bool = True,
        prefetch: int = 4,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        as_numpy: bool = False,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, "a batch has at least one sample", least=1)
        seed = whole_number("seed", seed, "use one from 0 to 2**63 - 1")
        prefetch = whole_number(
            "prefetch",
            prefetch,
            f"use 0 for none, or the number of batches to make ahead, below {_MOST_AHEAD:,}",
            below=_MOST_AHEAD,
        )
        one_of("remainder", remainder, ("pad", "drop"))
        one_of("on_corrupt", on_corrupt, ("raise", "skip"))
        truth_values(
            shuffle=shuffle, normalise=normalise, channels_last=channels_last, verify=verify, as_numpy=as_numpy
        )
        limit_of(cache_bytes)
        local_directory(cache_dir)
        self._process = os.getpid()
        self.rank, self.world_size = place_in_world(rank, world_size)
        version = open_version(uri)
        self.definition = version.definition
        self._batch_size, self._seed, self._shuffle, self._remainder = batch_size, seed, shuffle, remainder
        self._prefetch = prefetch
        constants = Constants(version.definition, normalise, dtype, channels_last)
        # One batch is made, some wait, one is used, and one more may be held beside it.
        self._placement = placement(constants, device, as_numpy, prefetch + 4)
        self._cache = FileCache(cache_dir, cache_bytes) if version.uri.startswith("s3://") else None
        self._shards = Shards(version, split, self._cache, on_corrupt, verify)
        self._columns = picked_columns(columns, list(self._shards.columns))
        self._shards.pick(tuple(self._columns))
        files = self._shards.files if shuffle else 1  # as stored: one stream
        self._sizes = Sizes.of(self._shards.sample_bytes, self._shards.samples, files)
        if batch_size * self._shards.sample_bytes > memory_bytes():
            raise ConfigError(
                f"batch_size = {batch_size}: a batch of samples of {self._shards.sample_bytes:,} bytes is more than "
                "this machine's memory; use smaller ones"
            )
        self._batches = batch_count(self._shards.samples, batch_size, remainder)
        self._identity = {
            "dataset": version.manifest.dataset,
            "version": version.manifest.version,
            "split": split,
            "samples": self._shards.samples,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "remainder": remainder,
            "order": ORDER,
        }
        self._epoch = self._consumed = self._moves = 0
        self._counts = StreamStats()
        self._making: Any = None
        self._closed = False
        if not len(self):
            raise ConfigError(
                f"split {split!r} has {self._shards.samples} samples, less than a batch of {batch_size} for each of "
                f"{self.world_size} workers, and remainder = 'drop' leaves them out: use 'pad', or smaller batches"
            )

    @property
    def epoch(self) -> int:
        """Epoch that an iteration would continue, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self._move(whole_number("epoch", epoch, "epochs are counted from 0"), 0)

    def __len__(self) -> int:
        """Return the batches of this worker in a whole epoch."""
        return step_count(self._batches, self.world_size, self._remainder)

    @property
    def stats(self) -> StreamStats:
        """Statistics so far."""
        cached = self._cache.counts if self._cache is not None else None
        return replace(
            self._counts,
            skipped_files=self._shards.skipped_files,
            **({"cache_hits": cached.hits, "cache_misses": cached.misses} if cached else {}),
            **({"cache_bytes_read": cached.bytes_read} if cached else {}),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place of all workers after the last delivered batch: plain values, the same in each worker.

        After the last batch of an epoch it is the start of the next one.
        """
        return {**self._identity, "epoch": self._epoch, "batches": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a place saved by any worker of any number of them.

        Raises:
            InputError: it is a place in another version, or in another order, with each difference named; or
                there is no such place.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"the state is a {type(state).__name__}: {_OF_A_STATE}")
        missing = [name for name in (*self._identity, "epoch", "batches") if name not in state]
        if missing:
            raise InputError(f"the state lacks {', '.join(missing)}: {_OF_A_STATE}")
        differences = [
            f"{name} {state[name]!r} (here {value!r})"
            for name, value in self._identity.items()
            if type(state[name]) is not type(value) or state[name] != value
        ]
        if differences:
            raise InputError(
                f"the state belongs to another stream: {', '.join(differences)}; open the stream as it was when the "
                "state was saved (rank, world_size, prefetch and device may differ)"
            )
        epoch, consumed = state["epoch"], state["batches"]
        for name, value, most in (("epoch", epoch, LIMIT - 2), ("batches", consumed, self._batches)):
            if type(value) is not int or not 0 <= value <= most:
                raise InputError(
                    f"the state's {name} = {value!r} is no place in an epoch of {self._batches} batches: {_OF_A_STATE}"
                )
        # The rest may be too small for a step of this number of workers, if a remainder is dropped.
        left = step_count(self._batches, self.world_size, self._remainder, consumed)
        self._move(*((epoch, consumed) if left else (epoch + 1, 0)))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch."""
        if self._closed:
            raise PipelineError("the stream is closed: open another one")
        self._refuse_other_process()
        self._stop_making()
        self._moves += 1
        move, epoch, first = self._moves, self._epoch, self._consumed
        steps = step_count(self._batches, self.world_size, self._remainder, first)
        counts, place, clock = self._counts, self._placement, time.perf_counter
        given, lost, before = counts.samples, counts.skipped_samples, counts.seconds
        asked = started = clock()
        with closing(self._made(epoch, first, steps)) as made:
            self._making = made
            for step in range(1, steps + 1):
                one = next(made)
                batch = place.receive(one.placed)
                if step < steps:
                    self._consumed = first + step * self.world_size
                else:  # loops over len(stream) batches never ask for more
                    self._epoch, self._consumed = epoch + 1, 0
                _count(counts, one, clock() - asked)
                counts.seconds = before + clock() - started
                if step == steps and not first and counts.samples == given and counts.skipped_samples > lost:
                    raise CorruptVersion(
                        f"epoch {epoch} had no sample for worker {self.rank} of {self.world_size}: all of its "
                        f"{steps} batches are damaged; publish a new version, or restore it from a copy"
                    )
                del one
                yield batch
                del batch  # else its memory couldn't be reused during the wait for the next one
                self._refuse_other_process()
                if step < steps and move != self._moves:
                    raise PipelineError(
                        "this iteration can't go on: the stream was moved, closed or iterated over anew meanwhile; "
                        "begin a new iteration"
                    )
                asked = clock()
                counts.seconds = before + asked - started

    def close(self) -> None:
        """End iterations and downloads; delivered batches stay valid."""
        self._closed = True
        self._moves += 1
        self._shards.close()
        self._stop_making()

    def __reduce__(self) -> Any:
        """Refuse to be copied, or sent to another process."""
        raise PipelineError(
            "a TrainingStream can't be copied or sent to another process: open one there with the same arguments, and "
            "go on from state_dict() of this one by load_state_dict()"
        )

    def _refuse_other_process(self) -> None:
        if os.getpid() != self._process:
            raise PipelineError(
                f"this stream was opened in process {self._process}, of which process {os.getpid()} is a fork: open "
                "one in each process that reads (a torch DataLoader around it needs num_workers=0)"
            )

    def __enter__(self) -> TrainingStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move(self, epoch: int, consumed: int) -> None:
        self._epoch, self._consumed = epoch, consumed
        self._moves += 1

    def _made(self, epoch: int, first: int, steps: int) -> Any:
        """Return a closable iterator over the batches of this worker from a place on."""
        share = Share(self.rank, self.world_size, self._batch_size)
        start = first * self._batch_size
        masked = self._remainder == "pad"
        order = EpochOrder(self._shards.samples, self._sizes, self._seed, epoch, self._shuffle)
        # Not a method: the thread mustn't keep the stream from being collected.
        items = _make(
            self._shards,
            self._placement,
            order,
            columns=self._columns,
            share=share,
            starts=range(start, start + steps * share.step, share.step),
            masked=masked,
        )
        return Prefetch(items, self._prefetch) if self._prefetch else items

    def _stop_making(self) -> None:
        """End the thread of an unfinished iteration: only one at a time may use the shards."""
        if self._making is not None:
            self._making.close()
            self._making = None


def _count(counts: StreamStats, made: _Made, waited: float) -> None:
    counts.batches += 1
    counts.samples += made.samples
    counts.bytes_read += made.bytes
    counts.wait_seconds += waited
    counts.skipped_samples += made.skipped


def _make(
    shards: Shards,
    place: Placement,
    order: EpochOrder,
    *,
    columns: Sequence[str],
    share: Share,
    starts: range,
    masked: bool,
) -> Iterator[_Made]:
    """Yield a worker's batches of the steps from some positions on."""
    streams = order.streams_of(starts.start, share)
    sizes, named = order.sizes, 0
    for start in starts:
        first, last = order.round_at(start), order.round_at(start + share.step - 1)
        if last + 2 > named:  # a stream may be a round ahead
            if shards.remote:
                chunks = order.chunks_of(streams, first, max(sizes.ahead, (last + 1 - first) * sizes.window))
            else:
                chunks = order.chunks_of(streams, max(first, named), (last + 2 - max(first, named)) * sizes.window)
            shards.soon(*chunks, sizes.chunk)
            named = last + 2
        index, real = order.part(start, share)
        kept, good = real, shards.usable(index)
        if good is not None:
            index, kept = index[good], int(np.count_nonzero(good[:real]))
        yield _gathered(shards, place, columns=columns, index=index, real=kept, skipped=real - kept, masked=masked)


def _gathered(
    shards: Shards,
    place: Placement,
    *,
    columns: Sequence[str],
    index: npt.NDArray[np.int64],
    real: int,
    skipped: int,
    masked: bool,
) -> _Made:
    """Return one batch of samples, the first of which are real."""
    gathered = {name: place.buffer(shards.columns[name], len(index)) for name in columns}
    shards.gather(index, gathered)
    size = sum(values.nbytes for values in gathered.values())
    if masked:
        mask = place.buffer(_MASK_SPEC, len(index))
        mask[:real], mask[real:] = True, False
        gathered[MASK] = mask
    return _Made(place.place(gathered), real, size, skipped)
