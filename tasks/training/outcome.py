"""The verdict of a training: it learned, it wasn't short of data, and every sample counted. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.io.numerals import number, plural, share
from tasks.quality.rules import gate
from tasks.store.manifest import CheckResult, GateResult, Verdict
from tasks.training.monitoring import WAIT_BOUND, TrainingResult, judge_bound, throughput

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
        checks.append(_consumed(result, int(definition["samples"]["train"])))
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
    """Check that each epoch covered the whole split: without padding, the workers' samples add up to it."""
    totals: dict[int, int] = {}
    for one in result.workers:
        totals[one.epoch] = totals.get(one.epoch, 0) + one.samples + one.skipped_samples
    odd = {epoch: total for epoch, total in sorted(totals.items()) if total != samples}
    if odd:
        epoch, total = next(iter(odd.items()))
        message = f"Epoch {epoch} had {total:,} samples, and the split has {samples:,}."
        return _check("consumed", "fail", float(total), number(samples), message)
    message = f"Each epoch had all {plural(samples, 'sample')} once."
    return _check("consumed", "pass", float(samples), number(samples), message)
