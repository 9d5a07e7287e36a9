"""Arguments of the loader, checked, and the rank of this process among the workers.

Launchers nest: `srun` starts a torchrun on each node, which starts the workers. Then each sets its
variables, and those of the innermost count: it starts at least as many processes as the outer one. Variables
that contradict such a nesting would let several processes deliver the same samples, and are refused.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.io.errors import ConfigError

LIMIT = 1 << 63
"""Upper bound, exclusive, of all whole numbers: they are kept as int64."""


def whole_number(name: str, value: Any, cure: str, *, least: int = 0, below: int = LIMIT) -> int:
    """Return a whole number in [least, below), of Python or numpy; refuse truth values, and floats even if whole.

    Raises:
        ConfigError: it is anything else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool | np.bool_) or not least <= number < below:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return number


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a value is one of some words.

    Raises:
        ConfigError: it isn't.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} = {value!r}: use {' or '.join(map(repr, choices))}")


def truth_values(**values: Any) -> None:
    """Check that values are True or False; an error names the argument.

    Raises:
        ConfigError: one of them isn't.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r}: use True or False")


def place(name: str, value: Any, cure: str) -> str:
    """Return a path or URI as text.

    Raises:
        ConfigError: it is neither text nor a path, or it is empty.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return text


def picked_columns(columns: Any, there: Sequence[str], on_request: Sequence[str] = ()) -> list[str]:
    """Return the chosen columns, each once in the requested order; for None all but those on request.

    Raises:
        ConfigError: it isn't a list, is empty, or names another column.
    """
    if columns is None:
        return [name for name in there if name not in on_request]
    names = list(columns) if isinstance(columns, list | tuple | set | frozenset) else []
    if not names or not all(isinstance(name, str) and name in there for name in names):
        raise ConfigError(f"columns = {columns!r}: give a list of some of {', '.join(map(repr, there))}")
    return list(dict.fromkeys(names))


_BY_HAND = "or give rank and world_size to the stream"
_ALONE = "give rank=0, world_size=1 if this process is alone"

# Rank and number of processes, from the innermost launcher to the outermost.
_VARIABLES = (
    ("RANK", "WORLD_SIZE"),  # torchrun, accelerate, deepspeed
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # mpirun of Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # mpiexec of MPICH and Intel MPI; srun --mpi=pmi2
    ("SLURM_PROCID", "SLURM_NTASKS"),  # srun; a step may have fewer processes than its job
)
# Its ranks are assigned when its processes meet, and may differ from the launcher's.
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_STEP = "SLURM_STEP_NUM_TASKS"


def place_in_world(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Return rank and number of workers: as given, or those of Ray Train, torch.distributed or a launcher; else 0 of 1.

    Launchers are torchrun, mpirun, mpiexec and srun, known by the variables that they set. It imports nothing:
    a process of one of these has imported it.

    Raises:
        ConfigError: only one of them is given, the rank isn't below the number, variables contradict one another, or
            this is a process of a torch DataLoader without a given part.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank = {rank} and world_size = {world_size}: give both, or neither to have them found")
    if rank is None or world_size is None:
        _refuse_loader_process()
        return _ray_train() or _torch_distributed() or _environment() or (0, 1)
    world_size = whole_number("world_size", world_size, "give the number of workers, 1 or more", least=1)
    cure = f"of world_size = {world_size}: ranks are 0 to {world_size - 1}"
    try:
        return whole_number("rank", rank, cure, below=world_size), world_size
    except ConfigError as error:
        raise ConfigError(f"rank = {rank!r} {cure}") from error


def _refuse_loader_process() -> None:
    """Refuse to open a whole worker's stream in a DataLoader's processes, each of which would deliver all of it."""
    data: Any = sys.modules.get("torch.utils.data")
    found = data.get_worker_info() if data is not None else None
    if found is not None:
        raise ConfigError(
            f"the stream is opened in process {found.id} of a DataLoader's {found.num_workers}, each of which would "
            "deliver everything: open it before, and iterate over tasks.loader.torch_loader.StreamLoader, or over the "
            "stream itself, which makes batches ahead in a thread; or give each process its rank and world_size"
        )


def _ray_train() -> tuple[int, int] | None:
    train: Any = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        return int(context.get_world_rank()), int(context.get_world_size())
    except Exception:  # noqa: BLE001 - Ray's own way to say that this is no worker differs between its versions
        return None


def _torch_distributed() -> tuple[int, int] | None:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return int(distributed.get_rank()), int(distributed.get_world_size())


class _Said(NamedTuple):
    """Values of a launcher's variables."""

    rank: int
    size: int
    text: str


def _environment() -> tuple[int, int] | None:
    """Return the values of the innermost launcher with variables; None if there is none."""
    found: _Said | None = None
    for names in _VARIABLES:
        if names[0] == "SLURM_PROCID" and _outside_steps():
            if found is None:
                _refuse_job_of_several()
            continue
        said = _said(*names if names[1] != "SLURM_NTASKS" or _STEP not in os.environ else (names[0], _STEP))
        if found is not None and said is not None:
            _compare(found, said)
        found = found or said
    return None if found is None else (found.rank, found.size)


def _said(rank_name: str, size_name: str) -> _Said | None:
    rank, size = _number(rank_name), _number(size_name)
    if rank is None and size in (None, 1):
        return None
    if rank is None or size is None:
        there, missing, value = (size_name, rank_name, size) if rank is None else (rank_name, size_name, rank)
        raise ConfigError(
            f"{there} = {value} is set in the environment and {missing} isn't: set both or none, {_BY_HAND}; {_ALONE}"
        )
    text = f"{rank_name} = {rank} and {size_name} = {size}"
    if not 0 <= rank < size:
        raise ConfigError(f"{text} in the environment can't be: ranks are 0 to {size - 1}; correct them, {_BY_HAND}")
    return _Said(rank, size, text)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.removeprefix("-").isdigit():
        raise ConfigError(f"{name} = {text!r} in the environment is no whole number: correct or remove it, {_BY_HAND}")
    return int(text)


def _compare(inner: _Said, outer: _Said) -> None:
    """Raise an error if one of two launchers can't have started the other."""
    if inner.size < outer.size or (
        inner.size == outer.size and inner.rank != outer.rank and _TORCHRUN not in os.environ
    ):
        raise ConfigError(
            f"{inner.text} in the environment contradict {outer.text}: remove those that are left from elsewhere, "
            f"{_BY_HAND}"
        )


def _outside_steps() -> bool:
    """Return True in the script or the shell of a job of SLURM, False in a process started by srun."""
    step = {"SLURM_STEP_ID", _STEP} & os.environ.keys()
    return "SLURM_JOB_ID" in os.environ and not step and _number("SLURM_PROCID") in (None, 0)


def _refuse_job_of_several() -> None:
    """Refuse to take the first share of a job of several tasks in a process not started by srun."""
    tasks = _number("SLURM_NTASKS")
    if tasks is not None and tasks > 1:
        raise ConfigError(
            f"SLURM_NTASKS = {tasks}, but srun, which starts {tasks} processes, hasn't started this one: start it by "
            f"srun, or {_ALONE}"
        )
