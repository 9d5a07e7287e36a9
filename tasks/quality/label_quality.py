"""Rules of the quality gate for the target, and for features that give it away. Pure."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.numerals import number, plural
from tasks.quality import leakage
from tasks.quality.profile import ColumnPartial
from tasks.quality.rules import at_most, check_class_balance
from tasks.store.manifest import CheckResult, Verdict

FEW_INTEGERS = 50
"""Whole numbers of at most this many different values are treated as classes, as training-delivery does."""


def classes_of(target: ColumnPartial) -> dict[str, int] | None:
    """Return the classes of a target with their rows; None for a number, and for text of too many values to count.

    Text, booleans, few whole numbers and any two numbers are classes, named by their text (`leakage.as_text`).
    """
    if target.top is not None:
        return None if target.top.counts is None else dict(target.top.counts)
    sketch, whole = target.quantiles, target.type.startswith(("int", "uint"))
    if sketch is None or not sketch.is_exact or len(sketch.lows) > (FEW_INTEGERS if whole else 2):
        return None
    texts = leakage.as_text(pa.chunked_array([pa.array(sketch.lows)]))
    return dict(zip(texts.to_pylist(), sketch.counts.tolist(), strict=True))


def check_target(column: str, target: ColumnPartial, rarest_share: float) -> CheckResult:
    """Check that a target can be learned: fail if it is constant, warn if a class has less than `rarest_share`."""
    counts = classes_of(target)
    if counts is not None:
        balance = check_class_balance(column, list(counts.items()), rarest_share)
        verdict: Verdict = "warn" if balance.verdict == "fail" and len(counts) > 1 else balance.verdict
        return balance.model_copy(update={"name": "target", "verdict": verdict})
    if target.kind == "string":
        message = f"{column} has too many different values, or long ones, to be classes."
        return CheckResult(
            name="target", column=column, verdict="fail", figure="text", bound="classes", message=message
        )
    spread = target.moments.std if target.moments is not None else None
    found = math.nan if spread is None else spread
    message = f"{column} is a number that spreads by {number(found)} about its mean."
    verdict = "pass" if found > 0 else "fail"
    return CheckResult(name="target", column=column, verdict=verdict, figure=found, bound="> 0", message=message)


def check_unmatched(group: str, matched: int, rows: int, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of rows for which a group had no features in time against two bounds; 0 if there is no row."""
    missing = rows - matched
    share = missing / rows if rows else 0.0
    message = f"{missing:,} of {plural(rows, 'row')} ({share:.2%}) found no {group} in time."
    return at_most("unmatched", group, share, (warn_above, fail_above), message)


def check_canary(planted: int) -> CheckResult:
    """Check that future rows were added for a trial; had one changed a result, the job would have failed already."""
    message = f"{plural(planted, 'feature row')} from the future, added for a trial, changed nothing."
    if not planted:
        message = "No feature row from the future could be added for a trial: nothing shows that none gets in."
    return CheckResult(
        name="canary",
        verdict="pass" if planted else "fail",
        figure=float(planted),
        bound="≥ 1",
        message=message,
    )


def prepare_target(
    target: pa.ChunkedArray, partial: ColumnPartial, entities: pa.ChunkedArray | None = None
) -> leakage.Target | None:
    """Return the target of the rows that have one, as `check_leakage` takes it; None if it has no classes to learn.

    Args:
        target: Target of those rows, without nulls.
        partial: Profile of the target over all rows.
        entities: Entity of each row.
    """
    counts = classes_of(partial)
    if counts is None:
        if not (pt.is_integer(target.type) or pt.is_floating(target.type) or pt.is_decimal(target.type)):
            return None
        return leakage.prepare(target, (), entities)
    seen = set(pc.unique(leakage.as_text(target)).to_pylist())
    return leakage.prepare(target, tuple(name for name in counts if name in seen), entities) if len(seen) > 1 else None


def check_leakage(
    column: str, feature: pa.ChunkedArray, target: leakage.Target, warn_above: float, fail_above: float
) -> CheckResult:
    """Check how well a feature alone predicts the target (see `tasks.quality.leakage`), against two bounds in [0, 1].

    A bound below what chance explains once in ten thousand times is raised to that, so that small samples raise no
    false alarm. Features of a kind without order or categories aren't judged: they pass with a note.
    """
    found = leakage.leakage(feature, target)
    if found is None:
        message = f"Leakage through {column} isn't judged: it is {feature.type}."
        bound = f"≤ {number(warn_above)}"
        return CheckResult(name="leakage", column=column, verdict="pass", bound=bound, message=message)
    told = f"explains {found.score:.1%} of the target's variance"
    if target.classes:
        one = f"{found.about!r} from the others" if len(target.classes) > 2 else "one class from the other"
        told = f"tells {one}: area under the ROC curve {found.score:.4f}"
    message = f"{column} alone {told}."
    if found.chance >= 1:
        message = f"Leakage through {column} isn't judged: {plural(len(feature), 'row')} are too few."
    elif found.chance > warn_above:
        message += f" Chance explains up to {found.chance:.3f}."
    elif found.score > warn_above:
        message += " Is it known before the event?"
    bounds = max(warn_above, min(found.chance, 1.0)), max(fail_above, min(found.chance, 1.0))
    return at_most("leakage", column, min(found.score, 1.0), bounds, message)
