"""What all streams share: their options, their place and its states, and the delivery of batches made ahead."""

from __future__ import annotations

import abc
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from tasks.io.errors import ConfigError, CorruptVersion, InputError, PipelineError
from tasks.loader.arguments import LIMIT, one_of, picked_columns, place_in_world, truth_values, whole_number
from tasks.loader.batches import Delivery, Lookup, make_batches
from tasks.loader.cache import FileCache, limit_of, local_directory
from tasks.loader.options import StreamStats
from tasks.loader.order import ORDER, Remainder, Share, Sizes, batch_count, step_count
from tasks.loader.placement import Constants, placement
from tasks.loader.prefetch import Prefetch
from tasks.loader.samples import IMAGE, WEIGHT
from tasks.loader.sequences import padding_of
from tasks.loader.shards import Joined, OnCorrupt, Shards, common_columns, memory_bytes
from tasks.loader.sources import Source, Takes
from tasks.loader.version_files import open_version, refuse_misfits

Batch = dict[str, Any]

_MOST_AHEAD = 10_000
_OF_A_PROCESS = {
    *("_process", "_placement", "_cache", "_opened", "_lookups", "_counts", "_making", "_closed", "_begun"),
    *("_delivery", "_shown", "_joined"),
}


class BatchStream(abc.ABC):
    """Batches of one split of one or more versions for one worker: what `TrainingStream` and `MixedStream` share.

    An iteration yields the rest of the current epoch. With its last batch the stream is at the start of the next one,
    even if no further batch is requested. Of two iterations at the same time only the later one continues.

    Args:
        uris: Directory of each version (…/v3), or of a dataset for its latest version.
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
        columns: Some of features, image, sequence, length, label, weight and sample_id; None: all but the weight.
        normalise: True for inputs as (x - mean) / std with the version's constants, and pixels as x / 255 before.
        dtype: Element type of the inputs, of torch, of numpy or by its name: float32, float16, bfloat16, float64. None:
            float32 if they are normalised, else as stored.
        channels_last: True to store images pixel by pixel, in tensors of the same shape.
        device: Device of the batches; None: the current GPU if there is one, else the CPU.
        on_corrupt: 'raise' on damaged or missing data, or 'skip' the samples concerned: batches have fewer samples.
        verify: True to check the checksums in files before its first use in this process.
        prefetch: Batches that are made ahead in a thread, and another one that is begun; 0: none, and no thread.
        cache_dir: Parent of the cache's directory, for files of S3; None: the user's cache directory.
        cache_bytes: Bytes of all files kept there; None: 50 GB.
        as_numpy: Arrays instead of tensors, for any other library.
        transform: Change of each sample's inputs, before they are normalised: an `Augmentation` of pictures; a
            transform of torchvision, or a function of a tensor; or a function of an array and a numpy Generator. They
            get uint8 (3, height, width) or float32 (features,), and give uint8 or floats of one shape. Pictures that
            are floats then aren't normalised.
        mixup: Parameter alpha of MixUp with another sample of the epoch, such as 0.2. Labels are float32 (n, classes).
        cutmix: Likewise of CutMix; with both, each is for half of the samples.
        transform_threads: Threads that transform or decode; None: the CPUs for an `Augmentation` or JPEGs, else 1.
        max_length: Elements after which sequences are cut; None: nowhere.
        pad_value: What follows a sequence in its row: 'sequence' is (n, longest of the batch), of the stored type, and
            'length' int64 (n,).

    Raises:
        ConfigError: an argument is invalid, or it isn't a streaming-ready version.
        VersionNotFound: there is no such published version.
        CorruptVersion: a file is missing or differs from the manifest, here or while iterating; or everything is to be
            skipped, at the latest by the end of a worker's epoch.

    """

    def __init__(
        self,
        uris: Sequence[str | os.PathLike[str]],
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
        transform: Any = None,
        mixup: float | None = None,
        cutmix: float | None = None,
        transform_threads: int | None = None,
        max_length: int | None = None,
        pad_value: float = 0,
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
        self.rank, self.world_size = place_in_world(rank, world_size)
        versions = self._versions = [open_version(uri) for uri in uris]
        refuse_misfits(versions)
        self.definition = versions[0].definition
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._shuffle, self._remainder = shuffle, remainder
        self._prefetch = prefetch
        changes = {"transform": transform, "mixup": mixup, "cutmix": cutmix, "dtype": dtype}
        self._padding = padding_of(self.definition, max_length, pad_value, **changes)
        self._constants = Constants(self.definition, normalise, dtype, channels_last)
        self._device, self._as_numpy, self._on_corrupt, self._verify = device, as_numpy, on_corrupt, verify
        self._cache_limits = cache_dir, cache_bytes
        self._open_files()
        first = self._opened[0]
        self._columns = picked_columns(columns, common_columns(self._opened), on_request=(WEIGHT,))
        self._alters = bool(transform is not None or mixup or cutmix)
        decodes = first.encoded and IMAGE in self._columns
        if transform is None and transform_threads is not None and not decodes:
            raise ConfigError(f"transform_threads = {transform_threads!r} without a transform: leave it out")
        self._new_delivery: Callable[..., Delivery] | None = None
        if self._alters or decodes:
            self._new_delivery = functools.partial(
                Delivery,
                transform=transform,
                mixup=mixup,
                cutmix=cutmix,
                threads=transform_threads,
                definition=self.definition,
                specs=first.delivered,
                encoded=first.encoded,
                columns=self._columns,
                normalise=normalise,
            )
        self._begin_delivery()
        if batch_size * first.delivered_bytes > memory_bytes():
            raise ConfigError(
                f"batch_size = {batch_size}: a batch of samples of {first.delivered_bytes:,} bytes is more than "
                "this machine's memory; use smaller ones"
            )
        self._epoch = self._consumed = self._moves = self._changes = 0

    def _open(self) -> None:
        """Open what belongs to one process: files, memory, threads."""
        self._open_files()
        self._begin_delivery()

    def _begin_delivery(self) -> None:
        """Set up what changes samples on their way, and the columns to gather."""
        self._delivery = self._new_delivery() if self._new_delivery is not None else None
        self._gathered = self._delivery.columns if self._delivery is not None else tuple(self._columns)
        for shards in self._opened:
            shards.pick(self._gathered)

    def _open_files(self) -> None:
        self._process = os.getpid()
        # Two batches are made, some wait, one is used, and one more may be held beside it.
        self._placement = placement(self._constants, self._device, self._as_numpy, self._prefetch + 5)
        self._on_gpu = self._placement.on_gpu
        remote = any(version.uri.startswith("s3://") for version in self._versions)
        self._cache = FileCache(*self._cache_limits) if remote else None
        self._opened = [
            Shards(version, self._split, self._cache, self._on_corrupt, self._verify) for version in self._versions
        ]
        self._joined = Joined(self._opened)
        # Look-ups have shards and memory of their own: one thread at a time may use them.
        self._lookups: dict[int, Lookup] = {}
        self._shown: Delivery | None = None
        self._counts = StreamStats(source_samples=(0,) * len(self._versions))
        self._making: Any = None
        self._closed = False

    def _set_order(self, samples: int, told: Mapping[str, Any], **further: Any) -> None:
        """Set the length of an epoch, and what a state says of the order, for the first time.

        Args:
            samples: Samples of an epoch.
            told: What identifies the data.
            further: What else determines the order.
        """
        self._samples = samples
        self._batches = batch_count(samples, self._batch_size, self._remainder)
        self._identity = {
            **told,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "remainder": self._remainder,
            "order": ORDER,
            **further,
            **(self._delivery.identity if self._delivery is not None else {}),
        }
        if not len(self):
            raise ConfigError(
                f"split {self._split!r} has {samples} samples, less than a batch of {self._batch_size} for each of "
                f"{self.world_size} workers, and remainder = 'drop' leaves them out: use 'pad', or smaller batches"
            )

    def _sizes_of(self, shards: Shards, samples: int) -> Sizes:
        # As stored: one stream.
        return Sizes.of(shards.sample_bytes, samples, shards.files if self._shuffle else 1)

    _numbered = False  # whether batches have a column 'source'

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
            skipped_files=sum(shards.skipped_files for shards in self._opened),
            cache_hits=cached.hits if cached else 0,
            cache_misses=cached.misses if cached else 0,
            cache_bytes_read=cached.bytes_read if cached else 0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place of all workers after the last delivered batch: plain values, the same in each worker.

        After the last batch of an epoch it is the start of the next one.

        Raises:
            PipelineError: only a DataLoader knows it (see `tasks.loader.torch_loader.StreamDataset`).
        """
        self._refuse_uncounted()
        return {**self._identity, **self._place()}

    def _place(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batches": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a place saved by any worker of any number of them.

        Raises:
            InputError: it is a place in another version, or in another order, with each difference named; or
                there is no such place.
        """
        cure = f"give what state_dict() of a {type(self).__name__} gave"
        if not isinstance(state, Mapping):
            raise InputError(f"the state is a {type(state).__name__}: {cure}")
        places = self._place().keys()
        missing = [name for name in (*self._identity, *places) if name not in state]
        if missing:
            raise InputError(f"the state lacks {', '.join(missing)}: {cure}")
        differences = [
            f"{name} {state[name]!r} (here {value!r})"
            for name, value in self._identity.items()
            if type(state[name]) is not type(value) or state[name] != value
        ]
        further = state.keys() - self._identity.keys() - places
        differences += [f"{name} {state[name]!r} (here none)" for name in sorted(map(str, further))]
        if differences:
            raise InputError(
                f"the state belongs to another stream: {', '.join(differences)}; open the stream as it was when the "
                "state was saved (rank, world_size, prefetch and device may differ)"
            )
        epoch, consumed, batches = state["epoch"], state["batches"], self._batches
        for name, value in (("epoch", epoch), ("batches", consumed)):
            if type(value) is not int or not 0 <= value <= (LIMIT - 2 if name == "epoch" else batches):
                raise InputError(f"the state's {name} = {value!r} is no place in an epoch of {batches} batches: {cure}")
            if name == "epoch":
                batches = self._batches_of(epoch)
        self._restore(state, cure)
        self._move(epoch, consumed)
        # The rest may be too small for a step of this number of workers, if a remainder is dropped.
        if not step_count(self._batches, self.world_size, self._remainder, consumed):
            self._next_epoch()

    def _batches_of(self, epoch: int) -> int:  # noqa: ARG002 - that of packed rows depends on it
        """Return the batches of an epoch over all workers."""
        return self._batches

    def _restore(self, state: Mapping[str, Any], cure: str) -> None:  # noqa: B027 - most have nothing more
        """Take what `_place` adds to a place, checked; `cure` ends the text of errors."""

    def _next_epoch(self) -> None:
        """Go to the beginning of the next epoch, as an iteration does with its last batch."""
        self._epoch, self._consumed = self._epoch + 1, 0
        self._batches = self._batches_of(self._epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch."""
        return self._deliver(self._made)

    def _deliver(self, make: Callable[[int, int, int], Any]) -> Iterator[Batch]:
        """Yield the rest of the current epoch; batches count as they are delivered.

        Args:
            make: Returns a closable iterator over what was made of the batches of so many steps, from an epoch and the
                number of its consumed batches on, as `_made` does.
        """
        if self._closed:
            raise PipelineError("the stream is closed: open another one")
        self._refuse_other_process()
        self._refuse_uncounted()
        self._stop_making()
        self._moves += 1
        move, change, epoch, first = self._moves, self._changes, self._epoch, self._consumed
        steps = step_count(self._batches, self.world_size, self._remainder, first)
        counts, place, clock = self._counts, self._placement, time.perf_counter
        given, lost, before = counts.samples, counts.skipped_samples, counts.seconds
        asked = started = clock()
        made = make(epoch, first, steps)
        try:
            for step in range(1, steps + 1):
                if change != self._changes:  # batches that were made ahead follow the order before the change
                    made.close()
                    change, made = self._changes, make(epoch, self._consumed, steps + 1 - step)
                one = next(made)
                batch = place.receive(one.placed)
                if step < steps:
                    self._consumed = first + step * self.world_size
                else:  # loops over len(stream) batches never ask for more
                    self._next_epoch()
                counts.add(one, clock() - asked)
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
        finally:
            made.close()

    def _sample(
        self, source: int, sample_id: int | None, index: int | None, epoch: int | None = None, copy: int = 0
    ) -> Batch:
        if self._closed:
            raise PipelineError("the stream is closed: open another one")
        self._refuse_other_process()
        if source not in self._lookups:
            version = self._versions[source]
            shards = Shards(version, self._split, self._cache, self._on_corrupt)
            placed = placement(self._constants, self._device, self._as_numpy, buffers=0)
            self._lookups[source] = Lookup(version, self._split, shards, placed, self._padding)
        lookup, shards = self._lookups[source], self._lookups[source].shards
        if epoch is None and (self._new_delivery is None or not shards.encoded):
            shards.pick(tuple(self._columns))
            return lookup.sample(sample_id, index)
        if self._new_delivery is None or (epoch is not None and not self._alters):
            raise ConfigError(f"epoch = {epoch!r}: without a transform a sample is the same in each; leave it out")
        if self._shown is None:  # beside the one of the producing thread
            self._shown = self._new_delivery(threads=1)
        shards.pick(self._gathered)
        change = functools.partial(
            self._shown.single,
            seed=self._sources()[source].seed,
            epoch=None if epoch is None else whole_number("epoch", epoch, "epochs are counted from 0"),
            copy=whole_number("copy", copy, "copies are counted from 0"),
        )
        return lookup.sample(sample_id, index, change)

    def close(self) -> None:
        """End iterations and downloads; delivered batches stay valid."""
        self._closed = True
        self._moves += 1
        for shards in self._opened:
            shards.close()
        for lookup in self._lookups.values():
            lookup.close()
        self._stop_making()
        if self._delivery is not None:
            self._delivery.close()

    def __reduce__(self) -> Any:
        """Refuse to be copied, or sent to another process."""
        raise PipelineError(
            f"a {type(self).__name__} can't be copied or sent to another process: open one there with the same "
            "arguments, and go on from state_dict() of this one by load_state_dict()"
        )

    def _refuse_other_process(self) -> None:
        if os.getpid() != self._process:
            raise PipelineError(
                f"this stream was opened in process {self._process}, of which process {os.getpid()} is a fork: open "
                "one in each process that reads (for processes of a torch DataLoader, use tasks.loader.torch_loader)"
            )

    _begun: Any = None  # (processes,) the move from which each process of a DataLoader began, if any may

    def _refuse_uncounted(self) -> None:
        if self._begun is not None and self._moves in self._begun:
            raise PipelineError(
                "processes of a DataLoader have taken batches of this stream, and only the DataLoader knows how many: "
                "use StreamLoader(stream, num_workers=…), which counts them, or say where to go on by set_epoch() or "
                "load_state_dict()"
            )

    def _settled(self) -> Self:
        """Return a stream of the same data and place that has nothing of a process, until it is opened there."""
        copy = object.__new__(type(self))
        vars(copy).update({name: value for name, value in vars(self).items() if name not in _OF_A_PROCESS})
        return copy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move(self, epoch: int, consumed: int) -> None:
        self._epoch, self._consumed = epoch, consumed
        self._batches = self._batches_of(epoch)
        self._moves += 1

    def _made(self, epoch: int, first: int, steps: int, part: slice = slice(None)) -> Any:
        """Return a closable iterator over the batches of this worker from a place on, or over those of some steps."""
        share = Share(self.rank, self.world_size, self._batch_size)
        # Not a method: the thread mustn't keep the stream from being collected.
        items = make_batches(
            self._sources(),
            self._joined,
            self._placement,
            self._takes(epoch, first, range(0, steps * share.step, share.step)[part], share),
            columns=self._columns,
            masked=self._remainder == "pad",
            numbered=self._numbered,
            delivery=self._delivery,
            padding=self._padding,
            ahead=min(self._prefetch, 1),
        )
        self._making = Prefetch(items, self._prefetch) if self._prefetch else items
        return self._making

    @abc.abstractmethod
    def _sources(self) -> list[Source]:
        """Return the sources at their beginning; they mustn't refer to this stream."""

    @abc.abstractmethod
    def _takes(self, epoch: int, first: int, starts: range, share: Share) -> Iterator[list[Takes]]:
        """Return what a worker takes from each source in each group of steps; real samples come first.

        The iterator mustn't refer to this stream.

        Args:
            epoch: The epoch.
            first: Its batches that were consumed.
            starts: Samples of the epoch between that place and each step.
            share: The worker's part of a step.
        """

    def _stop_making(self) -> None:
        """End the thread of an unfinished iteration: only one at a time may use the shards."""
        if self._making is not None:
            self._making.close()
            self._making = None
