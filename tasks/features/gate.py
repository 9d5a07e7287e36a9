"""The quality gate of a feature group. Pure: figures in, verdict out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tasks.features.config import FeatureStoreConfig
from tasks.features.definitions import FeatureGroup
from tasks.features.rows import AFTER_AS_OF
from tasks.quality import rules
from tasks.quality.figures import Figures
from tasks.store.layout import FEATURES, OUTLYING
from tasks.store.manifest import CheckResult, ColumnProfile, GateResult, Manifest, RowBalance

NEVER_STALE = float("inf")
TAKEN_FOR_FINER = dt.datetime(1970, 3, 1, tzinfo=dt.UTC)
"""Today's counts in a unit a thousand times coarser than assumed are all before this time."""


@dataclass(frozen=True, kw_only=True)
class GroupFigures(Figures):
    """Figures of a feature group; the balance of the entities is the last.

    Attributes:
        group: The declaration.
        features: Columns that count as features: the group's and its dimension's.
        duplicate_keys: Rows with the entity key of another row.
        unmatched: Entities without a dimension row, once for each as-of time with features.
        ready: Training-ready rows.
        newest_event: Time of the newest event that counted.
        as_of: Time up to which events count, the last of them.
        times: All times that the version holds.
        suspects: Keys that look like missing values.

    """

    group: FeatureGroup
    features: tuple[str, ...]
    duplicate_keys: int
    unmatched: int
    ready: int
    newest_event: dt.datetime | None
    as_of: dt.datetime
    times: tuple[dt.datetime, ...] = ()
    suspects: tuple[str, ...] = ()


def judge_group(config: FeatureStoreConfig, figures: GroupFigures, previous: Manifest | None) -> GateResult:
    """Judge the written files of a group by its thresholds and the last published version, if there is one."""
    bounds, group, schema, features = config.thresholds, figures.group, figures.schema, figures.features
    profile, balances, as_of = figures.profile, figures.balances, figures.as_of
    columns = profile.columns()
    entities = balances[-1]
    checks: list[CheckResult] = [rules.check_rows(profile.rows, 1)]
    types = {field.name: str(field.type) for field in schema}
    checks += rules.check_schema(types, _expected_types(group, types, features, previous, config))
    checks.append(rules.check_unique(group.entity, figures.duplicate_keys))
    if figures.suspects:
        checks.append(_missing_keys(group.entity, figures.suspects))
    checks += [rules.check_balance(balance) for balance in balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in balances[:-1]
    ]
    if any(balance.name == group.dimension for balance in balances[:-1]):
        found, asked = figures.unmatched, entities.rows_in
        checks.append(rules.check_reference(group.entity, found, asked, bounds.orphan_warn, bounds.orphan_fail))
    for name in features:
        checks.append(rules.check_nulls(name, columns[name], bounds.null_warn, bounds.null_fail))
        if pa.types.is_floating(schema.field(name).type):
            checks.append(rules.check_finite(name, columns[name]))
    checks += [
        rules.check_range(name, columns[name], minimum, maximum)
        for name, (minimum, maximum) in group.bounds.items()
        if name in columns  # a missing one fails the schema
    ]
    checks += _event_times(balances[0], figures.newest_event, as_of, config)
    checks.append(_outliers(columns, features, profile.rows, config))
    checks.append(rules.check_ready_share(figures.ready, profile.rows, bounds.ready_warn, bounds.ready_fail))
    if bounds.fresh_warn_days is not None or bounds.fresh_fail_days is not None:
        fail_after = bounds.fresh_fail_days or NEVER_STALE
        warn_after = bounds.fresh_warn_days or fail_after
        checks.append(rules.check_freshness(figures.newest_event, as_of, warn_after, fail_after))
    if previous is not None and (other := _incomparable(figures.times, previous)):
        checks.append(other)
    elif previous is not None:
        checks += [
            rules.check_drift(
                name, profile, previous.profile[name], warn_above=bounds.drift_warn, fail_above=bounds.drift_fail
            )
            for name in features
            if name in previous.profile
        ]
    return rules.gate(checks)


def _event_times(
    events: RowBalance, newest: dt.datetime | None, as_of: dt.datetime, config: FeatureStoreConfig
) -> list[CheckResult]:
    """Return a result on event times that a wrong unit or zone has shifted; nothing if they may be right."""
    late = events.filtered.get(AFTER_AS_OF, 0)
    if late and not events.rows_out:
        message = (
            f"All {late} events lie after {as_of:%Y-%m-%d %H:%M} UTC: give a later --as-of, or look at --epoch-unit "
            f"and --timezone."
        )
    elif config.epoch_unit not in (None, "s") and newest is not None and newest < TAKEN_FOR_FINER:
        message = (
            f"The newest event is of {newest:%Y-%m-%d}: counts of a coarser unit, such as seconds, seem to be taken "
            f"for {config.epoch_unit}; give another --epoch-unit."
        )
    else:
        return []
    return [CheckResult(name="event times", verdict="fail", bound="up to as_of, and plausible", message=message)]


def _missing_keys(entity: str, suspects: Sequence[str]) -> CheckResult:
    told = ", ".join(map(repr, suspects))
    message = (
        f"{entity} {told} looks like a missing value: if it is one, make it null in the source, or for CSV name it: "
        f"--null-values={','.join(suspects)} (which takes the place of the default ones)."
    )
    return CheckResult(name="missing keys", column=entity, verdict="warn", bound="no such key", message=message)


def _incomparable(times: Sequence[dt.datetime], previous: Manifest) -> CheckResult | None:
    """Return why drift against the last version is meaningless; None if it is meaningful.

    Features over all events grow with time: a history, or a day of the past, differs from today's snapshot by nature.
    """
    before = previous.as_of
    if not times or not before or (len(times) == len(before) and times[-1] >= before[-1]):
        return None
    held = [f"{len(some)} as-of times up to {some[-1].date()}" for some in (times, before)]
    message = f"Drift isn't judged: this version holds {held[0]}, v{previous.version} {held[1]}."
    return CheckResult(name="drift", verdict="pass", bound="versions of like as-of times", message=message)


def _expected_types(
    group: FeatureGroup,
    found: Mapping[str, str],
    features: Sequence[str],
    previous: Manifest | None,
    config: FeatureStoreConfig,
) -> dict[str, str]:
    """Return the expected columns: the declared ones, and those of the last version with their types."""
    names = dict.fromkeys([group.entity, *group.feature_names, *features, *FEATURES])
    types = {name: found.get(name, "any type") for name in names}
    if previous is not None and not config.allow_schema_change:
        types |= {column.name: column.type for column in previous.columns}
    return types


def _outliers(
    columns: dict[str, ColumnProfile], features: Sequence[str], rows: int, config: FeatureStoreConfig
) -> CheckResult:
    numeric = sum(columns[name].kind == "numeric" for name in features)
    values = rows * numeric
    outliers = round((columns[OUTLYING].mean or 0.0) * values)
    bounds = config.thresholds
    return rules.check_outlier_share("all numeric features", outliers, values, bounds.outlier_warn, bounds.outlier_fail)
