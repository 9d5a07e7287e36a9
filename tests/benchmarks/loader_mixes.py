"""Speed of several versions mixed by weight, against one version of as many samples, and MosaicML's mix of the same.

    python -m tests.benchmarks.loader_mixes [--kind tables] [--rounds 3]

| side | does |
|---|---|
| one | an epoch of `TrainingStream` |
| mix | an epoch of `MixedStream` of four versions, stratified: a quarter of each batch comes from each |
| mosaicml | a `StreamingDataset` of four streams of equal proportions, two loader processes, which are kept |

Each side delivers batches as they are stored, and counts their samples. The sides take turns. A table has 200,000 rows
for MosaicML, which makes its shards row by row, and 25 times as many for ours.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.loader.mixed import MixedStream
from tasks.loader.options import Options
from tasks.loader.stream import TrainingStream
from tests.benchmarks.delivery_data import BY_ROW, IMAGES, TABLES, Source, write
from tests.benchmarks.loaders import LOADER_PROCESSES
from tests.benchmarks.turns import machine, median, ratio, take_turns

SOURCES = 4
BATCH = {IMAGES: 64, TABLES: 1024}
COLUMN = {IMAGES: "image", TABLES: "features"}
SAMPLES = {IMAGES: 8000, TABLES: 25 * BY_ROW}


def count(batches: Iterable[Any], column: str, samples: int) -> None:
    """Look at each batch of an epoch, and count the samples."""
    found = 0
    for batch in batches:
        batch[column][(0,) * batch[column].ndim].item()
        found += int(batch["mask"].sum()) if "mask" in batch else len(batch["label"])
    assert found == samples, f"{found} samples of {samples}"


def ours(stream: Any, source: Source) -> Callable[[Path], object]:
    """An epoch of a stream."""
    return lambda _: count(stream, COLUMN[source.kind], source.samples)


def mosaicml(sources: list[Source], batch: int) -> Callable[[Path], object]:
    """An epoch of MosaicML's mix."""
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    streams = [Stream(local=str(source.path("mds")), proportion=1 / len(sources)) for source in sources]
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=batch)
    loader = StreamingDataLoader(dataset, batch_size=batch, num_workers=LOADER_PROCESSES, persistent_workers=True)
    samples = sum(source.by_row for source in sources)
    return lambda _: count(loader, COLUMN[sources[0].kind], samples)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=(IMAGES, TABLES), default=IMAGES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    kind, batch = arguments.kind, BATCH[arguments.kind]
    with tempfile.TemporaryDirectory(prefix="mixes-") as directory:
        whole = Source(kind, SAMPLES[kind], Path(directory, "whole"), chunk=1000)
        parts = [Source(kind, SAMPLES[kind] // SOURCES, Path(directory, str(n)), chunk=1000) for n in range(SOURCES)]
        by_row = [replace(part, samples=part.by_row // SOURCES) if kind == TABLES else part for part in parts]
        for source in (whole, *parts):
            write(source, "version")
        for source in by_row:
            write(source, "mds")
        made = {"one": SAMPLES[kind], "mix": SAMPLES[kind], "mosaicml": sum(source.samples for source in by_row)}
        options: Options = {"rank": 0, "world_size": 1, "device": "cpu", "normalise": False}
        sides = {"mosaicml": mosaicml(by_row, batch)}  # first: its processes are forks
        with (
            TrainingStream(whole.version, batch_size=batch, **options) as one,
            MixedStream({str(part.version): 1 for part in parts}, batch_size=batch, **options) as mix,
        ):
            sides |= {"one": ours(one, whole), "mix": ours(mix, whole)}
            print(f"{SOURCES} {kind} of {SAMPLES[kind] // SOURCES:,} samples, batches of {batch}; {machine()}")
            seconds = take_turns(sides, arguments.rounds, prefix="mixes-")
    per_sample = {name: [one / made[name] for one in taken] for name, taken in seconds.items()}
    for name, taken in seconds.items():
        print(f"{name:9s} {median(taken, lambda one, name=name: f'{made[name] / one:,.0f} samples/s')}")
    for other in ("one", "mosaicml"):
        print(f"mix / {other}, samples/s: {ratio(per_sample[other], per_sample['mix'])}")


if __name__ == "__main__":
    main()
