from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tasks.io.errors import ConfigError, InputError, PipelineError
from tasks.loader.batch_stream import BatchStream
from tasks.loader.mixed import MixedStream
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamDataset, StreamLoader
from tests.delivery.making import table_version
from tests.processes import PROJECT


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 1,234 samples: 13 batches of 100."""
    return table_version(str(tmp_path_factory.mktemp("root")), 900, 1, 333, batch_size=100)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    roots = [str(tmp_path_factory.mktemp("root")) for _ in range(2)]
    return {table_version(roots[0], *[5] * 16, seed=1): 2, table_version(roots[1], 40, seed=2): 1}


def opened(version: str, **options: Any) -> TrainingStream:
    return TrainingStream(version, **{"batch_size": 100, "device": "cpu", "columns": ["sample_id"], **options})


Batches = list[list[tuple[int, bool]]]


def ids(batches: Any) -> Batches:
    """Id of each sample, and whether it is a real one or fills the batch."""
    found = []
    for batch in batches:
        sample_ids = batch["sample_id"].tolist()
        real = batch["mask"].tolist() if "mask" in batch else [True] * len(sample_ids)
        found.append(list(zip(sample_ids, real, strict=True)))
    return found


def epochs(version: str, count: int = 3, **options: Any) -> list[Batches]:
    """What the stream itself delivers."""
    with opened(version, **options) as stream:
        return [ids(stream) for _ in range(count)]


class Processes:
    """Processes of a DataLoader without processes: a copy of a dataset each, which take turns."""

    def __init__(self, stream: BatchStream, count: int, counted: bool = False) -> None:
        self.datasets = [StreamDataset(stream) for _ in range(count)]
        self.infos = [SimpleNamespace(id=number, num_workers=count) for number in range(count)]
        for dataset in self.datasets:
            dataset._counted = counted

    def __iter__(self) -> Iterator[Any]:
        loops = [iter(())] * len(self.datasets)
        for number, _ in enumerate(self.datasets):
            loops[number] = self.within(number, iter)
        done = False
        while not done:
            for number, loop in enumerate(loops):
                batch = self.within(number, lambda _, loop=loop: next(loop, None))
                if batch is None:
                    done = True
                    break
                yield batch

    def within(self, number: int, use: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tasks.loader.torch_loader.get_worker_info", lambda: self.infos[number])
            return use(self.datasets[number])


@settings(max_examples=30)
@given(
    processes=st.integers(1, 5),
    world=st.integers(1, 3),
    batch_size=st.integers(1, 60),
    remainder=st.sampled_from(["pad", "drop"]),
    consumed=st.integers(0, 20),
    data=st.data(),
)
def test_processes_in_turn_make_the_steps_of_the_stream_from_any_place(
    sources: dict[str, float], *, processes, world, batch_size, remainder, consumed, data
) -> None:
    kind = data.draw(st.sampled_from(["one", "mixed"]))
    options = {"remainder": remainder, "batch_size": batch_size, "as_numpy": True, "prefetch": 0}
    first = next(iter(sources))

    def another(rank: int) -> BatchStream:
        if kind == "one":
            return TrainingStream(first, rank=rank, world_size=world, **options)
        return MixedStream(sources, rank=rank, world_size=world, **options)

    try:
        whole = another(world - 1)
    except ConfigError:  # too few samples for a step
        return
    place = {**whole.state_dict(), "batches": min(consumed, whole._batches)}
    whole.load_state_dict(place)
    shared = another(world - 1)
    shared.load_state_dict(place)
    for expected, found in zip(list(whole), Processes(shared, processes, counted=True), strict=True):
        assert expected.keys() == found.placed.keys()
        for name, values in expected.items():
            assert np.array_equal(values, found.placed[name])


def test_a_state_of_other_processes_is_refused(version: str) -> None:
    with opened(version) as stream:
        two = Processes(stream, 2)
        state = two.within(1, lambda dataset: dataset.state_dict())
        with pytest.raises(InputError, match="one of 2 processes, and 1 steps ahead, not one of num_workers = 3"):
            Processes(stream, 3).within(0, lambda dataset: dataset.load_state_dict(state))
        with pytest.raises(InputError, match=r"ahead 1 \(here none\), processes 2"):
            stream.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "batch_size = 8: the stream has batches and order; leave it out"),
        ({"shuffle": True, "drop_last": True}, "shuffle = True, drop_last = True: the stream has"),
        ({"in_order": False}, "in_order = False: the stream has"),
    ],
)
def test_options_that_the_stream_has_are_refused(version: str, options: dict[str, Any], message: str) -> None:
    with opened(version) as stream, pytest.raises(ConfigError, match=message):
        StreamLoader(stream, **options)


def test_what_cannot_be_done_in_processes_is_refused(version: str) -> None:
    with opened(version) as stream:
        with pytest.raises(ConfigError, match="num_workers = 257: use 256 at most"):
            next(iter(Processes(stream, 257)))
        with pytest.raises(PipelineError, match="a TrainingStream can't be copied or sent to another process"):
            pickle.dumps(StreamDataset(stream))
        stream._on_gpu = True
        with pytest.raises(
            ConfigError, match=r"made on a GPU, which processes of a DataLoader can.t use: .*device=.cpu"
        ):
            StreamLoader(stream, num_workers=2)
        assert len(ids(StreamLoader(stream))) == 13


def test_a_loader_that_may_divide_a_share_is_refused(version: str) -> None:
    with opened(version, rank=1, world_size=2) as stream:
        loader: Any = DataLoader(StreamDataset(stream), batch_size=None)
        with pytest.raises(PipelineError, match=r"share of rank 1 of 2 already, .* leave it out of prepare\(\)"):
            next(iter(loader))


def test_data_loaders_with_processes() -> None:
    path = Path(__file__).with_name("data_loader_processes.py")
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
