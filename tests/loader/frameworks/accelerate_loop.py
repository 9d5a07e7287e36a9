"""Accelerate: the stream is left out of prepare(), as it is this process's share already, and is registered."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tasks.loader.stream import TrainingStream


def train(version: str, directory: str, steps: int | None = None) -> list[int]:
    """Train for some steps, or to the end of the epoch; return the ids of the samples."""
    accelerator, seen = Accelerator(cpu=True), []
    with TrainingStream(version, batch_size=32, device=accelerator.device) as stream:
        model = torch.nn.Linear(stream.definition["feature_count"], 2)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.register_for_checkpointing(stream)
        if steps is None:
            accelerator.load_state(directory)
        for step, batch in enumerate(stream, 1):
            loss = torch.nn.functional.cross_entropy(model(batch["features"]), batch["label"], reduction="none")
            optimizer.zero_grad()
            accelerator.backward((loss * batch["mask"]).sum() / batch["mask"].sum())
            optimizer.step()
            seen += batch["sample_id"][batch["mask"]].tolist()
            if step == steps:
                accelerator.save_state(directory)
                break
    return seen
