"""transformers: a Trainer that iterates over the stream's loader, and a callback that keeps its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamLoader


class StreamTrainer(Trainer):
    def get_train_dataloader(self) -> StreamLoader:
        return self.train_dataset


class KeepPlace(TrainerCallback):
    def __init__(self, loader: StreamLoader) -> None:
        self.loader = loader

    def on_save(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        place = Path(arguments.output_dir, f"checkpoint-{state.global_step}", "stream.json")
        place.write_text(json.dumps(self.loader.state_dict()))


class Classifier(torch.nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(features, 2)
        self.seen: list[int] = []

    def forward(self, features: Any, label: Any, sample_id: Any, mask: Any) -> dict[str, torch.Tensor]:
        self.seen += sample_id[mask].tolist()
        loss = torch.nn.functional.cross_entropy(self.layer(features), label, reduction="none")
        return {"loss": (loss * mask).sum() / mask.sum()}


def train(version: str, directory: str, steps: int | None = None) -> list[int]:
    """Train for some steps, or to the end of the epoch; return the ids of the samples."""
    with TrainingStream(version, batch_size=32, device="cpu") as stream:
        loader = StreamLoader(stream, num_workers=2)
        model = Classifier(stream.definition["feature_count"])
        checkpoint = f"{directory}/checkpoint-5"
        if steps is None:
            loader.load_state_dict(json.loads(Path(checkpoint, "stream.json").read_text()))
        arguments = TrainingArguments(
            directory, num_train_epochs=1, max_steps=steps or -1, save_steps=5, ignore_data_skip=True, use_cpu=True
        )
        trainer = StreamTrainer(model, arguments, train_dataset=loader, callbacks=[KeepPlace(loader)])
        trainer.train(resume_from_checkpoint=None if steps else checkpoint)
    return model.seen
