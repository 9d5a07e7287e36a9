"""The faults that a training set's gate is shown, in a sample of the version's own rows. Pure, but for the reading.

spine rows ─ judge ─ tally ─┐
spine ──┐                   │        the same functions as in the job, on a few thousand rows:
        ├─ as-of join ─ canary ─ profile ─ gate
history ┘                            the features that a row found become a history of their own, known at its time
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from tasks.core import injection, layout
from tasks.core.errors import LeakFound
from tasks.core.injection import DOUBLED, LOST, NULLS, ODD, SHIFT
from tasks.core.leakage import as_text
from tasks.core.manifest import FaultResult, GateResult, Manifest, RowBalance
from tasks.core.own_columns import AS_OF, EVENT_TIME, TARGET
from tasks.core.profile import TableProfile, merge_profiles, profile_table
from tasks.core.sampling import sample_rows
from tasks.core.self_test import Fault, as_previous, inject
from tasks.core.sketch import QuantileSketch
from tasks.features.config import FeatureStoreConfig
from tasks.features.keys import KeyType
from tasks.features.parts import to_arrow
from tasks.features.rows import REASON, TIME, ColumnPlan, RowPlan
from tasks.features.rows import judge as judge_rows
from tasks.features.tallies import Tally
from tasks.serving.asof import Int64Array, join_asof
from tasks.serving.canary import plant
from tasks.serving.definition import FeatureReference, Model, SpineSource
from tasks.serving.gate import judge_training_set
from tasks.serving.history import FROM, UNTIL
from tasks.serving.stages import is_later, later_bound, repeated_rows, taken

MOST_FEATURES = 64
"""Features that a sample has at most, the first ones: of a thousand, more would only take longer."""
REJECTED = 0.4
_YEAR = dt.timedelta(days=366)

Join = Callable[..., Int64Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What `judge_training_set` asks for."""

    rows: int
    schema: pa.Schema
    features: tuple[str, ...]
    profile: TableProfile
    profile_earlier: TableProfile
    profile_later: TableProfile
    balances: tuple[RowBalance, ...]
    matched: Mapping[str, int]
    planted: int
    duplicates: int
    sample: pa.Table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What a fault changes. table: the rows with their features; the rest is about how they came together.

    aged: features are known so much later than they are. join: the function that joins. bad: share of spine rows that
    lose their time. lost: share of the rows that vanish between joining and writing.
    """

    table: pa.Table
    aged: dt.timedelta = dt.timedelta()
    join: Join = join_asof
    bad: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    model: Model
    config: FeatureStoreConfig
    groups: Mapping[str, tuple[str, ...]]
    """Group → its columns in the sample."""
    source: str
    previous: Manifest | None

    @property
    def features(self) -> tuple[str, ...]:
        """Columns of features."""
        return tuple(name for columns in self.groups.values() for name in columns)

    def judge(self, rows: _Rows) -> GateResult:
        """Judge some rows as the job does."""
        return judge_training_set(self.model, self.config, self.figures(rows), self.previous)

    def figures(self, rows: _Rows) -> _Figures:
        """Join and count some rows as the job does."""
        model = self.model
        spine = _frame(rows.table.drop_columns([name for name in self.features if name in rows.table.column_names]))
        judged = judge_rows(_raw(spine, model.entity, rows.bad), _row_plan(spine, model, self.source))
        read = Tally(rows_in=spine.height, rows_out=judged.kept.height)
        read.rejected.update(judged.rejected[REASON].to_list())
        joined, matched, planted = self._joined(spine, rows)
        table = to_arrow(joined.select(rows.table.column_names))
        kept = injection.lost(table, rows.lost) if rows.lost else table
        earlier, later = (profile_table(half) for half in self._halves(kept))
        return _Figures(
            rows=table.num_rows,
            schema=kept.schema,
            features=self.features,
            profile=merge_profiles([earlier, later]),
            profile_earlier=earlier,
            profile_later=later,
            balances=(
                read.balance(self.source),
                RowBalance(name=model.name, rows_in=table.num_rows, rows_out=kept.num_rows),
            ),
            matched=matched,
            planted=planted,
            duplicates=repeated_rows(_frame(kept), model.entity),
            sample=kept,
        )

    def _joined(self, spine: pl.DataFrame, rows: _Rows) -> tuple[pl.DataFrame, dict[str, int], int]:
        """The rows with the features that they find, rows that found some by group, and rows that were planted."""
        model, joined, planted, matched = self.model, spine, 0, {}
        options = {"entity": model.entity, "event_time": EVENT_TIME, "ttl": None, "strict": model.strict}
        for group, columns in self.groups.items():
            own = [name for name in columns if name in rows.table.column_names]
            history = _history(_frame(rows.table.select([model.entity, EVENT_TIME, *own])), model, own, rows.aged)
            found = rows.join(spine, history, **options)
            planted += plant(spine, history, found, join=rows.join, **options)  # type: ignore[arg-type]
            matched[group] = int(np.count_nonzero(found >= 0))
            joined = joined.hstack(taken(history, found, {name: name for name in own}))
        return joined, matched, planted

    def _halves(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The earlier and the later rows, as the job parts them."""
        later = self.later(table)
        return table.filter(pc.invert(later)), table.filter(later)

    def later(self, table: pa.Table) -> pa.ChunkedArray:
        """Which rows are the latest."""
        times = table[EVENT_TIME].drop_null().cast(pa.int64()).to_numpy().astype(np.float64)
        return is_later(table, later_bound(QuantileSketch.of(times), self.config.label_thresholds.later_share))


