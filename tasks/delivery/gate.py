"""The quality gate of a streaming-ready copy, and its fault tests. Pure, but for reading the sample.

The fault tests run the job's functions on a sample of the source's rows:

source rows ─ judge ─ split ─ profile ─ encoder, label ─┐   the same functions as in the job,
                        └─ keys ─ repeats ─ sample ids ─┴─ gate     on a few thousand rows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.definition import class_counts, describe, fit, named_profile, weight_column
from tasks.delivery.encoding import Label, bounds_of, label_names, length_name, text_of
from tasks.delivery.shuffle import (
    NOT_READY,
    CopyFigures,
    Loaded,
    Look,
    Shuffle,
    WrittenBucket,
    admit,
    judge,
    keys_of,
    note_of,
)
from tasks.delivery.source import (
    SPLITS,
    Repeats,
    Source,
    find_repeats,
    random_keys,
    repeated,
    sample_ids,
    split_entities,
)
from tasks.io.errors import ConfigError
from tasks.io.hashing import METHOD
from tasks.io.tensors import BoolArray, Int8Array, Int64Array
from tasks.io.text import number, plural
from tasks.quality import faults, rules
from tasks.quality.faults import ALIKE, DOUBLED, MOST_FEATURES, Faults, Sample, Trial, rarest, sample_rows
from tasks.store.manifest import CheckResult, FileEntry, GateResult, Manifest, RowBalance, Verdict
from tasks.store.reservation import Reservation

NAMED = 5


def judge_copy(config: DeliveryConfig, copy: CopyFigures, previous: Manifest | None) -> GateResult:
    """Judge a written copy.

    Against the last published version, a change of the source columns of features, of the label or of the shape
    of images fails unless it is allowed: a model can't be trained on both. Other columns of the matrix, as new
    categories bring them, and other classes or batch sizes warn.
    """
    bounds = config.thresholds
    columns = copy.profile.columns()
    label = copy.definition["label"]
    labels = label_names(label)
    lengths = [length_name(copy.definition["sequence"]["column"])] if "sequence" in copy.definition else []
    features = dict.fromkeys(feature["column"] for feature in copy.definition.get("features", ()))
    checks: list[CheckResult] = [_rows(copy, bounds.minimum_samples)]
    checks += _splits(config, copy)
    checks += [rules.check_balance(balance) for balance in copy.balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in copy.balances
    ]
    checks += [rules.check_unique("sample_id", copy.duplicate_ids), _repeats(copy), _leak(copy)]
    checks += [rules.check_nulls(name, columns[name], bounds.missing_warn, bounds.missing_fail) for name in features]
    if features:
        checks.append(_constants(copy.definition["features"]))
    if copy.class_counts:
        checks += _classes(config, copy)
    elif label is not None and label["kind"] == "number":
        [name] = labels
        if columns[name].std == 0:
            message = f"{name} is {number(columns[name].mean or 0.0)} in every row: nothing can be learned."
            checks.append(_check("target", name, ("fail", 0.0, "> 0"), message))
    elif label is not None and label["kind"] != "class":
        checks += [rules.check_target(name, copy.profile.partial(name), bounds.balance_warn / 2) for name in labels]
    weight = weight_column(copy.definition)
    if weight is not None:
        checks.append(_weights(weight, bounds_of(copy.profile.partial(weight))[1]))
    if previous is not None:
        checks += _against(previous.version, previous.definition, copy.definition, config.allow_schema_change)
        checks += [
            rules.check_drift(
                name, copy.profile, previous.profile[name], warn_above=bounds.drift_warn, fail_above=bounds.drift_fail
            )
            for name in dict.fromkeys([*features, *labels, *lengths, *([weight] if weight else [])])
            if name in previous.profile
        ]
    return rules.gate(checks)


def _rows(copy: CopyFigures, minimum: int) -> CheckResult:
    """Check that there are enough rows to train on; if none is left, report why."""
    check = rules.check_rows(copy.samples["train"], minimum)
    left_out = {reason: rows for balance in copy.balances for reason, rows in balance.filtered.items() if rows}
    if sum(copy.samples.values()) or not left_out:
        return check
    counts = ", ".join(f"{plural(rows, 'row')} {reason}" for reason, rows in left_out.items())
    cure = "; take all rows with --no-ready-only" if NOT_READY in left_out else ""
    return check.model_copy(update={"message": f"No row is left: {counts}{cure}."})


def _splits(config: DeliveryConfig, copy: CopyFigures) -> list[CheckResult]:
    """Check that each required split has samples; images have the splits of their source, whatever its shares."""
    if copy.definition["kind"] != "images":
        shares = (1 - config.validation_share - config.test_share, config.validation_share, config.test_share)
        return rules.check_split_sizes(copy.samples, dict(zip(SPLITS, shares, strict=True)), SPLITS[0])
    checks = []
    needs: dict[str, Verdict] = {"train": "fail", "validation": "warn"}
    for split, absent in needs.items():
        count = copy.samples[split]
        message = f"Split {split} has {plural(count, 'image')}, as in the source."
        checks.append(_check("split", split, ("pass" if count else absent, float(count), "≥ 1"), message))
    return checks


def _repeats(copy: CopyFigures) -> CheckResult:
    """Check that each row has a unique key: rows with the same values count more than once."""
    found, keys = copy.repeated_keys, ", ".join(copy.definition["keys"])
    message = f"Every row has another {keys}."
    if found:
        message = f"{plural(found, 'row')} repeat the {keys} of another; each is a sample of its own."
    return _check("repeated keys", keys, _none(found), message)


def _leak(copy: CopyFigures) -> CheckResult:
    found, entity = copy.leaking_entities, copy.definition["entity"]
    message = f"No {entity} is in several splits ({sum(copy.entities.values()):,} were looked at)."
    if found:
        message = f"{plural(found, 'value')} of {entity} are in several splits: validation would tell of memory."
    return rules.check_leak(found).model_copy(update={"column": entity, "message": message})


def _constants(features: Iterable[Mapping[str, Any]]) -> CheckResult:
    """Check that no column of the matrix is constant."""
    constant = [str(feature["name"]) for feature in features if feature["minimum"] == feature["maximum"]]
    message = f"{_listed(constant)} never differ in the train split: they teach nothing."
    message = message if constant else "Every feature differs between samples."
    return _check("constant", None, _none(len(constant)), message)


def _weights(column: str, largest: float) -> CheckResult:
    """Check that some samples can be drawn by their weights."""
    message = f"{column} is {number(largest)} at most: samples can be drawn by it."
    if largest == 0:
        message = f"{column} is 0 in every row of the train split: nothing can be drawn by it."
    return _check("weights", column, ("fail" if largest == 0 else "pass", largest, "> 0"), message)


def _classes(config: DeliveryConfig, copy: CopyFigures) -> list[CheckResult]:
    """Check that each class is frequent enough to be learned, and is in every split."""
    column, train = copy.definition["label"]["column"], copy.class_counts.get("train", {})
    share = config.thresholds.balance_warn / max(len(train), 1)
    balance = rules.check_class_balance(column, list(train.items()), share)
    if balance.verdict == "fail" and len(train) > 1:
        balance = balance.model_copy(update={"verdict": "warn"})
    checks = [balance]
    for split, counts in copy.class_counts.items():
        absent = [name for name, count in counts.items() if not count]
        message = f"Split {split} has every class."
        if absent:
            message = f"Split {split} has no sample of {column} {_listed(absent)}."
        checks.append(_check("classes", split, _none(len(absent)), message))
    return checks


def _against(
    version: int, before: Mapping[str, Any], now: Mapping[str, Any], change_allowed: bool
) -> list[CheckResult]:
    """Check that readers of the last version can read this one, from both definitions."""
    checks = []
    for what, find in _ESSENTIALS.items():
        old, new = find(before), find(now)
        if old != new:
            verdict: Verdict = "warn" if change_allowed else "fail"
            message = f"{what} differ from v{version}: {_difference(old, new)}. Allow it, or take another name."
            checks.append(_check("schema", what, (verdict, _difference(old, new), f"as in v{version}"), message))
    for what, find in () if checks else _DETAILS.items():
        old, new = find(before), find(now)
        if old != new:
            message = f"{what} differ from v{version}: {_difference(old, new)}."
            checks.append(_check("schema", what, ("warn", _difference(old, new), f"as in v{version}"), message))
    message = f"Features, label and batches are those of v{version}."
    return checks or [_check("schema", None, ("pass", float(now.get("feature_count", 1)), "as before"), message)]


def _label_part(name: str) -> Any:
    return lambda definition: (definition.get("label") or {}).get(name)


def _feature_part(name: str) -> Any:
    return lambda definition: tuple(dict.fromkeys(feature[name] for feature in definition.get("features", ())))


_ESSENTIALS: dict[str, Any] = {
    "Kinds": lambda definition: definition.get("kind"),
    "Source columns": _feature_part("column"),
    "Images": lambda definition: (definition.get("image") or {}).get("shape"),
    "Sequences": lambda definition: tuple((definition.get("sequence") or {}).get(name) for name in ("column", "dtype")),
    "Label columns": lambda definition: (
        _label_part("column")(definition) or (*label_names(definition.get("label")),) or None
    ),
    "Label kinds": _label_part("kind"),
}
_DETAILS: dict[str, Any] = {
    "Features": _feature_part("name"),
    "Classes": lambda definition: tuple((definition.get("label") or {}).get("classes") or ()),
    "Encodings": lambda definition: (definition.get("image") or {}).get("encoding"),
    "Batch sizes": lambda definition: definition.get("batch_size"),
    "Weight columns": weight_column,
}


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, tuple) or not isinstance(new, tuple):
        return f"{new} instead of {old}"
    words = [
        f"{_listed([str(name) for name in names])} {what}"
        for what, names in (
            ("came", [name for name in new if name not in old]),
            ("went", [name for name in old if name not in new]),
        )
        if names
    ]
    return " and ".join(words) or "another order"


def _listed(names: list[str]) -> str:
    """Return some names, and the number of the others."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {number(more)} more" if more > 0 else "")


