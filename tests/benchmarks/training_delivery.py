"""Speed of the training delivery, from files to batches in a training loop, against what else does it on this machine.

    python -m tests.benchmarks.training_delivery                  20,000 images, 1 and 2 trainers
    python -m tests.benchmarks.training_delivery --kind tables    10 million rows × 20, batches of 1024 and of 8192
    python -m tests.benchmarks.training_delivery --cold           the first epoch reads from the disk

Each side delivers whole shuffled epochs to trainers that only look at each batch. The sides take turns; in each round
a side's processes start anew, and deliver a first epoch, whose samples are counted one by one, and then further ones,
until those have taken two seconds: these make the rate. Medians and ratios of the rounds are printed.

The sides and their settings are described in `loaders.py`, the data in `delivery_data.py`. What isn't installed says
so and is left out: `pip install mosaicml-streaming litdata`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from tests.benchmarks import loaders
from tests.benchmarks.delivery_data import IMAGES, TABLES, Source, write
from tests.benchmarks.loaders import Consumed, Epochs, Task
from tests.benchmarks.turns import Sampler, machine, ratio
from tests.benchmarks.workers import CannotRun, Maker, Workers

WARM_SECONDS = 2.0
MIB = 2**20
BATCHES = {IMAGES: (64,), TABLES: (1024, 8192)}
OURS, RAY, PEERS = "ours", ("ray", "ray-rows", "ray-columns"), ("torch", "mosaicml", "litdata")
GOALS = {(IMAGES, 64): (6.0, 2.0), (TABLES, 1024): (3.0, 1.5)}
"""How many times as fast as the fastest of Ray Data's sides, and of the peers, ours is to be; by kind and batch.

torch-inline is compared without a goal: it can't load while a trainer computes.
"""

# Ray Data: docs.ray.io, 'Iterating over Data' (streaming_split: "equal: … dropping rows if necessary") and
# ExecutionOptions.preserve_order (False by default: "blocks … in the order that they are ready"); its iterators have
# no state to save. torch: docs.pytorch.org, torch.utils.data ('Reproducibility'; DistributedSampler, drop_last:
# "If False, the sampler will add extra indices"); pytorch.org/data for StatefulDataLoader, which wants the same
# number of loader processes. mosaicml-streaming 0.13: README 'True Determinism', 'Instant mid-epoch resumption';
# base/partition/orig.py ("repeat samples to populate it") and relaxed.py (what must divide what). litdata 0.2.76:
# README 'Shuffle, seed, and drop_last', 'Pause, resume data streaming' ("drops a global sample_in_epoch prefix and
# restripes the rest"); tried with 1,000 samples: 2 trainers with batches of 8 went on as 1, 2 and 4 (8 and 4) exactly,
# as 3 with one batch twice. The column 'missing, repeated' of each run is what was counted here.
GUARANTEES = """
| | same order in each run | resumes in mid-epoch | with another number of trainers | each sample once an epoch |
|---|---|---|---|---|
| ours | by version, seed and epoch | yes | yes, in the same order | yes; what fills the last step is marked |
| Ray Data | with preserve_order, off by default | no | no | equal splits drop a remainder |
| torch DataLoader | by hand, for a number of processes | torchdata's | no | DistributedSampler repeats some |
| mosaicml-streaming | by seed and epoch | yes | numbers that divide one another | repeats some to even out |
| litdata | by seed, trainers and processes | yes | yes; a batch can come twice | several trainers drop a remainder |
"""


@dataclass(frozen=True, slots=True)
class Side:
    """A way to deliver."""

    form: str  # of the data it reads
    makers: Callable[[Source, int, int], Sequence[Maker]]  # by source, batch and number of trainers: one a process


def _each(make: Callable[[Task], Epochs]) -> Callable[[Source, int, int], Sequence[Maker]]:
    """A process a trainer."""

    def makers(source: Source, batch: int, world: int) -> Sequence[Maker]:
        port = _free_port()
        tasks = [Task(source, batch, rank, world) for rank in range(world)]
        return [partial(loaders.trainer, make, task, port) for task in tasks]

    return makers


def _ray(form: str) -> Side:
    """A process that starts Ray, which has the trainers."""
    return Side(form, lambda source, batch, world: [partial(loaders.ray_data, source, form, batch, world)])


SIDES: dict[str, dict[str, Side]] = {
    IMAGES: {
        OURS: Side("version", _each(loaders.ours)),
        "ours-float": Side("version", _each(partial(loaders.ours, normalise=True))),
        "ray": _ray("version"),
        "torch": Side("version", _each(loaders.torch_loader)),
        "torch-inline": Side("version", _each(partial(loaders.torch_loader, inline=True))),
        "mosaicml": Side("mds", _each(loaders.mosaicml)),
        "litdata": Side("litdata", _each(loaders.litdata)),
    },
    TABLES: {
        OURS: Side("version", _each(loaders.ours)),
        "ray-rows": _ray("rows"),
        "ray-columns": _ray("columns"),
        "torch": Side("rows", _each(loaders.torch_loader)),
        "torch-inline": Side("rows", _each(partial(loaders.torch_loader, inline=True))),
        "mosaicml": Side("mds", _each(loaders.mosaicml)),
        "litdata": Side("litdata", _each(loaders.litdata)),
    },
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What a side did in a round; seconds and MiB."""

    up: float  # from the start of its processes until they have imported what they need
    first: float  # from there to the first batch in every trainer
    first_epoch: float  # a sample, in the first epoch
    later_first: float  # to the first batch of a later epoch
    later: float  # a sample, in later epochs
    own: float  # peak memory of its processes, without mapped files
    mapped: float  # the same, with them
    missing: int
    repeated: int
    shuffled: float  # mean way of a sample from its place in the files, 1 where all is mixed evenly


