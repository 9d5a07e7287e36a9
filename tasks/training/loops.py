"""The default training function with its models, loss and metrics: an example to copy for a custom function.

A custom function takes one `TrainingRun` and is named by its import path in the configuration. It runs in every worker,
reads its batches from `run.train` and `run.validation`, reports each epoch's metrics at its end (`run.report`), and
resumes from `run.resumed` if that isn't None. A state that includes `run.train.state_dict()` can be resumed in the
middle of an epoch, by any number of workers, without losing or repeating a sample. Ray isn't used: the same function
runs under torchrun.

The models are an MLP for tables and a small CNN for images. Neither has a layer whose output for one sample depends on
the rest of its batch (as batch normalisation does): so a padded sample changes nothing, and a batch means the same with
one worker as with eight.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tasks.io.errors import ConfigError

if TYPE_CHECKING:
    from tasks.delivery.config import TrainingConfig

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]


def auc(scores: FloatArray, positive: npt.NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve: the probability that a positive scores above a negative, ties counting half.

    Args:
        scores: Score of each sample, shape (n,).
        positive: True for positive samples, shape (n,).

    Returns:
        The area, or None if there are no positives or no negatives.
    """
    hits = int(positive.sum())
    misses = len(positive) - hits
    if not hits or not misses:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place.ravel()]  # samples of one score share the mean of their ranks
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def class_metrics(scores: FloatArray, labels: IntArray) -> dict[str, float]:
    """Return accuracy and AUC of probabilities.

    Args:
        scores: Probability of each class, shape (n, classes).
        labels: Class ids, shape (n,).

    Returns:
        'accuracy', and 'auc' where it is defined: of the second class for two classes, else the one-against-rest mean
        over the classes that some samples have and some don't.
    """
    if not len(labels):
        return {}
    found = {"accuracy": float((scores.argmax(1) == labels).mean())}
    tried = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    areas = [area for one in tried if (area := auc(scores[:, one], labels == one)) is not None]
    return found | ({"auc": math.fsum(areas) / len(areas)} if areas else {})


def number_metrics(predicted: FloatArray, numbers: FloatArray) -> dict[str, float]:
    """Return root mean squared error, in the number's unit, and R².

    Args:
        predicted: Predicted numbers, shape (n,).
        numbers: True numbers, shape (n,).

    Returns:
        'rmse', and 'r2' unless all numbers are the same.
    """
    if not len(numbers):
        return {}
    predicted, numbers = predicted.astype(np.float64), numbers.astype(np.float64)
    squares = float(((predicted - numbers) ** 2).sum())
    spread = float(((numbers - numbers.mean()) ** 2).sum())
    found = {"rmse": math.sqrt(squares / len(numbers))}
    return found | ({"r2": 1 - squares / spread} if spread > 0 else {})


_STAGES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The target that a version's label defines for a model.

    Attributes:
        kind: 'class' or 'number'; of several labels 'classes' or 'numbers'.
        classes: names of the classes, by class id; none for a number.
        mean: mean of the train split's numbers.
        std: standard deviation of the train split's numbers; never 0.
        parts: each of several labels.
    """

    kind: Literal["class", "number", "classes", "numbers"]
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    parts: tuple[Target, ...] = ()

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> Target:
        """Return the target of a streaming-ready version, from its definition.

        Raises:
            ConfigError: the version has no label, or fewer than two classes of one.
        """
        label = definition.get("label")
        if label is None:
            raise ConfigError(
                "the version has no label to learn: publish it with a target column, or train by a function of your own"
            )
        if label["kind"] == "number":
            return cls(kind="number", mean=float(label["mean"]), std=float(label["std"]) or 1.0)
        if label["kind"] in ("classes", "numbers"):
            one = {"classes": "class", "numbers": "number"}[label["kind"]]
            names = ("classes",) if one == "class" else ("mean", "std")
            columns = label["columns"] if len(label["columns"]) > 1 else label["columns"] * len(label[names[0]])
            each = [
                {"kind": one, "column": column, **dict(zip(names, values, strict=True))}
                for column, *values in zip(columns, *(label[name] for name in names), strict=True)
            ]
            return cls(kind=label["kind"], parts=tuple(cls.of({"label": part}) for part in each))
        classes = tuple(map(str, label["classes"]))
        if len(classes) < 2:
            raise ConfigError(
                f"label '{label.get('column')}' has {len(classes)} class: a model needs two to tell apart; "
                "choose another target column"
            )
        return cls(kind="class", classes=classes)

    @property
    def outputs(self) -> int:
        """Number of outputs of a model: one for each class, or one; of several labels one after the other."""
        if self.parts:
            return sum(part.outputs for part in self.parts)
        return len(self.classes) if self.kind == "class" else 1

    def split(self, outputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the outputs of each of several labels, shape (B, …)."""
        return torch.split(outputs, [part.outputs for part in self.parts], dim=1)

    def losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, shape (B,): cross entropy, or squared error of the standardised number.

        Of several labels it is the sum of their cross entropies, or the mean of their squared errors.

        Args:
            outputs: Outputs of the model, shape (B, `outputs`).
            labels: int64 class ids, or float32 numbers in their original unit, shape (B,) or (B, labels).
        """
        if self.parts:
            pairs = zip(self.parts, self.split(outputs), labels.unbind(1), strict=True)
            each = torch.stack([part.losses(own, label) for part, own, label in pairs])
            return each.sum(0) if self.kind == "classes" else each.mean(0)
        if self.kind == "class":
            return functional.cross_entropy(outputs.float(), labels, reduction="none")
        return (outputs.float().squeeze(1) - (labels - self.mean) / self.std).square()

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the input of the metrics, shape (B, `outputs`): probabilities, or the number in its original unit."""
        if self.parts:
            pairs = zip(self.parts, self.split(outputs), strict=True)
            return torch.cat([part.scores(own) for part, own in pairs], dim=1)
        return outputs.float().softmax(1) if self.kind == "class" else outputs.float() * self.std + self.mean

    def metrics(self, scores: FloatArray, labels: npt.NDArray[Any]) -> dict[str, float]:
        """Return `class_metrics` or `number_metrics`; of several labels the mean of those that all have.

        Args:
            scores: Result of `scores`, shape (n, `outputs`).
            labels: Labels, shape (n,) or (n, labels).
        """
        if not self.parts:
            return class_metrics(scores, labels) if self.kind == "class" else number_metrics(scores[:, 0], labels)
        bounds = np.cumsum([part.outputs for part in self.parts])[:-1]
        pairs = zip(self.parts, np.split(scores, bounds, axis=1), labels.T, strict=True)
        each = [part.metrics(own, label) for part, own, label in pairs]
        names = [name for name in each[0] if all(name in one for one in each)]
        return {name: math.fsum(one[name] for one in each) / len(each) for name in names}


