"""Lightning: its checkpoint holds the loader's place, as of everything with state_dict and load_state_dict."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tasks.loader.stream import TrainingStream
from tasks.loader.torch_loader import StreamLoader


class Classifier(lightning.LightningModule):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(features, 2)
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen += batch["sample_id"][batch["mask"]].tolist()
        loss = torch.nn.functional.cross_entropy(self.layer(batch["features"]), batch["label"], reduction="none")
        return (loss * batch["mask"]).sum() / batch["mask"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(lightning.LightningDataModule):
    def __init__(self, version: str) -> None:
        super().__init__()
        self.version = version

    def train_dataloader(self) -> StreamLoader:
        # Opened here, where Lightning has started all ranks, the stream finds its own one.
        self.stream = TrainingStream(self.version, batch_size=32, device="cpu")
        return StreamLoader(self.stream, num_workers=2)

    def teardown(self, stage: str) -> None:  # noqa: ARG002 - Lightning names it
        self.stream.close()


def train(version: str, directory: str, steps: int | None = None, **options: Any) -> list[int]:
    """Train for some steps, or to the end of the epoch; return the ids of this rank's samples."""
    model = Classifier(features=3)
    checkpoints = ModelCheckpoint(directory, filename="last", every_n_train_steps=5, enable_version_counter=False)
    trainer = lightning.Trainer(
        max_epochs=1, max_steps=steps or -1, callbacks=[checkpoints], accelerator="cpu", logger=False, **options
    )
    trainer.fit(model, Data(version), ckpt_path=None if steps else f"{directory}/last.ckpt")
    return model.seen
