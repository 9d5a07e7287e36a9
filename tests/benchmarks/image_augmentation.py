"""Speed of the image augmentation, three variants of each picture, against what else does it on this machine.

    python -m tests.benchmarks.image_augmentation --images DIR            2,000 pictures, all sides
    python -m tests.benchmarks.image_augmentation --images DIR --memory   2,000 and 20,000: time an image, peak memory

The JPEGs of DIR are repeated until there are enough; without --images they are synthetic. The sides take turns in one
run, and medians and ratios are printed; each has two processes, started before, with all their imports.

- kernel: our decoder and compiled kernel on pictures in memory, in two plain processes that do nothing else.
- kernel+write: the same, and each process writes its variants, raw, to a file, past the page cache as the flow does,
  and it is on the disk at the end.
- flow: the jobs from the listing to the last file of the version, on Ray. It also reads the pictures, fingerprints
  them, judges, scores, hashes and writes their variants as Parquet, finds near-duplicates, splits and profiles.
- torch, torch-uint8: a DataLoader with two workers, PIL and torchvision; normalised float32, or as ours uint8.
- albumentations, dali: on the CPU; they need not be installed. albumentations-linear doesn't antialias.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import simplejpeg

from tests.benchmarks.augmenters import BATCH, OTHERS, PROCESSES, SETTINGS, Augmenters, kernel
from tests.benchmarks.data import originals, pictures
from tests.benchmarks.turns import (
    GIB,
    Side,
    grow,
    machine,
    median,
    ratio,
    take_turns,
)
from tests.benchmarks.workers import CannotRun

PREFIX = "image-benchmark-"
KERNEL, WRITE, FLOW = "kernel", "kernel+write", "flow"
SIDES = (KERNEL, WRITE, FLOW, *OTHERS)
REST = 1.0
"""Seconds before each side; DALI makes two batches more than it was asked for."""

Seconds = dict[str, float]


def run_flow(source: Path, target: Path) -> tuple[Seconds, Seconds]:
    """The jobs of the flow, on the Ray that is connected.

    Returns:
        Seconds of each part, one after the other; seconds of each stage of 'augment and write', of all workers.
    """
    from tasks.images.config import ImageAugmentationConfig
    from tasks.images.pipeline import augment_images
    from tasks.images.plan import plan_images
    from tasks.store import layout
    from tasks.store.reservation import reserve

    config = ImageAugmentationConfig(
        evaluation="augmented",
        root=str(target),
        images=str(source / "images"),
        labels=str(source / "labels.csv"),
        group_column="scene",
        augmentation=SETTINGS,
    )
    started = time.perf_counter()
    plan = plan_images(config, reserve(config.root, layout.image_dataset(config.name), "benchmark"), None)
    planned = time.perf_counter() - started
    made = augment_images(plan, config)
    rows = sum(entry.rows for entry in made.files)
    assert rows == plan.images * SETTINGS.variants, f"{rows:,} variants were written of {plan.images:,} pictures"
    return {"plan": planned, **made.timings}, made.stage_seconds


def connect() -> None:
    """Start Ray with as many CPUs as each side has, and say how long it took."""
    from tasks.engine import cluster

    started = time.perf_counter()
    cluster.connect(num_cpus=PROCESSES, object_store_memory=GIB)
    print(f"Ray started in {time.perf_counter() - started:.1f} s")


def compare(source: Path, chosen: Collection[str], repeats: int) -> None:
    """Let the chosen sides take turns, and print what came out."""
    paths = [str(path) for path in sorted((source / "images").iterdir())]
    parts: list[Seconds] = []
    stages: list[Seconds] = []

    def flow(target: Path) -> None:
        for found, seconds in zip((parts, stages), run_flow(source, target), strict=True):
            found.append(seconds)

    with ExitStack() as stack:
        sides = start_processes(paths, chosen, stack)
        if FLOW in chosen:
            connect()
            sides[FLOW] = flow
        sides = {name: sides[name] for name in SIDES if name in sides}
        seconds = take_turns(sides, repeats, prefix=PREFIX, directory=source.parent, rest=REST)
    for name, values in seconds.items():
        print(f"{name:21s} {median(values, lambda middle: f'{len(paths) / middle:5.0f} images/s')}")
    if parts:
        del parts[0], stages[0]  # of the warm-up
        show_parts("parts of the flow", parts)
        show_parts("stages of its 'augment and write', summed over its workers", stages)
        seconds["augment and write"] = [found["augment and write"] for found in parts]
    show_ratios(seconds)


def start_processes(paths: Sequence[str], chosen: Collection[str], stack: ExitStack) -> dict[str, Side]:
    """The chosen sides but for the flow, ready to run until the stack is left; what can't run says why."""
    sides: dict[str, Side] = {}
    if KERNEL in chosen or WRITE in chosen:
        ours = stack.enter_context(Augmenters(kernel, paths, PROCESSES))
        sides |= {KERNEL: lambda _: ours.run()} if KERNEL in chosen else {}
        sides |= {WRITE: ours.run} if WRITE in chosen else {}
    for name, (make, processes) in OTHERS.items():
        if name not in chosen:
            continue
        try:
            workers = stack.enter_context(Augmenters(make, paths, processes))
        except CannotRun as fault:
            print(f"{name} is left out: {fault}")
            continue
        sides[name] = lambda _, workers=workers: workers.run()
    return sides


