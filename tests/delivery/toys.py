"""A stream in memory with the promises of the real one, and training functions that the tests name by import path."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tasks.io.errors import CorruptVersion
from tasks.training.loops import Batch, TrainingRun, train

KILL_AFTER, STOP_AFTER = 7, 7


@dataclass
class ToyStream:
    """Batches of tensors in memory: global batch p + rank of W, padded with a mask in the last step."""

    inputs: torch.Tensor
    labels: torch.Tensor
    batch_size: int
    name: str = "features"
    rank: int = 0
    world_size: int = 1
    seed: int | None = 0
    padding: float | None = None
    """What stands in padded samples; None for the epoch's first ones."""
    epoch: int = 0
    consumed: int = 0
    stats: Any = field(default_factory=lambda: SimpleNamespace(**dict.fromkeys(STATS, 0)))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        count = len(self.inputs)
        order = torch.arange(count)
        if self.seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * 1000 + self.epoch))
        batches = -(-count // self.batch_size)
        for first in range(self.consumed, batches, self.world_size):
            places = torch.arange(self.batch_size) + (first + self.rank) * self.batch_size
            self.consumed = first + self.world_size
            if self.consumed >= batches:
                self.epoch, self.consumed = self.epoch + 1, 0
            chosen, mask = order[places % count], places < count
            inputs = self.inputs[chosen].clone()
            if self.padding is not None:
                inputs[~mask] = self.padding
            self.stats.samples += int(mask.sum())
            yield {self.name: inputs, "label": self.labels[chosen], "sample_id": chosen, "mask": mask}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.consumed = state["epoch"], state["consumed"]


STATS = ("batches", "samples", "seconds", "wait_seconds", "bytes_read", "cache_hits", "cache_misses", "skipped_samples")


def watched(run: TrainingRun) -> None:
    """The default training; writes down what it consumed."""
    train(replace(run, on_batch=_notes(run)))


def killed_once(run: TrainingRun) -> None:
    """As `watched`; in the first attempt worker 1 is killed a step after a checkpoint."""
    first = run.resumed is None
    note = _notes(run)

    def on_batch(epoch: int, step: int, batch: Batch) -> None:
        note(epoch, step, batch)
        if first and run.rank == 1 and step == KILL_AFTER:
            _wait_for_checkpoint(run)
            os.kill(os.getpid(), signal.SIGKILL)

    train(replace(run, on_batch=on_batch))


def stopped_once(run: TrainingRun) -> None:
    """As `watched`; fails with an error of the project's own, after a checkpoint, unless it goes on from one."""
    first = run.resumed is None
    note = _notes(run)

    def on_batch(epoch: int, step: int, batch: Batch) -> None:
        note(epoch, step, batch)
        if first and step == STOP_AFTER:
            _wait_for_checkpoint(run)
            raise CorruptVersion("part-00000-a1.parquet is no good: publish it anew")

    train(replace(run, on_batch=on_batch))


NO_FUNCTION = 3


def _wait_for_checkpoint(run: TrainingRun) -> None:
    """Ray counts a checkpoint when its controller has next looked: only from then on does a restart begin with it."""
    give_up = time.monotonic() + 60
    while not Path(str(run.run_uri), "checkpoint_manager_snapshot.json").exists():
        assert time.monotonic() < give_up, "no checkpoint was kept"
        time.sleep(0.05)


def _notes(run: TrainingRun) -> Any:
    """A hook that writes a line for each step, and where the attempt began."""
    resumed = run.resumed["progress"]["steps"] if run.resumed is not None else 0
    # A process is one attempt of one worker.
    assert run.run_uri is not None
    path = Path(run.run_uri, "consumed", f"{os.getpid()}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"begins_after": resumed, "rank": run.rank, "workers": run.world_size}) + "\n")

    def on_batch(epoch: int, step: int, batch: Batch) -> None:
        ids = batch["sample_id"][batch["mask"]].tolist() if "mask" in batch else batch["sample_id"].tolist()
        with path.open("a") as file:  # closed, so written, before anything may happen to the process
            file.write(json.dumps({"epoch": epoch, "step": step, "ids": ids}) + "\n")

    return on_batch
