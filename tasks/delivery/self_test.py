"""The faults that a copy's gate is shown, in a sample of the source's own rows. Pure, but for the reading.

source rows ─ judge ─ split ─ profile ─ encoder, label ─┐   the same functions as in the job,
                        └─ keys ─ repeats ─ sample ids ─┴─ gate     on a few thousand rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.core import injection
from tasks.core.digests import METHOD
from tasks.core.errors import ConfigError
from tasks.core.injection import DOUBLED, LOST, NULLS, SHIFT
from tasks.core.manifest import FaultResult, FileEntry, GateResult, Manifest, RowBalance
from tasks.core.reservation import Reservation
from tasks.core.sampling import sample_rows
from tasks.core.self_test import Fault, as_previous, inject
from tasks.delivery.columns import text_of
from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import describe, named_profile
from tasks.delivery.fitting import class_counts, fit
from tasks.delivery.gate import judge_copy
from tasks.delivery.keys import SPLITS, Repeats, find_repeats, random_keys, repeated, sample_ids, split_entities
from tasks.delivery.source import Source
from tasks.delivery.stages import (
    Look,
    Shuffle,
    StreamingReady,
    UnitNote,
    WrittenBucket,
    admit,
    judge,
    keys_of,
    note_of,
)

REJECTED, ONE_CLASS = 0.4, 0.9
SPLIT = "_split"
"""Column of the sample that tells the split a row is given, -1 where its entity draws one."""

MOST_FEATURES = 64
"""Features that a sample has at most, the first ones: of a thousand, more would only take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What a fault changes: the rows, what is taken of them, and shares that are written twice or get lost."""

    table: pa.Table
    source: Source
    twice: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Trial:
    config: DeliveryConfig
    rows: _Rows
    reservation: Reservation
    previous: Manifest | None

    def judge(self, rows: _Rows) -> GateResult:
        """Judge some rows as the job does."""
        return judge_copy(self.config, self.made(rows), self.previous)

    @cached_property
    def baseline(self) -> StreamingReady:
        """The copy of the sample as it is."""
        return self.made(self.rows)

    def made(self, rows: _Rows) -> StreamingReady:
        """What the job would say of a copy of some rows."""
        source, table = rows.source, rows.table
        judged = judge(table, source, self.config)
        given = table[SPLIT].to_numpy().astype(np.int8)
        loaded = admit(table, given, judged, source, self.config, rejected=table.slice(0, 0))
        note = note_of(0, loaded, source, self.config)
        assert note.profile is not None
        shuffle = fit(Look(self.config, source, self.reservation, (), 1), [note], note.profile)
        keys = keys_of(loaded.rows, source)
        repeats = find_repeats(keys, np.zeros(len(keys), np.int64), np.arange(len(keys))).get(0, Repeats())
        written = self._written(shuffle, loaded.rows, loaded.splits, sample_ids(keys, repeats), rows)
        entities, leaking = split_entities(loaded.entities, loaded.splits)
        samples = dict(zip(SPLITS, note.samples.tolist(), strict=True))
        return StreamingReady(
            reservation=self.reservation,
            files=(),
            rejected_files=(),
            schema=shuffle.form.schema,
            profile=named_profile(note.profile, shuffle.label, [note]),
            balances=(_balance(source, note, written),),
            definition=describe(shuffle, written, {split: count for split, count in samples.items() if count}),
            samples=samples,
            class_counts=class_counts(shuffle.label, written),
            entities=dict(zip(SPLITS, entities.tolist(), strict=True)),
            leaking_entities=leaking,
            repeated_keys=len(repeats.rows),
            duplicate_ids=sum(made.duplicate_ids for made in written),
            timings={},
        )

    def _written(
        self,
        shuffle: Shuffle,
        table: pa.Table,
        splits: npt.NDArray[np.int8],
        ids: npt.NDArray[np.int64],
        rows: _Rows,
    ) -> list[WrittenBucket]:
        """What would be written of each split."""
        label = shuffle.label
        labels = label.encode(table[label.column]) if label is not None and label.kind == "class" else None
        places = np.arange(len(ids))
        if rows.lost:
            places = places[~injection.some(len(ids), rows.lost)]
        if rows.twice:
            places = np.append(places, places[injection.some(len(ids), rows.twice)])
        written = []
        for split in np.unique(splits[places]).tolist():
            own = places[splits[places] == split]
            counts = None
            if label is not None and labels is not None:
                counts = np.bincount(labels[own], minlength=len(label.classes))
            written.append(
                WrittenBucket(
                    entry=FileEntry(path=f"{split}", rows=len(own), bytes=0, digest=f"{METHOD}:{'0' * 64}"),
                    split=split,
                    samples=len(own),
                    class_counts=counts,
                    duplicate_ids=repeated(np.sort(random_keys(ids[own], self.config.seed))),
                )
            )
        return written


def self_test(
    source: Source, manifest: Manifest, config: DeliveryConfig, previous: Manifest | None
) -> tuple[FaultResult, ...]:
    """Inject faults into a sample of what a copy was made from, and judge each.

    Drift, features and label are compared with the sample as it is.

    Args:
        source: The published version that was copied.
        manifest: The copy's; it need not be committed.
        config: Thresholds and choices.
        previous: Manifest of the last published version of the copy, if there is one.

    """
    source = replace(source, features=source.features[:MOST_FEATURES])
    splits = {file.uri: -1 if file.split is None else file.split for file in source.files}

    def with_split(uri: str, table: pa.Table) -> pa.Table:
        return table.append_column(SPLIT, pa.array(np.full(table.num_rows, splits[uri], np.int8)))

    table = sample_rows([file.uri for file in source.files], source.columns, source.entity, convert=with_split)
    reservation = Reservation(
        root=source.root, dataset=manifest.dataset, version=manifest.version, run_id="self-test", attempt=1
    )
    rows = _Rows(table=table, source=source)
    trial = _Trial(config=config, rows=rows, reservation=reservation, previous=None)
    known = trial.baseline
    fewest = max(1, min(config.thresholds.minimum_samples, known.samples["train"]))  # a sample has fewer than the whole
    thresholds = config.thresholds.model_copy(update={"minimum_samples": fewest})
    before = as_previous(previous or manifest, known.schema, known.profile)
    trial = replace(
        trial,
        config=config.model_copy(update={"thresholds": thresholds}),
        previous=before.model_copy(update={"definition": known.definition}),
    )
    return inject(judge_copy(trial.config, known, trial.previous), list(_faults(trial)))


def _faults(trial: _Trial) -> Iterator[Fault]:
    yield from _row_faults(trial)
    yield from _split_faults(trial)
    yield from _class_faults(trial)
    yield from _feature_faults(trial)


def _row_faults(trial: _Trial) -> Iterator[Fault]:
    """Rows that are missing, twice, or bad."""
    judged, source = _judging(trial), trial.rows.source
    name = source.manifest.dataset
    yield Fault(
        name="no rows",
        injected="Every row was taken away.",
        aims=("rows",),
        judge=judged(lambda r: replace(r, table=r.table.slice(0, 0))),
        raises=(ConfigError,),
    )
    yield Fault(
        name="duplicates",
        injected=f"{DOUBLED:.0%} of the source's rows were put in twice.",
        aims=(f"repeated keys of {', '.join(source.keys)}",),
        judge=judged(lambda r: replace(r, table=injection.doubled(r.table))),
    )
    yield Fault(
        name="written twice",
        injected=f"{DOUBLED:.0%} of the samples were written twice.",
        aims=("unique of sample_id",),
        judge=judged(lambda r: replace(r, twice=DOUBLED)),
    )
    yield Fault(
        name="lost rows",
        injected=f"{LOST:.0%} of the samples were lost before they were written.",
        aims=(f"balance of {name}",),
        judge=judged(lambda r: replace(r, lost=LOST)),
    )
    yield Fault(
        name="bad rows",
        injected=f"{REJECTED:.0%} of the rows lost their {source.keys[0]}.",
        aims=(f"rejected of {name}",),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [source.keys[0]], REJECTED))),
    )


def _split_faults(trial: _Trial) -> Iterator[Fault]:
    """Rows in a split where they don't belong."""
    judged, entity = _judging(trial), trial.rows.source.entity
    yield Fault(
        name="split overlap",
        injected=f"{DOUBLED:.0%} of the rows were copied into another split, with the same {entity}.",
        aims=(f"leak of {entity}",),
        judge=judged(_overlapping),
    )
    yield Fault(
        name="no train rows",
        injected="Every row was put into the validation split.",
        aims=("split of train",),
        judge=judged(lambda r: replace(r, table=_in_split(r.table, 1))),
        raises=(ConfigError,),
    )


