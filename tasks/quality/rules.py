"""Rules of the quality gate: each judges a few figures and returns pass, warn or fail with one plain sentence.

The rules are pure: they take profiles, counts and bounds, independent of storage and counting.
A figure that is NaN fails, as no comparison with it holds.
`Figures` holds what they judge, `Written` also what the manifest is made of.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.io.text import number, plural
from tasks.quality import leakage
from tasks.quality.profile import ColumnPartial, TableProfile, binned, chance_index, population_stability_index
from tasks.store.manifest import CheckResult, ColumnProfile, ColumnSpec, FileEntry, GateResult, RowBalance, Verdict
from tasks.store.reservation import Reservation


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures that the gates of all kinds judge; a kind of dataset adds more.

    Attributes:
        schema: Schema of the data files.
        profile: Profile of the data files.
        balances: Row balances.
    """

    schema: pa.Schema
    profile: TableProfile
    balances: tuple[RowBalance, ...]


@dataclass(frozen=True, kw_only=True)
class Written(Figures):
    """Result of a job that wrote a version, before the commit.

    Attributes:
        reservation: Reservation of the version.
        files: Data files.
        rejected_files: Files of rejected rows.
        timings: Seconds of each stage.
    """

    reservation: Reservation
    files: tuple[FileEntry, ...]
    rejected_files: tuple[FileEntry, ...]
    timings: dict[str, float]

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """Schema of the data files, for the manifest."""
        return tuple(ColumnSpec(name=f.name, type=str(f.type), nullable=f.nullable) for f in self.schema)


SEVERITY: dict[Verdict, int] = {"pass": 0, "warn": 1, "fail": 2}


def gate(checks: Sequence[CheckResult]) -> GateResult:
    """Return the worst verdict of one or more checks, with all of them in their order."""
    assert checks, "a gate without checks would pass anything"
    worst: Verdict = max((check.verdict for check in checks), key=SEVERITY.__getitem__)
    return GateResult(verdict=worst, checks=tuple(checks))


def check_schema(actual: Mapping[str, str], expected: Mapping[str, str]) -> list[CheckResult]:
    """Check that columns and types are the expected ones; return one failure for each that differs.

    The order of columns and their nullability don't matter here: readers use names, and `check_nulls` counts.

    Args:
        actual: Arrow types, as pyarrow prints them, by column.
        expected: likewise.
    """
    results = []
    for name in sorted({*actual, *expected}):
        found, wanted = actual.get(name, "missing"), expected.get(name, "no such column")
        if found == wanted:
            continue
        if found == "missing":
            message = f"Column {name} ({wanted}) is missing."
        elif wanted == "no such column":
            message = f"Column {name} ({found}) isn't in the expected schema."
        else:
            message = f"Column {name} is {found}, not {wanted}."
        results.append(
            CheckResult(name="schema", column=name, verdict="fail", figure=found, bound=wanted, message=message)
        )
    if results:
        return results
    count = len(actual)
    message = f"All {plural(count, 'column')} have the expected types."
    return [CheckResult(name="schema", verdict="pass", figure=float(count), bound="as expected", message=message)]


def check_rows(count: int, minimum: int) -> CheckResult:
    """Check that there are enough rows."""
    message = f"{plural(count, 'row')}, where at least {minimum:,} are asked for."
    return at_least("rows", None, count, minimum, message)


