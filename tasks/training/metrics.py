"""Exact metrics of a whole validation split: from all its scores at once, never a mean over batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

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
