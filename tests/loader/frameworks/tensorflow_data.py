"""TensorFlow: a tf.data.Dataset over a stream of arrays. It runs ahead, so each batch brings its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from tasks.loader.stream import TrainingStream


def train(version: str, directory: str, steps: int | None = None) -> list[int]:
    """Train for some steps, or to the end of the epoch; return the ids of the samples."""
    seen: list[int] = []
    place = Path(directory, "stream.json")
    with TrainingStream(version, batch_size=32, as_numpy=True) as stream:
        features = stream.definition["feature_count"]
        if steps is None:
            stream.load_state_dict(json.loads(place.read_text()))

        def batches() -> Iterator[dict[str, Any]]:
            for batch in stream:
                yield {**batch, "place": json.dumps(stream.state_dict())}

        signature = {
            "place": tf.TensorSpec((), tf.string),
            "features": tf.TensorSpec((None, features), tf.float32),
            **{name: tf.TensorSpec((None,), tf.int64) for name in ("label", "sample_id")},
            "mask": tf.TensorSpec((None,), tf.bool),
        }
        weights = tf.Variable(tf.zeros((features, 2)))
        for step, batch in enumerate(tf.data.Dataset.from_generator(batches, output_signature=signature), 1):
            with tf.GradientTape() as tape:
                logits, real = batch["features"] @ weights, tf.cast(batch["mask"], tf.float32)
                loss = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
                mean = tf.reduce_sum(loss * real) / tf.reduce_sum(real)
            weights.assign_sub(0.1 * tape.gradient(mean, weights))
            seen += batch["sample_id"][batch["mask"]].numpy().tolist()
            if step == steps:
                place.write_bytes(batch["place"].numpy())
                break
    return seen
