"""The rows that a model learns from, where they are a table of the user's own: looked at before any work starts.

They are read and judged by the features' own machinery (`tasks.features.rows`): a row without a readable time or
without a target is rejected with the reason; one without its entity key is kept, and finds no features.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.types as pt

from tasks.core.errors import SourceError
from tasks.features.config import FeatureStoreConfig
from tasks.features.plan import SourcePlan, is_readable_time, polars_type
from tasks.features.rows import ColumnPlan, KeyType, RowPlan
from tasks.features.sources import SourceTable, inspect
from tasks.serving.definition import EVENT_TIME, TARGET, Model, SpineSource, closest

SPINE = "spine"


def plan_spine(model: Model, keys: Mapping[str, KeyType | None], config: FeatureStoreConfig) -> SourcePlan:
    """Find the files of a model's spine and decide how their rows are read.

    Args:
        model: A model whose spine is a table.
        keys: Entity keys that the spine must have, each with its type in the features (None: the files say).
        config: Time zone, epoch unit and earliest time.

    Raises:
        SourceError: the spine is missing, unreadable, or lacks a column.

    """
    assert isinstance(model.spine, SpineSource)
    table = inspect(SPINE, model.spine.uri)
    wanted = (*keys, EVENT_TIME, TARGET)
    unknown = sorted(set(model.spine.columns) - set(wanted))
    if unknown:
        raise SourceError(
            f"model '{model.name}' maps '{unknown[0]}', which isn't read from its spine{closest(unknown[0], wanted)}"
        )
    names = {ours: model.spine.columns.get(ours, ours) for ours in wanted}
    for ours, theirs in names.items():
        _check_column(model, table, ours, theirs)
    _check_time(model, table, names[EVENT_TIME], config)
    columns = [
        ColumnPlan(name=key, source_name=names[key], kind="key", key_type=kind or _key_type(table, names[key]))
        for key, kind in keys.items()
    ]
    columns.append(ColumnPlan(name=EVENT_TIME, source_name=names[EVENT_TIME], kind="time", required=True))
    columns.append(_target(names[TARGET], table.type_of(names[TARGET])))
    return SourcePlan(
        table=table,
        rows=RowPlan(
            source=SPINE,
            columns=tuple(columns),
            time=EVENT_TIME,
            earliest=config.earliest,
            timezone=config.timezone,
            epoch_unit=config.epoch_unit,
        ),
    )


def _check_column(model: Model, table: SourceTable, ours: str, theirs: str) -> None:
    for file in table.files:
        if theirs not in file.schema.names:
            raise SourceError(
                f"the spine of model '{model.name}': {file.info.uri} has no column '{theirs}'"
                f"{closest(theirs, file.schema.names)} If '{ours}' bears another name, say so in the model: "
                f"spine: {{columns: {{{ours}: …}}}}"
            )


def _check_time(model: Model, table: SourceTable, column: str, config: FeatureStoreConfig) -> None:
    for kind in dict.fromkeys(file.schema.field(column).type for file in table.files):
        where = f"the spine of model '{model.name}': the time column '{column}'"
        if pt.is_integer(kind) and config.epoch_unit is None:
            raise SourceError(f"{where} holds integers; say what they count since 1970: --epoch-unit s, ms, us or ns")
        if not is_readable_time(kind):
            raise SourceError(f"{where} is of type {kind}; it must be a timestamp, date, ISO 8601 text, or integer")


def _key_type(table: SourceTable, column: str) -> KeyType:
    # Whole numbers come as floats where a data frame had a null among them.
    kind = table.type_of(column)
    return "int64" if pt.is_integer(kind) or pt.is_floating(kind) else "string"


def _target(source_name: str, kind: pa.DataType) -> ColumnPlan:
    """A target keeps its kind: classes stay integers or text; a number must be finite, as nothing else is learnt."""
    if pt.is_floating(kind):
        return ColumnPlan(name=TARGET, source_name=source_name, kind="number", required=True)
    if pt.is_integer(kind):
        return ColumnPlan(name=TARGET, source_name=source_name, kind="key", key_type="int64", required=True)
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_dictionary(kind):
        return ColumnPlan(name=TARGET, source_name=source_name, kind="key", key_type="string", required=True)
    return ColumnPlan(name=TARGET, source_name=source_name, kind="any", required=True, dtype=polars_type(kind))
