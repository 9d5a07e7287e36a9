from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion, VersionNotFound
from tasks.loader.shards import Shards, open_version
from tasks.loader.version_files import MappedFile
from tests.delivery.making import (
    DATASET,
    cut,
    damage,
    image_samples,
    image_version,
    publish,
    sequence_samples,
    sequence_version,
    table_samples,
    table_version,
)

FIRST, PART = (f"split=train/part-0000{number}-a1.parquet" for number in range(2))


def gathered(shards: Shards, index, names=None) -> dict[str, np.ndarray]:
    index = np.asarray(index, np.int64)
    good = shards.usable(index)
    index = index if good is None else index[good]
    out = {
        name: np.empty((len(index), *shards.columns[name].shape), shards.columns[name].dtype)
        for name in names or shards.columns
    }
    shards.gather(index, out)
    return out


def check_ragged(shards: Shards, samples, index) -> None:
    """Compare values of any length, and their lengths, with those that were written."""
    index = np.asarray(index, np.int64)
    good = shards.usable(index)
    index = index if good is None else index[good]
    values, starts = shards.gather_ragged(index)
    assert values.dtype == samples["sequence"][0].dtype
    assert [one.tolist() for one in np.split(values, starts[1:-1])] == [
        one.tolist() for one in samples["sequence"][index]
    ]
    lengths = gathered(shards, index, ["length"])["length"]
    assert lengths.tolist() == np.diff(starts).tolist() == samples["length"][index].tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("group_batches", [1, 3, None])
def test_values_of_any_length_are_gathered_from_wherever_they_are(
    tmp_path: Path, group_batches: int | None, dtype: str
) -> None:
    sizes = (95, 1, 40, 7)
    samples = sequence_samples(sum(sizes), dtype=dtype)
    version = open_version(sequence_version(str(tmp_path), *sizes, samples=samples, group_batches=group_batches))
    shards = Shards(version, "train")
    check_ragged(shards, samples, [100])
    assert [file for file, mapped in shards._mapped.items() if mapped.places is not None] == [2]
    check_ragged(shards, samples, np.random.default_rng(1).permutation(np.tile(np.arange(sum(sizes)), 3)))
    for name in ("label", "sample_id"):
        assert np.array_equal(gathered(shards, range(143), [name])[name], samples[name])


def test_values_that_are_all_empty_or_one_alone_are_gathered(tmp_path: Path) -> None:
    for number, lengths in enumerate(([0] * 12, [3], [0])):
        samples = sequence_samples(len(lengths), lengths=lengths)
        version = sequence_version(str(tmp_path / f"{number}"), len(lengths), samples=samples)
        check_ragged(Shards(open_version(version), "train"), samples, range(len(lengths)))


@pytest.mark.parametrize(
    ("place", "message", "lost"),
    [
        ("value", "batch 1 has not the checksum in the footer", range(60, 70)),
        ("prefix", "batch 1 has not the checksum in the footer", range(60, 70)),
        # A row group has three batches.
        ("length", "the lengths in row group 0 aren't those of its sequences", range(50, 80)),
        ("sign", "the lengths in row group 0 aren't those of its sequences", range(50, 80)),
        ("swapped", "batch 1 has not the checksum in the footer", range(60, 70)),
    ],
)
def test_a_changed_byte_of_a_value_or_of_its_length_is_noticed(
    tmp_path: Path, place: str, message: str, lost: range
) -> None:
    samples = sequence_samples(100, lengths=[2, 3] * 50)
    version = sequence_version(str(tmp_path), 50, 50, samples=samples)
    with (Path(version) / PART).open("rb") as file:
        mapped = MappedFile(file, PART)
    assert mapped.locate() == []
    value, length = int(mapped.places[10]), int(mapped.columns["length"].offsets[0]) + 80
    places = {"value": [value], "prefix": [value - 4], "length": [length], "sign": [length + 7]}
    # Lengths of 2 and 3 become 3 and 2: their sum stays.
    for at in places.get(place, [length, length + 8]):
        damage(version, PART, at, b"\x80" if place == "sign" else b"\x01")
    shards = Shards(open_version(version), "train")
    check_ragged(shards, samples, range(50))
    with pytest.raises(CorruptVersion, match=f"{PART}: {message}"):
        shards.usable(np.array([5, 65]))
    skipping = Shards(open_version(version), "train", on_corrupt="skip")
    good = skipping.usable(np.arange(100))
    assert good is not None
    assert np.flatnonzero(~good).tolist() == list(lost)
    check_ragged(skipping, samples, range(100))