def _none(count: int) -> tuple[Verdict, float, str]:
    """Return the verdict on a count that should be 0, but does no harm if it isn't."""
    return "warn" if count else "pass", float(count), "= 0"


def _check(name: str, column: str | None, found: tuple[Verdict, float | str, str], message: str) -> CheckResult:
    """Return a result; `found` is the verdict, the figure and the requirement."""
    verdict, figure, bound = found
    return CheckResult(name=name, column=column, verdict=verdict, figure=figure, bound=bound, message=message)


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
            rows_out=sum(made.entry.rows for made in written),
            rejected=dict(note.rejected),
            filtered=dict(note.filtered),
        )
        return CopyFigures(
            schema=shuffle.form.schema,
            profile=named_profile(note.profile, shuffle.label, [note]),
            balances=(balance,),
            definition=describe(shuffle, {split: count for split, count in samples.items() if count}),
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

    def _written(self, shuffle: Shuffle, loaded: Loaded, ids: Int64Array, rows: _Rows) -> list[WrittenBucket]:
        """Return the rows that would be written for each split."""
        label, labels, classes = shuffle.label, None, 0
        if isinstance(label, Label) and label.kind == "class":
            labels, classes = label.encode_rows(loaded.rows), len(label.classes)
        kept, again = ~faults.some(len(ids), rows.lost), faults.some(len(ids), rows.twice)
        places = np.concatenate([np.flatnonzero(kept), np.flatnonzero(again)])
        written = []
        for split in np.unique(loaded.splits[places]).tolist():
            own = places[loaded.splits[places] == split]
            made = WrittenBucket(
                entry=FileEntry(path=f"{split}", rows=len(own), bytes=0, digest=f"{METHOD}:{'0' * 64}"),
                split=split,
                class_counts=None if labels is None else np.bincount(labels[own], minlength=classes),
                duplicate_ids=repeated(np.sort(random_keys(ids[own], self.config.seed))),
            )
            written.append(made)
        return written

    def faults(self) -> Faults:
        source, first = self.sample.source, self.first
        target = source.targets[0] if len(source.targets) == 1 else ""  # of several none has classes to take away
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
        sequence = source.sequence
        none = "Images have no features." if sequence is None else "Sequences have no features."
        yield self.nulls(*more, why_not=none)
        yield self.values("constant", "constant", self.number, 1, why_not=ALIKE if first else none)
        yield self.values("weights", "weights", source.weight or "", 0, why_not="Samples have no weights.")
        aims = ("schema", "schema of Source columns", "schema of Label columns")
        why_not = "" if first or source.targets else "There is neither a feature nor a label."
        fewer = {"features": tuple(column for column in source.features if column != first)}
        left = replace(source, **(fewer if first else {"targets": ()}))
        lost = first or ",".join(source.targets)
        schema = self.fault("schema", f"Column {lost} was left out.", aims, why_not, source=left)
        yield replace(schema, raises=(ConfigError,))
        if sequence is not None:
            emptied = self._cut(sequence, faults.some(self.table.num_rows, faults.BAD), 0)
            words = f"{faults.BAD:.0%} of the sequences were emptied."
            yield self.fault("empty sequences", words, f"rejected of {name}", table=emptied)
            drift, known = length_name(sequence), self.before.profile
            why_not = "" if drift in known and known[drift].minimum != known[drift].maximum else "All have one length."
            words = "Every sequence was cut to its first element."
            cut = self._cut(sequence, np.ones(self.table.num_rows, np.bool_), 1)
            yield self.fault("cut sequences", words, f"drift of {drift}", why_not, table=cut)
        value = self.table[target].drop_null()[0].as_py() if rare else None
        why_not = "There is no number and no class that differs between rows."
        yield self.shift() if self.number else self.one_class(target if rare else "", value, why_not)

    def _cut(self, sequence: str, where: BoolArray, length: int) -> pa.Table:
        """Cut some of the sequences to a length; text to its first characters."""
        values = [
            value if value is None or not hit else value[:length]
            for value, hit in zip(self.table[sequence].to_pylist(), where.tolist(), strict=True)
        ]
        return faults.with_column(self.table, sequence, pa.array(values, self.table.schema.field(sequence).type))

    def _of_class(self, name: str) -> tuple[BoolArray, Int8Array]:
        """Mark the rows of a class, none for ''; return each row's split, too, −1 for rows that the job leaves out."""
        source, table = self.sample.source, self.table
        good = judge(table, source, self.config)[0] == 0
        splits = np.full(len(good), -1, np.int8)
        splits[good] = self._loaded(table, source).splits
        if not name:
            return np.zeros(len(good), np.bool_), splits
        value = str(source.classes.index(name)) if source.classes is not None else name
        return pc.equal(text_of(table[source.targets[0]]), value).fill_null(False).to_numpy(), splits


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
