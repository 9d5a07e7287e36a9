"""Ray Datasets published and streamed, as a user does it: a real API, a real Ray, a local disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import ray
import ray.data

from flows.publish_dataset import publish, read_mds, stream_of
from tasks.cli import commands
from tasks.io import storage
from tasks.io.errors import ConfigError, GateFailed, InputError
from tasks.io.tensors import to_numpy
from tasks.loader.stream import TrainingStream
from tasks.store import layout, versions
from tests.datasets.test_mds import write_mds
from tests.datasets.test_rows import encoded, pixels, tensors
from tests.faults.failpoints import environment
from tests.processes import PROJECT
from tests.runs import assert_nothing_published

pytestmark = pytest.mark.usefixtures("stack")

NAME = "datasets/visits"
COPY = layout.streaming_dataset("visits")
ROWS, UNLABELLED = 600, 7


def visits(rows: int = ROWS) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "number": np.arange(rows),
            "seconds": draw.normal(100, 30, rows),
            "member": draw.random(rows) < 0.3,
            "city": draw.choice(["Lima", "Oslo", "Rome"], rows),
            "bought": draw.choice(["yes", "no"], rows),
        }
    )
    frame.loc[frame.index % 10 == 3, "seconds"] = np.nan
    frame.loc[:: rows // UNLABELLED + 1, "bought"] = None
    return frame


def dataset_of(frame: pd.DataFrame, blocks: int = 4) -> ray.data.Dataset:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    bounds = np.linspace(0, len(frame), blocks + 1).astype(int).tolist()
    return ray.data.from_arrow([table.slice(a, b - a) for a, b in pairwise(bounds)])


def stored(root: str, dataset: str = NAME, version: int | str = "latest") -> pd.DataFrame:
    return versions.read_table(root, dataset, version).to_pandas().sort_values("number", ignore_index=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the visits, published in four blocks, and their copy."""
    place = str(tmp_path_factory.mktemp("published"))
    version = publish(dataset_of(visits()), "visits", root=place, label="bought")
    kept = ROWS - visits()["bought"].isna().sum()
    assert (version.dataset, version.version, version.rows, version.notes) == (NAME, 1, kept, ())
    stream_of(dataset_of(visits()), "visits", root=place, label="bought", batch_size=8).close()
    assert versions.version_numbers(place, NAME) == [1], "the same rows are published once"
    return place


def test_it_has_the_rows_of_the_frame_and_nothing_vanishes(root: str) -> None:
    frame, manifest = visits(), versions.resolve(root, NAME)
    versions.verify(root, manifest)
    wanted = frame[frame["bought"].notna()].reset_index(drop=True)
    found = stored(root)
    assert found["row_id"].is_unique
    pd.testing.assert_frame_equal(found[wanted.columns], wanted, check_dtype=False)
    [balance] = manifest.balances
    assert (balance.rows_in, balance.rejected) == (len(frame), {"null_bought": len(frame) - len(wanted)})
    profile = manifest.profile["seconds"]
    assert (profile.nulls + profile.nans, profile.mean) == (
        wanted["seconds"].isna().sum(),
        pytest.approx(wanted["seconds"].mean()),
    )
    base = Path(layout.version_uri(root, NAME, 1))
    listed = {file.path for file in (*manifest.files, *manifest.rejected_files)}
    protocol = {layout.MANIFEST, layout.REPORT_HTML, layout.REPORT_JSON, layout.reservation_name(1)}
    assert {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()} == listed | protocol