def run_side(side: Side, source: Source, batch: int, world: int, cold: bool) -> Figures:
    """Start a side, let it deliver, and end it.

    Raises:
        CannotRun: it can't.
    """
    samples = source.by_row if side.form in ("mds", "litdata") else source.samples
    if cold:
        evict(source.path(side.form))
    memory = SideMemory()
    started = time.monotonic()
    memory.start()
    try:
        with Workers(side.makers(source, batch, world)) as workers:
            up = time.monotonic()
            first, first_epoch, labels = deliver(workers, keep_labels=True)
            memory.stop()
            later: list[tuple[float, float]] = []
            while sum(seconds for _, seconds in later) < WARM_SECONDS:
                later.append(deliver(workers)[:2])
            memory.sample()
    finally:
        memory.stop()
    missing, repeated, shuffled = count(labels, samples)
    return Figures(
        up - started,
        first,
        first_epoch / samples,
        statistics.median(seconds for seconds, _ in later),
        sum(seconds for _, seconds in later) / len(later) / samples,
        memory.own / MIB,
        memory.bytes / MIB,
        missing,
        repeated,
        shuffled,
    )


def deliver(workers: Workers, keep_labels: bool = False) -> tuple[float, float, list[np.ndarray]]:
    """An epoch: seconds until every trainer has a batch, and until all have ended; the labels of each trainer."""
    started = time.monotonic()
    answers: list[Consumed] = [answer for answers in workers.ask(keep_labels) for answer in answers]
    labels = [answer.labels for answer in answers if answer.labels is not None]
    return max(a.first for a in answers) - started, max(a.last for a in answers) - started, labels


def count(labels: Sequence[np.ndarray], samples: int) -> tuple[int, int, float]:
    """Samples that were missing and that came again, and how well they were shuffled."""
    counts = np.bincount(np.concatenate(labels), minlength=samples)
    assert len(counts) == samples, "a label that nobody has written"
    # Each trainer's batches are spread over the epoch.
    ways = [np.abs(np.linspace(0, samples, len(some)) - some).mean() for some in labels]
    return int((counts == 0).sum()), int((counts - 1).clip(0).sum()), float(np.mean(ways) / (samples / 3))


def evict(directory: Path) -> None:
    """Take files out of the system's page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


class SideMemory(Sampler):
    """Largest proportional set size of this process's children; `own` is without files that they have mapped."""

    def __init__(self) -> None:
        super().__init__(0.3)
        self.bytes = self.own = 0

    def sample(self) -> None:
        whole = own = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                sizes = {name: int(size.split()[0]) << 10 for name, _, size in (line.partition(":") for line in lines)}
                whole += sizes["Pss"]
                own += sizes["Pss"] - sizes["Pss_File"]
        self.bytes, self.own = max(self.bytes, whole), max(self.own, own)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def compare(source: Source, batch: int, world: int, chosen: Collection[str], *, repeats: int, cold: bool) -> None:
    """Let the chosen sides take turns, and print what came out."""
    print(f"\n{source.samples:,} {source.kind}, batch {batch}, {world} trainer{'s' * (world > 1)}", flush=True)
    found: dict[str, list[Figures]] = {name: [] for name in SIDES[source.kind] if name in chosen}
    for turn in range(1, repeats + 1):
        for name in list(found):
            try:
                figures = run_side(SIDES[source.kind][name], source, batch, world, cold)
            except CannotRun as fault:
                print(f"  {name} is left out: {fault}", flush=True)
                del found[name]
                continue
            found[name].append(figures)
            print(f"  round {turn} {name:12s} {1 / figures.later:12,.0f} samples/s", flush=True)
    show(found, cold)
    show_ratios(found, *GOALS.get((source.kind, batch), (None, None)))


