"""What a job takes of memory at most: `python -m tests.footprint JOB SIZE PIECE FOLDER` prints it as JSON, in bytes.

Each job runs in a fresh process on a Ray of its own, so that nothing is kept from another one. Counted is the private
memory of each process (RssAnon), as often as can be looked at; what it has mapped of the object store is the store's.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

WORKER = "ray::"
LOOK_SECONDS = 0.01
STORE_BYTES = 256 << 20
DAY = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)


class Watch:
    """Looks at this process and its workers until it is stopped; the peak of each."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        own = psutil.Process()
        workers: list[psutil.Process] = []
        turn = 0
        while not self._stop.wait(LOOK_SECONDS):
            if turn % 20 == 0:  # looking for processes takes longer than looking at them
                workers = [process for process in own.children(recursive=True) if process.name().startswith(WORKER)]
            turn += 1
            for pid in (own.pid, *(process.pid for process in workers)):
                self._peaks[pid] = max(self._peaks.get(pid, 0), private_bytes(pid))

    @property
    def driver(self) -> int:
        return self._peaks.pop(psutil.Process().pid)

    @property
    def worker(self) -> int:
        return max(self._peaks.values())


def private_bytes(pid: int) -> int:
    """Private memory of a process; 0 for one that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else 0


def images(size: int, piece: int, folder: Path) -> Callable[[], object]:
    """Photographs of a number of pixels, 4 to 3, three variants of each."""
    from tasks.images.config import ImageAugmentationConfig
    from tasks.images.pipeline import augment_images
    from tasks.images.plan import plan_images
    from tasks.store.reservation import reserve

    source = folder / f"pictures-{size}-{piece}"
    side = int((piece / 12) ** 0.5)
    small = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    picture = io.BytesIO()
    Image.fromarray(small).resize((4 * side, 3 * side), Image.Resampling.BICUBIC).save(picture, "JPEG", quality=80)
    for number in range(size):
        place = source / f"class-{number % 4}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture.getvalue() + str(number).encode())
    config = ImageAugmentationConfig(root=str(folder / f"root-{size}-{piece}"), images=str(source))
    plan = plan_images(config, reserve(config.root, "training-datasets/images", "run"), None)
    return lambda: augment_images(plan, config)


def features(size: int, piece: int, folder: Path) -> Callable[[], object]:
    """Transactions, some ten a customer."""
    from tasks.features.config import FeatureStoreConfig
    from tasks.features.pipeline import compute_groups
    from tasks.features.plan import plan_features, with_uris
    from tasks.features.standard import STANDARD
    from tasks.store.reservation import reserve
    from tests.benchmarks.data import transactions

    source = str(transactions(folder, size))
    config = FeatureStoreConfig(root=str(folder / f"root-{size}-{piece}"), transactions=source, rows_per_bucket=piece)
    [plan] = plan_features(with_uris(STANDARD, config), config, (dt.datetime(2026, 1, 1, tzinfo=dt.UTC),))
    reservations = [reserve(config.root, planned.group.name, "run") for planned in plan.groups]
    return lambda: compute_groups(plan, config, reservations, DAY)


def delivery(size: int, piece: int, folder: Path) -> Callable[[], object]:
    """A table of twenty features."""
    from tasks.delivery.pipeline import write_streaming_ready
    from tasks.delivery.source import find_source
    from tasks.store import layout
    from tasks.store.reservation import reserve
    from tests.delivery.sources import FEATURES, configured, publish

    root = str(folder / f"root-{size}-{piece}")
    draw = np.random.default_rng(0)
    columns = {f"feature_{number}": draw.random(size, np.float32) for number in range(20)}
    table = pa.table(
        {
            "customer_id": np.arange(size),
            **columns,
            "target": draw.integers(0, 2, size),
            "is_training_ready": np.ones(size, bool),
            "as_of": pa.array([DAY] * size, pa.timestamp("us", "UTC")),
        }
    )
    schema = {"entity": "customer_id"}
    files = [("", table.slice(first, 100_000)) for first in range(0, size, 100_000)]
    publish(root, FEATURES, files, schema, row_group=50_000)
    config = configured(root, file_megabytes=piece / 2**20)
    source = find_source(config)
    reservation = reserve(root, layout.streaming_dataset(config.dataset_name), "run")
    return lambda: write_streaming_ready(config, source, reservation, unit_bytes=piece)


JOBS = {"images": images, "features": features, "delivery": delivery}


def main() -> None:
    import ray

    from tasks.engine.cluster import connect

    job, size, piece, folder = JOBS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    connect(num_cpus=2, object_store_memory=STORE_BYTES)
    work = job(size, piece, folder)
    with Watch() as watch:
        work()
    print(json.dumps({"driver": watch.driver, "worker": watch.worker}))
    ray.shutdown()


if __name__ == "__main__":
    main()
