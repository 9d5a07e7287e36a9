"""Speed of augmentation in the loader, against the bare kernel and a torch DataLoader with the same operations.

    python -m tests.benchmarks.loader_transforms [--samples 4000] [--rounds 3]

| side | does |
|---|---|
| kernel | the kernel on pictures that are in memory as it takes them, drawn at once; no file, no batch, no order |
| ours | `TrainingStream(transform=Augmentation())`, bytes delivered |
| ours-float | the same, normalised |
| torch | a DataLoader with torchvision's operations of the same bounds, on the same mapped files |

All use two cores: two threads, or two loader processes, which are kept. The sides take turns.
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

from tasks.images.config import Augmentation
from tasks.images.draws import draw
from tasks.images.kernel import FusedEngine
from tasks.loader.stream import TrainingStream
from tests.benchmarks.delivery_data import IMAGES, SHAPE, Source, pictures, write
from tests.benchmarks.loaders import LOADER_PROCESSES, Batch, Task, torch_loader
from tests.benchmarks.turns import machine, median, ratio, take_turns

BATCH = 64
SETTINGS = Augmentation(variants=1)


def kernel(samples: int) -> Callable[[Path], object]:
    """The kernel alone."""
    shown = pictures(None)
    pixels = np.zeros((len(shown), *SHAPE[1:], 4), np.uint8)
    pixels[..., :3] = shown.transpose(0, 2, 3, 1)
    keys = np.random.default_rng(5).integers(0, 1 << 63, samples, np.uint64)
    side = np.full(samples, SHAPE[1])
    engines = [FusedEngine(SETTINGS) for _ in range(LOADER_PROCESSES)]
    out = np.empty((LOADER_PROCESSES, 1, *SHAPE), np.uint8)
    figures = np.empty((LOADER_PROCESSES, 1, 2), np.float32)

    def run(_: Path) -> None:
        draws = draw(keys, side, side, SETTINGS)

        def work(worker: int) -> None:
            for number in range(worker, samples, LOADER_PROCESSES):
                engines[worker].augment(pixels[number % len(pixels)], draws, number, out[worker], figures[worker])

        with ThreadPoolExecutor(LOADER_PROCESSES) as pool:
            list(pool.map(work, range(LOADER_PROCESSES)))

    return run


def ours(source: Source, *, normalise: bool) -> Callable[[Path], object]:
    """An epoch of the stream."""
    stream = TrainingStream(
        source.version,
        batch_size=BATCH,
        rank=0,
        world_size=1,
        device="cpu",
        normalise=normalise,
        transform=SETTINGS,
        transform_threads=LOADER_PROCESSES,
    )
    return lambda _: consume(stream, lambda batch: (batch["image"], batch["label"]), source.samples, stream)


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
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    print(f"{arguments.samples:,} pictures of {' × '.join(map(str, SHAPE))}, batches of {BATCH}; {machine()}")
    with tempfile.TemporaryDirectory(prefix="transforms-") as directory:
        source = Source(IMAGES, arguments.samples, Path(directory))
        write(source, "version")
        sides = {
            "torch": torch(source),  # first: its processes are forks, and threads don't survive that
            "kernel": kernel(arguments.samples),
            "ours": ours(source, normalise=False),
            "ours-float": ours(source, normalise=True),
        }
        seconds = take_turns(sides, arguments.rounds, prefix="transforms-")
    for name, taken in seconds.items():
        print(f"{name:12s} {median(taken, lambda one: f'{arguments.samples / one:,.0f} images/s')}")
    print(f"ours / kernel, images/s: {ratio(seconds['kernel'], seconds['ours'])}")
    print(f"ours-float / kernel:     {ratio(seconds['kernel'], seconds['ours-float'])}")
    print(f"ours / torch:            {ratio(seconds['torch'], seconds['ours'])}")


if __name__ == "__main__":
    main()
