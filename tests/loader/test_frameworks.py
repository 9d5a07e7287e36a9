"""The examples of `frameworks/` with the real frameworks, each in a process of its own, where they are installed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.loader.stream import TrainingStream
from tests.delivery.making import table_version
from tests.processes import PROJECT

STEPS = 5
EXAMPLE = """
import importlib, json, sys
if __name__ == "__main__":
    name, version, directory = sys.argv[1:]
    module = importlib.import_module(f"tests.loader.frameworks.{name}")
    before, after = module.train(version, directory, 5), module.train(version, directory)
    print("\\n" + json.dumps([before, after]))
"""


def run(code: str, *arguments: str) -> str:
    return run_command("-c", code, *arguments)


def run_command(*command: str) -> str:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    python = [sys.executable, "-W", "ignore"]
    done = subprocess.run(
        [*python, *command], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture
def version(tmp_path: Path) -> str:
    return table_version(str(tmp_path / "root"), 300, 77, batch_size=100)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} isn't installed: it is in the extra 'frameworks'")


@pytest.mark.parametrize(
    "example",
    [
        "torch_data_loader",
        pytest.param("lightning_trainer", marks=[pytest.mark.nightly, needs("lightning")]),
        pytest.param("accelerate_loop", marks=[pytest.mark.nightly, needs("accelerate")]),
        pytest.param("transformers_trainer", marks=[pytest.mark.nightly, needs("transformers")]),
        pytest.param("tensorflow_data", marks=[pytest.mark.nightly, needs("tensorflow")]),
        pytest.param("jax_loop", marks=[pytest.mark.nightly, needs("jax")]),
    ],
)
def test_the_example_trains_resumes_in_mid_epoch_and_has_each_sample_once(
    version: str, tmp_path: Path, example: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    before, after = json.loads(run(EXAMPLE, example, version, str(tmp_path / "checkpoints")).splitlines()[-1])
    with TrainingStream(version, batch_size=32, as_numpy=True) as stream:
        expected = [batch["sample_id"][batch["mask"]].tolist() for batch in stream]
    assert before == list(itertools.chain(*expected[:STEPS]))
    assert after == list(itertools.chain(*expected[STEPS:]))


PREPARED = """
import sys
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tasks.io.errors import PipelineError
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamDataset, StreamLoader
if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    stream = TrainingStream(sys.argv[1], batch_size=32, device="cpu")
    assert accelerator.prepare(stream) is stream
    for loader in (StreamLoader(stream), DataLoader(StreamDataset(stream), batch_size=None)):
        try:
            print(len(list(accelerator.prepare(loader))))
        except PipelineError as error:
            print(error)
    print(len(list(StreamLoader(stream, num_workers=2))))
"""


@pytest.mark.nightly
@needs("accelerate")
def test_accelerate_divides_nothing_once_more(version: str) -> None:
    first, second, alone = run(PREPARED, version).splitlines()
    assert first == second
    assert first.endswith("or the stream itself, and leave it out of prepare()")
    assert alone == "12"


TRAINER = """
import sys
from transformers import Trainer, TrainingArguments
from tasks.io.errors import PipelineError
from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamDataset
from tests.loader.frameworks.transformers_trainer import Classifier
if __name__ == "__main__":
    version, directory = sys.argv[1:]
    dataset = StreamDataset(TrainingStream(version, batch_size=32, device="cpu"))
    arguments = TrainingArguments(directory, max_steps=3, use_cpu=True)
    try:
        Trainer(Classifier(3), arguments, train_dataset=dataset).train()
    except PipelineError as error:
        print(error)
"""


@pytest.mark.nightly
@needs("transformers")
def test_a_trainer_of_transformers_makes_no_loader_of_its_own(version: str, tmp_path: Path) -> None:
    assert "a loader made around it, as by accelerate's prepare() or a Trainer" in run(TRAINER, version, str(tmp_path))


RANKS = """
import json, sys
from pathlib import Path
if __name__ == "__main__":
    version, directory = sys.argv[1:]
    {train}
    Path(directory, f"rank-{{rank}}.json").write_text(json.dumps(seen))
"""
LIGHTNING = """
    import torch.distributed as dist
    from tests.loader.frameworks.lightning_trainer import train
    options = {"devices": 2, "strategy": "ddp"}
    train(version, directory, 5, **options)
    rank = dist.get_rank()
    seen = train(version, directory, None, **options)
"""
ACCELERATE = """
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import DataLoader
    from tasks.io.errors import PipelineError
    from tasks.loader.stream import TrainingStream
    from tasks.loader.torch_loader import StreamDataset, StreamLoader
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    rank = accelerator.process_index
    stream = TrainingStream(version, batch_size=32, device="cpu")
    try:
        list(accelerator.prepare(DataLoader(StreamDataset(stream), batch_size=1)))
        raise SystemExit("a share was divided")
    except PipelineError:
        pass
    loader = StreamLoader(stream, num_workers=1)
    for step, _ in enumerate(loader, 1):
        if step == 5:
            break
    seen = [sample for batch in loader for sample in batch["sample_id"][batch["mask"]].tolist()]
    accelerator.end_training()
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("train", "launcher"),
    [
        pytest.param(LIGHTNING, [], marks=needs("lightning"), id="lightning"),
        pytest.param(
            ACCELERATE,
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            marks=needs("accelerate"),
            id="accelerate",
        ),
    ],
)
def test_two_ranks_share_an_epoch_and_its_rest(version: str, tmp_path: Path, train: str, launcher: list[str]) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(train=train.strip()))
    run_command(*launcher, str(script), version, str(tmp_path))
    with TrainingStream(version, batch_size=64, as_numpy=True) as stream:
        batches = [batch["sample_id"][batch["mask"]].tolist() for batch in stream]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(itertools.chain(*found)) == sorted(itertools.chain(*batches[5:]))
