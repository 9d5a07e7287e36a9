"""What is published can be learned from: by a small network, and not if the labels mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from flows.image_augmentation import image_augmentation
from tasks.images.config import Augmentation, ImageAugmentationConfig
from tasks.io.tensors import to_torch
from tasks.store import versions
from tasks.store.manifest import Manifest

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("stack")]

DATASET = "training-datasets/images"
EPOCHS, BATCH, RATE = 12, 32, 3e-3
CHANCE = 1 / 5


@dataclass(frozen=True)
class Split:
    """Images as a network wants them, with their class and the original that they were made from."""

    images: torch.Tensor
    classes: torch.Tensor
    originals: list[str]


@pytest.fixture(scope="module")
def published(stack: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """A root with the published sample, and its manifest."""
    root = str(tmp_path_factory.mktemp("learning"))
    image_augmentation(ImageAugmentationConfig(root=root, sample_images=500, augmentation=Augmentation(size=40)))
    return root, versions.resolve(root, DATASET)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, on a machine that others use too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(root: str, manifest: Manifest, name: str) -> Split:
    """A split by what the version says of itself alone."""
    uris = [uri for uri in versions.data_files(root, manifest) if f"/split={name}/" in uri]
    rows = pa.concat_tables([pq.ParquetFile(uri).read() for uri in uris])
    constants = manifest.definition["normalise"]
    mean, std = (torch.tensor(constants[key])[:, None, None] for key in ("mean", "std"))
    images = (to_torch(rows, "image") / constants["scale"] - mean) / std
    labels = to_torch(rows, "one_hot_label").argmax(1)
    assert labels.tolist() == rows["class_id"].to_pylist()
    return Split(images, labels, rows["original_image_id"].to_pylist())


def network(classes: int) -> nn.Sequential:
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    torch.manual_seed(0)
    body = [*stage(3, 24), *stage(24, 48), *stage(48, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def accuracy(model: nn.Sequential, split: Split) -> float:
    model.eval()
    with torch.inference_mode():
        return float((model(split.images).argmax(1) == split.classes).float().mean())


def learned(train: Split, validation: Split) -> list[float]:
    """Accuracy on the validation split after each of the last epochs."""
    model = network(5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = EPOCHS * -(-len(train.classes) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    order = torch.Generator().manual_seed(0)
    reached = []
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(train.classes), generator=order).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(train.images[batch]), train.classes[batch]).backward()
            optimiser.step()
            schedule.step()
        reached.append(accuracy(model, validation))
    return reached[-3:]


def shuffled(splits: list[Split]) -> list[Split]:
    """The same images, each original with the class of another one drawn at random, of whichever split."""
    classes = {name: number for one in splits for name, number in zip(one.originals, one.classes.tolist(), strict=True)}
    names = sorted(classes)
    drawn = np.random.default_rng(0).permutation(len(names))
    others = {name: classes[names[other]] for name, other in zip(names, drawn, strict=True)}
    return [Split(one.images, torch.tensor([others[name] for name in one.originals]), one.originals) for one in splits]


def test_a_small_network_learns_the_classes(published: tuple[str, Manifest], one_thread: None) -> None:
    splits = [load(*published, name) for name in ("train", "validation")]
    right = max(learned(*splits))
    assert right > 3 * CHANCE, f"validation accuracy {right:.2f}, where guessing gives {CHANCE}"


def test_it_learns_nothing_where_there_is_nothing(published: tuple[str, Manifest], one_thread: None) -> None:
    """With labels that mean nothing, only an original that stands in both splits could tell a class."""
    splits = [load(*published, name) for name in ("train", "validation")]
    assert not set(splits[0].originals) & set(splits[1].originals)
    nothing = max(learned(*shuffled(splits)))
    assert nothing < 1.75 * CHANCE, f"validation accuracy {nothing:.2f} from labels without meaning"
