"""torch: a DataLoader with two processes, stopped after some steps, and resumed from a checkpoint."""

from __future__ import annotations

import torch

from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamLoader


def train(version: str, directory: str, steps: int | None = None) -> list[int]:
    """Train for some steps, or to the end of the epoch; return the ids of the samples."""
    seen: list[int] = []
    with TrainingStream(version, batch_size=32, device="cpu") as stream:
        loader = StreamLoader(stream, num_workers=2, pin_memory=torch.cuda.is_available())
        model = torch.nn.Linear(stream.definition["feature_count"], 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if steps is None:
            saved = torch.load(f"{directory}/checkpoint.pt")
            model.load_state_dict(saved["model"])
            loader.load_state_dict(saved["loader"])
        for step, batch in enumerate(loader, 1):
            loss = torch.nn.functional.cross_entropy(model(batch["features"]), batch["label"], reduction="none")
            optimizer.zero_grad()
            (loss * batch["mask"]).sum().div(batch["mask"].sum()).backward()
            optimizer.step()
            seen += batch["sample_id"][batch["mask"]].tolist()
            if step == steps:
                torch.save({"model": model.state_dict(), "loader": loader.state_dict()}, f"{directory}/checkpoint.pt")
                break
    return seen
