"""Mixtures of samples by MixUp and CutMix, keyed by the pair.

MixUp (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) mix a sample with its
neighbour in the order of the epoch. Partners are pairs that don't depend on batches, so that any number of workers
mixes the same ones. They lie in the same stream of files, nearly always in the same batch of the same worker: at most
two further samples a batch and stream are read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tasks.io.errors import ConfigError
from tasks.io.tensors import Float32Array, Int64Array, UInt64Array

_LARGEST_ALPHA = 1e6


class Mixing:
    """Mixtures of pairs of samples.

    Args:
        mixup: Parameter alpha of MixUp, whose weights are drawn from Beta(alpha, alpha); 0: none.
        cutmix: Likewise of CutMix. With both, one of them is drawn for each pair, each half of the times.

    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self._mixup, self._cutmix = mixup, cutmix

    def draw(self, keys: UInt64Array, height: int, width: int) -> tuple[Float32Array, Int64Array]:
        """Return what becomes of some pairs.

        Args:
            keys: (n,) keys of the pairs, some repeatedly.
            height: Height of the pictures, pixels; 1 for rows.
            width: Width of the pictures.

        Returns:
            (n,) weight of each pair's own sample; 1 less it is its partner's. (n, 4) top, left, bottom, right of the
            partner's box, as of torchvision's CutMix; an empty one with MixUp.

        """
        found, back = np.unique(keys, return_inverse=True)
        weights, boxes = np.empty(len(found), np.float32), np.zeros((len(found), 4), np.int64)
        for number, key in enumerate(found.tolist()):
            generator = np.random.Generator(np.random.Philox(key=key))
            cut = self._cutmix > 0 and (not self._mixup or generator.random() < 0.5)
            alpha = self._cutmix if cut else self._mixup
            weights[number] = weight = generator.beta(alpha, alpha)
            if cut:
                # Its middle is anywhere; what lies beyond the edge is cut off.
                half = 0.5 * math.sqrt(1 - weight)
                y, x = int(generator.random() * height), int(generator.random() * width)
                top, left = max(int(y - half * height), 0), max(int(x - half * width), 0)
                bottom, right = min(int(y + half * height), height), min(int(x + half * width), width)
                boxes[number] = top, left, bottom, right
                weights[number] = 1 - (bottom - top) * (right - left) / (height * width)
        return weights[back], boxes[back]


def alpha_of(name: str, value: Any) -> float:
    """Return a parameter alpha, 0 for None.

    Raises:
        ConfigError: it isn't a number from 0 on.
    """
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LARGEST_ALPHA:
        raise ConfigError(f"{name} = {value!r}: give alpha of the Beta distribution of weights, such as 0.2, or 0")
    return float(value)
