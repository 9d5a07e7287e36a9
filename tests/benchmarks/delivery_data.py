"""The same samples in the format of each side of the delivery benchmark, written once and kept.

A sample's label is its number in the order of writing: so an epoch can be checked, and how well it is shuffled.

| | images: 3 × 224 × 224, uint8 | tables: 20 features, float32 |
|---|---|---|
| version | a streaming-ready version, which Ray Data and the DataLoader read too | the same, in batches of 1000 rows |
| rows | | Parquet with one tensor column of (20,) and a label |
| columns | | Parquet with 20 columns and a label |
| mds, litdata | shards of 64 MiB, uncompressed | the same, of the first 200,000 rows: they are made row by row |
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tasks.io import storage
from tasks.io.hashing import stable_hash
from tasks.io.storage import ParquetStream
from tasks.io.tensors import parquet_settings, tensor_array, tensor_field, to_numpy
from tasks.loader.samples import SampleFormat, write_samples
from tasks.store import layout, versions
from tasks.store.manifest import ColumnSpec, FileEntry, GateResult, Manifest, RowBalance, RunRecord
from tasks.store.reservation import Reservation

Arrays = dict[str, npt.NDArray[Any]]

IMAGES, TABLES = "images", "tables"
SHAPE = (3, 224, 224)
FEATURES = 20
BATCH = 1000
FILES = 8
CHUNK = {IMAGES: 128, TABLES: 250_000}
"""Samples that are made at a time; a file has a whole number of these."""
BY_ROW = 200_000
"""Rows of a table in the formats that are written row by row, at most."""
_SYNTHETIC = 146


@dataclass(frozen=True, slots=True)
class Source:
    """Where the samples are; each format in a directory of its own.

    Attributes:
        kind: 'images' or 'tables'.
        samples: how many there are.
        directory: where they are.
        most_files: of the version.
        chunk: samples that are made at a time, a multiple of a batch; 0: `CHUNK`.
    """

    kind: str
    samples: int
    directory: Path
    most_files: int = FILES
    chunk: int = 0

    @property
    def at_once(self) -> int:
        """Samples that are made at a time."""
        return self.chunk or CHUNK[self.kind]

    @property
    def by_row(self) -> int:
        """Samples in the formats that are written row by row."""
        return min(self.samples, BY_ROW) if self.kind == TABLES else self.samples

    @property
    def version(self) -> Path:
        """The streaming-ready version."""
        return Path(layout.version_uri(str(self.directory / "root"), _dataset(self.kind), 1))

    def files(self, form: str) -> list[str]:
        """The Parquet files of a format: 'version', 'rows' or 'columns'."""
        return [str(path) for path in sorted(self.path(form).rglob("part-*.parquet"))]

    def path(self, form: str) -> Path:
        """The directory of a format."""
        return self.version if form == "version" else self.directory / form


def _dataset(kind: str) -> str:
    return layout.join(layout.TRAINING_DATASETS, "streaming-ready", kind)


def write(source: Source, form: str, photographs: Path | None = None) -> None:
    """Write the samples in a format, unless that is done.

    Raises:
        ModuleNotFoundError: the format is that of a library that isn't installed.
    """
    done = source.directory / f"{form}.done.json"
    if done.exists():
        return
    target = source.directory / "root" if form == "version" else source.path(form)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "version":
        _write_version(source, photographs)
    else:
        _WRITERS[form](source, target)
    done.write_text(json.dumps({"kind": source.kind, "samples": source.samples}))


def _samples(source: Source, photographs: Path | None) -> Iterator[Arrays]:
    """All samples, a chunk at a time: features or image, and label."""
    draw = np.random.Generator(np.random.Philox(key=[11, 0]))
    base = pictures(photographs) if source.kind == IMAGES else None
    for first in range(0, source.samples, source.at_once):
        label = np.arange(first, min(first + source.at_once, source.samples))
        if base is None:
            yield {"features": draw.standard_normal((len(label), FEATURES), dtype=np.float32), "label": label}
        else:
            yield {"image": base[label % len(base)], "label": label}


def pictures(directory: Path | None) -> npt.NDArray[np.uint8]:
    """Photographs of a directory, cut to the size of the samples; noise on gradients, if there is no directory."""
    if directory is None:
        draw = np.random.Generator(np.random.Philox(key=[12, 0]))
        ramp = np.linspace(0, 200, SHAPE[-1], dtype=np.float32)
        noise = draw.integers(0, 56, (_SYNTHETIC, *SHAPE), dtype=np.uint8)
        return noise + (ramp * draw.random((_SYNTHETIC, 3, 1, 1), dtype=np.float32)).astype(np.uint8)
    found = []
    for path in sorted(directory.iterdir()):
        with Image.open(path) as image:
            found.append(np.asarray(image.convert("RGB").resize(SHAPE[1:])).transpose(2, 0, 1))
    return np.stack(found)


def _write_version(source: Source, photographs: Path | None) -> None:
    """Publish a streaming-ready version with a train split only."""
    reservation = versions.reserve(str(source.directory / "root"), _dataset(source.kind), "benchmark")
    form = SampleFormat(
        kind="images" if source.kind == IMAGES else "table",
        shape=SHAPE if source.kind == IMAGES else (FEATURES,),
        label="int64",
        batch_size=1 if source.kind == IMAGES else BATCH,
    )
    chunks = -(-source.samples // source.at_once)
    files = min(source.most_files, chunks)
    made = _samples(source, photographs)
    entries = []
    for index in range(files):
        uri = reservation.data_uri(index, layout.split_directory("train"))
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        parts = [_rows(next(made), form) for _ in range(index * chunks // files, (index + 1) * chunks // files)]
        order = np.arange(sum(part.num_rows for part in parts))
        entries.append(reservation.entry(write_samples(uri, parts, order, form)))
    versions.commit(reservation, _manifest(source, reservation, entries, form))


def _rows(chunk: Arrays, form: SampleFormat) -> pa.Table:
    values = {**chunk, "sample_id": stable_hash(pa.array(chunk["label"])).view(np.int64)}
    arrays = [
        tensor_array(values[name]) if spec.shape else pa.array(values[name]) for name, spec in form.columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=form.schema)


def _manifest(source: Source, reservation: Reservation, files: list[FileEntry], form: SampleFormat) -> Manifest:
    width = FEATURES if source.kind == TABLES else SHAPE[0]
    names = [f"f{number:02d}" for number in range(FEATURES)] if source.kind == TABLES else []
    number = {"encoding": "number", "fill": 0.0, "mean": 0.0, "std": 1.0, "minimum": -10.0, "maximum": 10.0}
    definition = {
        "kind": form.kind,
        "batch_size": form.batch_size,
        **({"feature_count": FEATURES} if source.kind == TABLES else {"image": {"shape": SHAPE, "dtype": "uint8"}}),
        "seed": 0,
        "samples": {"train": source.samples},
        "features": [{"name": name, "column": name, **number} for name in names],
        "label": {"column": "label", "kind": "class", "classes": []},
        "normalise": {
            "mean": [0.0 if names else 0.5] * width,
            "std": [1.0 if names else 0.25] * width,
            **({} if names else {"scale": 255}),
        },
        "source": {"dataset": "benchmark", "version": 1},
    }
    rows = sum(file.rows for file in files)
    return Manifest(
        dataset=reservation.dataset,
        version=reservation.version,
        status="published",
        created_at=dt.datetime.now(dt.UTC),
        files=tuple(files),
        columns=tuple(ColumnSpec(name=f.name, type=str(f.type), nullable=f.nullable) for f in form.schema),
        balances=(RowBalance(name="benchmark", rows_in=rows, rows_out=rows),),
        profile={},
        gate=GateResult(verdict="pass", checks=()),
        inputs=(),
        config={},
        definition=definition,
        code_digest="0",
        packages={},
        run=RunRecord(flow_run_id=reservation.run_id, attempt=reservation.attempt),
    )


def _stored(path: str) -> Iterator[Arrays]:
    """The samples of a file of the version, a row group at a time, read-only."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        yield {name: to_numpy(table, name) for name in ("features", "image", "label") if name in table.schema.names}


