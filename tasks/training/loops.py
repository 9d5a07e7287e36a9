"""The default training function and its argument: an example to copy for a custom function.

A custom function takes one `TrainingRun` and is named by its import path in the configuration. It runs in every worker,
reads its batches from `run.train` and `run.validation`, reports each epoch's metrics at its end (`run.report`), and
resumes from `run.resumed` if that isn't None. A state that includes `run.train.state_dict()` can be resumed in the
middle of an epoch, by any number of workers, without losing or repeating a sample. Ray isn't used: the same function
runs under torchrun.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tasks.training.models import Target, build_model, class_metrics, input_name, number_metrics

if TYPE_CHECKING:
    from tasks.delivery.config import TrainingConfig

Batch = Mapping[str, torch.Tensor]
State = Mapping[str, Any]
Send = Callable[[dict[str, Any], State | None], None]

_RISE, _FIRST = 0.3, 0.04  # of the learning rate: length of its rise, and its start relative to its highest value

COUNTERS = (
    "batches",
    "samples",
    "seconds",
    "wait_seconds",
    "bytes_read",
    "cache_hits",
    "cache_misses",
    "skipped_samples",
)


class Stream(Protocol):
    """Part of `tasks.loader.stream.TrainingStream` that is used here."""

    @property
    def epoch(self) -> int:
        """Epoch that the next iteration continues; one more from an epoch's last batch on."""
        ...

    @property
    def stats(self) -> Any:
        """Counters since the stream was opened, including `COUNTERS`."""
        ...

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last delivered batch, for all workers together."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved place."""
        ...