def self_test(
    root: str, manifest: Manifest, config: FeatureStoreConfig, previous: Manifest | None
) -> tuple[FaultResult, ...]:
    """Inject faults into a sample of a training set, and judge each.

    Drift and types are compared with the sample as it is.

    Args:
        root: Root of the store.
        manifest: The training set's; it need not be committed.
        config: Thresholds and choices.
        previous: Manifest of the last published version, if there is one.

    """
    definition = manifest.definition
    model = Model(
        name=definition["name"],
        entity=definition["entity"],
        spine=SpineSource(uri=""),
        features=tuple(FeatureReference.parse(text) for text in definition["features"]),
        strict=definition["strict"],
        known_at=definition["known_at"],
    )
    columns: Mapping[str, str] = definition["columns"]
    chosen = list(columns)[:MOST_FEATURES]
    groups: dict[str, tuple[str, ...]] = {}
    for name in chosen:
        group = columns[name].partition(":")[0]
        groups[group] = (*groups.get(group, ()), name)
    uri = layout.version_uri(root, manifest.dataset, manifest.version)
    names = [column.name for column in manifest.columns if column.name not in columns or column.name in chosen]
    table = sample_rows([layout.join(uri, file.path) for file in manifest.files], names, model.entity)
    trial = _Trial(model=model, config=config, groups=groups, source=manifest.balances[0].name, previous=None)
    rows = _Rows(table=table)
    known = trial.figures(rows)
    trial = replace(trial, previous=as_previous(previous or manifest, known.schema, known.profile))
    return inject(trial.judge(rows), list(_faults(trial, rows)))


def _faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    yield from _row_faults(trial, rows)
    yield from _join_faults(trial, rows)
    yield from _label_faults(trial, rows)
    yield from _feature_faults(trial, rows)


def _row_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Rows that are missing, twice, or bad at the source."""
    judged, model = _judging(trial, rows), trial.model
    yield Fault(
        name="no rows",
        injected="Every row was taken away.",
        aims=("rows",),
        judge=judged(lambda r: replace(r, table=r.table.slice(0, 0))),
    )
    yield Fault(
        name="duplicates",
        injected=f"{DOUBLED:.0%} of the rows were put in twice.",
        aims=("repeated rows",),
        judge=judged(lambda r: replace(r, table=injection.doubled(r.table))),
    )
    yield Fault(
        name="lost rows",
        injected=f"{LOST:.0%} of the joined rows were lost before they were written.",
        aims=(f"balance of {model.name}",),
        judge=judged(lambda r: replace(r, lost=LOST)),
    )
    yield Fault(
        name="bad rows",
        injected=f"{REJECTED:.0%} of the rows of {trial.source} lost their time.",
        aims=(f"rejected of {trial.source}",),
        judge=judged(lambda r: replace(r, bad=REJECTED)),
    )


def _join_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Features that no row finds, or that it finds in its future."""
    judged, group = _judging(trial, rows), next(iter(trial.groups))
    yield Fault(
        name="late features",
        injected="All features were computed as of a year after their rows.",
        aims=(f"unmatched of {group}",),
        judge=judged(lambda r: replace(r, aged=_YEAR)),
    )
    yield Fault(
        name="future features",
        injected="The join was made to take features of up to a year after a row.",
        aims=("canary",),
        judge=judged(lambda r: replace(r, join=_looking_ahead)),
        raises=(LeakFound,),
    )
    entity = trial.model.entity
    yield Fault(
        name="no keys",
        injected=f"Every {entity} was made null, so that no row from the future can be planted.",
        aims=("canary",),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [entity], 1.0))),
    )
    yield Fault(
        name="null keys",
        injected=f"{NULLS:.0%} of {entity} were made null.",
        aims=(f"nulls of {entity}",),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [entity]))),
    )


