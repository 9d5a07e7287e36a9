"""How time and memory grow with what users have more of: files, rows, buckets, columns, times, images, versions.

    python -m tests.benchmarks.growth                     all of them, some minutes each
    python -m tests.benchmarks.growth files images        some of them
    python -m tests.benchmarks.growth files --sizes 8,200,2000,10000

Each size is a run of its own in a process of its own, on a Ray of its own, after a small run that warms it up. Printed:
seconds; how much the driving process's memory grew; peak memory of all processes; the most objects of Ray's store that
the driver held at a time; of versions on S3 the requests, of a stream the maps that opening takes; and the exponent of
each, by least squares of its logarithm on the size's (1: in proportion, 0: not at all). What is too small to tell
(below `FLOOR`) counts as that much.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq

from tests.benchmarks.data import transactions
from tests.benchmarks.turns import GIB, PeakMemory, Sampler, machine, scratch

AS_OF = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
CPUS = 2
MIB = 2**20
PREFIX = "growth-benchmark-"
FLOOR = {"seconds": 0.5, "driver MiB": 32.0, "all MiB": 256.0, "objects": 16.0}
"""What can't be told from noise, or is there at any size."""

Work = Callable[[Path], Mapping[str, float] | None]
"""Works in an empty directory; gives what it has counted itself, by name."""


@dataclass(frozen=True, slots=True)
class Law:
    """One thing that grows.

    Attributes:
        prepare: Directory and size → the work; everything that isn't measured.
        sizes: Sizes, the smallest first.
        bounds: What the exponents must not exceed, by figure.
    """

    prepare: Callable[[Path, int], Work]
    sizes: tuple[int, ...]
    bounds: Mapping[str, float]


