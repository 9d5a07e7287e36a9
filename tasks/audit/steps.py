"""What a step of a training saw: the batch that the training's own stream delivers at a place, with its pictures.

A place is a saved state of a stream, or the number of a step in an epoch with the settings of the last training on the
copy. The stream is opened as it was, goes there and delivers one batch: nothing is computed in another way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tasks.audit.copies import source_rows, trainings_on
from tasks.audit.explanation import Explanation, Section, version_section
from tasks.io import storage
from tasks.io.errors import ConfigError, InputError, PipelineError
from tasks.io.tensors import AnyArray, UInt8Array
from tasks.io.text import plural
from tasks.loader.batch_stream import Batch
from tasks.loader.batches import MASK, SOURCE
from tasks.loader.mixed import MixedStream
from tasks.loader.samples import FEATURES, IMAGE, LABEL, LENGTH, SAMPLE_ID, SEQUENCE, WEIGHT, SampleFormat
from tasks.loader.stream import TrainingStream
from tasks.report.plots import font, one_line
from tasks.store.manifest import Manifest
from tasks.store.reading import read_manifest
from tasks.store.settings import load_object

_CURE = "give what state_dict() of a stream on this version gave, as JSON"
_OF_ALL = {
    "split": str,
    "seed": int,
    "batch_size": int,
    "shuffle": bool,
    "remainder": str,
    "epoch": int,
    "batches": int,
}
_GAP, _LINE, _LETTERS, _LETTER_WIDTH, _NARROWEST = 8, 18, 12, 7, 112  # of a sheet, pixels
_MOST_PICTURES = 1024
_DRAWN: tuple[dict[str, Any], ...] = ({}, {"balance": "class"}, {"weights": WEIGHT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked for.

    Attributes:
        state: file with a saved state as JSON; None for the settings of the last training on the copy.
        epoch: epoch, from 0; None: that of the state, or the first one.
        step: step in it, from 0; None: the one that follows the state, or the first one.
        rank: worker whose batch is shown.
        world_size: number of workers; None: those of the training, with a state one.
        seed: seed of the order; None: that of the training. A state has its own.
        batch_size: samples of a batch of each worker; None: likewise.
        transform: import path of the training's transform, or settings of an `Augmentation` as JSON.
        mixup: alpha of MixUp; None: that of the state, or none.
        cutmix: alpha of CutMix; None: likewise.
        picture: file to draw the batch's pictures to.
    """

    state: str | None = None
    epoch: int | None = None
    step: int | None = None
    rank: int = 0
    world_size: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    transform: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    picture: str | None = None


Stream = TrainingStream | MixedStream


def explain_step(root: str, manifest: Manifest, asked: Asked) -> Explanation:
    """Show what a step of a training on a streaming-ready copy saw.

    Raises:
        ConfigError: an argument is invalid, or contradicts the state.
        InputError: the state can't be read, or is of another version or stream; or there is no such step.
        CorruptVersion: a file is missing or damaged.
    """
    if asked.picture is not None and manifest.definition["kind"] != "images":
        raise ConfigError(f"--picture shows images, and {manifest.dataset} holds none; leave it out")
    state = None if asked.state is None else _read_state(asked.state)
    versions = [manifest] if state is None else _versions(root, manifest, state)
    with _opened(root, versions, state, asked) as stream:
        _go(stream, state, asked)
        place = stream.state_dict()
        batch = next(iter(stream))
        steps, workers = len(stream), stream.world_size
    step, between = divmod(place["batches"], workers)
    name = f"after {place['batches']} batches" if between else f"step {step}"
    samples = _samples(root, versions, batch)
    sections = [
        *([] if asked.picture is None else [_picture(asked.picture, batch, samples.rows)]),
        _stream(place, asked, steps, workers),
        samples,
        version_section(root, manifest),
    ]
    headline = f"{name} of epoch {place['epoch']} of {manifest}"
    what = f"worker {asked.rank} of {workers} got {plural(len(batch[SAMPLE_ID]), 'sample')}"
    return Explanation(manifest, name, "held", f"{headline}: {what}", sections)


