"""Which of how many workers this process is, whatever started it."""

from __future__ import annotations

import os
import sys
from typing import Any

from tasks.core.errors import ConfigError


def place_in_world(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Rank and number of workers: as given, or those of Ray Train, torch.distributed or torchrun; else 0 of 1.

    Nothing is imported for it: who runs in one of these has imported it.

    Raises:
        ConfigError: only one of them is given, or the rank isn't below the number.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank = {rank} and world_size = {world_size}: give both, or neither to have them found")
    if rank is None or world_size is None:
        rank, world_size = _ray_train() or _torch_distributed() or _environment() or (0, 1)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank = {rank} of world_size = {world_size}: ranks are 0 to {world_size - 1}")
    return rank, world_size


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


def _environment() -> tuple[int, int] | None:
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return None
    try:
        return int(rank), int(size)
    except ValueError as error:
        raise ConfigError(
            f"RANK = {rank!r} and WORLD_SIZE = {size!r} in the environment are no numbers; correct or remove them"
        ) from error