def _class_faults(trial: _Trial) -> Iterator[Fault]:
    """Classes that are missing, or that hardly occur."""
    judged, target, counts = _judging(trial), trial.rows.source.target, trial.baseline.class_counts
    train = counts.get("train", {})
    rarest = min(train, key=lambda name: (train[name], name)) if len(train) > 1 else ""
    other = next((split for split in counts if split != "train"), "")
    yield Fault(
        name="rare class",
        injected=f"All rows but one of class {rarest} were taken away.",
        aims=(f"class balance of {target}",),
        judge=judged(lambda r: replace(r, table=_without(r.table, trial, rarest, keep=1))) if rarest else None,
        why_not="There are no two classes to learn.",
    )
    yield Fault(
        name="missing class",
        injected=f"Class {rarest} was taken out of the {other} split.",
        aims=(f"classes of {other}",),
        judge=judged(lambda r: replace(r, table=_without(r.table, trial, rarest, split=other)))
        if rarest and other
        else None,
        why_not="There are no two classes in two splits.",
    )


def _feature_faults(trial: _Trial) -> Iterator[Fault]:
    """Values of one feature that can't be; of images, what their labels can have."""
    judged, rows = _judging(trial), trial.rows
    source, number = rows.source, injection.varied(rows.table, rows.source.features)
    first = number or next(iter(source.features), "")
    why = "Images have no features."
    yield Fault(
        name="nulls",
        injected=f"{NULLS:.0%} of {first or 'a feature'} were made null.",
        # Where a row without a value is rejected, there is none left to count.
        aims=(f"nulls of {first}", *([f"rejected of {source.manifest.dataset}"] if _rejects(trial) else [])),
        judge=judged(lambda r: replace(r, table=injection.with_nulls(r.table, [first]))) if first else None,
        why_not=why,
    )
    yield Fault(
        name="constant",
        injected=f"{number or 'A number'} was made the same in all rows.",
        aims=("constant",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, number, 1, 1.0))) if number else None,
        why_not=why if not first else "No feature is a number that differs between rows.",
    )
    yield Fault(
        name="schema",
        injected=f"Column {first or source.target} was left out.",
        aims=("schema", "schema of Source columns", "schema of Label columns"),
        judge=judged(lambda r: replace(r, source=_without_column(r.source, first)))
        if first or source.target is not None
        else None,
        why_not="There is neither a feature nor a label.",
        raises=(ConfigError,),
    )
    yield _shift(trial, number)