def _write_rows(source: Source, target: Path) -> None:
    schema = pa.schema([tensor_field("features", (FEATURES,), np.float32), tensor_field("label", (), np.int64)])
    settings = parquet_settings(schema) | {"row_group_size": 1 << 17}
    target.mkdir()
    for path in source.files("version"):
        with ParquetStream(str(target / Path(path).name), schema, **settings) as stream:
            for chunk in _stored(path):
                stream.write(pa.Table.from_arrays([tensor_array(chunk[name]) for name in schema.names], schema=schema))


def _write_columns(source: Source, target: Path) -> None:
    target.mkdir()
    for path in source.files("version"):
        parts = [
            pa.table({**{f"f{i:02d}": chunk["features"][:, i] for i in range(FEATURES)}, "label": chunk["label"]})
            for chunk in _stored(path)
        ]
        storage.write_parquet(pa.concat_tables(parts), str(target / Path(path).name), row_group_size=1 << 17)


def _write_mds(source: Source, target: Path) -> None:
    """Shards of 64 MiB, which is the writer's default; not compressed, as noise and photographs' pixels hardly are."""
    from streaming import MDSWriter

    kind = "ndarray:uint8:3,224,224" if source.kind == IMAGES else f"ndarray:float32:{FEATURES}"
    name = "image" if source.kind == IMAGES else "features"
    with MDSWriter(out=str(target), columns={name: kind, "label": "int64"}) as writer:
        for sample in _one_by_one(source):
            writer.write(sample)


def _one_by_one(source: Source) -> Iterator[dict[str, Any]]:
    left = source.by_row
    for path in source.files("version"):
        for chunk in _stored(path):
            name = "image" if source.kind == IMAGES else "features"
            for value, label in zip(chunk[name][:left], chunk["label"][:left].tolist(), strict=True):
                yield {name: value, "label": label}
            left = max(0, left - len(chunk["label"]))
            if not left:
                return


def _write_litdata(source: Source, target: Path) -> None:
    from litdata import optimize

    optimize(
        fn=_one_by_one,
        inputs=[source],
        output_dir=str(target),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
        start_method="spawn",
    )


_WRITERS: dict[str, Callable[[Source, Path], None]] = {
    "rows": _write_rows,
    "columns": _write_columns,
    "mds": _write_mds,
    "litdata": _write_litdata,
}