def test_lengths_that_are_all_wrong_leave_nothing(tmp_path: Path) -> None:
    samples = sequence_samples(10)
    samples["length"] = samples["length"] + 1
    version = open_version(sequence_version(str(tmp_path), 10, samples=samples))
    with pytest.raises(CorruptVersion, match="all 10 samples are damaged or missing"):
        Shards(version, "train", on_corrupt="skip").usable(np.arange(10))


def test_a_length_that_is_written_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    samples = sequence_samples(20, lengths=[4] * 20)
    version = sequence_version(str(tmp_path), 20, samples=samples)
    shards = Shards(open_version(version), "train", verify=False)
    check_ragged(shards, samples, range(20))
    place = int(shards._mapped[0].places[19])
    with (Path(version) / FIRST).open("r+b") as file:
        file.seek(place - 4)
        file.write(b"\xff\xff\xff\x7f")
    with pytest.raises(CorruptVersion, match=f"{FIRST}: its lengths were changed while it was read"):
        shards.find(np.array([19]))
    shards._next_look = shards._next_times = 0.0
    checking = Shards(open_version(version), "train")
    with pytest.raises(CorruptVersion, match=f"{FIRST}: batch 1 has not the checksum"):
        checking.usable(np.array([19]))


def test_a_file_without_lengths_or_with_a_page_too_many_is_refused(tmp_path: Path) -> None:
    samples = sequence_samples(20)
    version = sequence_version(
        str(tmp_path / "a"),
        20,
        samples={n: v for n, v in samples.items() if n != "length"} | {"length": samples["length"].astype(np.int32)},
    )
    with pytest.raises(CorruptVersion, match="have no int64 column 'length' beside them"):
        Shards(open_version(version), "train")
    version = sequence_version(
        str(tmp_path / "b"),
        200,
        samples=sequence_samples(200),
        group_batches=None,
        data_page_size=64,
        write_batch_size=1,
    )
    with pytest.raises(CorruptVersion, match=r"don't lie one after the other in row group 0|aren't those of its"):
        Shards(open_version(version), "train").usable(np.arange(200))


@pytest.mark.parametrize("group_batches", [1, 3, None])
def test_rows_of_a_table_are_gathered_from_wherever_they_are(tmp_path: Path, group_batches: int | None) -> None:
    # Files with a shorter last batch, a single sample, and a whole number of batches.
    sizes = (95, 1, 40, 7)
    shards = Shards(open_version(table_version(str(tmp_path), *sizes, group_batches=group_batches)), "train")
    samples = table_samples(sum(sizes))
    index = np.random.default_rng(1).permutation(np.tile(np.arange(sum(sizes)), 3))
    found = gathered(shards, index)
    assert found.keys() == samples.keys()
    for name, values in found.items():
        assert values.dtype == samples[name].dtype
        assert np.array_equal(values, samples[name][index]), name


def test_images_are_gathered_and_columns_picked(tmp_path: Path) -> None:
    sizes = (20, 1, 13)
    shards = Shards(open_version(image_version(str(tmp_path), *sizes)), "train")
    samples = image_samples(sum(sizes))
    index = np.random.default_rng(1).permutation(sum(sizes))
    for names in (["image"], ["label", "image"], ["sample_id"], []):
        for name, values in gathered(shards, index, names).items():
            assert np.array_equal(values, samples[name][index]), name


def test_a_row_group_of_another_size_among_others_is_found(tmp_path: Path) -> None:
    # Row groups of 7, 7 and 6 images, and larger ones in the other file.
    files = cut(image_samples(60), 20, 40)
    version = publish(str(tmp_path), {"train": files[:1]}, group_batches=7)
    table = pq.read_table(f"{version}/split=train/part-00000-a1.parquet", partitioning=None)
    path = tmp_path / "uneven.parquet"
    metadata = pq.read_metadata(f"{version}/{FIRST}").metadata
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        writer.add_key_value_metadata({name: metadata[name] for name in (b"batch_size", b"batch_id")})
        for start, count in ((0, 3), (3, 12), (15, 5)):
            writer.write_table(table.slice(start, count))
    with path.open("rb") as file:
        mapped = MappedFile(file, "uneven")
    assert mapped.starts.tolist() == [0, 3, 15, 20]
    assert all(mapped.is_intact(image) for image in range(20))


