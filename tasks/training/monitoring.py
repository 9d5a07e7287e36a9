"""Data report of a training, and its verdict: figures of each worker, the bottleneck, charts, and checks.

The verdict: the training learned, it wasn't short of data, and every sample counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.io.text import number, plural, share
from tasks.quality.rules import gate
from tasks.report.plots import BEFORE_COLOUR, INK_COLOUR, NOW_COLOUR, compact_png, wide_figure
from tasks.report.report import DataTable, Picture
from tasks.store.manifest import CheckResult, GateResult, Verdict

WAIT_BOUND = 0.1
"""A training that waits for batches for more than this share of its time is data-bound."""

_COLOURS = (NOW_COLOUR, BEFORE_COLOUR, "#2f9e78", "#9c5fc0", "#c3a13a", "#8d97a8")
_NAMES = {"auc": "AUC", "rmse": "RMSE", "r2": "R²"}
_WORKERS_SHOWN = 32
_MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEpoch:
    """Deliveries of one worker's stream in one epoch, or since a restart within it.

    Attributes:
        epoch: number of the epoch, from 0.
        worker: rank.
        samples: real samples, without padding.
        seconds: duration of the epoch's training, without validation.
        wait_seconds: part of it spent waiting for batches.
        bytes_read: bytes of the samples, from any source.
        cache_hits: files of a remote store that were in the local cache.
        cache_misses: files that were downloaded.
        skipped_samples: samples skipped in corrupt batches.
    """

    epoch: int
    worker: int
    samples: int
    seconds: float
    wait_seconds: float
    bytes_read: int
    cache_hits: int
    cache_misses: int
    skipped_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Bottleneck of a training.

    Attributes:
        verdict: 'data-bound' if the workers waited for data for more than `WAIT_BOUND` of their time.
        wait_share: share of all workers' time spent in waiting for data.
        advice: a recommendation in a sentence or two.
    """

    verdict: Literal["data-bound", "compute-bound"]
    wait_share: float
    advice: str

    @property
    def sentence(self) -> str:
        """The verdict, its reason and the advice, in one line."""
        return (
            f"The training is {self.verdict}: its workers spent {share(self.wait_share)} of their time in waiting "
            f"for data (above {share(WAIT_BOUND)} is data-bound). {self.advice}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """Result of a training, over all calls for the same run.

    Attributes:
        version_uri: version used for training.
        run_uri: directory of the run, with its checkpoints.
        epochs: metrics of each epoch as rank 0 reported them, with its number under 'epoch'; the last report counts.
        workers: deliveries of each worker's stream in each epoch.
        restarts: number of times that workers died or failed and all of them were restarted.
        checkpoint_uri: directory of the last checkpoint; None if none was kept.
        seconds: wall time of this call, including the start of the workers.
        drawn: samples of each class, weight or version, 'natural' in the split and 'epoch' in the first epoch; empty if
            each sample of one version comes once.
    """

    version_uri: str
    run_uri: str
    epochs: tuple[dict[str, Any], ...]
    workers: tuple[WorkerEpoch, ...]
    restarts: int
    checkpoint_uri: str | None
    seconds: float
    drawn: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def judge_bound(workers: Sequence[WorkerEpoch]) -> Bound | None:
    """Return the bottleneck, data or computing; None if no worker has delivered anything.

    The first epoch counts only if it is the only one: it fills the cache and compares the batches' checksums.
    """
    steady = _steady(workers)
    seconds = sum(one.seconds for one in steady)
    if seconds <= 0:
        return None
    wait_share = min(sum(one.wait_seconds for one in steady) / seconds, 1.0)
    if wait_share <= WAIT_BOUND:
        advice = "Faster delivery wouldn't shorten it; a GPU, more workers, a smaller model or larger batches might."
        return Bound(verdict="compute-bound", wait_share=wait_share, advice=advice)
    if any(one.cache_misses for one in steady):
        advice = (
            "Files were fetched again after they had been cached: raise cache_gigabytes above the version's size, or "
            "put cache_dir on a larger disk."
        )
    elif any(one.cache_hits for one in steady):
        advice = "The files came from the local cache: put cache_dir on a faster disk, or give each worker more CPU."
    else:
        advice = (
            "Put the data on a faster disk or on nodes whose memory holds it, give each worker more CPU, or take "
            "larger batches. More workers on the same disk won't help."
        )
    return Bound(verdict="data-bound", wait_share=wait_share, advice=advice)


def _steady(workers: Sequence[WorkerEpoch]) -> list[WorkerEpoch]:
    """Return the figures of every epoch but the first, if there are others."""
    first = min((one.epoch for one in workers), default=0)
    return [one for one in workers if one.epoch > first] or list(workers)


def throughput(workers: Sequence[WorkerEpoch]) -> dict[int, float]:
    """Return samples a second of all workers together, by epoch: the slowest worker's time counts."""
    found = {}
    for epoch in sorted({one.epoch for one in workers}):
        own = [one for one in workers if one.epoch == epoch]
        found[epoch] = sum(one.samples for one in own) / max(*(one.seconds for one in own), 1e-9)
    return found


def worker_table(workers: Sequence[WorkerEpoch]) -> DataTable:
    """Return a row for each worker over all epochs, with the wait share without the first epoch; the verdict below."""
    rows = []
    for worker in sorted({one.worker for one in workers}):
        own = [one for one in workers if one.worker == worker]
        samples, seconds = sum(one.samples for one in own), sum(one.seconds for one in own)
        later = [one for one in _steady(workers) if one.worker == worker]
        waited = sum(one.wait_seconds for one in later) / max(sum(one.seconds for one in later), 1e-9)
        rows.append(
            (
                worker,
                samples,
                round(samples / max(seconds, 1e-9), 1),
                round(waited, 4),
                round(sum(one.bytes_read for one in own) / _MB, 3),
                sum(one.cache_hits for one in own),
                sum(one.cache_misses for one in own),
                sum(one.skipped_samples for one in own),
            )
        )
    columns = ("worker", "samples", "samples/s", "wait share", "MB read", "cache hits", "cache misses", "skipped")
    bound = judge_bound(workers)
    return DataTable(
        title="Delivery by worker", columns=columns, rows=tuple(rows), note=bound.sentence if bound else ""
    )


def epoch_table(epochs: Sequence[Mapping[str, Any]], workers: Sequence[WorkerEpoch]) -> DataTable:
    """Return a row for each epoch: its metrics and its speed.

    Args:
        epochs: Metrics of each epoch, with its number under 'epoch'.
        workers: Figures of the workers.
    """
    names = _metric_names(epochs)
    speed = throughput(workers)
    rows = tuple(
        (
            int(epoch["epoch"]),
            *(_rounded(epoch.get(name)) for name in names),
            round(speed[epoch["epoch"]], 1) if epoch["epoch"] in speed else None,
        )
        for epoch in epochs
    )
    columns = ("epoch", *map(_label, names), "samples/s")
    return DataTable(title="Epochs", columns=columns, rows=rows)


_DRAWN = {
    "class": "Balanced classes",
    "weight": "Samples drawn by weight",
    "version": "Mixed versions",
}


def drawn_table(drawn: Mapping[str, Mapping[str, int]], what: str) -> DataTable:
    """Return a row for each class, weight, or version of a mix: its samples in the split, and in an epoch.

    Args:
        drawn: As `TrainingResult.drawn`.
        what: 'class', 'weight' or 'version'.
    """
    rows = tuple((name, count, drawn["epoch"][name]) for name, count in drawn["natural"].items())
    return DataTable(title=_DRAWN[what], columns=(what, "in the split", "in an epoch"), rows=rows)


def training_pictures(epochs: Sequence[Mapping[str, Any]], workers: Sequence[WorkerEpoch]) -> list[Picture]:
    """Return the charts of learning and of data delivery, without empty ones.

    Args:
        epochs: Metrics of each epoch, with its number under 'epoch'.
        workers: Figures of the workers.
    """
    pictures = []
    if any(len(epoch) > 1 for epoch in epochs):
        caption = "Losses of both splits, and the metrics of the validation split, by epoch."
        pictures.append(Picture.of("How it learned", caption, "image/png", learning_chart(epochs)))
    bound = judge_bound(workers)
    if bound is not None:
        caption = (
            "Samples a second of all workers by epoch, and the share of its time that each worker waited for data "
            "after the first epoch. "
        )
        picture = delivery_chart(workers)
        pictures.append(Picture.of("How it was fed", caption + bound.sentence, "image/png", picture))
    return pictures


def learning_chart(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot losses on the left and all other metrics on the right, by epoch, as PNG on a transparent ground.

    With an R², the RMSE, which has the label's unit, appears only in the table.
    """
    figure, (losses, others) = wide_figure(height=3.0, columns=2)
    names = _metric_names(epochs)
    names = [name for name in names if name != "rmse" or "r2" not in names]
    for axes, shown in ((losses, [n for n in names if "loss" in n]), (others, [n for n in names if "loss" not in n])):
        for name, colour in zip(shown, _COLOURS, strict=False):
            points = [(epoch["epoch"], epoch[name]) for epoch in epochs if epoch.get(name) is not None]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=_label(name))
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if shown:
            axes.legend(frameon=False, labelcolor=INK_COLOUR, fontsize=9.5)
        else:
            axes.set_yticks([])
    return compact_png(figure)


def delivery_chart(workers: Sequence[WorkerEpoch]) -> bytes:
    """Plot throughput by epoch on the left, wait share by worker on the right, as PNG on a transparent ground."""
    figure, (speed, waits) = wide_figure(height=3.0, columns=2)
    found = throughput(workers)
    speed.plot(list(found), list(found.values()), color=NOW_COLOUR, marker="o", markersize=4)
    speed.set_ylim(0, max(found.values(), default=0) * 1.1 or 1)
    speed.set_xlabel("epoch")
    speed.set_ylabel("samples a second")
    speed.xaxis.get_major_locator().set_params(integer=True)
    speed.yaxis.set_major_formatter(lambda value, _: number(float(value), in_full_below=1e7))

    ranks = sorted({one.worker for one in workers})[:_WORKERS_SHOWN]
    shares = []
    for rank in ranks:
        own = [one for one in _steady(workers) if one.worker == rank]
        shares.append(min(sum(one.wait_seconds for one in own) / max(sum(one.seconds for one in own), 1e-9), 1.0))
    places = list(range(len(ranks)))
    waits.barh(places, shares, height=0.72, color=NOW_COLOUR)
    for place, value in zip(places, shares, strict=True):
        waits.text(value, place, f" {share(value)}", va="center", color=INK_COLOUR, fontsize=9)
    waits.axvline(WAIT_BOUND, color=BEFORE_COLOUR, linewidth=1.2, linestyle="--", zorder=0)
    waits.set_yticks(places, [f"worker {rank}" for rank in ranks])
    waits.set_ylim(max(len(ranks), 1) - 0.4, -0.6)
    waits.set_xlim(0, min(max([*shares, WAIT_BOUND]) * 1.25, 1.15))
    waits.xaxis.set_major_formatter(lambda value, _: share(float(value)))
    waits.set_xlabel("time spent in waiting for data; dashed: data-bound from here on")
    return compact_png(figure)


def _metric_names(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for epoch in epochs for name in epoch if name != "epoch"))


def _label(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


# Scores without information: the AUC of a coin, the R² of the mean.
_CHANCE = {"auc": ("AUC", 0.5), "r2": ("R²", 0.0)}


def judge_training(result: TrainingResult, definition: Mapping[str, Any], epochs: int, remainder: str) -> GateResult:
    """Judge a training by the reports of its workers.

    Args:
        result: Reports of the workers.
        definition: `manifest.definition` of the version.
        epochs: Number of requested epochs.
        remainder: 'pad' or 'drop'.
    """
    checks = [_complete(result, epochs), _learned(result), *_fed(result), _skipped(result), _restarts(result)]
    if remainder == "pad" and not result.restarts:
        samples = sum(result.drawn["epoch"].values()) if result.drawn else int(definition["samples"]["train"])
        checks.append(_consumed(result, samples))
    return gate(checks)


def headline(result: TrainingResult) -> tuple[tuple[str, str], ...]:
    """Return the outcome in a few lines, each with a label."""
    last = result.epochs[-1] if result.epochs else {}
    figures = [f"{name.replace('_', ' ')} {number(value)}" for name, value in last.items() if name != "epoch"]
    speed = throughput(result.workers)
    if speed:
        figures.append(f"{number(round(speed[max(speed)]))} samples/s")
    lines = [("trained", f"{plural(len(result.epochs), 'epoch')} in {result.seconds:.0f} s: {', '.join(figures)}")]
    bound = judge_bound(result.workers)
    if bound is not None:
        lines.append(("limit", f"{bound.verdict}: {share(bound.wait_share)} of the time waited for data"))
    if result.checkpoint_uri is not None:
        lines.append(("model", result.checkpoint_uri))
    return tuple(lines)


def _check(name: str, verdict: Verdict, figure: float | None, bound: str, message: str) -> CheckResult:
    return CheckResult(name=name, verdict=verdict, figure=figure, bound=bound, message=message)


def _complete(result: TrainingResult, epochs: int) -> CheckResult:
    done = len(result.epochs)
    message = f"{done} of {plural(epochs, 'epoch')} were reported."
    return _check("complete", "pass" if done == epochs else "fail", float(done), number(epochs), message)


def _learned(result: TrainingResult) -> CheckResult:
    """Check that the last epoch's model predicts the validation split better than chance."""
    last = result.epochs[-1] if result.epochs else {}
    for name, (label, chance) in _CHANCE.items():
        if last.get(name) is not None:
            found = float(last[name])
            message = f"{label} on the validation split is {number(found)}, where chance gives {number(chance)}."
            return _check("learned", "pass" if found > chance else "warn", found, f"> {number(chance)}", message)
    message = "Nothing tells whether it learned: there is no AUC or R² of a validation split."
    return _check("learned", "warn", None, "above chance", message)


def _fed(result: TrainingResult) -> list[CheckResult]:
    bound = judge_bound(result.workers)
    if bound is None:
        return []
    verdict: Verdict = "pass" if bound.verdict == "compute-bound" else "warn"
    return [_check("delivery", verdict, bound.wait_share, f"≤ {number(WAIT_BOUND)}", bound.sentence)]


def _skipped(result: TrainingResult) -> CheckResult:
    skipped = sum(one.skipped_samples for one in result.workers)
    message = f"{plural(skipped, 'sample')} of damaged files were skipped." if skipped else "No sample was skipped."
    return _check("skipped", "warn" if skipped else "pass", float(skipped), "0", message)


def _restarts(result: TrainingResult) -> CheckResult:
    restarts = result.restarts
    message = (
        f"Workers were lost, and the training went on from a checkpoint, {plural(restarts, 'time')}."
        if restarts
        else "No worker was lost."
    )
    return _check("restarts", "warn" if restarts else "pass", float(restarts), "0", message)


def _consumed(result: TrainingResult, samples: int) -> CheckResult:
    """Check that the workers' samples of each epoch, without padding, add up to those of an epoch."""
    totals: dict[int, int] = {}
    for one in result.workers:
        totals[one.epoch] = totals.get(one.epoch, 0) + one.samples + one.skipped_samples
    odd = {epoch: total for epoch, total in sorted(totals.items()) if total != samples}
    if odd:
        epoch, total = next(iter(odd.items()))
        message = f"Epoch {epoch} had {total:,} samples, and an epoch has {samples:,}."
        return _check("consumed", "fail", float(total), number(samples), message)
    count = plural(samples, "sample")
    message = f"Each epoch had {count}, drawn by weight." if result.drawn else f"Each epoch had all {count} once."
    return _check("consumed", "pass", float(samples), number(samples), message)
