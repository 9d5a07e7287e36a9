"""Ways to make three variants of each picture on two cores, ours and others', each in processes of its own.

All decode a picture once and do the same operations with the same bounds: a random crop resized to 224 × 224, a flip,
a rotation with black corners, brightness, contrast, saturation and hue. Where they differ, none is slowed by it:

| | pictures come from | resizing | hue | variants |
|---|---|---|---|---|
| ours | memory | antialiased | HSV | uint8, planes |
| torchvision on PIL images, by a DataLoader | files | antialiased | HSV | float32 or uint8, planes, in batches |
| albumentations | memory | area where it shrinks, else linear; or always linear | HSV | uint8, pixel by pixel |
| DALI | files | antialiased | a matrix on YIQ | uint8, pixel by pixel, in batches |
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.images.config import Augmentation, ImageAugmentationConfig
from tests.benchmarks.workers import Workers

PROCESSES = 2
BATCH = 16
SETTINGS = Augmentation()

Work = Callable[[Path | None], int]
"""Makes the variants of all its pictures, writes them if there is a directory, and gives their number."""
Maker = Callable[[Sequence[str]], Work]
"""Loads what the work on these files needs; called in the process that works."""


class Augmenters(Workers):
    """Processes that share pictures, each with the same work; a context manager.

    Args:
        make: Makes the work of a process.
        paths: The pictures.
        processes: Number of processes; the first of n gets the pictures 0, n, 2n, and so on.

    Raises:
        CannotRun: the work can't be made.
    """

    def __init__(self, make: Maker, paths: Sequence[str], processes: int) -> None:
        super().__init__([partial(make, paths[number::processes]) for number in range(processes)])
        self._pictures = len(paths)

    def run(self, target: Path | None = None) -> None:
        """Make all variants once, and write them if a directory is given."""
        made = sum(self.ask(target))
        expected = self._pictures * SETTINGS.variants
        assert made == expected, f"{made:,} variants were made of {self._pictures:,} pictures, not {expected:,}"


def kernel(paths: Sequence[str]) -> Work:
    """Our decoder and engine, called as the flow calls them, and nothing else; written as the flow writes, if asked."""
    from tasks.images.augment import IMAGES_AT_ONCE, expected_size
    from tasks.images.decode import Decoded, Decoder
    from tasks.images.draws import image_keys
    from tasks.images.engines import make_engine
    from tasks.io.disk import NewFile

    config = ImageAugmentationConfig(augmentation=SETTINGS)
    engine = make_engine(config)
    decoder = Decoder(config.max_pixels, config.background)
    keys = image_keys([Path(path).stem for path in paths], config.seed)
    contents = _contents(paths)

    def pixels(data: bytes) -> npt.NDArray[np.uint8]:
        decoded = decoder.decode(data)
        assert isinstance(decoded, Decoded), f"a picture was rejected: {decoded}"
        return decoded.pixels

    def work(target: Path | None) -> int:
        made = 0
        file = None if target is None else NewFile(str(target / f"{os.getpid()}.raw"))
        for first in range(0, len(contents), IMAGES_AT_ONCE):
            some = slice(first, first + IMAGES_AT_ONCE)
            sizes = [expected_size(data) for data in contents[some]]
            variants = engine.variants(map(pixels, contents[some]), keys[some], sizes)[0]
            if file is not None:
                file.append(memoryview(variants).cast("B"))
            made += len(variants)
        if file is not None:
            file.close()
        return made

    return work


def _contents(paths: Sequence[str]) -> list[bytes]:
    return [Path(path).read_bytes() for path in paths]


class _PilPictures:
    """A map-style dataset, as torchvision's documentation shows it, but for its three variants of each picture."""

    def __init__(self, paths: Sequence[str], as_float: bool) -> None:
        from torchvision import transforms

        self._paths = paths
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SETTINGS.size, SETTINGS.scale, SETTINGS.ratio),
                transforms.RandomHorizontalFlip(SETTINGS.flip),
                transforms.RandomRotation(SETTINGS.degrees),
                transforms.ColorJitter(SETTINGS.brightness, SETTINGS.contrast, SETTINGS.saturation, SETTINGS.hue),
                *(
                    [transforms.ToTensor(), transforms.Normalize(SETTINGS.mean, SETTINGS.std)]
                    if as_float
                    else [transforms.PILToTensor()]
                ),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self._paths[number]) as file:
            image = file.convert("RGB")
        return torch.stack([self._transform(image) for _ in range(SETTINGS.variants)])


