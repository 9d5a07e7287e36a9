from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.io.errors import ConfigError
from tasks.loader.dataset import read_version
from tasks.loader.stream import TrainingStream
from tests.delivery.making import image_samples, image_version, table_version


def counted(batches, name: str) -> Counter[tuple[int, int, bytes]]:
    """How often each sample comes, by its id, label and contents."""
    found: Counter[tuple[int, int, bytes]] = Counter()
    for batch in batches:
        real = np.asarray(batch.get("mask", torch.ones(len(batch["label"]), dtype=torch.bool)))
        columns = (np.asarray(batch[key])[real] for key in ("sample_id", "label", name))
        found.update((int(one), int(label), value.tobytes()) for one, label, value in zip(*columns, strict=True))
    return found


@pytest.mark.parametrize(
    ("root", "kind"),
    [
        ("local", "table"),
        ("s3", "images"),
        pytest.param("local", "images", marks=pytest.mark.nightly),
        pytest.param("s3", "table", marks=pytest.mark.nightly),
    ],
    indirect=["root"],
)
def test_ray_and_the_stream_have_the_same_samples(ray_cluster: None, root: str, tmp_path: Path, kind: str) -> None:
    uri = table_version(root, 95, 1, 40) if kind == "table" else image_version(root, 30, 5)
    name, shape, dtype = ("features", (3,), torch.float32) if kind == "table" else ("image", (3, 4, 5), torch.uint8)
    dataset = read_version(uri)
    batches = list(dataset.iter_torch_batches(batch_size=16))
    assert {(tuple(batch[name].shape[1:]), batch[name].dtype) for batch in batches} == {(shape, dtype)}
    assert {(batch["label"].ndim, batch["label"].dtype) for batch in batches} == {(1, torch.int64)}
    stream = TrainingStream(uri, batch_size=16, normalise=False, cache_dir=tmp_path / "cache")
    assert counted(batches, name) == counted(stream, name)
    assert sum(counted(batches, name).values()) == (136 if kind == "table" else 35)
    stream.close()


def test_columns_can_be_picked(ray_cluster: None, tmp_path: Path) -> None:
    uri = image_version(str(tmp_path), 30)
    table = read_version(uri, columns=["sample_id"]).to_pandas()
    assert list(table.columns) == ["sample_id"]
    assert sorted(table["sample_id"]) == sorted(image_samples(30)["sample_id"])
    with pytest.raises(ConfigError, match=r"columns = \['features'\]: give a list of some of 'image', 'label'"):
        read_version(uri, columns=["features"])
    with pytest.raises(ConfigError, match="no samples in split 'test'"):
        read_version(uri, split="test")
    with pytest.raises(ConfigError, match="verify = 'no': use True or False"):
        read_version(Path(uri), verify="no")  # type: ignore[arg-type]
