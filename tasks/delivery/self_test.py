"""Fault tests of a streaming-ready copy, in a sample of the source's rows. Pure, but for the reading.

source rows ─ judge ─ split ─ profile ─ encoder, label ─┐   the same functions as in the job,
                        └─ keys ─ repeats ─ sample ids ─┴─ gate     on a few thousand rows
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import class_counts, describe, fit, named_profile
from tasks.delivery.encoding import text_of
from tasks.delivery.gate import judge_copy
from tasks.delivery.keys import SPLITS, Repeats, find_repeats, random_keys, repeated, sample_ids, split_entities
from tasks.delivery.shuffle import CopyFigures, Loaded, Look, Shuffle, WrittenBucket, admit, judge, keys_of, note_of
from tasks.delivery.source import Source
from tasks.io.errors import ConfigError
from tasks.io.hashing import METHOD
from tasks.quality import faults
from tasks.quality.faults import ALIKE, DOUBLED, MOST_FEATURES, BoolArray, Faults, Sample, Trial, rarest, sample_rows
from tasks.store.manifest import FileEntry, Manifest, RowBalance
from tasks.store.reservation import Reservation

SPLIT = "_split"
"""Column of the sample with the number of a row's split, −1 if its entity draws one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows(Sample):
    """Rows of a source, the columns taken from them, and the share of samples that are written twice."""

    source: Source
    twice: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[_Rows]):
    reservation: Reservation
    splits: ClassVar = (SPLIT, 0, 1)

    def figures(self, rows: _Rows) -> CopyFigures:
        source, config = rows.source, self.config
        table = faults.with_values(rows.table, source.keys[:1], None, rows.bad)
        loaded = self._loaded(table, source)
        note = note_of(0, loaded, source, config)
        assert note.profile is not None
        shuffle = fit(Look(config, source, self.reservation, (), 1), [note], note.profile)
        keys = keys_of(loaded.rows, source)
        repeats = find_repeats(keys, np.zeros(len(keys), np.int64), np.arange(len(keys))).get(0, Repeats())
        written = self._written(shuffle, loaded, sample_ids(keys, repeats), rows)
        entities, leaking = split_entities(loaded.entities, loaded.splits)
        samples = dict(zip(SPLITS, note.samples.tolist(), strict=True))
        balance = RowBalance(
            name=source.manifest.dataset,
            rows_in=note.rows,
            rows_out=sum(made.samples for made in written),
            rejected=dict(note.rejected),
            filtered=dict(note.filtered),
        )
        return CopyFigures(
            schema=shuffle.form.schema,
            profile=named_profile(note.profile, shuffle.label, [note]),
            balances=(balance,),
            definition=describe(shuffle, written, {split: count for split, count in samples.items() if count}),
            samples=samples,
            class_counts=class_counts(shuffle.label, written),
            entities=dict(zip(SPLITS, entities.tolist(), strict=True)),
            leaking_entities=leaking,
            repeated_keys=len(repeats.rows),
            duplicate_ids=sum(made.duplicate_ids for made in written),
        )

    def _loaded(self, table: pa.Table, source: Source) -> Loaded:
        given = table[SPLIT].to_numpy().astype(np.int8)
        judged = judge(table, source, self.config)
        return admit(table, given, judged, source, self.config, rejected=table.slice(0, 0))

    def _written(
        self, shuffle: Shuffle, loaded: Loaded, ids: npt.NDArray[np.int64], rows: _Rows
    ) -> list[WrittenBucket]:
        """Return the rows that would be written for each split."""
        label, labels, classes = shuffle.label, None, 0
        if label is not None and label.kind == "class":
            labels, classes = label.encode(loaded.rows[label.column]), len(label.classes)
        kept, again = ~faults.some(len(ids), rows.lost), faults.some(len(ids), rows.twice)
        places = np.concatenate([np.flatnonzero(kept), np.flatnonzero(again)])
        written = []
        for split in np.unique(loaded.splits[places]).tolist():
            own = places[loaded.splits[places] == split]
            made = WrittenBucket(
                entry=FileEntry(path=f"{split}", rows=len(own), bytes=0, digest=f"{METHOD}:{'0' * 64}"),
                split=split,
                samples=len(own),
                class_counts=None if labels is None else np.bincount(labels[own], minlength=classes),
                duplicate_ids=repeated(np.sort(random_keys(ids[own], self.config.seed))),
            )
            written.append(made)
        return written

    def faults(self) -> Faults:
        source, first, target = self.sample.source, self.first, self.sample.source.target or ""
        name, entity = source.manifest.dataset, source.entity
        yield replace(self.no_rows(), raises=(ConfigError,))
        yield self.duplicates(f"repeated keys of {', '.join(source.keys)}")
        words = f"{DOUBLED:.0%} of the samples were written twice."
        yield self.fault("written twice", words, "unique of sample_id", twice=DOUBLED)
        yield self.lost_rows(name)
        yield self.bad_rows("bad rows", f"the rows lost their {source.keys[0]}", name)
        words = f"{DOUBLED:.0%} of the rows were copied into another split, with the same {entity}."
        yield self.split_overlap(words, f"leak of {entity}", self.copies)
        yield replace(self.no_train_rows(), raises=(ConfigError,))
        counts = self.known.class_counts
        rare, other = rarest(counts.get("train", {})), next((split for split in counts if split != "train"), "")
        own, splits = self._of_class(rare)
        yield self.rare_class(target, rare, own, splits == 0, "There are no two classes to learn.")
        words = f"Class {rare} was taken out of the {other} split."
        why_not = "" if rare and other else "There are no two classes in two splits."
        table = faults.lost(self.table, own & (splits == SPLITS.index(other)) if other else own)
        yield self.fault("missing class", words, f"classes of {other}", why_not, table=table)
        # If rows without a value are rejected, none is left to count.
        more = [f"rejected of {name}"] if self.config.nulls == "reject" else []
        none = "Images have no features."
        yield self.nulls(*more, why_not=none)
        yield self.values("constant", "constant", self.number, 1, why_not=ALIKE if first else none)
        aims = ("schema", "schema of Source columns", "schema of Label columns")
        why_not = "" if first or target else "There is neither a feature nor a label."
        fewer = {"features": tuple(column for column in source.features if column != first)}
        left = replace(source, **(fewer if first else {"target": None}))
        schema = self.fault("schema", f"Column {first or target} was left out.", aims, why_not, source=left)
        yield replace(schema, raises=(ConfigError,))
        value = self.table[target].drop_null()[0].as_py() if rare else None
        why_not = "There is no number and no class that differs between rows."
        yield self.shift() if self.number else self.one_class(target if rare else "", value, why_not)

    def _of_class(self, name: str) -> tuple[BoolArray, npt.NDArray[np.int8]]:
        """Mark the rows of a class, none for ''; return each row's split, too, −1 for rows that the job leaves out."""
        source, table = self.sample.source, self.table
        good = judge(table, source, self.config)[0] == 0
        splits = np.full(len(good), -1, np.int8)
        splits[good] = self._loaded(table, source).splits
        if not name:
            return np.zeros(len(good), np.bool_), splits
        value = str(source.classes.index(name)) if source.classes is not None else name
        return pc.equal(text_of(table[str(source.target)]), value).fill_null(False).to_numpy(), splits