def _shift(trial: _Trial, number: str | None) -> Fault:
    judged, table, target = _judging(trial), trial.rows.table, trial.rows.source.target
    if number is not None:
        distance = SHIFT * injection.spread(table, number)
        return Fault(
            name="shift",
            injected=f"{number} was shifted by {SHIFT:g} standard deviations.",
            aims=(f"drift of {number}",),
            judge=judged(lambda r: replace(r, table=injection.shifted(r.table, number, distance))),
        )
    some = target is not None and len(trial.baseline.class_counts.get("train", {})) > 1
    first = table[target].drop_null()[0].as_py() if some else None
    return Fault(
        name="shift",
        injected=f"{ONE_CLASS:.0%} of the rows were given one class.",
        aims=(f"drift of {target}",),
        judge=judged(lambda r: replace(r, table=injection.with_values(r.table, str(target), first, ONE_CLASS)))
        if some
        else None,
        why_not="There is no number and no class that differs between rows.",
    )


def _judging(trial: _Trial) -> Callable[[Callable[[_Rows], _Rows]], Callable[[], GateResult]]:
    return lambda change: lambda: trial.judge(change(trial.rows))


def _rejects(trial: _Trial) -> bool:
    return trial.config.nulls == "reject"


def _overlapping(rows: _Rows) -> _Rows:
    """Some rows once more, the copies in validation, and the others in train."""
    copies = rows.table.filter(pa.array(injection.some(rows.table.num_rows, DOUBLED)))
    originals = _in_split(rows.table, 0)
    return replace(rows, table=pa.concat_tables([originals, _in_split(copies, 1)]))


def _in_split(table: pa.Table, split: int) -> pa.Table:
    return injection.with_column(table, SPLIT, pa.array(np.full(table.num_rows, split, np.int8)))


def _without(table: pa.Table, trial: _Trial, name: str, keep: int = 0, split: str = "") -> pa.Table:
    """The rows without those of a class, but for the first ones, and of one split alone if it is given."""
    source, config = trial.rows.source, trial.config
    loaded = admit(
        table,
        table[SPLIT].to_numpy().astype(np.int8),
        (np.zeros(table.num_rows, np.int16), [""]),
        source,
        config,
        rejected=table.slice(0, 0),
    )
    value = str(source.classes.index(name)) if source.classes is not None else name
    own = pc.equal(text_of(table[str(source.target)]), value).fill_null(False).to_numpy(zero_copy_only=False)
    if split:
        own = own & (loaded.splits == SPLITS.index(split))
    judged, _ = judge(table, source, config)
    gone = np.flatnonzero(own & (loaded.splits == 0) & (judged == 0))[:keep] if keep else np.empty(0, np.int64)
    stay = ~own
    stay[gone] = True
    return table.filter(pa.array(stay))


def _without_column(source: Source, column: str) -> Source:
    if column:
        return dataclasses.replace(source, features=tuple(name for name in source.features if name != column))
    return dataclasses.replace(source, target=None)


def _balance(source: Source, note: UnitNote, written: list[WrittenBucket]) -> RowBalance:
    counts: dict[str, Any] = {"rejected": dict(note.rejected), "filtered": dict(note.filtered)}
    name = source.manifest.dataset
    return RowBalance(name=name, rows_in=note.rows, rows_out=sum(made.samples for made in written), **counts)