def _read_state(file: str) -> dict[str, Any]:
    """Read a state, with the fields that each has."""
    try:
        state = json.loads(storage.read_bytes(storage.normalise(file)))
    except FileNotFoundError as error:
        raise InputError(f"--state {file}: there is no such file; {_CURE}") from error
    except ValueError as error:
        raise InputError(f"--state {file} isn't JSON ({error}); {_CURE}") from error
    if not isinstance(state, dict):
        raise InputError(f"--state {file} holds a {type(state).__name__}; {_CURE}")
    for field, kind in _OF_ALL.items():
        if type(state.get(field)) is not kind:
            raise InputError(f"--state {file}: its {field} is {state.get(field)!r}, no {kind.__name__}; {_CURE}")
    return state


def _versions(root: str, manifest: Manifest, state: Mapping[str, Any]) -> list[Manifest]:
    """Return the versions of a state's stream, of which the named one must be one."""
    try:
        names = list(zip(state["datasets"], state["versions"], strict=True)) if "datasets" in state else []
        names = names or [(state["dataset"], state["version"])]
        named = {(str(dataset), int(version)) for dataset, version in names}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the state doesn't say of which version it is ({error!r}); {_CURE}") from error
    if (manifest.dataset, manifest.version) not in named:
        others = ", ".join(f"{dataset} v{version}" for dataset, version in sorted(named))
        raise InputError(f"the state is of {others}, not of {manifest}: name that one")
    return [read_manifest(root, dataset, version) for dataset, version in names]


def _opened(root: str, versions: Sequence[Manifest], state: Mapping[str, Any] | None, asked: Asked) -> Stream:
    """Open the stream of a state, or of the last training on a copy."""
    uris = [version.uri(root) for version in versions]
    options: dict[str, Any] = {"as_numpy": True, "normalise": False, "prefetch": 0, "rank": asked.rank}
    options["transform"] = None if asked.transform is None else _transform(asked.transform)
    if state is None:
        return _of_training(root, versions[0], uris[0], asked, options)
    for field in ("seed", "batch_size", "mixup", "cutmix"):
        if getattr(asked, field) is not None:
            raise ConfigError(f"--{field.replace('_', '-')} and --state: the state says it; leave one of them out")
    if "augmentation" in state and asked.transform is None:
        raise ConfigError(
            "the state is of a stream that augments, and has only a digest of how: give its settings as --transform, "
            """such as '{"size": 192}', or the import path of the Augmentation"""
        )
    fields = ("split", "seed", "batch_size", "shuffle", "remainder", "mixup", "cutmix")
    options |= {field: state[field] for field in fields if field in state}
    options["world_size"] = 1 if asked.world_size is None else asked.world_size
    if "datasets" in state:
        return _of_mix(uris, state, options)
    options["columns"] = _columns(versions[0])
    if "pack" in state:
        raise ConfigError(
            "the state is of rows that several sequences fill, which aren't shown one by one: open the stream with "
            f"pack={state['pack']!r} in Python, load the state, and take one batch"
        )
    options |= {field: state[field] for field in ("length_buckets", "max_length") if field in state}
    if "weights" not in state:
        return TrainingStream(uris[0], **options)
    return _of_draws(uris[0], state, options)


def _of_training(root: str, manifest: Manifest, uri: str, asked: Asked, options: dict[str, Any]) -> Stream:
    """Open the stream of the last training on a copy, or of its flow's settings."""
    _, training = trainings_on(root, manifest)[0]
    if training.get("mix"):
        raise ConfigError(
            f"the last training on {manifest} mixed versions: give a saved state of its stream as --state"
        )
    balance = training.get("balance")
    drawn: dict[str, Any] = {"weights" if balance == WEIGHT else "balance": balance}
    return TrainingStream(
        uri,
        batch_size=training["batch_size"] if asked.batch_size is None else asked.batch_size,
        seed=training["seed"] if asked.seed is None else asked.seed,
        world_size=training["workers"] if asked.world_size is None else asked.world_size,
        remainder=training["remainder"],
        columns=_columns(manifest),
        mixup=asked.mixup,
        cutmix=asked.cutmix,
        **drawn,
        **options,
    )