def torch_loader(paths: Sequence[str], as_float: bool) -> Work:
    """A DataLoader whose two workers open, decode and transform; torch gives each of them one thread."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    loader: Any = DataLoader(
        _PilPictures(paths, as_float), batch_size=BATCH, num_workers=PROCESSES, persistent_workers=True
    )

    def work(_: Path | None) -> int:
        made = 0
        for batch in loader:
            assert batch.dtype == (torch.float32 if as_float else torch.uint8)
            made += batch.shape[0] * batch.shape[1]
        return made

    return work


def albumentations(paths: Sequence[str], antialias: bool) -> Work:
    """Compose on arrays, by OpenCV on one thread; decoded by simplejpeg, which is faster than OpenCV.

    Both albumentations and AlbumentationsX will do, whichever is installed.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network whether there is a newer one
    import albumentations as A  # noqa: N812 - its documentation's name for it
    import cv2
    import simplejpeg

    cv2.setNumThreads(0)
    # AlbumentationsX has other names for arguments; it warns of those that it doesn't know, and ignores them.
    named_ranges = "brightness_range" in inspect.signature(A.ColorJitter).parameters
    spreads = {name: getattr(SETTINGS, name) for name in ("brightness", "contrast", "saturation")}
    bounds = {name: (1 - spread, 1 + spread) for name, spread in spreads.items()}
    bounds["hue"] = (-SETTINGS.hue, SETTINGS.hue)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform = A.Compose(
            [
                A.RandomResizedCrop(
                    (SETTINGS.size, SETTINGS.size),
                    scale=SETTINGS.scale,
                    ratio=SETTINGS.ratio,
                    interpolation=cv2.INTER_LINEAR,
                    area_for_downscale="image" if antialias else None,
                ),
                A.HorizontalFlip(p=SETTINGS.flip),
                A.Rotate(
                    **{"angle_range" if named_ranges else "limit": (-SETTINGS.degrees, SETTINGS.degrees)},
                    interpolation=cv2.INTER_NEAREST,
                    border_mode=cv2.BORDER_CONSTANT,
                    fill=0,
                    p=1,
                ),
                A.ColorJitter(**{f"{name}_range" if named_ranges else name: b for name, b in bounds.items()}, p=1),
            ],
            **({"telemetry": False} if "telemetry" in inspect.signature(A.Compose).parameters else {}),
        )
    contents = _contents(paths)
    shape = (SETTINGS.size, SETTINGS.size, 3)

    def work(_: Path | None) -> int:
        made = 0
        for data in contents:
            image = simplejpeg.decode_jpeg(data, "RGB")
            for _ in range(SETTINGS.variants):
                variant = transform(image=image)["image"]
                assert variant.shape == shape
                made += 1
        return made

    return work


def dali(paths: Sequence[str], settings: Augmentation = SETTINGS, batch: int = BATCH) -> Work:
    """A DALI pipeline without a GPU: one process, two threads, batches made ahead of their use, as is its default."""
    from nvidia.dali import fn, pipeline_def, types

    count = len(paths)
    assert not count % batch, f"DALI would fill the last batch up: {count} pictures are no multiple of {batch}"
    uniform, degrees = fn.random.uniform, settings.degrees

    @pipeline_def(batch_size=batch, num_threads=PROCESSES, device_id=None, seed=0)
    def pipeline() -> Any:
        files, _ = fn.readers.file(files=list(paths))
        images = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        made = []
        for _ in range(settings.variants):
            variants = fn.random_resized_crop(
                images, size=settings.size, random_area=settings.scale, random_aspect_ratio=settings.ratio
            )
            variants = fn.flip(variants, horizontal=fn.random.coin_flip(probability=settings.flip))
            variants = fn.rotate(
                variants,
                angle=uniform(range=(-degrees, degrees)),
                keep_size=True,
                fill_value=0.0,
                interp_type=types.INTERP_NN,
            )
            spreads = {name: getattr(settings, name) for name in ("brightness", "contrast", "saturation")}
            factors = {name: uniform(range=(1 - spread, 1 + spread)) for name, spread in spreads.items()}
            turn = 360 * settings.hue
            made.append(fn.color_twist(variants, hue=uniform(range=(-turn, turn)), **factors))
        return tuple(made)

    built = pipeline()
    built.build()
    built.run()  # what can't run here is known at once

    def work(_: Path | None) -> int:
        made = 0
        for _ in range(count // batch):
            for variants in built.run():
                shape = variants.shape()
                assert shape[0] == (settings.size, settings.size, 3)
                made += len(shape)
        return made

    return work


OTHERS: dict[str, tuple[Maker, int]] = {
    "torch": (partial(torch_loader, as_float=True), 1),
    "torch-uint8": (partial(torch_loader, as_float=False), 1),
    "albumentations": (partial(albumentations, antialias=True), PROCESSES),
    "albumentations-linear": (partial(albumentations, antialias=False), PROCESSES),
    "dali": (dali, 1),
}
"""Each way but ours: what makes its work, and how many processes share it; the loader and DALI divide it themselves."""
