"""Tests of DataLoaders with processes, which `test_torch_loader.py` runs in a process of their own.

Once a flow of Prefect has run in a process, its forks end with exit code 1, those of any DataLoader included, and
torch's handler of dying children raises that wherever it finds the parent.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tasks.io.errors import PipelineError
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamDataset, StreamLoader
from tests.delivery.making import damage, table_version
from tests.loader.test_torch_loader import Batches, epochs, ids, opened, sources, version

__all__ = ["sources", "version"]  # fixtures


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, {}),
        (3, {"rank": 1, "world_size": 2, "remainder": "drop"}),
        (2, {"persistent_workers": True, "prefetch_factor": 1}),
        (15, {"persistent_workers": True}),  # two have nothing to do
        (0, {}),
    ],
)
def test_a_data_loader_delivers_the_stream(version: str, processes: int, options: dict[str, Any]) -> None:
    own = {name: options.pop(name) for name in ("rank", "world_size", "remainder") if name in options}
    expected = epochs(version, **own)
    with opened(version, **own) as stream:
        loader = StreamLoader(stream, num_workers=processes, **options)
        assert len(loader) == len(stream)
        assert [ids(loader) for _ in range(3)] == expected
        assert stream.state_dict() == loader.state_dict()
        assert (stream.epoch, stream.stats.batches) == (3, 3 * len(stream))
        assert stream.stats.samples == sum(real for epoch in expected for batch in epoch for _, real in batch)


def test_values_arrive_as_from_the_stream_and_processes_may_be_spawned(version: str) -> None:
    with TrainingStream(version, batch_size=400, device="cpu") as stream:
        expected = list(stream)
        stream.set_epoch(0)
        found = list(StreamLoader(stream, num_workers=1, multiprocessing_context="spawn"))
    for batch, other in zip(expected, found, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def shifted(features: Any, generator: Any) -> Any:
    return features + generator.normal(0, 1, features.shape)


@pytest.mark.parametrize(("method", "processes"), [("fork", 2), ("spawn", 1)])
def test_samples_are_transformed_and_mixed_as_by_the_stream(version: str, method: str, processes: int) -> None:
    options: dict[str, Any] = {"batch_size": 400, "device": "cpu", "transform": shifted, "mixup": 0.4}
    with TrainingStream(version, **options) as stream:
        expected = list(stream)
        stream.set_epoch(0)
        found = list(StreamLoader(stream, num_workers=processes, multiprocessing_context=method))
    for batch, other in zip(expected, found, strict=True):
        assert batch["label"].shape == (400, 4)
        assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("persistent", [False, True])
def test_it_goes_on_in_mid_epoch_with_any_number_of_processes(version: str, persistent: bool) -> None:
    expected = epochs(version, 2)
    with opened(version) as stream:
        loader = StreamLoader(stream, num_workers=2, persistent_workers=persistent)
        found = []
        for batch in loader:
            found.append(batch)
            if len(found) == 5:
                break
        state = json.loads(json.dumps(loader.state_dict()))
        assert ids(found) + ids(loader) == expected[0]  # the broken iteration has lost nothing
        stream.set_epoch(1)
        assert ids(loader) == expected[1]
    for processes in (0, 3):
        with opened(version) as stream:
            loader = StreamLoader(stream, num_workers=processes)
            loader.load_state_dict(state)
            loader.set_epoch(0)  # as trainers do, also after a resume
            assert ids(loader) == expected[0][5:]


def test_weights_change_for_the_next_batch(sources: dict[str, float]) -> None:
    first, second = sources
    found: list[Batches] = []
    for processes in (None, 2):
        with MixedStream(sources, batch_size=12, device="cpu") as stream:
            loop = iter(stream if processes is None else StreamLoader(stream, num_workers=processes))
            batches = [next(loop) for _ in range(3)]
            stream.set_weights({first: 1, second: 2})
            found.append(ids([*batches, *loop]))
    assert found[0] == found[1]


def test_a_data_loader_of_others_delivers_one_epoch_for_each_set_epoch(version: str) -> None:
    expected = epochs(version, 2)
    with opened(version) as stream:
        dataset = StreamDataset(stream)
        loader: Any = DataLoader(dataset, batch_size=None, num_workers=2)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            assert ids(loader) == expected[epoch]
            for use in (stream.state_dict, lambda: next(iter(stream))):
                with pytest.raises(PipelineError, match="only the DataLoader knows how many: use StreamLoader"):
                    use()
        with pytest.raises(PipelineError, match=r"delivered batches from this place on \(epoch 1\), and samples would"):
            list(loader)
        stream.set_epoch(0)
        assert ids(stream) == expected[0]
        assert ids(DataLoader(dataset, batch_size=None)) == expected[1]
        assert stream.epoch == 2


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("steps", [5, 12, 13])
def test_a_stateful_data_loader_goes_on_in_mid_epoch(version: str, processes: int, steps: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="needs the extra 'frameworks'")
    (expected,) = epochs(version, 1)
    with opened(version) as stream:
        loader = torchdata.StatefulDataLoader(StreamDataset(stream), batch_size=None, num_workers=processes)
        loop = iter(loader)
        assert ids(next(loop) for _ in range(steps)) == expected[:steps]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
    with opened(version) as stream:
        loader = torchdata.StatefulDataLoader(StreamDataset(stream), batch_size=None, num_workers=processes)
        loader.load_state_dict(state)
        found = ids(loader)
        assert found == expected[steps:] or (steps == 13 and found == epochs(version, 2)[1])


def test_files_of_s3_reach_forked_processes(s3_root: str, tmp_path: Path) -> None:
    version = table_version(s3_root, 100, 50)
    options = {"cache_dir": tmp_path, "batch_size": 16}
    (expected,) = epochs(version, 1, **options)
    with opened(version, **options) as stream:
        assert ids(StreamLoader(stream, num_workers=2)) == expected


def test_damage_is_named(tmp_path: Path) -> None:
    version = table_version(str(tmp_path), 100, 50)
    with opened(version, batch_size=50) as stream:
        damage(version, "split=train/part-00000-a1.parquet", 100)
        with pytest.raises(PipelineError, match=r"part-00000-a1.parquet.*(checksum|differ)"):
            list(StreamLoader(stream, num_workers=2))


def test_no_process_is_left_behind(version: str) -> None:
    before = multiprocessing.active_children()  # an exception holds those of its DataLoader until it is collected
    with opened(version) as stream:
        for batch in StreamLoader(stream, num_workers=2):
            del batch
            break
    # On a busy machine torch ends them by a signal, without waiting for their end.
    left = set(multiprocessing.active_children()) - set(before)
    for process in left:
        process.join(60)
    assert not any(process.is_alive() for process in left), left
