"""The quality gate of a published Ray Dataset: checks that make sense for any table; and its fault tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.datasets.config import DatasetConfig
from tasks.quality import faults, rules
from tasks.quality.faults import MOST_FEATURES, Faults, Sample, Trial, rarest, sample_rows
from tasks.quality.profile import profile_table
from tasks.quality.rules import Figures, classes_of
from tasks.store.manifest import CheckResult, GateResult, Manifest, RowBalance

LABEL_KINDS = "The dataset has no label that is a class."


def judge_dataset(config: DatasetConfig, written: Figures, previous: Manifest | None) -> GateResult:
    """Judge the rows of a dataset by its thresholds and the last published version, if there is one."""
    bounds, columns = config.thresholds, written.profile.columns()
    checks: list[CheckResult] = [rules.check_rows(written.profile.rows, bounds.minimum_rows)]
    types = {field.name: str(field.type) for field in written.schema}
    free = previous is None or config.allow_schema_change
    before = {} if previous is None else {spec.name: spec.type for spec in previous.columns}
    checks += rules.check_schema(types, types if free else before)
    checks += [rules.check_balance(balance) for balance in written.balances]
    if config.required:  # else no row is ever rejected
        checks += [
            rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail)
            for balance in written.balances
        ]
    checks += [
        rules.check_nulls(name, profile, bounds.missing_warn, bounds.missing_fail)
        for name, profile in columns.items()
        if name not in config.required
    ]
    checks += [
        rules.check_target(label, written.profile.partial(label), bounds.class_warn)
        for label in config.labels
        if label in columns
    ]
    if previous is not None:
        checks += [
            rules.check_drift(
                name,
                written.profile,
                previous.profile[name],
                warn_above=bounds.drift_warn,
                fail_above=bounds.drift_fail,
            )
            for name in columns
            if name in previous.profile
        ]
    return rules.gate(checks)


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[Sample]):
    required: str

    def figures(self, rows: Sample) -> Figures:
        kept, reasons = rows.table, Counter[str]()
        if rows.bad:
            kept = faults.lost(rows.table, rows.bad)
            reasons[f"null_{self.required}"] = rows.table.num_rows - kept.num_rows
        written = faults.lost(kept, rows.lost)
        balance = RowBalance(
            name=self.config.name, rows_in=rows.table.num_rows, rows_out=written.num_rows, rejected=dict(reasons)
        )
        return Figures(schema=written.schema, profile=profile_table(written), balances=(balance,))

    def faults(self) -> Faults:
        name, label = self.config.name, next(iter(self.config.labels), "")
        yield self.no_rows()
        yield self.lost_rows(name)
        why_not = "" if self.required else "No column is required, so that no row is rejected."
        words = f"{faults.BAD:.0%} of the rows lost their {self.required or 'values'}."
        yield self.fault("bad rows", words, f"rejected of {name}", why_not, bad=faults.BAD)
        yield self.schema(self.first or label)
        yield self.nulls(why_not="There is no column besides those that each row must have.")
        values = self.table[label].drop_null() if label else pa.chunked_array([], pa.null())
        one = values[0].as_py() if len(values) else None
        words = "Every row was given the label of the first."
        yield self.values("one label", f"target of {label}", label, one, words=words, why_not="There is no label.")
        counts = classes_of(self.known.profile.partial(label)) if label else None
        rare = rarest(counts or {})
        yield (
            self.shift()
            if self.number
            else self.one_class(label if rare else "", self._value(label, rare), LABEL_KINDS)
        )

    def _value(self, label: str, name: str) -> Any:
        """Return a class by its name."""
        if not name:
            return None
        return next(one for one in pc.unique(self.table[label]).to_pylist() if str(one).lower() == name.lower())


def trial(root: str, manifest: Manifest, config: DatasetConfig, previous: Manifest | None) -> Trial[Sample]:
    """Sample a version, without its images and ids; drift and types are compared with the sample as it is."""
    key: str = manifest.definition["key"]
    features = [name for name in manifest.profile if name not in config.required][:MOST_FEATURES]
    names = [name for name in dict.fromkeys([*config.required, *features]) if name in manifest.profile]
    table = sample_rows([manifest.uri(root, file.path) for file in manifest.files], [key, *names], key)
    bounds = config.thresholds
    fewest = max(1, min(bounds.minimum_rows, table.num_rows))  # a sample has fewer than the whole
    return _Trial(
        sample=Sample(table=table.select(names)),
        features=features,
        before=previous or manifest,
        config=config.model_copy(update={"thresholds": bounds.model_copy(update={"minimum_rows": fewest})}),
        gate=judge_dataset,
        required=next(iter(config.required), ""),
    )
