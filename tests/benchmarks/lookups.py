"""Look-ups by key in the newest feature version: latency on a local disk and on S3.

    python -m tests.benchmarks.lookups [--entities 1000000] [--features 20] [--rounds 200]

S3 is moto's server on this machine: its answers take the time of a Python process, not of a network.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import polars as pl
import s3fs

from tasks.io import storage
from tasks.serving.feature_store import FeatureStore
from tasks.serving.online import Lookup
from tasks.store.manifest import Manifest
from tests.benchmarks.turns import machine
from tests.s3 import ENVIRONMENT, s3_endpoint
from tests.serving.feature_versions import DAY, ENTITY, GROUP, publish_features


def publish(root: str, entities: int, features: int) -> Manifest:
    """A version as the flow writes it: hash-partitioned, sorted, row groups of 8192 rows."""
    draw = np.random.default_rng(0)
    columns = {f"f{number:02d}": draw.gamma(2, 50, entities) for number in range(features)}
    frame = pl.DataFrame({ENTITY: np.arange(entities), **columns}).with_columns(
        pl.lit(DAY, pl.Datetime("us", "UTC")).alias("as_of")
    )
    return publish_features(root, frame, buckets=8)


def latencies(ask: Callable[[list[int]], object], entities: int, keys: int, rounds: int) -> str:
    """p50 and p99 of look-ups of other keys each round, ms."""
    draw = np.random.default_rng(keys)
    taken = []
    for _ in range(rounds):
        chosen = draw.integers(0, entities, keys).tolist()
        started = time.perf_counter()
        ask(chosen)
        taken.append((time.perf_counter() - started) * 1000)
    return f"p50 {np.quantile(taken, 0.5):7.2f} ms, p99 {np.quantile(taken, 0.99):7.2f} ms"


def measure(root: str, manifest: Manifest, arguments: argparse.Namespace) -> None:
    """Print the latencies of one root."""
    names = [column.name for column in manifest.columns if column.name.startswith("f") and column.name[1:].isdigit()]

    def cold(columns: list[str]) -> Callable[[list[int]], object]:
        return lambda keys: Lookup(root, manifest).rows(keys, columns)

    def small(columns: list[str]) -> Callable[[list[int]], object]:
        lookup = Lookup(root, manifest, cache_bytes=0)
        return lambda keys: lookup.rows(keys, columns)

    def warm(columns: list[str]) -> Callable[[list[int]], object]:
        lookup = Lookup(root, manifest, cache_bytes=2**30)
        lookup.rows(range(arguments.entities), columns)
        return lambda keys: lookup.rows(keys, columns)

    store = FeatureStore(root)
    store.get_online_features([f"{GROUP}:*"], {ENTITY: [0]})
    sides = {
        "nothing in memory": (cold, arguments.rounds // 4),
        "footers in memory": (small, arguments.rounds),
        "all row groups in memory": (warm, arguments.rounds),
    }
    for columns in (names, names[:4]):
        for name, (side, rounds) in sides.items():
            ask = side(columns)
            for keys in (1, 100):
                figures = latencies(ask, arguments.entities, keys, rounds)
                print(f"  {len(columns):2d} features, {name:25s} {keys:3d} keys: {figures}", flush=True)
    for keys in (1, 100):
        figures = latencies(
            lambda chosen: store.get_online_features([f"{GROUP}:*"], {ENTITY: chosen}).to_dict(),
            arguments.entities,
            keys,
            arguments.rounds,
        )
        print(f"  get_online_features, all features, default cache, {keys:3d} keys: {figures}", flush=True)


def main() -> None:
    """Measure on a local disk and on S3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    print(f"{arguments.entities:,} entities × {arguments.features} features of float64; {machine()}")
    with tempfile.TemporaryDirectory(prefix="lookups-") as root:
        manifest = publish(root, arguments.entities, arguments.features)
        print(f"local disk ({sum(file.bytes for file in manifest.files) / storage.MIB:.0f} MiB)")
        measure(root, manifest, arguments)
    with s3_endpoint() as url:
        os.environ.update(ENVIRONMENT | {"AWS_ENDPOINT_URL": url})
        s3fs.S3FileSystem(endpoint_url=url).mkdir("lookups")
        print("S3 (moto)")
        measure("s3://lookups/root", publish("s3://lookups/root", arguments.entities, arguments.features), arguments)


if __name__ == "__main__":
    main()
