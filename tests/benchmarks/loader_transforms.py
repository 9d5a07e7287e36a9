"""Speed of augmentation in the loader, against the bare kernel and a torch DataLoader with the same operations.

    python -m tests.benchmarks.loader_transforms [--samples 4000] [--rounds 3] [--jpeg]

| side | does |
|---|---|
| kernel | the kernel on pictures that are in memory as it takes them, drawn at once; no file, no batch, no order |
| ours | `TrainingStream(transform=Augmentation())`, bytes delivered |
| ours-float | the same, normalised |
| torch | a DataLoader with torchvision's operations of the same bounds, on the same mapped files |
| kernel-jpeg | as kernel, of JPEGs in memory, each decoded by simplejpeg just before |
| ours-jpeg | as ours, of a version of the same JPEGs |
| dali-jpeg | DALI on the CPU, of the same JPEGs as files in batches, in their order |

All use two cores: two threads, or two loader processes, which are kept. The sides take turns. `--jpeg` leaves out those
of pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from tasks.images.config import Augmentation
from tasks.images.draws import draw
from tasks.images.kernel import FusedEngine
from tasks.loader.stream import TrainingStream
from tests.benchmarks.augmenters import dali
from tests.benchmarks.delivery_data import IMAGES, SHAPE, Source, pictures, write
from tests.benchmarks.loaders import LOADER_PROCESSES, Batch, Task, torch_loader
from tests.benchmarks.turns import machine, median, ratio, take_turns
from tests.delivery.making import publish

BATCH = 64
SETTINGS = Augmentation(variants=1)


def encoded(photographs: Path | None) -> list[bytes]:
    """The pictures as the augmentation flow writes JPEGs."""
    return [
        simplejpeg.encode_jpeg(np.ascontiguousarray(picture.transpose(1, 2, 0)), 95, "RGB", "444")
        for picture in pictures(photographs)
    ]


def kernel(samples: int, picture: Callable[[int, int], npt.NDArray[np.uint8]]) -> Callable[[Path], object]:
    """The kernel alone, on pictures (height, width, 4) by number of the worker and of the sample."""
    keys = np.random.default_rng(5).integers(0, 1 << 63, samples, np.uint64)
    side = np.full(samples, SHAPE[1])
    engines = [FusedEngine(SETTINGS) for _ in range(LOADER_PROCESSES)]
    out = np.empty((LOADER_PROCESSES, 1, *SHAPE), np.uint8)
    figures = np.empty((LOADER_PROCESSES, 1, 2), np.float32)

    def run(_: Path) -> None:
        draws = draw(keys, side, side, SETTINGS)

        def work(worker: int) -> None:
            for number in range(worker, samples, LOADER_PROCESSES):
                engines[worker].augment(picture(worker, number), draws, number, out[worker], figures[worker])

        with ThreadPoolExecutor(LOADER_PROCESSES) as pool:
            list(pool.map(work, range(LOADER_PROCESSES)))

    return run


def kernel_of_pixels(samples: int, photographs: Path | None) -> Callable[[Path], object]:
    """The kernel alone, on decoded pictures."""
    shown = pictures(photographs)
    pixels = np.zeros((len(shown), *SHAPE[1:], 4), np.uint8)
    pixels[..., :3] = shown.transpose(0, 2, 3, 1)
    return kernel(samples, lambda _, number: pixels[number % len(pixels)])


def kernel_of_jpegs(samples: int, files: list[bytes]) -> Callable[[Path], object]:
    """The decoder and the kernel alone."""
    room = np.empty((LOADER_PROCESSES, *SHAPE[1:], 4), np.uint8)

    def decoded(worker: int, number: int) -> npt.NDArray[np.uint8]:
        return simplejpeg.decode_jpeg(files[number % len(files)], "RGBX", buffer=room[worker].reshape(-1))

    return kernel(samples, decoded)


def dali_of_jpegs(samples: int, files: list[bytes], directory: Path) -> Callable[[Path], object]:
    """DALI on the CPU."""
    directory.mkdir()
    paths = []
    for number, data in enumerate(files):
        path = directory / f"{number}.jpg"
        path.write_bytes(data)
        paths.append(str(path))
    work = dali([paths[number % len(paths)] for number in range(samples)], SETTINGS, BATCH)
    return lambda _: work(None)


def version_of_jpegs(samples: int, files: list[bytes], root: str) -> str:
    """A streaming-ready version of the JPEGs."""
    numbers = np.arange(samples)
    images = np.empty(samples, object)
    images[:] = [np.frombuffer(files[number % len(files)], np.uint8) for number in numbers]
    lengths = np.array([len(image) for image in images])
    columns = {"image": images, "length": lengths, "label": numbers % 4, "sample_id": numbers}
    return publish(root, {"train": [columns]}, shape=SHAPE, group_batches=256)


def ours(version: Path | str, samples: int, *, normalise: bool) -> Callable[[Path], object]:
    """An epoch of the stream."""
    stream = TrainingStream(
        version,
        batch_size=BATCH,
        rank=0,
        world_size=1,
        device="cpu",
        normalise=normalise,
        transform=SETTINGS,
        transform_threads=LOADER_PROCESSES,
    )
    return lambda _: consume(stream, lambda batch: (batch["image"], batch["label"]), samples, stream)


def torch(source: Source) -> Callable[[Path], object]:
    """An epoch of a DataLoader."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SETTINGS.size, scale=SETTINGS.scale, ratio=SETTINGS.ratio, antialias=True),
            v2.RandomHorizontalFlip(SETTINGS.flip),
            v2.RandomRotation(SETTINGS.degrees),
            v2.ColorJitter(SETTINGS.brightness, SETTINGS.contrast, SETTINGS.saturation, SETTINGS.hue),
        ]
    )
    epochs = torch_loader(Task(source, BATCH, 0, 1), transform=transform)
    return lambda _: consume(epochs(), lambda batch: batch, source.samples, None)