class Meter:
    """Counter of a stream's deliveries since the last call; the first call counts from the opening."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._before = dict.fromkeys(COUNTERS, 0.0)

    def take(self) -> dict[str, float]:
        """Return `COUNTERS` since the last call."""
        stats = self._stream.stats
        now = {name: getattr(stats, name) for name in COUNTERS}
        taken = {name: now[name] - self._before[name] for name in COUNTERS}
        self._before = now
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """Argument of a training function.

    Attributes:
        definition: `manifest.definition` of the version.
        config: the configuration of the training.
        train: batches of the train split for this worker.
        validation: batches of the validation split in a fixed order, padded, with a mask; None if the split is empty.
        device: device of the batches, and of the model.
        rank: number of this worker, from 0.
        world_size: number of workers.
        resumed: contents of the last checkpoint, on the CPU; None at the start.
        run_uri: directory of the run, open to files of the function; None outside Ray Train.
        send: takes a message and, with a checkpoint, the state to keep; used by `report` and `save`.
        meter: counts what `train` delivers.
        on_batch: called for each batch that was trained on, with the epoch, the number of the step and the batch.
    """

    definition: Mapping[str, Any]
    config: TrainingConfig
    train: Stream
    validation: Stream | None
    device: torch.device
    send: Send
    meter: Meter
    rank: int = 0
    world_size: int = 1
    resumed: State | None = None
    run_uri: str | None = None
    on_batch: Callable[[int, int, Batch], None] | None = None

    def report(self, epoch: int, metrics: Mapping[str, float], state: State | None = None) -> None:
        """Report an epoch's metrics, and keep a checkpoint if a state is given; every worker calls it equally often.

        Args:
            epoch: Number of the epoch, from 0.
            metrics: Numbers by name, of all workers together; rank 0's count.
            state: Value of `resumed` after a restart: tensors, numbers, texts, and lists and dicts of them. Rank 0's is
                kept.
        """
        figures = {name: float(value) for name, value in metrics.items()}
        self.send({"epoch": epoch, "metrics": figures, "worker": self.meter.take()}, state)

    def save(self, state: State) -> None:
        """Keep a checkpoint in the middle of an epoch; every worker calls it equally often."""
        self.send({}, state)


@contextlib.contextmanager
def open_run(
    uri: str,
    definition: Mapping[str, Any],
    config: TrainingConfig,
    *,
    send: Send,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    resumed: State | None = None,
    run_uri: str | None = None,
) -> Generator[TrainingRun]:
    """Open the streams of one worker; close them at the end.

    Args:
        uri: Directory of the version.
        definition: Its `manifest.definition`.
        config: Configuration of the training.
        send: As in `TrainingRun`; it must have written the state when it returns, which then changes.
        rank: Number of this worker, from 0.
        world_size: Number of workers; if more than one, their process group must exist.
        device: Device to train on; the CPU if not given.
        resumed: Contents of the last checkpoint.
        run_uri: Directory of the run.

    Raises:
        ConfigError: classes are to be balanced, and the version has none.
        CorruptVersion: a file is missing or differs from the manifest.
    """
    from tasks.loader.stream import TrainingStream

    device = device or torch.device("cpu")
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "cache_dir": config.cache_dir,
        "cache_bytes": int(config.cache_gigabytes * 1e9),
    }
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(TrainingStream(uri, remainder=config.remainder, balance=config.balance, **settings))
        validation = None
        if definition["samples"].get("validation"):
            fixed: dict[str, Any] = {"split": "validation", "shuffle": False, "remainder": "pad"}
            validation = stack.enter_context(TrainingStream(uri, **fixed, **settings))
        yield TrainingRun(
            definition=definition,
            config=config,
            train=train,
            validation=validation,
            device=device,
            send=send,
            meter=Meter(train),
            rank=rank,
            world_size=world_size,
            resumed=resumed,
            run_uri=run_uri,
        )


@dataclass(slots=True)
class Progress:
    """Progress of a training; a part of its checkpoints.

    Attributes:
        steps: steps of the optimiser so far.
        loss: sum of the losses of this epoch's samples so far, of all workers.
        samples: number of those samples.
        fraction: part of this epoch that is done.
        history: metrics of the epochs before.
    """

    steps: int = 0
    loss: float = 0.0
    samples: int = 0
    fraction: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def train(run: TrainingRun) -> None:
    """Train the default model for the version's kind; used when the configuration names no function.

    The same seed, version and number of workers give the same model, restarted or not, on the same kind of device.
    """
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(run.config.seed)
    target = Target.of(run.definition)
    model = build_model(run.definition, run.config).to(run.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.config.learning_rate, weight_decay=run.config.weight_decay)
    progress = Progress()
    if run.resumed is not None:
        model.load_state_dict(run.resumed["model"])
        optimiser.load_state_dict(run.resumed["optimiser"])
        run.train.load_state_dict(run.resumed["stream"])
        progress = Progress(**run.resumed["progress"])
    # Gradients are averaged over the workers while they are computed.
    parallel = DistributedDataParallel(model) if run.world_size > 1 else model

    def state() -> State:
        return {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "stream": run.train.state_dict(),
            "progress": asdict(progress),
        }

    while (epoch := run.train.epoch) < run.config.epochs:
        train_epoch(run, parallel, optimiser, target=target, progress=progress, state=state)
        metrics = {"train_loss": progress.loss / max(progress.samples, 1), **validate(run, model, target)}
        progress.history.append({"epoch": epoch, **metrics})
        progress.loss, progress.samples, progress.fraction = 0.0, 0, 0.0
        run.report(epoch, metrics, state())


def schedule(done: float) -> float:
    """Return the share of the highest learning rate, by the share of training done: a linear rise, then a cosine to 0.

    As torch's OneCycleLR (Smith & Topin 2019, "Super-convergence"), but by samples instead of steps, so that it
    continues unchanged when the number of workers changes.
    """
    if done < _RISE:
        return _FIRST + (1 - _FIRST) * done / _RISE
    return (1 + math.cos(math.pi * (done - _RISE) / (1 - _RISE))) / 2


def train_epoch(
    run: TrainingRun,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    target: Target,
    progress: Progress,
    state: Callable[[], State],
) -> None:
    """Train on the rest of the stream's epoch, with a checkpoint at intervals of steps."""
    model.train()
    epoch, every = run.train.epoch, run.config.checkpoint_every_steps
    step = run.world_size * run.config.batch_size / max(int(run.definition["samples"]["train"]), 1)
    # Loss and samples of this worker since the last sum over all; on the device, so that no step waits for it.
    own = torch.zeros(2, dtype=torch.float64, device=run.device)
    for batch in run.train:
        real = _real(batch, batch["label"])
        # DDP averages the workers' gradients, and padding makes some workers' batches count less. So each worker
        # divides the sum of its losses by the number of all workers' real samples, times the number of workers.
        everyone = real.sum()
        counted = torch.distributed.all_reduce(everyone, async_op=True) if run.world_size > 1 else None
        losses = target.losses(model(batch[input_name(run.definition)]), batch["label"]) * real
        if counted is not None:
            counted.wait()
        rate = run.config.learning_rate * schedule((epoch + min(progress.fraction, 1.0)) / run.config.epochs)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        loss = losses.sum() * (run.world_size / everyone.clamp(min=1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

        own += torch.stack([losses.detach().double().sum(), real.double().sum()])
        progress.steps += 1
        progress.fraction += step
        if run.on_batch is not None:
            run.on_batch(epoch, progress.steps, batch)
        # At its last batch the stream is in the next epoch: the epoch's checkpoint follows, with its metrics.
        if every and progress.steps % every == 0 and run.train.epoch == epoch:
            _add_up(run, own, progress)
            run.save(state())
    _add_up(run, own, progress)


@torch.no_grad()
def validate(run: TrainingRun, model: nn.Module, target: Target) -> dict[str, float]:
    """Return metrics of the whole validation split, same in all workers: loss and `class_metrics` or `number_metrics`.

    Scores, losses and labels of all workers' real samples are gathered: 8 bytes a sample and 4 for each class.
    """
    if run.validation is None:
        return {}
    model.eval()
    parts = []
    for batch in run.validation:
        outputs, real = model(batch[input_name(run.definition)]), _real(batch, batch["label"]) > 0
        losses = target.losses(outputs, batch["label"])
        parts.append((target.scores(outputs)[real], losses[real], batch["label"][real]))
    if not parts:
        return {}
    scores, each, labels = (_gathered(run, torch.cat(column)) for column in zip(*parts, strict=True))
    figures = class_metrics(scores, labels) if target.kind == "class" else number_metrics(scores[:, 0], labels)
    return ({"validation_loss": float(each.mean(dtype=np.float64))} if len(each) else {}) | figures


def _real(batch: Batch, like: torch.Tensor) -> torch.Tensor:
    """Return 1 for each real sample of a batch and 0 for each padded one, float32 (B,)."""
    mask = batch.get("mask")
    return torch.ones(len(like), device=like.device) if mask is None else mask.float()


def _add_up(run: TrainingRun, own: torch.Tensor, progress: Progress) -> None:
    """Add the counts of all workers to the common progress."""
    if run.world_size > 1:
        torch.distributed.all_reduce(own)
    loss, samples = own.tolist()
    progress.loss += loss
    progress.samples += int(samples)
    own.zero_()


def _gathered(run: TrainingRun, own: torch.Tensor) -> npt.NDArray[Any]:
    """Return the rows of all workers, by rank, in every worker."""
    if run.world_size == 1:
        return own.cpu().numpy()
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.zeros_like(count) for _ in range(run.world_size)]
    torch.distributed.all_gather(counts, count)
    sizes = [int(one) for one in counts]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).cpu().numpy()