def test_of_many_files_some_are_mapped_when_it_is_opened_and_others_when_they_are_needed(tmp_path: Path) -> None:
    sizes = [3] * 700
    shards = Shards(open_version(table_version(str(tmp_path), *sizes)), "train")
    assert mapped_below(tmp_path) == 512
    samples, index = table_samples(sum(sizes)), np.arange(sum(sizes))
    shards.soon(index[-30::15], index[-30::15] + 15, 15)
    assert mapped_below(tmp_path) == 522
    for some in np.array_split(np.random.default_rng(1).permutation(index), 9):
        for name, values in gathered(shards, some).items():
            assert np.array_equal(values, samples[name][some]), name
    assert mapped_below(tmp_path) == 700


def mapped_below(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_version_is_found_by_its_directory_and_the_latest_by_that_of_its_dataset(tmp_path: Path) -> None:
    first, second = (table_version(str(tmp_path), 5) for _ in range(2))
    assert open_version(first).uri == open_version(Path(first)).uri == first
    assert open_version(f"{tmp_path}/{DATASET}/").uri == second
    assert open_version(second).manifest.version == 2
    assert open_version(second).definition["kind"] == "table"


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("", ConfigError, "is no streaming-ready version: name …/training-datasets/streaming-ready/<name>/vN"),
        (f"{DATASET}/v7", VersionNotFound, "has no version v7.*published: v1"),
        (f"{DATASET}/v0", ConfigError, "has no version 'v0': versions are v1, v2, …; name …/training-datasets"),
        (f"{DATASET}/1", ConfigError, "has no version '1': versions are v1, v2, …"),
        ("training-datasets/streaming-ready/toyz", VersionNotFound, "did you mean '.*toys'"),
    ],
)
def test_a_version_that_is_not_there_is_named(tmp_path: Path, place: str, error, message: str) -> None:
    table_version(str(tmp_path), 5)
    with pytest.raises(error, match=message):
        open_version(f"{tmp_path}/{place}")


@pytest.mark.parametrize("uri", [None, "", 5, b"v1"])
def test_what_is_no_place_is_refused(uri) -> None:
    with pytest.raises(ConfigError, match=r"uri = .*: name the directory of a version, …/training-datasets"):
        open_version(uri)


def test_a_split_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no samples in split 'test': use 'train'"):
        Shards(open_version(table_version(str(tmp_path), 5)), "test")


def test_a_missing_or_shorter_file_is_named_at_opening(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 50, 50)
    path = Path(version) / PART
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptVersion, match=f"{PART}: bytes differ from its manifest: expected {len(whole)}, found"):
        Shards(open_version(version), "train")
    path.unlink()
    with pytest.raises(CorruptVersion, match=f"{PART} is missing, but its manifest lists it.*publish a new version"):
        Shards(open_version(version), "train")
    shards = Shards(open_version(version), "train", on_corrupt="skip")
    assert shards.skipped_files == 1
    assert np.array_equal(gathered(shards, range(100))["features"], table_samples(100)["features"][:50])


def test_a_footer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 50, 50)
    damage(version, PART, -1)
    with pytest.raises(CorruptVersion, match=f"{PART} can't be read as Parquet"):
        Shards(open_version(version), "train")
    assert Shards(open_version(version), "train", on_corrupt="skip").skipped_files == 1


@pytest.mark.parametrize("column", ["features", "label", "sample_id"])
def test_a_changed_byte_is_noticed_when_its_batch_is_first_used(tmp_path: Path, column: str) -> None:
    version = table_version(str(tmp_path), 50, 50)
    with (Path(version) / PART).open("rb") as file:
        mapped = MappedFile(file, PART)
    place = mapped.columns[column]
    damage(version, PART, int(place.offsets[0]) + 10 * place.spec.width + 3)  # in batch 1: samples 60 to 69
    shards = Shards(open_version(version), "train")
    gathered(shards, range(60))
    with pytest.raises(CorruptVersion, match=f"{PART}: batch 1 has not the checksum in the footer"):
        gathered(shards, [5, 65])
    skipping = Shards(open_version(version), "train", on_corrupt="skip")
    good = skipping.usable(np.arange(100))
    assert good is not None
    assert np.flatnonzero(~good).tolist() == list(range(60, 70))
    assert len(gathered(Shards(open_version(version), "train", verify=False), range(100))["label"]) == 100


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("0" * 32, "has 1 checksums of 20 batches"),
        (" ".join(["0" * 31] * 20), "batch 0 has not the checksum"),
        ("é", "has 1 checksums of 20 batches"),
        ("", "has 0 checksums of 20 batches"),
    ],
)
def test_checksums_that_are_damaged_themselves_are_named(tmp_path: Path, ids: str, message: str) -> None:
    version = image_version(str(tmp_path), 20)
    path = Path(version) / FIRST
    table = pq.read_table(path, partitioning=None).replace_schema_metadata({"batch_size": "1", "batch_id": ids})
    manifest = Path(version) / "_manifest.json"
    before = path.stat().st_size
    pq.write_table(table, path, compression="none", use_dictionary=False)
    manifest.write_text(manifest.read_text().replace(f'"bytes": {before}', f'"bytes": {path.stat().st_size}'))
    with pytest.raises(CorruptVersion, match=f"{FIRST}:? .*{message}"):
        gathered(Shards(open_version(version), "train"), range(20))


