"""MosaicML Streaming's format: read by its specification, and by MosaicML's own reader and writer (nightly)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.cli import commands
from tasks.datasets.mds import export_mds, read_index, read_shard
from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, InputError, PipelineError
from tasks.loader.stream import TrainingStream
from tests.datasets.test_rows import pixels
from tests.delivery.making import DATASET, cut, image_samples, publish, table_samples

ENCODE: dict[str, Callable[[Any], bytes]] = {
    "str": str.encode,
    "bytes": bytes,
    "int": lambda value: np.int64(value).tobytes(),
    "float32": lambda value: np.float32(value).tobytes(),
    "uint8": lambda value: np.uint8(value).tobytes(),
    "str_int": lambda value: str(value).encode(),
    "json": lambda value: json.dumps(value).encode(),
    "ndarray:int16:2,3": lambda value: np.asarray(value, np.int16).tobytes(),
    "jpeg": bytes,
    "ndarray:uint8:4,5,3": lambda value: value.tobytes(),
}
SIZES = {"int": 8, "float32": 4, "uint8": 1, "ndarray:int16:2,3": 12, "ndarray:uint8:4,5,3": 60}


def shard_bytes(columns: Mapping[str, str], samples: Sequence[Mapping[str, Any]], header: bytes = b"{}") -> bytes:
    """A shard, byte by byte as the specification says, by sample and value."""
    bodies = []
    for sample in samples:
        values = {name: ENCODE[encoding](sample[name]) for name, encoding in columns.items()}
        loose = [values[name] for name, encoding in columns.items() if encoding not in SIZES]
        bodies.append(b"".join(np.uint32(len(value)).tobytes() for value in loose) + b"".join(values.values()))
    first = 4 + 4 * (len(samples) + 1) + len(header)
    offsets = np.cumsum([first, *map(len, bodies)]).astype(np.uint32)
    return np.uint32(len(samples)).tobytes() + offsets.tobytes() + header + b"".join(bodies)


def write_mds(
    place: Path,
    columns: Mapping[str, str],
    shards: Sequence[Sequence[Mapping[str, Any]]],
    compression: str | None = None,
) -> str:
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        data, base = shard_bytes(columns, samples), f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "format": "mds",
            "version": 2,
            "column_names": [*columns],
            "column_encodings": [*columns.values()],
            "column_sizes": [SIZES.get(encoding) for encoding in columns.values()],
            "compression": compression,
            "hashes": [],
            "samples": len(samples),
            "size_limit": 1 << 26,
            "raw_data": {"basename": base, "bytes": len(data), "hashes": {}},
            "zip_data": None,
        }
        if compression:
            base, data = f"{base}.zstd", pa.compress(data, codec="zstd", asbytes=True)
            entry["zip_data"] = {"basename": base, "bytes": len(data), "hashes": {}}
        (place / base).write_bytes(data)
        entries.append(entry)
    (place / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return str(place)


def read(uri: str) -> pa.Table:
    return pa.concat_tables([read_shard(uri, shard) for shard in read_index(uri)])


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(max_size=9),
    "bytes": st.binary(max_size=9),
    "int": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "uint8": st.integers(0, 255),
    "str_int": st.integers(-(10**12), 10**12),
    "ndarray:int16:2,3": st.lists(st.integers(-9, 9), min_size=6, max_size=6).map(
        lambda values: np.array(values).reshape(2, 3).tolist()
    ),
}


@settings(max_examples=60)
@given(data=st.data(), compression=st.sampled_from([None, "zstd", "zstd:3"]))
def test_every_value_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, compression: str | None
) -> None:
    encodings = data.draw(st.lists(st.sampled_from([*VALUES]), min_size=1, max_size=5))
    columns = {f"c{number}": encoding for number, encoding in enumerate(encodings)}
    sample = st.fixed_dictionaries({name: VALUES[encoding] for name, encoding in columns.items()})
    shards = data.draw(st.lists(st.lists(sample, max_size=4), min_size=1, max_size=3).filter(any))
    found = read(write_mds(tmp_path_factory.mktemp("mds"), columns, shards, compression))
    for name, encoding in columns.items():
        values = found[name].to_pylist()
        if encoding.startswith("ndarray"):
            values = [np.reshape(value, (2, 3)).tolist() for value in values]
        assert values == [sample[name] for shard in shards for sample in shard]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", [table_samples, image_samples])
def test_an_export_has_the_samples_of_the_copy_in_their_order(
    root: str, kind: Callable[[int], Any], compression: Any
) -> None:
    samples = kind(47)
    block = 10 if "features" in samples else 1
    uri = publish(root, {"train": cut(samples, 30, 17)}, batch_size=block)
    out = f"{root}/exported"
    assert export_mds(uri, out, compression=compression, shard_bytes=1000) == 47
    assert len(read_index(out)) > 1
    found = read(out)
    for name, wanted in samples.items():
        column = found[name].combine_chunks()
        values = column.to_numpy_ndarray() if wanted.ndim > 1 else column.to_numpy()
        assert values.dtype == wanted.dtype
        assert np.array_equal(values, wanted), name
    with pytest.raises(ConfigError, match=r"has an index.json already"):
        export_mds(uri, out)


def test_the_command_exports_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(str(tmp_path), {"train": [table_samples(20)]}, batch_size=10)
    line = ["export", "toys", "--mds", str(tmp_path / "out"), "--root", str(tmp_path), "--json"]
    assert commands.run(line) == 0
    assert json.loads(capsys.readouterr().out) == {
        "dataset": DATASET,
        "split": "train",
        "samples": 20,
        "directory": str(tmp_path / "out"),
    }


COLUMNS = {"n": "int", "word": "str"}
SAMPLES = [[{"n": 1, "word": "one"}, {"n": 2, "word": "two"}]]


def changed(**fields: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        index = json.loads((place / "index.json").read_text())
        index["shards"][0].update(fields)
        (place / "index.json").write_text(json.dumps(index))

    return change


def overwrite(at: int, value: int) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        data = bytearray((place / "shard.00000.mds").read_bytes())
        data[at] = value
        (place / "shard.00000.mds").write_bytes(data)

    return change


HASHED = {"basename": "shard.00000.mds", "bytes": 60, "hashes": {"sha1": "0" * 40}}
DAMAGED: list[tuple[str, Callable[[Path], object], str]] = [
    ("no index", lambda place: (place / "index.json").unlink(), "is no MDS directory: it has no index.json"),
    ("no JSON", lambda place: (place / "index.json").write_text("{"), "is no index of MDS version 2"),
    ("another format", changed(format="csv"), r"shards.0.format: Input should be 'mds'"),
    (
        "pickles",
        changed(column_encodings=["int", "pkl"]),
        "column 'word' is encoded as 'pkl', which can't be read here",
    ),
    ("a dynamic array", changed(column_encodings=["int", "ndarray"]), "is encoded as 'ndarray'"),
    ("snappy", changed(compression="snappy", zip_data=HASHED), "compression 'snappy' can't be read here"),
    ("an escape", changed(raw_data=HASHED | {"basename": "../x"}), r"shard '../x' has a part '\.\.'"),
    ("no shard", lambda place: (place / "shard.00000.mds").unlink(), "shard.00000.mds is missing"),
    ("cut short", lambda place: (place / "shard.00000.mds").write_bytes(b"123"), "has 3 bytes, the index says"),
    ("another hash", changed(raw_data=HASHED), "has (another sha1|.* bytes)"),
    ("other samples", changed(samples=3), "it has 2 samples, the index says 3"),
    ("wild offsets", overwrite(4, 255), "can't be read as a shard of MDS"),
    ("a long value", overwrite(18, 200), "is longer than its sample"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_a_directory_that_is_no_mds_or_damaged_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    uri = write_mds(tmp_path / "mds", COLUMNS, SAMPLES)
    assert read(uri)["word"].to_pylist() == ["one", "two"]
    damage(tmp_path / "mds")
    with pytest.raises((InputError, CorruptVersion), match=message):
        read(uri)


def test_any_changed_byte_of_an_export_is_noticed(tmp_path: Path) -> None:
    uri = publish(str(tmp_path), {"train": [table_samples(20)]}, batch_size=10)
    out = tmp_path / "out"
    export_mds(uri, str(out))
    [shard] = read_index(str(out))
    data = (out / shard.raw_data.basename).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 50).tolist():
        (out / shard.raw_data.basename).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(PipelineError, match="has another xxh128"):
            read_shard(str(out), shard)


@pytest.mark.nightly
@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_what_mosaicml_writes_is_read_alike(tmp_path: Path, compression: str | None) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {
        "array": "ndarray:float32:4",
        "class": "int",
        "half": "float16",
        "picture": "pil",
        "png": "png",
        "text": "str",
        "whole": "uint32",
    }
    draw = np.random.default_rng(0)
    samples = [
        {
            "array": draw.normal(size=4).astype(np.float32),
            "class": number % 7,
            "half": np.float16(number / 3),
            "picture": Image.fromarray(pixels(5, 4, 3, seed=number)),
            "png": Image.fromarray(pixels(3, 6, 3, seed=number)),
            "text": "ä" * (number % 9),
            "whole": number,
        }
        for number in range(200)
    ]
    out = str(tmp_path / "mds")
    options: dict[str, Any] = {"compression": compression, "hashes": ["sha1", "xxh64"], "size_limit": 4000}
    with streaming.MDSWriter(columns=columns, out=out, **options) as writer:
        for sample in samples:
            writer.write(sample)
    found = read(out)
    theirs = streaming.StreamingDataset(local=out, batch_size=1, keep_zip=True)
    assert found.num_rows == len(theirs) == 200
    for number, mine in enumerate(found.to_pylist()):
        other = theirs[number]
        assert (mine["class"], mine["text"], mine["whole"]) == (other["class"], other["text"], other["whole"])
        assert np.array_equal(mine["array"], other["array"])
        assert mine["half"] == other["half"]
        for name in ("picture", "png"):
            with Image.open(pa.BufferReader(mine[name])) as image:
                assert np.array_equal(np.asarray(image), np.asarray(other[name]))


@pytest.mark.nightly
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", [table_samples, image_samples])
def test_what_is_exported_mosaicml_reads_alike(tmp_path: Path, kind: Callable[[int], Any], compression: Any) -> None:
    streaming = pytest.importorskip("streaming")
    samples = kind(200)
    uri = publish(str(tmp_path), {"train": [samples]}, batch_size=10 if "features" in samples else 1)
    out = str(tmp_path / "out")
    export_mds(uri, out, compression=compression, shard_bytes=4000)
    assert storage.exists(f"{out}/index.json")
    theirs = streaming.StreamingDataset(local=out, batch_size=1, validate_hash="xxh128", keep_zip=True)
    assert len(theirs) == 200
    with TrainingStream(uri, batch_size=1, shuffle=False, as_numpy=True, normalise=False) as stream:
        for number, batch in enumerate(stream):
            for name in samples:
                assert np.array_equal(theirs[number][name], batch[name][0]), name