def features(directory: Path, rows: int, *, files: int = 8, buckets: int = 8, columns: int = 0, times: int = 1) -> Work:
    """Both standard groups, or one with many numeric columns, of some rows in some files."""
    from tasks.features.config import FeatureStoreConfig
    from tasks.features.definitions import Definitions, FeatureGroup
    from tasks.features.pipeline import compute_groups
    from tasks.features.plan import plan_features, with_uris
    from tasks.features.standard import STANDARD
    from tasks.store.reservation import reserve

    source = cut(transactions(directory, rows), files)
    definitions = STANDARD
    if columns:
        wide = FeatureGroup(
            name="wide",
            entity="customer_id",
            source="transactions",
            features={f"amount_{n}": (pl.col("amount") * (n + 1)).sum() for n in range(columns)},
        )
        definitions = Definitions(events=STANDARD.events, dimensions={}, groups={"wide": wide})

    def work(target: Path) -> None:
        config = FeatureStoreConfig(root=str(target), transactions=str(source), rows_per_bucket=-(-rows // buckets))
        as_of = tuple(AS_OF - dt.timedelta(days=6 * number) for number in reversed(range(times)))
        (plan,) = plan_features(with_uris(definitions, config), config, as_of)
        reservations = [reserve(str(target), planned.group.name, uuid.uuid4().hex) for planned in plan.groups]
        compute_groups(plan, config, reservations, AS_OF)

    return work


def cut(source: Path, files: int) -> Path:
    """The same rows in another number of files, made unless they are there."""
    target = source.with_name(f"{source.name}-in-{files}")
    if not target.exists():
        table = pq.read_table(source)
        partial_target = target.with_suffix(".partial")
        partial_target.mkdir()
        bounds = np.linspace(0, table.num_rows, files + 1).astype(int)
        for number, (first, last) in enumerate(pairwise(bounds)):
            pq.write_table(table.slice(first, last - first), partial_target / f"{number:06d}.parquet")
        partial_target.rename(target)
    return target


def images(directory: Path, count: int) -> Work:
    """Small pictures of one class in units of 16, one variant each."""
    from PIL import Image

    from tasks.images.config import Augmentation, ImageAugmentationConfig
    from tasks.images.pipeline import augment_images, digest_in_tasks
    from tasks.images.plan import plan_images
    from tasks.store.layout import image_dataset
    from tasks.store.reservation import reserve

    source = directory / f"small-pictures-{count}" / "things"
    if not source.exists():
        made = source.with_name("partial")
        made.mkdir(parents=True)
        draw = np.random.default_rng(0)
        for number in range(count):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(made / f"{number:07d}.jpg", quality=80)
        made.rename(source)

    def work(target: Path) -> None:
        config = ImageAugmentationConfig(
            root=str(target),
            images=str(source.parent),
            augmentation=Augmentation(size=16, variants=1),
            images_per_file=16,
            near_duplicates=None,
        )
        reservation = reserve(str(target), image_dataset("images"), uuid.uuid4().hex)
        augment_images(plan_images(config, reservation, None, digest_in_tasks), config)

    return work


def versions(directory: Path, count: int) -> Work:
    """Three publishes and a look at the latest version, in a dataset that has some versions already."""
    from tasks.store import versions as store
    from tests.store.publishing import publish

    root = directory / f"versions-{count}"
    if not root.exists():
        for number in range(count):
            publish(str(root), f"run-{number}")

    def work(_: Path) -> None:
        for _number in range(3):
            latest = publish(str(root), uuid.uuid4().hex)
        found = store.latest(str(root), latest.dataset)
        assert found is not None
        assert found.version == latest.version

    return work


def versions_on_s3(_: Path, count: int) -> Work:
    """A publish, a look at the latest version and a reader's refresh, in a dataset on S3 that has some versions."""
    from tests.conftest import new_bucket
    from tests.s3 import ENVIRONMENT, s3_endpoint
    from tests.store.publishing import publish
    from tests.store.test_version_index import requests

    if "AWS_ENDPOINT_URL" not in os.environ:
        server = contextlib.ExitStack()
        atexit.register(server.close)
        os.environ.update({**ENVIRONMENT, "AWS_ENDPOINT_URL": server.enter_context(s3_endpoint())})

    def work(_: Path) -> Mapping[str, float]:
        root = new_bucket(os.environ["AWS_ENDPOINT_URL"])
        publish(root, "first")
        return {f"{step} requests": number for step, number in requests(root, count).items()}

    return work


def labels(directory: Path, rows: int) -> Work:
    """Some labels joined with the features of 50,000 entities at 10 times."""
    from tests.benchmarks.serving import ours, planned_join

    place = directory / f"labels-{rows}"
    planned = planned_join(place, rows, 50_000, 10)

    def work(target: Path) -> None:
        ours(planned, target)

    return work


def shards(directory: Path, count: int) -> Work:
    """A stream over a split in some shards of one batch, opened, and its first batch."""
    from tasks.loader.stream import TrainingStream
    from tests.benchmarks.delivery_data import BATCH, TABLES, Source, write

    source = Source(TABLES, count * BATCH, directory / f"shards-{count}", most_files=count, chunk=BATCH)
    write(source, "version")

    def work(_: Path) -> Mapping[str, float]:
        before = _maps()
        with TrainingStream(str(source.version), batch_size=1024) as stream:
            opened = _maps() - before
            next(iter(stream))
            return {"maps at the start": opened, "maps": _maps() - before}

    return work


def _maps() -> int:
    """Memory maps of Parquet files that this process holds."""
    return sum(".parquet" in line for line in Path("/proc/self/maps").read_text().splitlines())


FLAT = {"driver MiB": 0.05, "objects": 0.05}
LAWS = {
    "files": Law(
        lambda directory, size: features(directory, 10_000_000, files=size),
        (8, 200, 2_000, 10_000),
        {"seconds": 0.05, **FLAT},
    ),
    "rows": Law(features, (1_000_000, 2_000_000, 4_000_000, 8_000_000), {"seconds": 1.1, "driver MiB": 0.05}),
    "buckets": Law(
        lambda directory, size: features(directory, 2_000_000, buckets=size),
        (1, 8, 64),
        {"seconds": 0.3, "driver MiB": 0.05},
    ),
    "columns": Law(
        lambda directory, size: features(directory, 500_000, columns=size),
        (20, 60, 200),
        {"seconds": 1.1, "driver MiB": 0.05},
    ),
    "times": Law(
        lambda directory, size: features(directory, 500_000, times=size),
        (1, 6, 60),
        {"seconds": 1.1, "driver MiB": 0.05},
    ),
    "labels": Law(labels, (250_000, 1_000_000, 4_000_000), {"seconds": 1.1, "driver MiB": 0.05}),
    "images": Law(images, (2_000, 20_000, 100_000), {"seconds": 1.1, **FLAT}),
    "versions": Law(versions, (10, 100, 1000), {"seconds": 0.3, "driver MiB": 0.05}),
    "versions-on-s3": Law(
        versions_on_s3, (10, 100, 990), {f"{step} requests": 0.01 for step in ("latest", "refresh", "publish")}
    ),
    "shards": Law(shards, (1_000, 3_000, 10_000), {"maps at the start": 0.01, "driver MiB": 0.3}),
}


class References(Sampler):
    """The most objects of Ray's store that this process held references to."""

    def __init__(self, seconds: float = 0.1) -> None:
        super().__init__(seconds)
        self.most = 0

    def sample(self) -> None:
        import ray

        core = ray._private.worker.global_worker.core_worker
        self.most = max(self.most, len(core.get_all_reference_counts()))


def measure(name: str, size: int, directory: Path) -> dict[str, float]:
    """Run one size in this process."""
    import ray

    from tasks.engine import cluster

    law = LAWS[name]
    work = law.prepare(directory, size)
    cluster.connect(num_cpus=CPUS, object_store_memory=2 * GIB)
    try:
        with scratch(PREFIX) as target:
            law.prepare(directory, law.sizes[0])(target)
        before = psutil.Process().memory_info().rss
        memory, references = PeakMemory(), References()
        memory.start()
        references.start()
        started = time.perf_counter()
        with scratch(PREFIX) as target:
            counted = work(target)
        seconds = time.perf_counter() - started
        memory.stop()
        references.stop()
        return {
            "seconds": seconds,
            "driver MiB": max(0, psutil.Process().memory_info().rss - before) / MIB,
            "all MiB": memory.bytes / MIB,
            "objects": references.most,
            **(counted or {}),
        }
    finally:
        ray.shutdown()


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the values' logarithms on those of the sizes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def show(name: str, sizes: Sequence[int], directory: Path) -> bool:
    """Measure and print one law; False if it doesn't hold."""
    found = []
    for size in sizes:
        command = [sys.executable, "-m", __spec__.name, name, "--one", str(size), "--directory", str(directory)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        figures = "  ".join(f"{key} {value:8.1f}" for key, value in found[-1].items())
        print(f"{name:14s} {size:>10,}  {figures}", flush=True)
    held = True
    told = []
    for key in found[0]:
        slope = exponent(sizes, [max(FLOOR.get(key, 1.0), one[key]) for one in found])
        bound = LAWS[name].bounds.get(key)
        missed = bound is not None and slope > bound
        held = held and not missed
        goal = "" if bound is None else f" (goal {bound}{', missed' if missed else ''})"
        told.append(f"{key} n^{slope:.2f}{goal}")
    print(f"{name:14s}   exponents  " + "  ".join(told), flush=True)
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("laws", nargs="*", default=list(LAWS), help=f"of {', '.join(LAWS)}")
    parser.add_argument("--sizes", help="sizes to measure, with commas")
    parser.add_argument("--one", type=int, help="measure one size in this process and print it as JSON")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "growth-benchmark-data")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if unknown := set(arguments.laws) - set(LAWS):
        parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(LAWS)}")
    if arguments.one is not None:
        print(json.dumps(measure(arguments.laws[0], arguments.one, arguments.directory)))
        return 0
    print(machine())
    sizes = [int(size) for size in arguments.sizes.split(",")] if arguments.sizes else None
    held = [show(name, sizes or LAWS[name].sizes, arguments.directory) for name in arguments.laws]
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