def input_name(definition: Mapping[str, Any]) -> Literal["features", "image", "sequence"]:
    """Return the name of the batch's tensor that is the model's input."""
    names: dict[str, Literal["image", "sequence"]] = {"images": "image", "sequences": "sequence"}
    return names.get(definition["kind"], "features")


def build_model(definition: Mapping[str, Any], config: TrainingConfig) -> nn.Module:
    """Return the default model for a version; its weights come from torch's global generator.

    Args:
        definition: `manifest.definition` of the version.
        config: `hidden` sizes of the MLP, `width` of the CNN.

    Returns:
        A module from float32 (B, F) or (B, 3, H, W) to (B, outputs).

    Raises:
        ConfigError: as `Target.of`; or its samples are sequences.
    """
    outputs = Target.of(definition).outputs
    if input_name(definition) == "sequence":
        raise ConfigError("sequences have no default model: train by a function of your own")
    if input_name(definition) == "image":
        channels, height, width = (int(side) for side in definition["image"]["shape"])
        return _cnn(channels, min(height, width), config.width, outputs)
    return _mlp(int(definition["feature_count"]), config.hidden, outputs)


def _mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def _cnn(channels: int, size: int, width: int, outputs: int) -> nn.Module:
    """Return up to four stages of convolution, batch normalisation and pooling on an image shrunk to 32 … 63 pixels.

    Batch normalisation, because it learns classes of coarse shapes in a third of the epochs of group normalisation
    (the sample, 10 epochs: accuracy 0.92 against 0.51). In training its statistics are those of each worker's batch,
    as usual with DistributedDataParallel, and those of rank 0 are kept.
    """
    shrink = max(size // 32, 1)
    layers: list[nn.Module] = [nn.AvgPool2d(shrink)] if shrink > 1 else []
    left, made = size // shrink, width
    for _ in range(_STAGES):
        layers += [nn.Conv2d(channels, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
        channels, made, left = made, made * 2, left // 2
        if left < 2:
            break
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, _SpatialMean(), nn.Linear(channels, outputs))


class _SpatialMean(nn.Module):
    """Mean over space, (B, C, H, W) → (B, C). Not AdaptiveAvgPool2d: its gradient on a GPU differs from run to run."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean((2, 3))


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
        drawn: samples of each class, weight or source, 'natural' in the split and 'epoch' in an epoch; empty if each
            sample of one version comes once.
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
    drawn: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def report(self, epoch: int, metrics: Mapping[str, float], state: State | None = None) -> None:
        """Report an epoch's metrics, and keep a checkpoint if a state is given; every worker calls it equally often.

        Args:
            epoch: Number of the epoch, from 0.
            metrics: Numbers by name, of all workers together; rank 0's count.
            state: Value of `resumed` after a restart: tensors, numbers, texts, and lists and dicts of them. Rank 0's is
                kept.
        """
        figures = {name: float(value) for name, value in metrics.items()}
        drawn = {"drawn": self.drawn} if self.drawn and epoch == 0 and self.rank == 0 else {}
        self.send({"epoch": epoch, "metrics": figures, "worker": self.meter.take(), **drawn}, state)

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
    mix: Mapping[str | os.PathLike[str], float] | None = None,
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
        mix: Directories of versions to train on, each with its weight, the one of `uri` first; that one alone if None.

    Raises:
        ConfigError: classes are to be balanced, or samples drawn by weight, and the version has none; or versions to
            mix don't fit together.
        CorruptVersion: a file is missing or differs from the manifest.
    """
    from tasks.loader.mixed import MixedStream
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
        train: TrainingStream | MixedStream
        if mix is None:
            draw: dict[str, Any] = {"weights" if config.balance == "weight" else "balance": config.balance}
            train = TrainingStream(uri, remainder=config.remainder, **draw, **settings)
        else:
            train = MixedStream(mix, remainder=config.remainder, **settings)
        stack.enter_context(train)
        drawn: Mapping[str, Mapping[str, int]] = {}
        if isinstance(train, MixedStream):
            drawn = train.distribution()
        elif rank == 0 and config.balance is not None:
            drawn = train.distribution(config.balance)
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
            drawn=drawn,
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
    figures = target.metrics(scores, labels)
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