@pytest.mark.parametrize("size", ["7", "0", "-3", "ten", None])
def test_row_groups_that_are_no_whole_batches_are_refused(tmp_path: Path, size: str | None) -> None:
    table = pq.read_table(f"{table_version(str(tmp_path), 20)}/{FIRST}", partitioning=None)
    path = tmp_path / "odd.parquet"
    table = table.replace_schema_metadata({"batch_size": size} if size else None)
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=10)
    with path.open("rb") as file, pytest.raises(CorruptVersion, match="its row groups aren't whole batches, of batch"):
        MappedFile(file, "odd")


def test_a_version_of_blocks_is_refused_with_a_cure(tmp_path: Path) -> None:
    manifest = Path(version := table_version(str(tmp_path), 20)) / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"batch_size"', '"block_size"'))
    with pytest.raises(
        ConfigError, match=f"{version}: this version.s rows are blocks of samples.*make a new copy of its source"
    ):
        open_version(version)


@pytest.mark.parametrize(
    "settings",
    [{"compression": "zstd"}, {"use_dictionary": ["sample_id"]}, {"data_page_size": 512, "write_batch_size": 1}],
    ids=["compressed", "dictionary", "several pages"],
)
def test_values_that_do_not_lie_one_after_the_other_are_refused(tmp_path: Path, settings) -> None:
    version = table_version(str(tmp_path), 95, group_batches=None, **settings)
    with pytest.raises(CorruptVersion, match="don't lie one after the other in row group 0; write the file as"):
        Shards(open_version(version), "train")


def test_columns_that_may_hold_nulls_are_refused(tmp_path: Path) -> None:
    table = pq.read_table(f"{table_version(str(tmp_path), 20)}/split=train/part-00000-a1.parquet", partitioning=None)
    loose = pa.schema([field.with_nullable(True) for field in table.schema])
    path = tmp_path / "loose.parquet"
    pq.write_table(pa.Table.from_arrays(table.columns, schema=loose), path, compression="none", use_dictionary=False)
    with path.open("rb") as file, pytest.raises(CorruptVersion, match="column 'features' may hold nulls"):
        MappedFile(file, "loose")


def test_a_file_that_holds_something_else_than_its_manifest_says_is_named(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 50)
    manifest = Path(version) / "_manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"rows": 50', '"rows": 61').replace('"train": 50', '"train": 61'))
    with pytest.raises(
        CorruptVersion, match="has 50 samples in batches of 10, its manifest says 61 samples in batches of 10"
    ):
        Shards(open_version(version), "train")
    manifest.write_text(text.replace('"feature_count": 3', '"feature_count": 4'))
    with pytest.raises(
        CorruptVersion, match=r"its columns .*\(3,\), 'float32'.* aren't .*\(4,\), 'float32'.*, as its manifest says"
    ):
        Shards(open_version(version), "train")


def test_files_of_s3_come_when_they_are_needed_and_go_when_they_are_not(s3_root: str, tmp_path: Path) -> None:
    from tasks.loader.cache import FileCache

    version = open_version(table_version(s3_root, 50, 40, 30))
    cache = FileCache(tmp_path)
    shards = Shards(version, "train", cache)
    samples = table_samples(120)
    assert (cache.counts.misses, sorted(shards._mapped)) == (0, [])
    for index in ([3, 40], [119, 55, 4]):
        assert np.array_equal(gathered(shards, index)["features"], samples["features"][index])
    assert sorted(shards._mapped) == [0, 1, 2]
    held = shards.held
    shards.soon(np.array([95]), np.array([103]), 8)
    assert (sorted(shards._mapped), sorted(held)) == ([2], [0, 1, 2])  # threads may still read what is held
    shards.soon(np.array([95, 0]), np.array([103, 8]), 8)
    assert np.array_equal(gathered(shards, range(50))["label"], samples["label"][:50])
    assert (cache.counts.hits, cache.counts.misses) == (1, 3)
    shards.close()


