"""The default models, the default loop and its metrics, on a stream in memory."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from tasks.delivery.config import TrainingConfig
from tasks.io.errors import ConfigError
from tasks.loader.shards import open_version
from tasks.training.loops import (
    Meter,
    Progress,
    Target,
    TrainingRun,
    auc,
    build_model,
    class_metrics,
    number_metrics,
    open_run,
    train,
    train_epoch,
    validate,
)
from tests.delivery import making
from tests.delivery.toys import ToyStream

CPU = torch.device("cpu")
CLASSES = {"column": "trend", "kind": "class", "classes": ["down", "flat", "up"]}
NUMBER = {"column": "spent", "kind": "number", "mean": 1000.0, "std": 200.0}


def table(label: Mapping[str, Any] | None, features: int = 4) -> dict[str, Any]:
    return {"kind": "table", "feature_count": features, "label": label, "samples": {"train": 1, "validation": 1}}


def images(label: Mapping[str, Any], side: int = 16) -> dict[str, Any]:
    return {"kind": "images", "image": {"shape": [3, side, side], "dtype": "uint8"}, "label": label}


def settings(**changes: Any) -> TrainingConfig:
    chosen = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "hidden": (16,), "width": 8, "seed": 3}
    return TrainingConfig(**{**chosen, **changes})


def toy_run(
    definition: Mapping[str, Any], inputs: torch.Tensor, labels: torch.Tensor, config: TrainingConfig, **streams: Any
) -> tuple[TrainingRun, list[dict[str, Any]]]:
    """A run over the same samples for training and validation, and the list that its reports go to."""
    name = "image" if definition["kind"] == "images" else "features"
    own = ToyStream(inputs, labels, config.batch_size, name, **streams)
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any], state: Mapping[str, Any] | None) -> None:
        sent.append({**message, "state": copy.deepcopy(state)})

    run = TrainingRun(
        definition={**definition, "samples": {"train": len(inputs)}},
        config=config,
        train=own,
        validation=ToyStream(inputs, labels, config.batch_size, name, **{**streams, "seed": None}),
        device=CPU,
        send=send,
        meter=Meter(own),
        rank=own.rank,
        world_size=own.world_size,
    )
    return run, sent


def samples(kind: str, count: int = 203) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """A separable toy: its definition, inputs and labels."""
    drawn = torch.Generator().manual_seed(5)
    if kind == "images":
        labels = torch.arange(count) % 2
        noise = torch.randn(count, 3, 16, 16, generator=drawn)
        noise[:, 0, :8] += labels[:, None, None] * 1.5  # the upper half is redder
        return images({**CLASSES, "classes": ["plain", "red"]}), noise, labels
    inputs = torch.randn(count, 4, generator=drawn)
    score = inputs[:, 0] - inputs[:, 1]
    if kind == "number":
        return table(NUMBER), inputs, 1000 + 200 * score
    if kind == "two":
        return table({**CLASSES, "classes": ["no", "yes"]}), inputs, (score > 0).long()
    return table(CLASSES), inputs, (score > -0.6).long() + (score > 0.6).long()


@pytest.mark.parametrize(
    ("definition", "shape", "outputs"),
    [
        (table(CLASSES), (5, 4), 3),
        (table({**CLASSES, "classes": ["no", "yes"]}, features=1), (5, 1), 2),
        (table(NUMBER), (5, 4), 1),
        (images(CLASSES, 224), (2, 3, 224, 224), 3),
        (images(NUMBER, 8), (2, 3, 8, 8), 1),  # shrinks to one pixel, not to none
        (images(CLASSES, 33), (0, 3, 33, 33), 3),  # a batch of which everything was skipped
        (table(CLASSES), (0, 4), 3),
    ],
)
def test_models_have_the_shape_that_the_version_asks_for(definition, shape, outputs) -> None:
    model = build_model(definition, settings())
    assert model(torch.zeros(shape)).shape == (shape[0], outputs)


def test_hidden_layers_may_be_none_or_many() -> None:
    for hidden in ((), (8,), (8, 4, 2)):
        model = build_model(table(CLASSES), settings(hidden=hidden))
        assert [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [*hidden, 3]


def test_a_sample_s_outputs_do_not_depend_on_its_batch() -> None:
    model = build_model(images(CLASSES), settings()).eval()  # batch normalisation looks at batches while it is trained
    batch = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(model(batch)[:2], model(batch[:2]))


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "no label to learn"), ({**CLASSES, "classes": ["only"]}, "'trend' has 1 class")],
)
def test_a_label_that_cannot_be_learned_is_refused(label, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(table(label), settings())


def test_numbers_are_standardised_for_the_loss_and_given_back_in_their_unit() -> None:
    target = Target.of(table(NUMBER))
    outputs = torch.tensor([[1.0], [0.0]])
    assert target.losses(outputs, torch.tensor([1200.0, 1400.0])).tolist() == [0.0, 4.0]
    assert target.scores(outputs)[:, 0].tolist() == [1200.0, 1000.0]
    assert Target.of(table({**NUMBER, "std": 0.0})).std == 1.0  # a constant label


@pytest.mark.parametrize(
    ("kind", "metric", "least"), [("two", "auc", 0.99), ("three", "accuracy", 0.9), ("number", "r2", 0.97)]
)
def test_the_mlp_learns_what_can_be_separated(kind: str, metric: str, least: float) -> None:
    run, sent = toy_run(*samples(kind), settings(epochs=12, learning_rate=0.03))
    train(run)
    assert [message["epoch"] for message in sent] == list(range(12))
    assert sent[-1]["metrics"][metric] > least
    assert sent[-1]["metrics"]["train_loss"] < sent[0]["metrics"]["train_loss"] / 2
    assert sent[-1]["worker"]["samples"] == 203


def test_the_cnn_learns_what_can_be_separated() -> None:
    run, sent = toy_run(*samples("images"), settings(epochs=3))
    train(run)
    assert sent[-1]["metrics"]["accuracy"] > 0.95


def test_a_published_version_of_images_is_learned_without_ray(tmp_path: Path) -> None:
    splits = {
        "train": making.image_samples(120, 1, (3, 16, 16)),
        "validation": making.image_samples(37, 2, (3, 16, 16)),
    }
    for drawn in splits.values():
        drawn["image"] = drawn["image"] // 2 + drawn["label"][:, None, None, None].astype(np.uint8) * 30
    uri = making.publish(str(tmp_path), {name: [drawn] for name, drawn in splits.items()})
    sent: list[dict[str, Any]] = []
    config = settings(epochs=6)
    with open_run(uri, open_version(uri).definition, config, send=lambda message, _: sent.append(message)) as run:
        train(run)
    assert sent[-1]["metrics"]["accuracy"] > 0.9
    assert [message["worker"]["samples"] for message in sent] == [120] * 6
    for message in sent:
        worker = message["worker"]
        assert worker["bytes_read"] > 120 * 3 * 16 * 16
        assert 0 <= worker["wait_seconds"] <= worker["seconds"]


def test_a_version_of_jpegs_is_trained_on(tmp_path: Path) -> None:
    splits = {
        name: [making.jpegs(making.image_samples(24, seed, (3, 16, 16)))]
        for seed, name in enumerate(("train", "validation"))
    }
    uri = making.publish(str(tmp_path), splits, shape=(3, 16, 16))
    sent: list[dict[str, Any]] = []
    config = settings(epochs=2)
    with open_run(uri, open_version(uri).definition, config, send=lambda message, _: sent.append(message)) as run:
        train(run)
    assert [message["worker"]["samples"] for message in sent] == [24] * 2
    assert all(math.isfinite(value) for message in sent for value in message["metrics"].values())


def test_balanced_classes_come_equally_often(tmp_path: Path) -> None:
    drawn = making.table_samples(203, seed=1)
    drawn["label"] = (np.arange(203) < 30).astype(np.int64)
    uri = making.publish(str(tmp_path), {"train": [drawn]}, batch_size=10)
    with open_run(uri, open_version(uri).definition, settings(balance="class"), send=lambda *_: None) as run:
        labels = torch.cat([batch["label"][batch["mask"]] for batch in run.train])
    assert sorted(np.bincount(labels.numpy()).tolist()) == [101, 102]


def test_samples_are_drawn_by_their_stored_weights_and_told_by_them(tmp_path: Path) -> None:
    drawn = making.table_samples(100, seed=1)
    ids = drawn.pop("sample_id")
    drawn |= {"weight": np.repeat(np.float32([1, 3]), 50), "sample_id": ids}
    uri = making.publish(str(tmp_path), {"train": [drawn]}, batch_size=10)
    with open_run(uri, open_version(uri).definition, settings(balance="weight"), send=lambda *_: None) as run:
        found = torch.cat([batch["sample_id"][batch["mask"]] for batch in run.train])
    assert int(np.isin(found.numpy(), ids[50:]).sum()) == 75
    assert run.drawn == {"natural": {"1": 50, "3": 50}, "epoch": {"1": 25, "3": 75}}


def test_the_same_seed_gives_the_same_model_and_another_one_another() -> None:
    states = []
    for seed in (3, 3, 4):
        run, sent = toy_run(*samples("three"), settings(seed=seed))
        train(run)
        states.append(sent[-1]["state"]["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


@pytest.mark.parametrize("stop", [2, 13, 14, 20])  # an epoch has 13 steps
def test_going_on_from_a_checkpoint_gives_the_model_of_a_run_without_a_stop(stop: int) -> None:
    case = samples("three")
    whole, sent = toy_run(*case, settings(epochs=2, checkpoint_every_steps=1))
    train(whole)
    states = [message["state"] for message in sent]  # an epoch's last one comes with its figures
    assert [state["progress"]["steps"] for state in states] == list(range(1, 27))
    buffer = io.BytesIO()
    torch.save(states[stop - 1], buffer)
    buffer.seek(0)
    resumed, sent_again = toy_run(*case, settings(epochs=2, checkpoint_every_steps=1))
    train(replace(resumed, resumed=torch.load(buffer, weights_only=True)))
    first, again = sent[-1], sent_again[-1]
    assert again["metrics"] == first["metrics"]
    assert again["state"]["progress"] == first["state"]["progress"]
    assert all(torch.equal(again["state"]["model"][name], value) for name, value in first["state"]["model"].items())


def test_checkpoints_change_nothing() -> None:
    """The loss of an epoch is summed up in parts at each checkpoint."""
    figures = []
    for every in (None, 5):
        run, sent = toy_run(*samples("number"), settings(epochs=2, checkpoint_every_steps=every))
        train(run)
        assert len(sent) == (
            2 if every is None else 2 + 5
        )  # after steps 5, 10, … 25 of 26, and at the end of each epoch
        figures.append([message["metrics"] for message in sent if "epoch" in message])
    assert figures[0] == [pytest.approx(metrics, rel=1e-12) for metrics in figures[1]]


def test_without_a_validation_split_there_is_a_training_loss_alone() -> None:
    run, sent = toy_run(*samples("two"), settings(epochs=1))
    train(replace(run, validation=None))
    assert list(sent[-1]["metrics"]) == ["train_loss"]


@pytest.mark.parametrize("padding", [None, 100.0])
def test_padded_samples_change_neither_loss_nor_gradient_nor_metrics(padding: float | None) -> None:
    """Of 10 samples in batches of 16 six are padding; without any, in batches of 10, all is the same."""
    definition, inputs, labels = samples("three", count=10)
    figures, states = [], []
    for size in (16, 10):
        run, sent = toy_run(definition, inputs, labels, settings(epochs=3, batch_size=size), padding=padding)
        train(run)
        figures.append(sent[-1]["metrics"])
        states.append(sent[-1]["state"]["model"])
        assert sent[-1]["state"]["progress"]["steps"] == 3
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


COUNTS = (48, 41, 34)
"""Of these, the last step of two workers has 16, 9 and 2: one worker has a whole batch or a part, the other none."""


def test_two_workers_learn_what_one_with_twice_the_batch_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_one_of_two, args=(port, queue), nprocs=2)
    alone = {count: _learned(count, batch_size=32) for count in COUNTS}
    for _ in range(2):
        for count, (weights, loss, figures) in queue.get().items():
            expected_weights, expected_loss, expected_figures = alone[count]
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert figures == pytest.approx(expected_figures, rel=1e-5)
            for name, value in expected_weights.items():
                np.testing.assert_allclose(weights[name], value, rtol=1e-4, atol=1e-6)


def _one_of_two(rank: int, port: int, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    queue.put({count: _learned(count, batch_size=16, rank=rank, world_size=2, padding=9.0) for count in COUNTS})
    gc.collect()  # DDP's cycles hold the group, whose threads must end before the interpreter does
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _learned(count: int, batch_size: int, **streams: Any) -> tuple[dict[str, Any], float, dict[str, float]]:
    """Weights, training loss and validation metrics after an epoch."""
    run, _ = toy_run(*samples("three", count), settings(batch_size=batch_size, learning_rate=0.5), **streams)
    torch.manual_seed(0)
    model, progress, target = build_model(run.definition, run.config), Progress(), Target.of(run.definition)
    parallel = nn.parallel.DistributedDataParallel(model) if run.world_size > 1 else model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)  # Adam would hide a gradient of the wrong size
    train_epoch(run, parallel, optimiser, target=target, progress=progress, state=dict)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    assert progress.samples == count
    return weights, progress.loss / count, validate(run, model, target)


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    draw = np.random.default_rng(0)
    for size in (2, 3, 17, 60):
        for ties in (3, 1000):
            scores = draw.integers(0, ties, size).astype(np.float32)
            positive = draw.random(size) < 0.4
            positive[:2] = True, False
            pairs = [(hit > miss) + (hit == miss) / 2 for hit in scores[positive] for miss in scores[~positive]]
            assert auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.ones(3), np.ones(3, bool)) is None
    assert auc(np.ones(0), np.ones(0, bool)) is None


def test_the_auc_of_several_classes_is_their_mean_over_those_that_occur() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], np.float32)
    labels = np.array([0, 1, 0, 1])
    found = class_metrics(scores, labels)
    assert found == {"accuracy": 0.75, "auc": 1.0}
    labels[3] = 2
    expected = [1.0, 2 / 3, 0.5]  # class 2's scores are all the same
    assert class_metrics(scores, labels)["auc"] == pytest.approx(np.mean(expected))
    assert class_metrics(scores, np.zeros(4, int)) == {"accuracy": 0.75}  # one class alone has no AUC
    assert class_metrics(scores[:, :2], np.array([1, 0, 1, 0]))["auc"] == 0.0
    assert class_metrics(scores[:0], labels[:0]) == {}


def test_errors_of_numbers_are_in_their_unit() -> None:
    found = number_metrics(np.array([1.0, 2.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert found == {"rmse": pytest.approx(math.sqrt(4 / 3)), "r2": pytest.approx(1 - 4 / 2)}
    assert number_metrics(np.ones(2), np.ones(2)) == {"rmse": 0.0}  # R² has no meaning for a constant
    assert number_metrics(np.ones(0), np.ones(0)) == {}


def test_several_numbers_are_learned_by_the_mean_of_their_squared_errors() -> None:
    label = {"columns": ["a", "b"], "kind": "numbers", "mean": [10.0, -1.0], "std": [2.0, 0.5]}
    target = Target.of(table(label))
    assert (target.kind, target.outputs) == ("numbers", 2)
    outputs, labels = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[12.0, -1.0], [10.0, 0.0]])
    assert target.losses(outputs, labels).tolist() == [(1 + 1) / 2, (4 + 4) / 2]
    scores = target.scores(outputs)
    assert scores.tolist() == [[10.0, -0.5], [14.0, -1.0]]
    each = [number_metrics(scores[:, n].numpy(), labels[:, n].numpy()) for n in range(2)]
    found = target.metrics(scores.numpy(), labels.numpy())
    assert found == {name: pytest.approx((each[0][name] + each[1][name]) / 2) for name in ("rmse", "r2")}
    assert Target.of(table({**label, "columns": ["v"]})).outputs == 2


@pytest.mark.parametrize(("dtype", "metric"), [(np.float32, "r2"), (np.int64, "accuracy")])
def test_several_labels_are_learned_from_a_version(tmp_path: Path, dtype: type, metric: str) -> None:
    splits = {name: making.table_samples(count, seed=count) for name, count in (("train", 300), ("validation", 60))}
    for drawn in splits.values():
        inputs = (drawn["features"][:, :2] - 5) / 3
        drawn["label"] = (inputs if dtype == np.float32 else inputs > 0).astype(dtype)
    uri = making.publish(str(tmp_path), {name: [drawn] for name, drawn in splits.items()}, batch_size=10)
    sent: list[dict[str, Any]] = []
    config = settings(epochs=8, hidden=(32,))
    with open_run(uri, open_version(uri).definition, config, send=lambda message, _: sent.append(message)) as run:
        train(run)
    assert sent[-1]["metrics"][metric] > 0.85
    assert sent[-1]["metrics"]["train_loss"] < sent[0]["metrics"]["train_loss"] / 2


def test_sequences_have_no_default_model() -> None:
    with pytest.raises(ConfigError, match="sequences have no default model: train by a function of your own"):
        build_model({"kind": "sequences", "label": CLASSES}, settings())


def test_several_classes_are_learned_by_the_sum_of_their_cross_entropies() -> None:
    label = {"columns": ["a", "b"], "kind": "classes", "classes": [["x", "y", "z"], ["no", "yes"]]}
    target = Target.of(table(label))
    assert build_model(table(label), settings())(torch.zeros(2, 4)).shape == (2, 5)
    outputs, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12).reshape(6, 2) % 2
    expected = [
        nn.functional.cross_entropy(outputs[:, :3], labels[:, 0], reduction="none"),
        nn.functional.cross_entropy(outputs[:, 3:], labels[:, 1], reduction="none"),
    ]
    assert torch.allclose(target.losses(outputs, labels), sum(expected))
    scores = target.scores(outputs)
    assert torch.allclose(scores.sum(1), torch.full((6,), 2.0))
    hits = (scores[:, :3].argmax(1) == labels[:, 0]).float() + (scores[:, 3:].argmax(1) == labels[:, 1]).float()
    assert target.metrics(scores.numpy(), labels.numpy())["accuracy"] == pytest.approx(float(hits.mean()) / 2)
    with pytest.raises(ConfigError, match="label 'b' has 1 class: a model needs two"):
        Target.of(table({**label, "classes": [["x", "y"], ["no"]]}))