def _label_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """A label that is missing, that never differs, or that a feature gives away."""
    judged, table = _judging(trial, rows), rows.table
    yield Fault(
        name="null labels",
        injected=f"{NULLS:.0%} of the labels were made null.",
        aims=(f"nulls of {TARGET}",),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [TARGET]))),
    )
    first = table[TARGET][0].as_py() if table.num_rows else None
    yield Fault(
        name="one label",
        injected="Every row was given the label of the first.",
        aims=(f"target of {TARGET}",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, TARGET, first, 1.0))),
    )
    kinds = {name: table.schema.field(name).type for name in trial.features}
    told = next((name for name in trial.features if pa.types.is_floating(kinds[name])), trial.features[0])
    yield Fault(
        name="label copy",
        injected=f"The label was copied into {told}.",
        aims=(f"leakage of {told}",),
        judge=judged(lambda r: replace(r, table=injection.with_column(r.table, told, _copied(r.table[TARGET])))),
    )


def _feature_faults(trial: _Trial, rows: _Rows) -> Iterator[Fault]:
    """Values of one feature that can't be, chosen by its kind."""
    judged, table, features = _judging(trial, rows), rows.table, trial.features
    number = injection.varied(table, features)
    first = number or features[0]
    yield Fault(
        name="schema",
        injected=f"Column {first} was given another name.",
        aims=("schema", f"schema of {first}"),
        judge=judged(lambda r: replace(r, table=injection.renamed(r.table, first))),
    )
    yield Fault(
        name="nulls",
        injected=f"{NULLS:.0%} of {first} were made null.",
        aims=(f"nulls of {first}",),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [first]))),
    )
    real = next((name for name in features if pa.types.is_floating(table.schema.field(name).type)), "")
    yield Fault(
        name="not finite",
        injected=f"{ODD:.0%} of {real or 'a feature'} were made infinite.",
        aims=(f"finite of {real}",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, real, math.inf))) if real else None,
        why_not="No feature is a floating-point number.",
    )
    for name, where, check in (("shift", "", "drift"), ("late shift", " of the latest rows", "drift over time")):
        hit = trial.later(table).to_numpy(zero_copy_only=False) if where else None
        yield Fault(
            name=name,
            injected=f"{number or 'A number'}{where} was shifted by {SHIFT:g} standard deviations.",
            aims=(f"{check} of {number}",),
            judge=judged(partial(_shifted, number=number, hit=hit)) if number else None,
            why_not="No feature is a number that differs between rows.",
        )


def _judging(trial: _Trial, rows: _Rows) -> Callable[[Callable[[_Rows], _Rows]], Callable[[], GateResult]]:
    return lambda change: lambda: trial.judge(change(rows))


def _shifted(rows: _Rows, number: str, hit: injection.BoolArray | None) -> _Rows:
    distance = SHIFT * injection.spread(rows.table, number)
    return replace(rows, table=injection.shifted(rows.table, number, distance, hit))


def _copied(target: pa.ChunkedArray) -> pa.Array:
    """A label as a number that tells it: the number itself, or the place of its class."""
    if injection.is_number(target.type):
        return target.cast(pa.float64(), safe=False).combine_chunks()
    return as_text(target).combine_chunks().dictionary_encode().indices.cast(pa.float64())


def _looking_ahead(spine: pl.DataFrame, history: pl.DataFrame, **options: Any) -> Int64Array:
    """A join that is wrong: it takes what is known a year later."""
    return join_asof(spine.with_columns(pl.col(EVENT_TIME) + _YEAR), history, **options)


def _history(rows: pl.DataFrame, model: Model, columns: Sequence[str], aged: dt.timedelta) -> pl.DataFrame:
    """The features that rows found, as a history: known at their rows' own time, or later."""
    before = dt.timedelta(microseconds=1) if model.strict else dt.timedelta()
    some = pl.any_horizontal(pl.lit(value=False), *(pl.col(name).is_not_null() for name in columns))
    known = rows.filter(some).drop_nulls([model.entity, EVENT_TIME])
    return known.select(
        model.entity,
        (pl.col(EVENT_TIME) - before + aged).alias(AS_OF),
        pl.lit(None, TIME).alias(FROM),
        pl.lit(None, TIME).alias(UNTIL),
        *columns,
    ).sort(model.entity, AS_OF, maintain_order=True)


def _raw(spine: pl.DataFrame, entity: str, bad: float) -> pl.DataFrame:
    """Key and time of the rows, as a source has them; a share has no time."""
    hit = injection.some(spine.height, bad) if bad else np.zeros(spine.height, np.bool_)
    time = pl.when(~pl.Series(hit)).then(pl.col(EVENT_TIME)).alias(EVENT_TIME)
    return spine.select(entity, time)


def _row_plan(spine: pl.DataFrame, model: Model, source: str) -> RowPlan:
    of_key: KeyType = "int64" if spine.schema[model.entity].is_integer() else "string"
    key = ColumnPlan(name=model.entity, source_name=model.entity, kind="key", key_type=of_key)
    time = ColumnPlan(name=EVENT_TIME, source_name=EVENT_TIME, kind="time", required=True)
    return RowPlan(source=source, columns=(key, time), time=EVENT_TIME)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
