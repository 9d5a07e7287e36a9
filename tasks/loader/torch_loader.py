"""Streams in torch's DataLoader: its processes share the steps of one stream.

    with TrainingStream(images, batch_size=64, device="cpu") as stream:
        loader = StreamLoader(stream, num_workers=2, pin_memory=True)
        for batch in loader:  # as from the stream, in the same order
            …
            checkpoint = {…, "loader": loader.state_dict()}  # the stream's

A stream makes batches ahead in a thread and needs no DataLoader. Take one where batches are worth processes of their
own, or where a framework expects it.

Process w of W makes the steps w, w + W, w + 2 W, … of this rank's share, from the files as the stream has found them,
and a DataLoader takes one batch of each process in turn: so order, padding and mask are the stream's. Loaders that
would divide a share once more are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawArray
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tasks.io.errors import ConfigError, InputError, PipelineError
from tasks.loader.batch_stream import Batch, BatchStream
from tasks.loader.kernel import jit
from tasks.loader.order import step_count

_MOST_PROCESSES = 256
_SET_BY_STREAM = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn", "in_order")


class StreamDataset(IterableDataset[Any]):
    """A stream as the dataset of someone else's DataLoader: `DataLoader(dataset, batch_size=None, num_workers=2)`.

    Each iteration delivers the rest of the current epoch. Without processes the stream counts its batches. With
    processes only the DataLoader knows how many it has delivered. So call `set_epoch` before each iteration, as for
    torch's DistributedSampler; an iteration from a place that was used before is refused. The state is that of
    torchdata's StatefulDataLoader then. A `StreamLoader` needs none of this.

    Args:
        stream: An open stream. Processes need one with `device="cpu"`.

    """

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        self._counted = False  # by a StreamLoader
        if stream._begun is None:
            stream._begun = RawArray("q", [-1] * _MOST_PROCESSES)
        self._begun = stream._begun
        self._clear()

    def _clear(self) -> None:
        """Set what belongs to a process of a DataLoader."""
        self._opened: BatchStream | None = None
        self._ahead: int | None = None  # steps between the place of its stream and its next one
        self._used_up = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what a process that is being spawned needs; other copies are refused as those of the stream."""
        if get_spawning_popen() is None:
            self._stream.__reduce__()
        stream = self._stream._settled()
        return {"kind": type(stream), "stream": vars(stream), "counted": self._counted, "begun": self._begun}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, in the other process."""
        self._stream = object.__new__(state["kind"])
        vars(self._stream).update(state["stream"])
        self._counted, self._begun = state["counted"], state["begun"]
        self._clear()

    def __len__(self) -> int:
        """Return the batches of this rank in a whole epoch."""
        return len(self._stream)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; a stream that is in it, and knows its place, stays there."""
        if epoch != self._stream.epoch or self._stream._moves in self._begun:
            self._stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rest of the current epoch; in a process of a DataLoader, the steps of this process.

        Raises:
            ConfigError: a process can't make batches for a GPU, or there are too many processes.
            PipelineError: samples would come twice, or be divided twice.
        """
        if not self._counted:
            _refuse_division(self._stream)
        info = get_worker_info()
        if info is not None:
            return self._made_here(info.id, info.num_workers)
        if not self._counted:
            return iter(self._stream)
        made: Iterator[Any] = self._stream._made(*_rest(self._stream))
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's place; in a process of a StatefulDataLoader, the place of the process."""
        info = get_worker_info()
        if info is None:
            return self._stream.state_dict()
        ahead = info.id if self._ahead is None else self._ahead
        return {**self._here().state_dict(), "ahead": ahead, "processes": info.num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a place.

        Raises:
            InputError: as for the stream; or it isn't the place of such a process.
        """
        info = get_worker_info()
        if info is None:
            self._stream.load_state_dict(state)
            return
        known = isinstance(state, Mapping)
        ahead, processes = (state.get("ahead"), state.get("processes")) if known else (None, None)
        if type(ahead) is not int or ahead < 0 or processes != info.num_workers:
            raise InputError(
                f"the state is one of {processes} processes, and {ahead} steps ahead, not one of num_workers = "
                f"{info.num_workers}: use as many processes as when it was saved; or a StreamLoader, whose states go "
                "with any number"
            )
        place = {name: value for name, value in state.items() if name not in ("ahead", "processes")}
        self._here().load_state_dict(place)
        self._ahead = ahead

    def _here(self) -> BatchStream:
        """Return the stream of this process."""
        if self._opened is None:
            refuse_gpu(self._stream)
            self._opened = self._stream._settled()
            self._opened._prefetch = 0  # the DataLoader makes batches ahead
            self._opened._open()
        return self._opened

    def _made_here(self, number: int, processes: int) -> Iterator[Any]:
        if processes > _MOST_PROCESSES:
            raise ConfigError(f"num_workers = {processes}: use {_MOST_PROCESSES} at most")
        stream, move = self._here(), self._stream._moves
        if self._used_up:
            stream._next_epoch()
            self._ahead = None
        if self._ahead is None:
            if self._begun[number] == move and not self._counted:
                raise PipelineError(
                    f"processes of a DataLoader have delivered batches from this place on (epoch {stream.epoch}), and "
                    "samples would come twice: call set_epoch() before each iteration, with persistent_workers=False, "
                    "or use StreamLoader(stream, num_workers=…), which counts batches"
                )
            self._ahead = number
        if not self._counted:
            self._begun[number] = move
        epoch, first, steps = _rest(stream)
        made = stream._made(epoch, first, steps, slice(self._ahead, None, processes))
        self._used_up = self._ahead >= steps
        for one in made:
            self._ahead += processes
            self._used_up = self._ahead >= steps
            yield one if self._counted else stream._placement.receive(one.placed)


class StreamLoader(DataLoader[Any]):
    """A DataLoader that delivers a stream: its batches, order, length and state.

    It counts the batches that it delivers, so that the stream knows its place after each, and goes on from a state with
    any number of ranks and processes. `stats` of the stream counts them, too, but for its figures of the cache and of
    skipped files, which remain with the processes. It is a `Stateful` of torch and Lightning.

    Args:
        stream: An open stream. Processes need one with `device="cpu"`.
        num_workers: Processes; 0: batches are made by the stream's own thread.
        options: Options of DataLoader for processes and memory: pin_memory, prefetch_factor, persistent_workers,
            multiprocessing_context, timeout, worker_init_fn.

    Raises:
        ConfigError: an option contradicts the stream, or the stream is for a GPU.

    """

    def __init__(self, stream: BatchStream, *, num_workers: int = 0, **options: Any) -> None:
        unfit = [name for name in _SET_BY_STREAM if name in options]
        if unfit:
            told = ", ".join(f"{name} = {options[name]!r}" for name in unfit)
            raise ConfigError(
                f"{told}: the stream has batches and order; leave it out, and give the stream its options"
            )
        if num_workers:
            refuse_gpu(stream)
        super().__init__(
            StreamDataset(stream), batch_size=None, num_workers=num_workers, collate_fn=_unchanged, **options
        )
        self.stream = stream
        self._whole: tuple[int, int] | None = None  # move and change of an iteration that has delivered everything

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the rest of the current epoch."""
        return self.stream._deliver(self._made)

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's place after the last delivered batch."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a place of the stream, saved with any number of ranks and processes.

        Raises:
            InputError: it is no place of this stream.
        """
        self.stream.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; a stream that is in it stays where it is."""
        if epoch != self.stream.epoch:
            self.stream.set_epoch(epoch)

    def _made(self, _epoch: int, _first: int, steps: int) -> Iterator[Any]:
        """Yield what the processes make of the rest of the epoch."""
        stream, dataset = self.stream, self.dataset
        assert isinstance(dataset, StreamDataset), "a StreamLoader has made it"
        move, change = stream._moves, stream._changes
        if self._whole != (move - 1, change):
            self._iterator = None  # persistent processes only know how to go on after a whole epoch
        self._whole = None
        jit.functions()  # forks have them then, instead of importing numba in each epoch
        dataset._counted = True
        try:
            made = super().__iter__()
        finally:
            dataset._counted = False
        try:
            for number, one in enumerate(made, 1):
                if number == steps:
                    self._whole = move, change
                yield one
        finally:
            stream._stop_making()


def refuse_gpu(stream: BatchStream) -> None:
    """Refuse processes for a stream whose batches are made on a GPU.

    Raises:
        ConfigError: it is such a stream.
    """
    if stream._on_gpu:
        raise ConfigError(
            "the stream's batches are made on a GPU, which processes of a DataLoader can't use: use num_workers=0, or "
            'open the stream with device="cpu", and use pin_memory=True'
        )


def _refuse_division(stream: BatchStream) -> None:
    """Refuse a loader that may give each rank a part of what is its share already."""
    accelerate: Any = sys.modules.get("accelerate.state")
    if stream.world_size > 1 or (accelerate is not None and accelerate.PartialState._shared_state):
        raise PipelineError(
            f"the stream is the share of rank {stream.rank} of {stream.world_size} already, and a loader made around "
            "it, as by accelerate's prepare() or a Trainer, may divide it once more: iterate over "
            "StreamLoader(stream) or the stream itself, and leave it out of prepare()"
        )


def _rest(stream: BatchStream) -> tuple[int, int, int]:
    """Return a stream's epoch, its consumed batches, and the steps that are left."""
    epoch, first = stream._epoch, stream._consumed
    return epoch, first, step_count(stream._batches, stream.world_size, stream._remainder, first)


def _unchanged(made: Any) -> Any:
    return made
