from __future__ import annotations

import pytest

from tasks.io.errors import ConfigError
from tasks.loader.arguments import place_in_world

TORCH = {"RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")
    others = ("SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    for name in (*names, *others):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        (TORCH, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, (0, 2)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (3, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **SRUN}, (0, 8)),
        # A step of fewer tasks than its job has.
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", **SRUN}, (1, 2)),
        # srun starts a torchrun on each of two nodes, which each start two workers.
        ({**TORCH, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", **SRUN}, (1, 4)),
        # torchrun agrees on ranks of its own.
        ({**TORCH, "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", **SRUN}, (1, 4)),
        # mpirun in the script of a job: the variables of SLURM are those of the script.
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "SLURM_JOB_ID": "7",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "4",
            },
            (3, 4),
        ),
        # srun --mpi=pmi2 sets both.
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", **SRUN}, (3, 4)),
        # A script or shell of a job of one task, of which SLURM says no number unless it was asked for one.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, (0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": " "}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
    ],
)
def test_launchers_say_who_one_is(variables, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_in_world() == expected
    assert place_in_world(5, 6) == (5, 6)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK = 0 is set in the environment and WORLD_SIZE isn't: set both or none, or give rank"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 is set in the environment and RANK isn't: .*; give rank=0, world_size=1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = 2 is set .* and OMPI_COMM_WORLD_RANK isn't"),
        ({"PMI_RANK": "1"}, "PMI_RANK = 1 is set in the environment and PMI_SIZE isn't"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID = 1 is set in the environment and SLURM_NTASKS isn't"),
        (
            {"RANK": "1.5", "WORLD_SIZE": "2"},
            "RANK = '1.5' in the environment is no whole number: correct or",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "RANK = 2 and WORLD_SIZE = 2 in the environment can't be: ranks are 0",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK = -1 and WORLD_SIZE = 2 in the environment can't be"),
        # Left from elsewhere, each of the tasks would be the only worker; or all the first one.
        (
            {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", **SRUN},
            "RANK = 0 and WORLD_SIZE = 1 in the environment contradict SLURM_PROCID = 3 and SLURM_NTASKS = 4: remove",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4", "PMI_RANK": "3", "PMI_SIZE": "4"}, "contradict PMI_RANK = 3"),
        # The script of a job of four tasks would silently deliver a quarter.
        (
            {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
            "SLURM_NTASKS = 4, but srun, which starts 4 processes, hasn't started this one: start it by srun, or give",
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "SLURM_NTASKS = 4, but srun"),
    ],
)
def test_variables_that_cannot_be_are_refused(variables, message, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        place_in_world()
    assert place_in_world(0, 1) == (0, 1)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (1, None, "rank = 1 and world_size = None: give both"),
        (None, 2, "rank = None and world_size = 2: give both"),
        (2, 2, "rank = 2 of world_size = 2: ranks are 0 to 1"),
        (-1, 2, "rank = -1 of world_size = 2: ranks are 0 to 1"),
        (True, 2, "rank = True of world_size = 2"),
        (0.0, 2, "rank = 0.0 of world_size = 2"),
        (0, 0, "world_size = 0: give the number of workers, 1 or more"),
        (0, 2.0, "world_size = 2.0: give the number of workers"),
    ],
)
def test_places_that_cannot_be_are_refused(rank, world_size, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_in_world(rank, world_size)