def _of_mix(uris: Sequence[str], state: Mapping[str, Any], options: dict[str, Any]) -> Stream:
    try:
        weights: dict[Any, float] = dict(zip(uris, state["opened_with"], strict=True))
        size = {"epoch_size": state["epoch_size"]} if state["by"] == "proportion" else {}
        return MixedStream(weights, mix=state["mix"], by=state["by"], **size, **options)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PipelineError):
            raise
        raise InputError(f"the state isn't that of a mix ({error!r}); {_CURE}") from error


def _of_draws(uri: str, state: Mapping[str, Any], options: dict[str, Any]) -> Stream:
    """Open a stream of drawn samples, whose weights a state has as a digest only."""
    drawn: dict[str, Any] = {field: state.get(field) for field in ("epoch_size", "replacement")}
    for by in _DRAWN:
        try:
            stream = TrainingStream(uri, **by, **drawn, **options)
        except ConfigError:
            if not by:  # else there are no classes, or no weights
                raise
            continue
        if stream.state_dict()["weights"] == state["weights"]:
            return stream
        stream.close()
    raise ConfigError(
        "the state is of samples drawn by weights by class or by id, of which it has only a digest: open the stream "
        "with them in Python, load the state, and take one batch"
    )


def _columns(manifest: Manifest) -> list[str]:
    """Return all columns of a copy's samples that there are."""
    return list(SampleFormat.of(manifest.definition).delivered)


def _transform(text: str) -> Any:
    """Return the transform that a text names, or describes."""
    if not text.lstrip().startswith("{"):
        return load_object("--transform", text)
    from tasks.images.config import Augmentation

    try:
        return Augmentation.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ConfigError(f"--transform {text}: no Augmentation ({where}: {first['msg']})") from error


def _go(stream: Stream, state: Mapping[str, Any] | None, asked: Asked) -> None:
    """Go to the place that is asked for."""
    place = dict(stream.state_dict() if state is None else state)
    if asked.epoch is not None and asked.epoch != place["epoch"]:
        if isinstance(stream, MixedStream):
            raise ConfigError(
                f"--epoch {asked.epoch}: the state is of epoch {place['epoch']} of a mix, whose sources go on from "
                "epoch to epoch; give a state of that epoch"
            )
        place |= {"epoch": asked.epoch, "batches": 0}
    if asked.step is not None:
        if not 0 <= asked.step < len(stream):
            raise InputError(f"--step {asked.step}: an epoch has steps 0 to {len(stream) - 1}")
        place["batches"] = asked.step * stream.world_size
    stream.load_state_dict(place)


def _stream(place: Mapping[str, Any], asked: Asked, steps: int, workers: int) -> Section:
    """Return how the stream was opened, and its place."""
    facts: dict[str, object] = {**place, "worker": f"{asked.rank} of {workers}", "steps of an epoch": steps}
    notes = []
    if asked.transform is not None:
        facts["transform"] = asked.transform
    else:
        notes.append("Without --transform: the inputs are as stored. A state doesn't tell that there was a function.")
    return Section(title="stream", facts=facts, notes=notes)