def trial(source: Source, manifest: Manifest, config: DeliveryConfig, previous: Manifest | None) -> Trial[_Rows]:
    """Sample a copy's source; drift, features and label are compared with the sample as it is."""
    source = replace(source, features=source.features[:MOST_FEATURES])
    splits = {file.uri: -1 if file.split is None else file.split for file in source.files}

    def with_split(uri: str, table: pa.Table) -> pa.Table:
        return table.append_column(SPLIT, pa.array(np.full(table.num_rows, splits[uri], np.int8)))

    table = sample_rows([file.uri for file in source.files], source.columns, source.entity, convert=with_split)
    made = _Trial(
        sample=_Rows(table=table, source=source),
        features=source.features,
        before=previous or manifest,
        config=config,
        gate=judge_copy,
        reservation=Reservation(
            root=source.root, dataset=manifest.dataset, version=manifest.version, run_id="self-test", attempt=1
        ),
    )
    bounds, known = config.thresholds, made.known
    fewest = max(1, min(bounds.minimum_samples, known.samples["train"]))  # a sample has fewer than the whole
    bounds = bounds.model_copy(update={"minimum_samples": fewest})
    before = made.before.model_copy(update={"definition": known.definition})
    return replace(made, before=before, config=config.model_copy(update={"thresholds": bounds}))