def test_files_are_downloaded_in_the_order_of_their_use_and_let_go_if_they_are_not_used(
    s3_root: str, tmp_path: Path, monkeypatch
) -> None:
    from tasks.loader.cache import FileCache

    shards = Shards(open_version(table_version(s3_root, *[10] * 8)), "train", FileCache(tmp_path))
    asked: list[int] = []
    real = shards._pool.submit
    monkeypatch.setattr(shards._pool, "submit", lambda call, file: (asked.append(file), real(call, file))[1])
    # A chunk may have several files, and end with the last sample of one.
    shards.soon(np.array([65, 0]), np.array([75, 40]), 40)
    assert asked == [6, 7, 0, 1, 2, 3]
    for coming in shards._coming.values():
        coming.result(60)
    gathered(shards, [3, 15])
    shards.soon(np.array([15]), np.array([25]), 40)
    assert (sorted(shards._mapped), sorted(shards._coming)) == ([1], [2])
    shards.close()


def test_chunks_are_fetched_ahead_once_and_whole(tmp_path: Path, monkeypatch) -> None:
    """Pages in this process's table, of which /proc tells, are those of the chunks that were named."""
    files = cut(image_samples(24, shape=(3, 256, 256)), 20, 4)
    version = open_version(publish(str(tmp_path), {"train": files}, group_batches=7))
    monkeypatch.setattr("tasks.loader.shards._FETCH_BYTES", 0)
    shards = Shards(version, "train")
    shards.pick(("image",))
    calls: list[list[int]] = []
    real = shards._pool.submit
    monkeypatch.setattr(
        shards._pool, "submit", lambda call, *args: (calls.append(args[1].tolist()), real(call, *args))[1].result(60)
    )
    before = resident(FIRST)
    for firsts in ([8, 0], [8, 16]):
        shards.soon(np.array(firsts), np.array(firsts) + 8, 8)
    assert calls == [[8, 0], [16]]
    # All of the first file; opening touched a little of each of its row groups.
    assert resident(FIRST) > before + 2000
    assert np.array_equal(gathered(shards, range(24))["image"], image_samples(24, shape=(3, 256, 256))["image"])


def resident(name: str) -> int:
    """KiB of a file in this process's table of pages."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(name))
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


def test_values_of_any_length_are_fetched_ahead_and_come_from_s3(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.loader.cache import FileCache

    samples = sequence_samples(60, lengths=np.random.default_rng(0).integers(0, 9000, 60), dtype="int32")
    version = open_version(sequence_version(str(tmp_path / "root"), 25, 30, 5, samples=samples))
    monkeypatch.setattr("tasks.loader.shards._FETCH_BYTES", 0)
    shards = Shards(version, "train")
    shards.pick(("sequence", "length", "label"))
    calls: list[int] = []
    real = shards._pool.submit
    monkeypatch.setattr(
        shards._pool, "submit", lambda call, *args: (calls.append(len(args[0])), real(call, *args))[1].result(60)
    )
    before = resident(FIRST)
    shards.soon(np.array([0, 16]), np.array([16, 32]), 16)
    assert calls[1] == 3  # ranges: of the second chunk one in each of two files
    assert resident(FIRST) > before + 300
    check_ragged(shards, samples, range(60))
    away = Shards(open_version(sequence_version(s3_root, 25, 30, 5, samples=samples)), "train", FileCache(tmp_path))
    check_ragged(away, samples, [50, 3, 59])
    away.soon(np.array([30]), np.array([38]), 8)
    check_ragged(away, samples, range(60))
    away.close()


def test_a_cached_file_with_a_changed_byte_is_downloaded_anew_next_time(s3_root: str, tmp_path: Path) -> None:
    from tasks.loader.cache import FileCache

    version = open_version(image_version(s3_root, 20))
    shards = Shards(version, "train", FileCache(tmp_path))
    gathered(shards, [0])
    (path,) = tmp_path.rglob("[!.]*.parquet")
    damage(str(path.parent), path.name, 20 + int(next(iter(shards._mapped.values())).columns["image"].offsets[0]))
    again = Shards(version, "train", FileCache(tmp_path))
    with pytest.raises(CorruptVersion, match="batch 0 has not the checksum"):
        gathered(again, [0])
    assert np.array_equal(
        gathered(Shards(version, "train", FileCache(tmp_path)), range(20))["image"], image_samples(20)["image"]
    )


def test_a_missing_file_of_s3_is_named_at_opening(s3_root: str, tmp_path: Path) -> None:
    from tasks.loader.cache import FileCache

    version = open_version(table_version(s3_root, 50, 40))
    storage.delete(f"{version.uri}/{PART}")
    with pytest.raises(CorruptVersion, match=f"{PART} is missing"):
        Shards(version, "train", FileCache(tmp_path))