def check_nulls(column: str, profile: ColumnProfile, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of nulls in a column against two bounds in [0, 1]; 0 if there is no row."""
    share = profile.nulls / profile.count if profile.count else 0.0
    message = f"{profile.nulls:,} of {plural(profile.count, 'row')} ({share:.2%}) have no {column}."
    return at_most("nulls", column, share, (warn_above, fail_above), message)


def check_finite(column: str, profile: ColumnProfile) -> CheckResult:
    """Check that a column is free of NaN and infinities."""
    odd = profile.nans + profile.infinities
    message = f"{column} holds {profile.nans:,} NaN and {plural(profile.infinities, 'infinity', 'infinities')}."
    return at_most("finite", column, odd, (0, 0), message)


def check_range(
    column: str,
    profile: ColumnProfile,
    minimum: float | None = None,
    maximum: float | None = None,
    warn_only: bool = False,
) -> CheckResult:
    """Check that a numeric column lies within [minimum, maximum]; None leaves that side open.

    NaN and infinities are outside every range. A column without any value passes: `check_nulls` judges it.
    """
    bound = f"{number(-math.inf if minimum is None else minimum)} to {number(math.inf if maximum is None else maximum)}"
    low, high = profile.minimum, profile.maximum
    worse: Verdict = "warn" if warn_only else "fail"
    verdict: Verdict = "pass"
    figure: float | str | None = None
    if profile.kind != "numeric":
        verdict, figure, message = worse, profile.kind, f"{column} is {profile.kind}: it has no range."
    elif profile.nans + profile.infinities:
        verdict, figure = worse, math.nan
        message = f"{column} holds {plural(profile.nans + profile.infinities, 'value')} that are NaN or infinite."
    elif low is None or high is None:
        message = f"{column} holds no value to judge."
    elif minimum is not None and not float(low) >= minimum:
        verdict, figure, message = worse, low, f"The smallest {column} is {number(low)}, below {number(minimum)}."
    elif maximum is not None and not float(high) <= maximum:
        verdict, figure, message = worse, high, f"The largest {column} is {number(high)}, above {number(maximum)}."
    else:
        figure = f"{number(low)} to {number(high)}"
        message = f"{column} lies between {number(low)} and {number(high)}."
    return CheckResult(name="range", column=column, verdict=verdict, figure=figure, bound=bound, message=message)


def check_unique(key: str, duplicates: int) -> CheckResult:
    """Check that a key is unique; `duplicates` counts the rows beyond the first of each key."""
    message = f"{plural(duplicates, 'row')} repeat the {key} of another." if duplicates else f"Every {key} is unique."
    return at_most("unique", key, duplicates, (0, 0), message)


def check_reference(column: str, missing: int, total: int, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of rows with a dangling reference against two bounds in [0, 1]; 0 if there is no row."""
    share = missing / total if total else 0.0
    message = f"{missing:,} of {plural(total, 'row')} ({share:.2%}) refer to a {column} that doesn't exist."
    return at_most("reference", column, share, (warn_above, fail_above), message)


def check_balance(balance: RowBalance) -> CheckResult:
    """Check that every row read is accounted for: in = out + rejected + filtered + deduplicated."""
    missing = balance.missing
    message = f"{balance.name}: all {plural(balance.rows_in, 'row')} are accounted for."
    if missing:
        message = (
            f"{balance.name}: {balance.rows_in:,} in, {balance.rows_out:,} out, {sum(balance.rejected.values()):,} "
            f"rejected, {sum(balance.filtered.values()):,} filtered, {balance.deduplicated:,} deduplicated: "
            f"{missing:+,} unaccounted for."
        )
    verdict: Verdict = "fail" if missing else "pass"
    return CheckResult(
        name="balance", column=balance.name, verdict=verdict, figure=float(missing), bound="= 0", message=message
    )


def check_rejected_share(balance: RowBalance, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of rejected rows against two bounds in [0, 1]; 0 if no row was read."""
    rejected = sum(balance.rejected.values())
    share = rejected / balance.rows_in if balance.rows_in else 0.0
    message = f"{balance.name}: {rejected:,} of {plural(balance.rows_in, 'row')} ({share:.2%}) were rejected."
    return at_most("rejected", balance.name, share, (warn_above, fail_above), message)


def check_outlier_share(column: str, outliers: int, total: int, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of outliers among the values against two bounds in [0, 1]; 0 if there is no value."""
    share = outliers / total if total else 0.0
    message = f"{outliers:,} of {plural(total, 'value')} ({share:.2%}) of {column} are outliers."
    return at_most("outliers", column, share, (warn_above, fail_above), message)


def check_ready_share(ready: int, total: int, warn_below: float, fail_below: float) -> CheckResult:
    """Check that a large enough share of rows is ready for training, by two bounds in [0, 1]; fail without any row."""
    share = ready / total if total else math.nan
    message = f"{ready:,} of {plural(total, 'row')} ({share:.2%}) are ready for training."
    failed = at_least("ready", None, share, fail_below, message)
    if failed.verdict == "fail" or share >= warn_below:
        return failed
    return failed.model_copy(update={"verdict": "warn", "bound": f"≥ {number(warn_below)}"})


def check_invalid_share(invalid: int, total: int, warn_above: float, fail_above: float) -> CheckResult:
    """Check the share of written rows that failed validation against two bounds in [0, 1]; 0 if there is no row."""
    share = invalid / total if total else 0.0
    message = f"{invalid:,} of {plural(total, 'row')} ({share:.2%}) failed validation."
    return at_most("invalid", None, share, (warn_above, fail_above), message)


def check_leak(groups: int) -> CheckResult:
    """Check that no group is in several splits; `groups` counts those that are."""
    message = f"{plural(groups, 'group')} of rows that belong together are in several splits."
    return at_most("leak", None, groups, (0, 0), message if groups else "No group of rows is in several splits.")


def check_split_sizes(sizes: Mapping[str, int], shares: Mapping[str, float], essential: str) -> list[CheckResult]:
    """Check that each requested split has rows, and no other; return one result for each.

    An empty split is a warning, as few rows may round to none; rows in a split that wasn't requested are a failure.

    Args:
        sizes: Rows by split; a missing split has none.
        shares: Requested share of the rows, by split.
        essential: The split that can't be empty, such as 'train'.
    """
    results = []
    for name in sorted({*sizes, *shares}, key=lambda name: (-shares.get(name, 0), name)):
        size, asked = sizes.get(name, 0), shares.get(name, 0.0)
        if not size and not asked:
            continue
        verdict: Verdict = "pass"
        if not asked or (not size and name == essential):
            verdict = "fail"
        elif not size:
            verdict = "warn"
        message = f"Split {name} has {plural(size, 'row')}, where {asked:.1%} of all are asked for."
        bound = "≥ 1" if asked else "= 0"
        results.append(
            CheckResult(name="split", column=name, verdict=verdict, figure=float(size), bound=bound, message=message)
        )
    return results


def check_stratification(
    column: str, counts: Mapping[str, Mapping[str, int]], shares: Mapping[str, float]
) -> CheckResult:
    """Check that each class has its share in each split; warn if not, as groups can't be divided.

    A class may miss its share by 1% of its rows, and by one row in any case.

    Args:
        column: Column of the classes.
        counts: Rows by class and split.
        shares: Requested share of the rows, by split.
    """
    worst, message, allowed = 0.0, f"Every {column} has its share in each split.", 1.0
    for name, by_split in sorted(counts.items()):
        total = sum(by_split.values())
        spare = max(1.0, 0.01 * total)
        for split, asked in shares.items():
            missed = abs(by_split.get(split, 0) - asked * total)
            if missed / spare > worst / allowed:
                worst, allowed = missed, spare
                message = (
                    f"{column} {name!r} has {by_split.get(split, 0):,} of its {plural(total, 'row')} in {split}, where "
                    f"{number(asked * total)} would be its share."
                )
    verdict: Verdict = "pass" if worst <= allowed + 1e-9 else "warn"
    return CheckResult(
        name="stratification",
        column=column,
        verdict=verdict,
        figure=worst,
        bound=f"≤ {number(allowed)}",
        message=message,
    )


def check_class_balance(column: str, counts: Sequence[tuple[str, int]], minimum_share: float) -> CheckResult:
    """Check that the rarest class has a large enough share; `counts` names every class with its rows.

    Fail below two classes: nothing can be learned from one.
    """
    total = sum(count for _, count in counts)
    if len(counts) < 2 or not total:
        message = f"{column} has {plural(len(counts), 'class', 'classes')}: nothing can be learned from fewer than two."
        return at_least("class balance", column, math.nan, minimum_share, message)
    rarest, rows = min(counts, key=lambda pair: (pair[1], pair[0]))
    message = f"The rarest {column}, {rarest!r}, has {rows:,} of {plural(total, 'row')} ({rows / total:.2%})."
    return at_least("class balance", column, rows / total, minimum_share, message)


def check_drift(
    column: str,
    now: TableProfile,
    before: ColumnProfile,
    *,
    warn_above: float = 0.1,
    fail_above: float = 0.25,
    minimum_rows: int = 200,
    against: str = "the last version",
) -> CheckResult:
    """Check a column's population stability index against an earlier version or other rows (see `profile`).

    A bound below what chance explains once in a thousand times is raised to that, so that small samples raise no false
    alarm: with 20 bins and 2,500 rows on either side that is 0.035. Columns of dates or other kinds, columns with too
    many different values to count, and versions of fewer than `minimum_rows` rows aren't judged: they pass with a note.

    Raises:
        InputError: the table has no such column.
    """
    partial = now.partial(column)

    def unjudged(verdict: Verdict, message: str) -> CheckResult:
        bound = f"≤ {number(warn_above)}"
        return CheckResult(name="drift", column=column, verdict=verdict, bound=bound, message=message)

    if partial.kind != before.kind:
        return unjudged("fail", f"{column} is {partial.kind}, where {against} had {before.kind}.")
    if min(partial.count, before.count) < minimum_rows:
        sizes = f"{partial.count:,} rows now and {before.count:,} before"
        return unjudged("pass", f"Drift of {column} isn't judged: {sizes}, where {minimum_rows:,} are needed.")
    if partial.kind in ("temporal", "other"):
        return unjudged("pass", f"Drift of {column} isn't judged: it is {partial.kind}.")
    if partial.top is not None:
        if not before.top_values and before.nulls < before.count:
            return unjudged("pass", f"Drift of {column} isn't judged: it had too many different values to count.")
        if partial.top.counts is None:
            capacity = partial.top.capacity
            had = plural(before.distinct or 0, "different value")
            return unjudged(
                "warn", f"{column} has too many values to count (over {capacity:,}, or long); it had {had}."
            )
    new, old = binned(partial, before)
    index = population_stability_index(new, old)
    chance = chance_index(partial.count, before.count, len(new))
    message = f"PSI of {column} against {against} is {index:.3f} over {plural(len(new), 'bin')}"
    message += f"; chance explains up to {chance:.3f}." if chance > warn_above else "."
    return at_most("drift", column, index, (max(warn_above, chance), max(fail_above, chance)), message)


def check_freshness(
    newest: dt.date | str | None, as_of: dt.datetime, warn_after_days: float, fail_after_days: float
) -> CheckResult:
    """Check the age of the newest record, in days before `as_of`; fail if there is none, warn if it is in the future.

    Args:
        newest: date, datetime or ISO 8601 text, as in a profile; without a zone it is UTC.
        as_of: the reference time; without a zone it is UTC.
        warn_after_days: age in days above which it warns.
        fail_after_days: age in days above which it fails.
    """
    if newest is None:
        return at_most("freshness", None, math.nan, (warn_after_days, fail_after_days), "There is no newest record.")
    moment = _utc(dt.datetime.fromisoformat(newest if isinstance(newest, str) else newest.isoformat()))
    age = (_utc(as_of) - moment).total_seconds() / 86_400
    message = (
        f"The newest record is of {moment:%Y-%m-%d %H:%M} UTC, {age:,.1f} days before {_utc(as_of):%Y-%m-%d %H:%M}."
    )
    result = at_most("freshness", None, age, (warn_after_days, fail_after_days), message)
    if age < 0:
        message = f"The newest record is of {moment:%Y-%m-%d %H:%M} UTC, after {_utc(as_of):%Y-%m-%d %H:%M}."
        return result.model_copy(update={"verdict": "warn", "message": message})
    return result


def at_most(name: str, column: str | None, figure: float, bounds: tuple[float, float], message: str) -> CheckResult:
    """Check a figure against two upper bounds, for warning and failure; NaN fails."""
    warn_above, fail_above = bounds
    verdict: Verdict = "pass"
    if not figure <= fail_above:  # written so that NaN fails
        verdict = "fail"
    elif not figure <= warn_above:
        verdict = "warn"
    limit = fail_above if verdict == "fail" else warn_above
    bound = f"≤ {number(limit)}" if limit else "= 0"
    return CheckResult(name=name, column=column, verdict=verdict, figure=figure, bound=bound, message=message)


def at_least(name: str, column: str | None, figure: float, minimum: float, message: str) -> CheckResult:
    """Check a figure against a lower bound; NaN fails."""
    verdict: Verdict = "pass" if figure >= minimum else "fail"
    return CheckResult(
        name=name, column=column, verdict=verdict, figure=figure, bound=f"≥ {number(minimum)}", message=message
    )


def _utc(moment: dt.datetime) -> dt.datetime:
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


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
    strength = f"explains {found.score:.1%} of the target's variance"
    if target.classes:
        one = f"{found.about!r} from the others" if len(target.classes) > 2 else "one class from the other"
        strength = f"tells {one}: area under the ROC curve {found.score:.4f}"
    message = f"{column} alone {strength}."
    if found.chance >= 1:
        message = f"Leakage through {column} isn't judged: {plural(len(feature), 'row')} are too few."
    elif found.chance > warn_above:
        message += f" Chance explains up to {found.chance:.3f}."
    elif found.score > warn_above:
        message += " Is it known before the event?"
    bounds = max(warn_above, min(found.chance, 1.0)), max(fail_above, min(found.chance, 1.0))
    return at_most("leakage", column, min(found.score, 1.0), bounds, message)
