"""How much memory each job takes: the formulas of deployments/README.md, at two sizes of input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.processes import PROJECT, ran

MIB = 1 << 20
CHUNK = 32 * 3 * 224 * 224 * 3  # bytes of the variants that are made and written at once, with the default settings
ROW_GROUP = 625_000  # of the benchmark's transactions


def images(pixels: int, _: int) -> int:
    return 300 * MIB + 8 * pixels + 3 * CHUNK


def features(bucket: int, rows: int) -> int:
    return 250 * MIB + 256 * max(bucket, min(ROW_GROUP, rows))


def delivery(piece: int, _: int) -> int:
    return 250 * MIB + 8 * piece


def measured(job: str, size: int, piece: int, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.footprint", job, str(size), str(piece), str(folder)]
    done = ran(command, 280, env={**os.environ, "PYTHONPATH": str(PROJECT)}, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("job", "bound", "piece", "sizes"),
    [
        ("images", images, 12_000_000, (20, 80)),
        ("features", features, 100_000, (250_000, 1_000_000)),
        ("delivery", delivery, 16 * MIB, (150_000, 600_000)),
    ],
)
def test_memory_stays_below_its_formula(
    job: str, bound: object, piece: int, sizes: tuple[int, int], tmp_path: Path
) -> None:
    """A worker's formula doesn't know how much there is in all, and so what it takes may not grow with it."""
    assert callable(bound)
    for size in sizes:
        found = measured(job, size, piece, tmp_path)
        print(job, size, {name: round(value / MIB) for name, value in found.items()}, round(bound(piece, size) / MIB))
        assert found["worker"] <= bound(piece, size), f"{job} of {size}"
        assert found["worker"] > bound(piece, size) / 4, f"{job} of {size}: the formula says nothing"
        assert found["driver"] <= 350 * MIB + 100 * size, f"{job} of {size}: the driver"
