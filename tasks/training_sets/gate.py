"""The quality gate of a training set. Pure: figures in, verdict out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from tasks.features.config import FeatureStoreConfig
from tasks.io.text import plural
from tasks.quality import rules
from tasks.quality.figures import Figures
from tasks.quality.profile import TableProfile
from tasks.store.layout import EVENT_TIME, TARGET
from tasks.store.manifest import CheckResult, GateResult, Manifest
from tasks.training_sets.definition import Model


@dataclass(frozen=True, kw_only=True)
class TrainingSetFigures(Figures):
    """Figures of a training set.

    Attributes:
        model: The declaration.
        rows: Number of rows written.
        features: Names of the `feature_*` columns.
        profile_earlier: Profile of the rows before the latest.
        profile_later: Profile of the latest share of the rows by event time.
        matched: Group → rows with features in time.
        planted: Rows from the future planted as a test, none of which was matched.
        duplicates: Rows that repeat another's entity and event time.
        sample: Some rows: the features and the target, and the entity if it is known.

    """

    model: Model
    rows: int
    features: tuple[str, ...]
    profile_earlier: TableProfile
    profile_later: TableProfile
    matched: Mapping[str, int]
    planted: int
    duplicates: int
    sample: pa.Table


def judge_training_set(
    config: FeatureStoreConfig, computed: TrainingSetFigures, previous: Manifest | None
) -> GateResult:
    """Judge the training set of a model by its thresholds and the last published version, if there is one."""
    bounds, model = config.label_thresholds, computed.model
    columns = computed.profile.columns()
    checks: list[CheckResult] = [rules.check_rows(computed.rows, 1)]
    types = {field.name: str(field.type) for field in computed.schema}
    checks += rules.check_schema(types, _expected_types(model, computed.features, types, previous, config))
    checks += [rules.check_balance(balance) for balance in computed.balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in computed.balances
    ]
    checks += [
        rules.check_unmatched(group, matched, computed.rows, bounds.unmatched_warn, bounds.unmatched_fail)
        for group, matched in computed.matched.items()
    ]
    checks.append(rules.check_canary(computed.planted))
    if model.entity in columns:  # a row without its key is kept, and finds no features
        checks.append(rules.check_nulls(model.entity, columns[model.entity], 0.0, 1.0))
    checks += [rules.check_nulls(name, columns[name], 0.0, 0.0) for name in (EVENT_TIME, TARGET) if name in columns]
    checks.append(_repeats(model, computed.duplicates))
    present = [name for name in computed.features if name in columns]  # a missing one fails the schema
    checks += [rules.check_nulls(name, columns[name], bounds.null_warn, bounds.null_fail) for name in present]
    checks += [
        rules.check_finite(name, columns[name])
        for name in (*computed.features, TARGET)
        if name in columns and pt.is_floating(computed.schema.field(name).type)
    ]
    if TARGET in columns:
        checks.append(rules.check_target(TARGET, computed.profile.partial(TARGET), bounds.class_warn))
        checks += _leaks(config, computed)
    checks += _drifts(config, computed, previous)
    return rules.gate(checks)


def _expected_types(
    model: Model,
    features: Sequence[str],
    found: Mapping[str, str],
    previous: Manifest | None,
    config: FeatureStoreConfig,
) -> dict[str, str]:
    """Return the declared columns with their previous types; a model with the same features has the same columns."""
    keys = [name for name in found if name not in features]
    names = dict.fromkeys([model.entity, EVENT_TIME, *keys, *features, TARGET])
    types = {name: found.get(name, "any type") for name in names}
    if previous is None or config.allow_schema_change:
        return types
    same = previous.definition.get("features") == model.describe()["features"]
    return types | {column.name: column.type for column in previous.columns if same or column.name in types}


def _repeats(model: Model, duplicates: int) -> CheckResult:
    """Check that each row is unique in entity and time: a repeated row counts twice in training, perhaps on purpose."""
    message = f"{plural(duplicates, 'row')} repeat the {model.entity} and {EVENT_TIME} of another; all are kept."
    message = message if duplicates else f"Every {model.entity} has each {EVENT_TIME} once."
    return rules.at_most("repeated rows", model.entity, duplicates, (0, math.inf), message)


def _leaks(config: FeatureStoreConfig, computed: TrainingSetFigures) -> list[CheckResult]:
    """Check how well each feature alone predicts the target, on a sample of the rows."""
    sample, bounds, entity = computed.sample, config.label_thresholds, computed.model.entity
    sound = sample[TARGET].is_valid()
    if pt.is_floating(sample.schema.field(TARGET).type):
        sound = pc.and_(sound, pc.is_finite(pc.fill_null(sample[TARGET], 0.0)))
    sample = sample.filter(sound)
    entities = sample[entity] if entity in sample.column_names else None
    target = rules.prepare_target(sample[TARGET], computed.profile.partial(TARGET), entities)
    if target is None:
        return []
    return [
        rules.check_leakage(name, sample[name], target, bounds.leak_warn, bounds.leak_fail)
        for name in computed.features
        if name in sample.column_names
    ]


def _drifts(config: FeatureStoreConfig, computed: TrainingSetFigures, previous: Manifest | None) -> list[CheckResult]:
    """Compare the latest rows with the others, and this version with the last: both only warn."""
    bounds = config.label_thresholds
    names = [name for name in (*computed.features, TARGET) if name in computed.profile.partials]
    earlier = computed.profile_earlier.columns()
    checks = [
        rules.check_drift(
            name,
            computed.profile_later,
            earlier[name],
            warn_above=bounds.later_drift_warn,
            fail_above=math.inf,
            against="the earlier rows",
        ).model_copy(update={"name": "drift over time"})
        for name in names
    ]
    before = previous.profile if previous is not None else {}
    checks += [
        rules.check_drift(name, computed.profile, before[name], warn_above=bounds.drift_warn, fail_above=math.inf)
        for name in names
        # With another type it is another column, which the schema's check has judged.
        if name in before and before[name].kind == computed.profile.partial(name).kind
    ]
    return checks
