"""Figures of merit of a whole validation split, exact: from all its scores at once, never a mean over batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]


def auc(scores: FloatArray, positive: npt.NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve: how often a positive sample scores above a negative one, a tie counting half.

    Args:
        scores: Score of each sample, shape (n,).
        positive: Whether it is a positive one, shape (n,).

    Returns:
        The area, or None where there are no positives, or no negatives.
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
    """Accuracy and AUC of probabilities.

    Args:
        scores: Probability of each class, shape (n, classes).
        labels: Class ids, shape (n,).

    Returns:
        'accuracy', and 'auc' where it is defined: of the second class for two classes, else the mean over every class
        against the others, of those classes that some samples are of and some are not.
    """
    if not len(labels):
        return {}
    found = {"accuracy": float((scores.argmax(1) == labels).mean())}
    tried = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    areas = [area for one in tried if (area := auc(scores[:, one], labels == one)) is not None]
    return found | ({"auc": math.fsum(areas) / len(areas)} if areas else {})


def number_metrics(predicted: FloatArray, numbers: FloatArray) -> dict[str, float]:
    """Root mean squared error, in the number's own unit, and R².

    Args:
        predicted: Predicted numbers, shape (n,).
        numbers: True ones, shape (n,).

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