def run(line: str, root: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert commands.run([*line.split(), "--root", root, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_goes_through_the_programs_of_all_kinds(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    tested = run("self-test datasets/visits", root, capsys)
    assert (tested["blind"], tested["unproven"]) == ([], [])
    assert run("replay datasets/visits v1", root, capsys)["outcome"] == "ok"
    key = int(stored(root)["row_id"][5])
    explained = run(f"explain datasets/visits v1 {key}", root, capsys)
    assert explained["kind"] == "dataset"
    assert explained["sections"]["rows"]["rows"][0]["number"] == stored(root)["number"][5]
    assert {one["kind"] for one in run("list", root, capsys)} >= {"dataset"}


def test_the_copy_is_the_same_however_the_dataset_is_cut_and_ordered(root: str, tmp_path: Path) -> None:
    mixed = dataset_of(visits().sample(frac=1, random_state=1), 7)
    stream_of(mixed, "visits", root=str(tmp_path), label="bought", batch_size=8).close()
    for name, figure in ((NAME, "content"), (COPY, "samples")):
        one, other = (versions.resolve(place, name, 1) for place in (root, str(tmp_path)))
        assert one.definition[figure] == other.definition[figure]
    assert [file.digest for file in one.files] == [file.digest for file in other.files]


def streamed(stream: TrainingStream) -> list[dict[str, npt.NDArray[Any]]]:
    return [{name: values[batch["mask"]] for name, values in batch.items()} for batch in stream]


def test_a_stream_delivers_each_row_once_and_goes_on_in_mid_epoch(root: str) -> None:
    frame = visits()
    options: dict[str, Any] = {"root": root, "label": "bought", "batch_size": 32, "as_numpy": True, "normalise": False}
    with stream_of(dataset_of(frame), "visits", **options) as stream:
        batches = streamed(stream)
        features = [one["name"] for one in versions.resolve(root, COPY).definition["features"]]
    ids = np.concatenate([batch["sample_id"] for batch in batches])
    kept = frame[frame["bought"].notna()]
    assert len(ids) == len(set(ids.tolist())) == len(kept)
    numbers = np.concatenate([batch["features"] for batch in batches])[:, features.index("number")]
    labels = np.concatenate([batch["label"] for batch in batches])
    found = dict(zip(numbers.astype(int).tolist(), labels.tolist(), strict=True))
    assert found == dict(zip(kept["number"], (kept["bought"] == "yes").astype(int), strict=True))

    with TrainingStream(layout.dataset_uri(root, COPY), batch_size=32, as_numpy=True, normalise=False) as stream:
        for _, batch in zip(range(5), stream, strict=False):
            assert batch["mask"].all()
        place = stream.state_dict()
    rest = []
    for rank in range(2):
        uri = layout.dataset_uri(root, COPY)
        with TrainingStream(uri, batch_size=32, rank=rank, world_size=2, as_numpy=True, normalise=False) as stream:
            stream.load_state_dict(place)
            rest += [batch["sample_id"] for batch in streamed(stream)]
    assert sorted(np.concatenate(rest).tolist()) == sorted(ids[5 * 32 :].tolist())


def test_several_labels_are_a_vector(root: str) -> None:
    frame = visits()[["number", "member"]].dropna().astype({"number": float})
    frame["half"] = frame["number"] / 2
    options: dict[str, Any] = {"root": root, "batch_size": 32, "as_numpy": True, "normalise": False}
    with stream_of(dataset_of(frame), "two-labels", label=("half", "number"), **options) as stream:
        labels = np.concatenate([batch["label"] for batch in streamed(stream)])
    assert (labels.dtype, labels.shape) == (np.float32, (len(frame), 2))
    assert np.array_equal(labels[:, 0] * 2, labels[:, 1])
    assert sorted(labels[:, 1].tolist()) == sorted(frame["number"].tolist())
    with pytest.raises(ConfigError, match=r"label = .*names a column twice; name each label once"):
        publish(dataset_of(frame), "two-labels", root=root, label=("half", "half"))


def test_texts_go_through_the_programs_of_copies(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    frame = visits()[["number", "city"]].assign(text=lambda rows: "é" * 3 + rows["city"].str.slice(1) * 2)
    frame["half"] = frame["number"] / 2
    options: dict[str, Any] = {"root": root, "label": ("half", "number"), "batch_size": 32, "as_numpy": True}
    with stream_of(dataset_of(frame), "texts", delivery={"sequence": "text"}, **options) as stream:
        batches = streamed(stream)
    found = [
        (bytes(text[:length]).decode(), *label.tolist())
        for batch in batches
        for text, length, label in zip(batch["sequence"], batch["length"], batch["label"], strict=True)
    ]
    assert sorted(found) == sorted(frame[["text", "half", "number"]].itertuples(index=False, name=None))
    copy = COPY.replace("visits", "texts")
    tested = run(f"self-test {copy}", root, capsys)
    assert tested["blind"] == []
    assert run(f"replay {copy} v1", root, capsys)["outcome"] == "ok"
    key = int(stored(root, "datasets/texts")["row_id"][5])
    explained = run(f"explain {copy} v1 {key}", root, capsys)["sections"]["values"]["facts"]
    assert explained["check"] == "the same elements as in the source"
    assert explained["label"].endswith(
        f"of half = {stored(root, 'datasets/texts')['half'][5]}, number = {stored(root, 'datasets/texts')['number'][5]}"
    )
    [entry] = versions.resolve(root, copy).files
    uri = layout.join(layout.dataset_uri(root, copy), "v1", entry.path)
    data = bytearray(storage.read_bytes(uri))
    data[data.index(b"slo")] += 1  # a byte of a text
    storage.write_bytes(uri, bytes(data))
    capsys.readouterr()
    assert commands.run(["replay", copy, "v1", "--sample", "1000", "--root", root, "--json"]) == 1
    shown = capsys.readouterr().out
    assert '"sequence"' in shown
    assert '"batch_id"' in shown


def test_the_same_rows_are_not_written_again_and_others_are(root: str) -> None:
    def counts() -> list[int]:
        return [len(versions.version_numbers(root, name)) for name in (NAME, COPY)]

    options: dict[str, Any] = {"root": root, "label": "bought", "batch_size": 32}
    before, other = counts(), visits()
    stream_of(dataset_of(other.iloc[::-1], 3), "visits", **options).close()
    assert counts() == before
    other.loc[5, "seconds"] += 1
    stream_of(dataset_of(other), "visits", **options).close()
    assert counts() == [count + 1 for count in before]
    assert stored(root).set_index("number")["seconds"][5] == other["seconds"][5]


def test_images_are_streamed_as_they_were(tmp_path: Path) -> None:
    images = pixels(40, 6, 5, 3)
    table = pa.table({"picture": tensors(images), "kind": ["cat", "dog"] * 20})
    options: dict[str, Any] = {"root": str(tmp_path), "image": "picture", "label": "kind", "batch_size": 8}
    dataset = ray.data.from_arrow([table.slice(0, 17), table.slice(17)])
    with stream_of(dataset, "pets", **options, as_numpy=True, normalise=False) as stream:
        batches = streamed(stream)
    delivered, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label"))
    found = {image.tobytes(): label for image, label in zip(delivered, labels.tolist(), strict=True)}
    assert found == {np.moveaxis(image, 2, 0).tobytes(): number % 2 for number, image in enumerate(images)}


def test_encoded_images_that_cannot_be_decoded_are_rejected(tmp_path: Path) -> None:
    files = [encoded(pixels(6, 5, 3, seed=number)) for number in range(30)]
    table = pa.table({"bytes": [*files, files[0][:40]]})
    options: dict[str, Any] = {"image": "bytes", "image_size": (3, 4)}
    version = publish(ray.data.from_arrow(table), "pets", root=str(tmp_path), **options)
    [balance] = version.balances
    assert (version.rows, balance.rows_in, sum(balance.rejected.values())) == (30, 31, 1)
    assert versions.resolve(str(tmp_path), version.dataset).definition["image"]["shape"] == [3, 3, 4]


def test_a_directory_of_mosaicml_is_published(tmp_path: Path) -> None:
    columns = {"word": "str", "count": "int", "picture": "ndarray:uint8:4,5,3"}
    images = pixels(30, 4, 5, 3)
    samples = [{"word": "ab"[n % 2], "count": n, "picture": images[n]} for n in range(30)]
    mds = read_mds(write_mds(tmp_path / "mds", columns, [samples[:20], [], samples[20:]], "zstd"))
    version = publish(mds, "words", root=str(tmp_path / "root"), image="picture", label="word")
    table = versions.read_table(str(tmp_path / "root"), version.dataset).sort_by("count")
    assert table["word"].to_pylist() == [sample["word"] for sample in samples]
    assert np.array_equal(to_numpy(table, "image"), np.moveaxis(images, 3, 1))


def test_rows_that_the_gate_refuses_are_not_published(tmp_path: Path) -> None:
    frame = visits()
    frame.loc[frame.index > 300, "bought"] = None
    with pytest.raises(GateFailed, match=r"datasets/visits: visits: .* were rejected.*To go on: see _rejected/"):
        publish(dataset_of(frame), "visits", root=str(tmp_path), label="bought")
    assert_nothing_published(str(tmp_path), [NAME])


def changing() -> ray.data.Dataset:
    return ray.data.from_arrow([pa.table({"x": [1]}), pa.table({"x": ["one"]})])


REFUSED: list[tuple[str, Callable[[], Any], dict[str, Any], str]] = [
    ("a frame", visits, {}, "dataset is a DataFrame, no Ray Dataset: make one of it"),
    (
        "no row",
        lambda: ray.data.from_arrow(pa.table({"x": [1]})).filter(lambda _: False),
        {},
        "has no row to publish",
    ),
    ("lists", lambda: ray.data.from_items([{"x": [1, 2]}]), {}, "column 'x' is .*: drop it"),
    ("other blocks", changing, {}, "dataset 'visits' changes between blocks: "),
    ("a bad name", lambda: dataset_of(visits()), {"name": "Feature Store/x"}, "can't name a dataset; use lower case"),
    ("an unknown setting", lambda: dataset_of(visits()), {"lable": "x"}, "lable is unknown; did you mean 'label'"),
    ("no such label", lambda: dataset_of(visits()), {"label": "bougt"}, "label: .* did you mean 'bought'"),
]


@pytest.mark.parametrize(("make", "settings", "message"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_bad_input_gets_a_sentence(
    tmp_path: Path, make: Callable[[], Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        publish(make(), settings.pop("name", "visits"), root=str(tmp_path), **settings)
    assert_nothing_published(str(tmp_path), [NAME])


def test_without_ray_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(visits())
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=r"Ray isn't running in this process.*call ray.init\(\) first"):
        publish(dataset, "visits", root=str(tmp_path))


def test_a_name_whose_copy_is_of_another_dataset_is_refused(root: str) -> None:
    options: dict[str, Any] = {"root": root, "batch_size": 8, "delivery": {"name": "visits"}}
    with pytest.raises(ConfigError, match=f"name = 'visits' is taken: {COPY} is a copy of {NAME}; give another name"):
        stream_of(dataset_of(visits()), "others", **options)


PUBLISHER = """
import ray
from tests.test_publish_dataset import dataset_of, visits
from flows.publish_dataset import publish
ray.init(address="{address}", namespace="training-data", log_to_driver=False)
publish(dataset_of(visits()), "visits", root="{root}", label="bought")
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["after the data, before the report", "in mid-manifest"])
def test_a_publisher_killed_before_the_commit_leaves_nothing_half_published(
    tmp_path: Path, stack: str, point: str
) -> None:
    root = str(tmp_path / "root")
    armed = environment(tmp_path / "armed", point, Path(layout.version_uri(root, NAME, 1)))
    script = PUBLISHER.format(address=ray.get_runtime_context().gcs_address, root=root)

    shell = {**os.environ, **armed, "PREFECT_API_URL": stack, "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=PROJECT, env=shell, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr[-2000:]
    assert versions.published_versions(root, NAME) == []
    assert versions.latest(root, NAME) is None
    assert storage.list_files(layout.version_uri(root, NAME, 1)), "it was killed with its files written"
    version = publish(dataset_of(visits()), "visits", root=root, label="bought")
    assert version.version == 1
    versions.verify(root, versions.resolve(root, NAME))
    files = {info.uri for info in storage.list_files(layout.version_uri(root, NAME, 1))}
    assert files == set(versions.data_files(root, versions.resolve(root, NAME))), "the dead run's files are gone"
