"""Policies of a user, good and bad, to be named by their import path."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

SIZE = 16

transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5, 0.5, 0.5, 0.1)])
floats = v2.Compose([transform, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3)])
wide_floats = v2.Compose([v2.Resize((SIZE, SIZE)), v2.ToDtype(torch.float64, scale=True)])
wrong_size = v2.RandomResizedCrop(SIZE + 1)
to_integers = v2.Compose([transform, v2.ToDtype(torch.int32)])
to_picture = v2.Compose([transform, v2.ToPILImage()])
too_large_a_crop = v2.RandomCrop(1000)
partly = partial(v2.functional.resize, size=[SIZE, SIZE])
number = 7


class Nested:
    inner = transform


_own = np.random.default_rng(0)
_at_import = float(np.random.default_rng().uniform())


def own_generator(image: torch.Tensor) -> torch.Tensor:
    """Seeded, but drawn from one image to the next."""
    return function(image, float(_own.uniform()))


def system_randomness(image: torch.Tensor) -> torch.Tensor:
    return function(image, random.SystemRandom().random())


def drawn_at_import(image: torch.Tensor) -> torch.Tensor:
    """The same in a process for each image, and another one in each process."""
    return function(image, _at_import)


class FromClass:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return v2.functional.resize(image, [SIZE, SIZE])


class WithArguments:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return v2.functional.resize(image, [self.size, self.size])


def function(image: torch.Tensor, strength: float = 0.5) -> torch.Tensor:
    return v2.functional.adjust_brightness(v2.functional.resize(image, [SIZE, SIZE]), strength)


def of_any(*images: torch.Tensor) -> torch.Tensor:
    return v2.functional.resize(images[0], [SIZE, SIZE])


def factory(size: int = SIZE) -> Any:
    return v2.RandomResizedCrop(size)


def factory_of_nothing() -> None:
    return None


def broken_factory() -> Any:
    raise RuntimeError("no weights here")


def of_two(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return image + mask


def to_array(image: torch.Tensor) -> Any:
    return v2.functional.resize(image, [SIZE, SIZE]).numpy()


def every_generator(image: torch.Tensor) -> torch.Tensor:
    """Brightness by Python, numpy and torch."""
    factor = random.random() + np.random.rand() + np.random.randint(2) + float(torch.rand(1))
    return v2.functional.resize(image, [SIZE, SIZE]).float() * factor


def in_place(image: torch.Tensor) -> torch.Tensor:
    image //= 2
    return v2.functional.resize(image, [SIZE, SIZE])


def now_and_then(image: torch.Tensor) -> torch.Tensor:
    image = v2.functional.resize(image, [SIZE, SIZE])
    return image.float() if image.float().mean() > 100 else image