def show_parts(title: str, rounds: Sequence[Seconds]) -> None:
    """Medians of what a side's time went to."""
    medians = {name: statistics.median(seconds.get(name, 0.0) for seconds in rounds) for name in rounds[0]}
    print(f"{title}: " + ", ".join(f"{name} {value:.2f} s" for name, value in medians.items()))


def show_ratios(seconds: dict[str, list[float]]) -> None:
    """How many times as fast one side is as another, pair by pair, with the goal if there is one."""
    antialiased = [seconds[name] for name in ("albumentations", "dali") if name in seconds]
    fastest = "fastest of albumentations, dali"
    seconds = {**seconds, fastest: [min(values) for values in zip(*antialiased, strict=True)]}
    for name, other, goal in (
        (KERNEL, "torch", 6.0),
        (KERNEL, "torch-uint8", None),
        (KERNEL, fastest, 2.0),
        (KERNEL, "albumentations-linear", None),
        (FLOW, KERNEL, 0.85),
        (FLOW, WRITE, 0.85),
        ("augment and write", KERNEL, None),
        ("augment and write", WRITE, None),
        (FLOW, "torch", None),
    ):
        if seconds.get(name) and seconds.get(other):
            print(
                f"speed of {name} / {other}: {ratio(seconds[other], seconds[name])}"
                + (f", goal at least {goal:g}" if goal else "")
            )


def memory(sources: dict[int, Path], repeats: int) -> None:
    """The flow on few and on ten times as many pictures: time an image and peak memory."""
    connect()
    few, many = sources
    place = next(iter(sources.values())).parent
    peaks = grow(run_flow, sources, repeats, prefix=PREFIX, item="image", unit="µs", directory=place)
    # Of the few, the first round: later ones find what the workers have kept from the many.
    print(
        f"peak memory of all processes: {peaks[few][0]:.2f} GiB at {few:,}, {max(peaks[many]):.2f} GiB at {many:,}, "
        f"ratio {max(peaks[many]) / peaks[few][0]:.2f}"
    )


def describe(files: Sequence[bytes], images: Path | None) -> str:
    """What the pictures are."""
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in files]
    height, width = (statistics.median(side) for side in zip(*sizes, strict=True))
    origin = f"JPEGs of {images}" if images else "synthetic JPEGs (give --images for photographs)"
    kilobytes = statistics.mean(map(len, files)) / 1000
    return f"{len(files)} {origin}, in the middle {width:.0f} × {height:.0f}, {kilobytes:.0f} kB on average, repeated"


def main() -> None:
    """Run the comparison that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=None, help="directory of JPEGs (synthetic ones)")
    parser.add_argument("--count", type=int, default=2000, help=f"pictures, rounded up to a multiple of {BATCH} (2000)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "image-benchmark-data")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    count = -(-arguments.count // BATCH) * BATCH
    files = originals(arguments.images)
    print(f"{machine()}; {describe(files, arguments.images)}", flush=True)
    if arguments.memory:
        memory({size: pictures(arguments.directory, files, size) for size in (count, 10 * count)}, arguments.repeats)
    else:
        compare(pictures(arguments.directory, files, count), arguments.sides, arguments.repeats)


if __name__ == "__main__":
    main()
