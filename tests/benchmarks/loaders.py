"""Ways to bring a dataset, shuffled anew in each epoch, into a training loop that is infinitely fast.

| side | reads | shuffles | settings |
|---|---|---|---|
| ours | a version, memory-mapped | all samples, chunks and then windows | those of `TrainingStream` |
| ray | a version; of a table 'rows' or 'columns' | a buffer | docs.ray.io: local shuffle, prefetching |
| torch | as ray, 'rows' | row groups, and samples of one (tables) or some | two loader processes in all, kept |
| torch-inline | as torch | as torch | no loader process |
| mosaicml | mds | all samples | defaults, the dataset knows the batch size; two loader processes in all, kept |
| litdata | litdata | chunks, then samples of a chunk | defaults, batch_decode=0; two loader processes in all, kept |

Batches are (features or images, labels): uint8 or float32 as they are stored, on the CPU, not normalised.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.benchmarks.delivery_data import IMAGES, TABLES, Source
from tests.benchmarks.workers import Work

BUFFER = {IMAGES: 1024, TABLES: 1 << 17}
"""Samples that are shuffled together, where a side has a buffer."""
LOADER_PROCESSES = 2
"""Of all trainers together, where a side has such processes: as many as there are cores."""

Batch = tuple[Any, Any]
Epochs = Callable[[], Iterable[Batch]]
"""The batches of the next epoch."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one trainer consumes."""

    source: Source
    batch: int
    rank: int
    world: int

    @property
    def column(self) -> str:
        """Column of the samples."""
        return "image" if self.source.kind == IMAGES else "features"

    @property
    def loader_processes(self) -> int:
        """Processes that load for this trainer."""
        return max(1, LOADER_PROCESSES // self.world)

    @property
    def buffer(self) -> int:
        """Samples that are shuffled together."""
        return BUFFER[self.source.kind]


@dataclass(frozen=True, slots=True)
class Consumed:
    """What came out of an epoch in one trainer; the times are those of the system's monotonic clock."""

    first: float  # the first batch was there
    last: float  # the last one had been used
    labels: npt.NDArray[np.int64] | None  # in the order of delivery, if they were asked for


def consume(batches: Iterable[Batch], keep_labels: bool) -> Consumed:
    """The training loop: it looks at each batch's shape and at one element."""
    first, labels, samples = 0.0, [], 0
    for features, label in batches:
        assert features.shape[0] == label.shape[0]
        features[(0,) * features.ndim].item()
        first = first or time.monotonic()
        if keep_labels:
            labels.append(np.array(label, dtype=np.int64))  # a copy: a loader may use its memory again
        samples += len(label)
    assert samples, "an epoch had no batch"
    return Consumed(first, time.monotonic(), np.concatenate(labels) if keep_labels else None)


def trainer(make: Callable[[Task], Epochs], task: Task, port: int) -> Work:
    """The work of a trainer in a process of its own: an epoch a message, which says whether to keep the labels.

    Several trainers form a process group, as under `torchrun`; the first of them listens at the port.
    """
    # As in a script that nobody has spawned: a DataLoader's processes need not import everything again.
    multiprocessing.set_start_method("fork", force=True)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    if task.world > 1:
        _join(task, port)
    epochs = make(task)
    return lambda keep_labels: [consume(epochs(), keep_labels)]


def _join(task: Task, port: int) -> None:
    import torch.distributed

    torch.set_num_threads(1)  # `torchrun` says so by OMP_NUM_THREADS
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(task.rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(task.world))
    torch.distributed.init_process_group("gloo")


def ours(task: Task, normalise: bool = False) -> Epochs:
    """The stream; the samples that fill its last batch up are left out again."""
    from tasks.loader.stream import TrainingStream

    stream = TrainingStream(
        str(task.source.version),
        batch_size=task.batch,
        rank=task.rank,
        world_size=task.world,
        columns=[task.column, "label"],
        normalise=normalise,
    )

    def epoch() -> Iterator[Batch]:
        last = None
        for batch in stream:
            if last is not None:
                yield last[task.column], last["label"]
            last = batch
        if last is not None and (real := last["mask"]).any():  # only the last batch may be filled up
            yield last[task.column][real], last["label"][real]

    return epoch


def torch_loader(task: Task, inline: bool = False, transform: Callable[[Any], Any] = lambda image: image) -> Epochs:
    """A DataLoader that reads row groups of Parquet files in random order, and shuffles some; images are transformed.

    Inline it has no processes: nothing is loaded while the trainer computes, which this one doesn't, and nothing needs
    to be carried from one process to another.
    """
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    from tests.benchmarks.row_groups import shuffled_batches, shuffled_images

    files = task.source.files("version" if task.source.kind == IMAGES else "rows")
    images = task.source.kind == IMAGES

    class RowGroups(IterableDataset[Any]):
        epoch = 0

        def __iter__(self) -> Iterator[Any]:
            info = get_worker_info()
            number, processes = (info.id, info.num_workers) if info else (0, 1)
            share = (task.rank * processes + number, task.world * processes)
            draw = np.random.default_rng([0, self.epoch])  # the same in all processes, which divide what it permutes
            self.epoch += 1
            if images:
                return (
                    (transform(torch.from_numpy(image)), label)
                    for image, label in shuffled_images(files, share, task.buffer, draw)
                )
            batches = shuffled_batches(files, share, task.batch, draw)
            return ((torch.from_numpy(features), torch.from_numpy(labels)) for features, labels in batches)

    loader = DataLoader(
        RowGroups(),
        batch_size=task.batch if images else None,
        **({} if inline else {"num_workers": task.loader_processes, "persistent_workers": True}),
    )
    return lambda: loader


def mosaicml(task: Task) -> Epochs:
    """A StreamingDataset on local shards with its defaults; it must know the batch size."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    if task.world == 1:
        clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(task.source.path("mds")), shuffle=True, batch_size=task.batch)
    loader = StreamingDataLoader(
        dataset, batch_size=task.batch, num_workers=task.loader_processes, persistent_workers=True
    )
    return lambda: ((batch[task.column], batch["label"]) for batch in loader)


def litdata(task: Task) -> Epochs:
    """A StreamingDataset on optimised chunks; drop_last is its advice and default where there are several trainers.

    Samples are decoded one by one: 256 at a time, as by default, are decoded again and again (2,000 images/s instead of
    12,000; 10,000 rows/s instead of 130,000).
    """
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(
        str(task.source.path("litdata")),
        shuffle=True,
        drop_last=task.world > 1,
        batch_decode=0,
    )
    loader = StreamingDataLoader(
        dataset, batch_size=task.batch, num_workers=task.loader_processes, persistent_workers=True
    )
    return lambda: ((batch[task.column], batch["label"]) for batch in loader)


def ray_data(source: Source, form: str, batch: int, world: int, shuffle: bool = True) -> Work:
    """Ray Data on a Ray of its own; several trainers are actors, which share one streaming_split.

    Ray Train does the same. The trainers hold no CPU, so that the data has all of them.
    """
    import logging

    import ray

    from tasks.engine import cluster
    from tasks.io.tensors import as_fixed_shape_tensors

    os.environ |= cluster.worker_env()
    ray.init(**cluster.init_options(num_cpus=LOADER_PROCESSES), log_to_driver=False)
    cluster.data_context().__enter__()  # for as long as the process lives
    task = Task(source, batch, 0, world)
    columns = [task.column, "label"] if form != "columns" else None
    data = ray.data.read_parquet(source.files(form), columns=columns)
    if form != "columns":
        data = data.map_batches(as_fixed_shape_tensors, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)

    def batches(iterator: Any) -> Iterator[Batch]:
        import torch

        made = iterator.iter_torch_batches(
            batch_size=batch,
            prefetch_batches=4,
            local_shuffle_buffer_size=task.buffer if shuffle else None,
        )
        for found in made:
            label = found.pop("label")
            yield found[task.column] if form != "columns" else torch.stack(list(found.values()), dim=1), label

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # each epoch announces its plan
    if world == 1:
        return lambda keep_labels: [consume(batches(data.iterator()), keep_labels)]

    class Trainer:
        def __init__(self, iterator: Any) -> None:
            self._iterator = iterator

        def epoch(self, keep_labels: bool) -> Consumed:
            return consume(batches(self._iterator), keep_labels)

    remote = ray.remote(num_cpus=0)(Trainer)
    trainers = [remote.remote(iterator) for iterator in data.streaming_split(world, equal=True)]
    return lambda keep_labels: ray.get([trainer.epoch.remote(keep_labels) for trainer in trainers])
