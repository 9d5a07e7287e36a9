"""The specification of the streaming-ready format: its code reads what the flow writes, without this package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.pipeline import write_streaming_ready
from tasks.delivery.source import find_source
from tasks.loader.stream import TrainingStream
from tasks.store import layout, versions
from tests.delivery.making import damage, sequence_samples, sequence_version, table_version
from tests.delivery.sources import IMAGES, configured, publish_customers, publish_pictures
from tests.manifests import manifest

PAGE = Path(__file__).parents[2] / "tasks" / "delivery" / "FORMAT.md"
[CODE] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
ALONE = f"""import sys
sys.modules["tasks"] = sys.modules["flows"] = None
{CODE}
np.savez(sys.argv[3], **read_split(*sys.argv[1:3]))
"""


def read_alone(version: str, split: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, version, split, str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)


def check(version: str, split: str, out: Path) -> None:
    """Compare what the page's code reads with what a stream delivers."""
    done = read_alone(version, split, out)
    assert not done.returncode, done.stderr
    found = dict(np.load(out, allow_pickle=True))
    if found.get("image", np.empty(0)).dtype == object:
        lengths = found.pop("length").tolist()
        assert lengths == [len(value) for value in found["image"]]
        found["image"] = np.stack([simplejpeg.decode_jpeg(value).transpose(2, 0, 1) for value in found["image"]])
    with TrainingStream(version, batch_size=7, split=split, shuffle=False, normalise=False, as_numpy=True) as stream:
        batches = [{name: values[batch["mask"]] for name, values in batch.items()} for batch in stream]
    assert set(found) == {*batches[0]} - {"mask"}
    for name, values in found.items():
        delivered = np.concatenate([batch[name] for batch in batches])
        assert (values.dtype, values.shape) == (delivered.dtype, delivered.shape)
        assert values.tobytes() == delivered.tobytes(), name


@pytest.mark.parametrize("kind", ["table", "pixels", "jpegs"])
@pytest.mark.usefixtures("ray_cluster")
def test_what_the_flow_writes_is_read_by_the_pages_code(kind: str, tmp_path: Path) -> None:
    root = str(tmp_path)
    if kind == "table":
        publish_customers(root)
    else:
        publish_pictures(root, encoding="jpeg" if kind == "jpegs" else None)
    options = {} if kind == "table" else {"dataset": IMAGES}
    version = published(configured(root, batch_size=32, file_megabytes=0.02, **options))
    for split in ("train", "validation"):
        check(version, split, tmp_path / f"{split}.npz")


def published(config: DeliveryConfig) -> str:
    """Publish a copy as the flow writes it; its URI."""
    reservation = versions.reserve(config.root, layout.streaming_dataset(config.dataset_name), "run")
    made = write_streaming_ready(config, find_source(config), reservation)
    fields = {"files": made.files, "rejected_files": made.rejected_files, "balances": made.balances}
    versions.commit(reservation, manifest(reservation, made.schema, definition=made.definition, **fields))
    return reservation.uri


def test_a_long_list_of_files_is_read(tmp_path: Path) -> None:
    check(table_version(str(tmp_path), *[1] * 501), "train", tmp_path / "train.npz")


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_sequences_are_read(tmp_path: Path, dtype: str) -> None:
    samples = sequence_samples(47, dtype=dtype)
    version = sequence_version(str(tmp_path), 30, 17, samples=samples)
    done = read_alone(version, "train", tmp_path / "train.npz")
    assert not done.returncode, done.stderr
    found = np.load(tmp_path / "train.npz", allow_pickle=True)
    assert {*found} == {*samples}
    for name, values in samples.items():
        assert [one.tolist() for one in found[name]] == [one.tolist() for one in values]
    assert {one.dtype for one in found["sequence"]} == {np.dtype(dtype)}


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 30)
    damage(version, "split=train/part-00000-a1.parquet", 100)
    done = read_alone(version, "train", tmp_path / "train.npz")
    assert done.returncode
    assert "split=train/part-00000-a1.parquet isn't as it was written" in done.stderr
