"""The default models, an MLP for tables and a small CNN for images, their loss, and exact metrics.

Neither has a layer whose output for one sample depends on the rest of its batch (as batch normalisation does): so a
padded sample changes nothing, and a batch means the same with one worker as with eight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

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
        kind: 'class' or 'number'.
        classes: names of the classes, by class id; none for a number.
        mean: mean of the train split's numbers.
        std: standard deviation of the train split's numbers; never 0.
    """

    kind: Literal["class", "number"]
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> Target:
        """Return the target of a streaming-ready version, from its definition.

        Raises:
            ConfigError: the version has no label, or fewer than two classes.
        """
        label = definition.get("label")
        if label is None:
            raise ConfigError(
                "the version has no label to learn: publish it with a target column, or train by a function of your own"
            )
        if label["kind"] == "number":
            return cls(kind="number", mean=float(label["mean"]), std=float(label["std"]) or 1.0)
        classes = tuple(map(str, label["classes"]))
        if len(classes) < 2:
            raise ConfigError(
                f"label '{label.get('column')}' has {len(classes)} class: a model needs two to tell apart; "
                "choose another target column"
            )
        return cls(kind="class", classes=classes)

    @property
    def outputs(self) -> int:
        """Number of outputs of a model: one for each class, or one."""
        return len(self.classes) if self.kind == "class" else 1

    def losses(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, shape (B,): cross entropy, or squared error of the standardised number.

        Args:
            outputs: Outputs of the model, shape (B, `outputs`).
            labels: int64 class ids, or float32 numbers in their original unit, shape (B,).
        """
        if self.kind == "class":
            return functional.cross_entropy(outputs.float(), labels, reduction="none")
        return (outputs.float().squeeze(1) - (labels - self.mean) / self.std).square()

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the input of the metrics, shape (B, `outputs`): probabilities, or the number in its original unit."""
        return outputs.float().softmax(1) if self.kind == "class" else outputs.float() * self.std + self.mean


def input_name(definition: Mapping[str, Any]) -> Literal["features", "image"]:
    """Return the name of the batch's tensor that is the model's input."""
    return "image" if definition["kind"] == "images" else "features"


def build_model(definition: Mapping[str, Any], config: TrainingConfig) -> nn.Module:
    """Return the default model for a version; its weights come from torch's global generator.

    Args:
        definition: `manifest.definition` of the version.
        config: `hidden` sizes of the MLP, `width` of the CNN.

    Returns:
        A module from float32 (B, F) or (B, 3, H, W) to (B, outputs).

    Raises:
        ConfigError: as `Target.of`.
    """
    outputs = Target.of(definition).outputs
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