def _samples(root: str, versions: Sequence[Manifest], batch: Batch) -> Section:
    """Return the samples of a batch, in its order, each with its source row."""
    count, ids = len(batch[SAMPLE_ID]), batch[SAMPLE_ID]
    real, source = batch.get(MASK, np.ones(count, np.bool_)), batch.get(SOURCE, np.zeros(count, np.int64))
    found: dict[tuple[int, int], Mapping[str, Any]] = {}
    notes = []
    for number in np.unique(source).tolist():
        try:
            own = source_rows(root, versions[number], ids[source == number])
        except PipelineError as fault:
            notes.append(f"The source rows can't be told: {fault}")
            continue
        found |= {(number, sample): row for sample, row in own.items()}
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = []
    for place in range(count):
        number, sample = int(source[place]), int(ids[place])
        version = versions[number]
        row: dict[str, Any] = {"place": place, "sample id": str(sample)}
        row |= {"version": str(version)} if len(versions) > 1 else {}
        row |= dict.fromkeys(names) | dict(found.get((number, sample), {}))
        row |= {LABEL: _label(version, batch[LABEL][place])} if LABEL in batch else {}
        row |= {WEIGHT: float(batch[WEIGHT][place])} if WEIGHT in batch else {}
        row |= {} if real.all() else {"real": "yes" if real[place] else "fills the batch"}
        row |= {FEATURES: batch[FEATURES][place].tolist()} if FEATURES in batch else {}
        if SEQUENCE in batch:
            row |= {LENGTH: int(batch[LENGTH][place])}
            row |= {SEQUENCE: batch[SEQUENCE][place][: row[LENGTH]].tolist()}
        rows.append(row)
    shown = tuple(name for name in rows[0] if name not in (FEATURES, SEQUENCE))
    return Section(title="samples", facts={"real": int(real.sum())}, rows=rows, shown=shown, notes=notes)


def _label(manifest: Manifest, label: Any) -> Any:
    """Return a class by its name, a mixture as the share of each class, or the number; a list of several labels."""
    described = manifest.definition["label"]
    classes, kind = described.get("classes", []), described["kind"]
    if kind == "classes":
        return [names[one] for one, names in zip(label.tolist(), classes, strict=True)]
    if kind != "class":
        return label.tolist()
    if np.ndim(label):
        return {classes[number]: float(label[number]) for number in np.flatnonzero(label).tolist()}
    return classes[int(label)]


def _picture(path: str, batch: Batch, rows: Sequence[Mapping[str, object]]) -> Section:
    """Draw the pictures of a batch side by side, each with its pixels as they are, and its place and label below.

    Of a mixture it is the larger part.
    """
    from PIL import Image, ImageDraw

    values: AnyArray = batch[IMAGE][:_MOST_PICTURES]
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise ConfigError(
            f"--picture: inputs of shape {values.shape[1:]} are no pictures of 1 or 3 channels; leave it out"
        )
    pixels, said = _levels(values)
    count, height, width, _ = pixels.shape
    across = math.ceil(math.sqrt(count))
    right, down = max(width, _NARROWEST) + _GAP, height + _LINE + _GAP
    sheet = Image.new("RGB", (_GAP + across * right, _GAP + math.ceil(count / across) * down), "white")
    pen, letters = ImageDraw.Draw(sheet), font(_LETTERS)
    for place in range(count):
        left, top = _GAP + place % across * right, _GAP + place // across * down
        sheet.paste(Image.fromarray(pixels[place]), (left, top))
        label = rows[place].get(LABEL, "")
        words = (
            max((share, f"{share:.0%} {name}") for name, share in label.items())[1]
            if isinstance(label, dict)
            else label
        )
        text = one_line(f"{place} {words}", (right - _GAP) // _LETTER_WIDTH)
        pen.text((left, top + height + 2), text, fill="black", font=letters)
    try:
        sheet.save(path, lossless=True)
    except OSError as fault:
        raise ConfigError(f"--picture {path} can't be written: {fault.strerror}; give another place") from fault
    facts = {
        "written to": str(Path(path).resolve()),
        "shows": f"{plural(count, 'picture')} of {len(batch[IMAGE])}, {across} in a row, by place and label",
        "pixels": said,
    }
    return Section(title="picture", facts=facts)


def _levels(values: AnyArray) -> tuple[UInt8Array, str]:
    """Return pictures as uint8 (n, height, width, 3), and how they were made of the batch's (n, channels, …)."""
    said = "as delivered"
    if values.dtype != np.uint8:
        low, high = float(values.min(initial=0)), float(values.max(initial=1))
        values = np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
        said = f"floats, of which {low:g} is black and {high:g} white"
    last = np.moveaxis(values, 1, 3)
    return np.ascontiguousarray(np.broadcast_to(last, (*last.shape[:3], 3))), said