def consume(batches: Any, parts: Callable[[Any], Batch], samples: int, stream: TrainingStream | None) -> None:
    """Look at each batch of an epoch, and count the samples."""
    before = stream.stats.samples if stream is not None else 0
    found = 0
    for batch in batches:
        image, label = parts(batch)
        assert image.shape[1:] == SHAPE
        found += len(label)
    if stream is not None:
        found = stream.stats.samples - before
    assert found == samples, f"{found} samples of {samples}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="a multiple of the batch")
    parser.add_argument("--photographs", type=Path, default=None, help="directory of photographs (synthetic ones)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jpeg", action="store_true", help="only the sides of JPEGs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    print(f"{arguments.samples:,} pictures of {' × '.join(map(str, SHAPE))}, batches of {BATCH}; {machine()}")
    with tempfile.TemporaryDirectory(prefix="transforms-") as directory:
        source, samples = Source(IMAGES, arguments.samples, Path(directory)), arguments.samples
        sides: dict[str, Callable[[Path], object]] = {}
        if not arguments.jpeg:
            write(source, "version", arguments.photographs)
            sides = {
                "torch": torch(source),  # first: its processes are forks, and threads don't survive that
                "kernel": kernel_of_pixels(samples, arguments.photographs),
                "ours": ours(source.version, samples, normalise=False),
                "ours-float": ours(source.version, samples, normalise=True),
            }
        files = encoded(arguments.photographs)
        sides |= {
            "kernel-jpeg": kernel_of_jpegs(samples, files),
            "ours-jpeg": ours(version_of_jpegs(samples, files, f"{directory}/jpegs"), samples, normalise=False),
        }
        try:
            sides["dali-jpeg"] = dali_of_jpegs(samples, files, Path(directory, "files"))
        except ModuleNotFoundError as error:
            print(f"dali-jpeg is left out: {error.name} isn't installed")
        seconds = take_turns(sides, arguments.rounds, prefix="transforms-")
    for name, taken in seconds.items():
        print(f"{name:12s} {median(taken, lambda one: f'{arguments.samples / one:,.0f} images/s')}")
    pairs = [("ours", "kernel"), ("ours-float", "kernel"), ("ours", "torch")]
    for side, other in (*pairs, ("ours-jpeg", "kernel-jpeg"), ("ours-jpeg", "dali-jpeg")):
        if side in seconds and other in seconds:
            print(f"{side} / {other}, images/s: {ratio(seconds[other], seconds[side])}")


if __name__ == "__main__":
    main()