def show(found: dict[str, list[Figures]], cold: bool) -> None:
    """Medians of the rounds, as a table."""
    print(
        "| | samples/s | first epoch"
        + (", from the disk" if cold else "")
        + " | up, s | first batch, s | later ones, s | peak MB (with mapped files) | missing, repeated | shuffled |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        m = {field: statistics.median(getattr(r, field) for r in rounds) for field in Figures.__slots__}
        print(
            f"| {name} | {1 / m['later']:,.0f} | {1 / m['first_epoch']:,.0f} | {m['up']:.1f} | {m['first']:.2f} "
            f"| {m['later_first']:.3f} | {m['own']:,.0f} ({m['mapped']:,.0f}) | {m['missing']:,.0f}, "
            f"{m['repeated']:,.0f} | {m['shuffled']:.2f} |",
            flush=True,
        )


def show_ratios(found: dict[str, list[Figures]], ray_goal: float | None, peer_goal: float | None) -> None:
    """How many times as fast ours is as each other side, and as the fastest of a group, round by round."""
    seconds = {name: [figures.later for figures in rounds] for name, rounds in found.items()}
    if OURS not in seconds:
        return
    goals: dict[str, float | None] = dict.fromkeys((name for name in seconds if not name.startswith(OURS)), None)
    for group, names, goal in (("Ray Data", RAY, ray_goal), ("fastest peer", PEERS, peer_goal)):
        if members := [seconds[name] for name in names if name in seconds]:
            seconds[group] = [min(values) for values in zip(*members, strict=True)]
            goals[group] = goal
    for name, goal in goals.items():
        print(
            f"speed of {OURS} / {name}: {ratio(seconds[name], seconds[OURS])}"
            + (f", goal at least {goal:g}" if goal else "")
        )


def prepare(source: Source, chosen: Collection[str], photographs: Path | None) -> list[str]:
    """Write what the chosen sides read; a side whose library isn't installed is left out."""
    ready = []
    write(source, "version", photographs)
    for name, side in SIDES[source.kind].items():
        if name not in chosen:
            continue
        try:
            write(source, side.form)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error.name} isn't installed")
            continue
        ready.append(name)
    return ready


def main() -> None:
    """Run the comparison that the arguments ask for."""
    names = tuple(dict.fromkeys([*SIDES[IMAGES], *SIDES[TABLES]]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=(IMAGES, TABLES), default=IMAGES)
    parser.add_argument("--images", type=int, default=20_000, help="images, uint8, 3 × 224 × 224 (20000)")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of 20 float32 (10000000)")
    parser.add_argument("--photographs", type=Path, default=None, help="directory of photographs (synthetic ones)")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2), help="numbers of trainers (1 2)")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help="batch sizes (64; tables: 1024 8192)")
    parser.add_argument("--sides", nargs="+", choices=names, default=names, metavar="SIDE", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--cold", action="store_true", help="take the files out of the page cache in each round")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "delivery-benchmark-data")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    samples = arguments.images if arguments.kind == IMAGES else arguments.rows
    pixels = "" if arguments.kind == TABLES else "-synthetic" if arguments.photographs is None else "-photographs"
    source = Source(arguments.kind, samples, arguments.directory / f"{arguments.kind}-{samples}{pixels}")
    print(machine(), flush=True)
    chosen = prepare(source, arguments.sides, arguments.photographs)
    for batch in arguments.batch or BATCHES[arguments.kind]:
        for world in arguments.workers:
            compare(source, batch, world, chosen, repeats=arguments.repeats, cold=arguments.cold)
    print(GUARANTEES)


if __name__ == "__main__":
    main()
