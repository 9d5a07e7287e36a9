"""A toy kind of dataset: numbers and their squares. This folder and a line in `layout.KINDS` are all that it costs."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import Field

from tasks.audit.explanation import Explanation, look_for
from tasks.audit.holders import closing_sections
from tasks.audit.kind import Kind
from tasks.audit.replay_rows import TableAgain
from tasks.quality import faults, rules
from tasks.quality.faults import Faults, Sample, Trial, sample_rows
from tasks.quality.profile import profile_table
from tasks.quality.rules import Figures
from tasks.store import layout
from tasks.store.layout import AS_OF
from tasks.store.manifest import GateResult, Manifest, RowBalance
from tasks.store.settings import Settings

TIME = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)


class ToyConfig(Settings):
    root: str = Field(default="data", description="Root of the store.")
    count: int = Field(default=300, description="Numbers to square.")
    self_test: bool = Field(default=True, description="Test the gate.")


def squares(numbers: np.ndarray) -> pa.Table:
    """The job: rows of some numbers."""
    times = pa.array([TIME] * len(numbers), pa.timestamp("us", "UTC"))
    return pa.table({"number": numbers, "square": numbers**2, AS_OF: times})


def figures_of(table: pa.Table, lost: float = 0.0) -> Figures:
    """The gate's input: of the written rows, of which some may be lost on the way."""
    written = faults.lost(table, lost)
    return Figures(
        schema=written.schema,
        profile=profile_table(written),
        balances=(RowBalance(name="numbers", rows_in=table.num_rows, rows_out=written.num_rows),),
    )


def judge_squares(_config: ToyConfig, figures: Figures, _previous: Manifest | None) -> GateResult:
    columns = figures.profile.columns()
    found = [rules.check_rows(figures.profile.rows, 1), *map(rules.check_balance, figures.balances)]
    return rules.gate([*found, rules.check_nulls("square", columns["square"], 0.0, 0.0)])


@dataclass(frozen=True, kw_only=True)
class _Trial(Trial[Sample]):
    def figures(self, rows: Sample) -> Figures:
        return figures_of(rows.table, rows.lost)

    def faults(self) -> Faults:
        yield self.no_rows()
        yield self.lost_rows("numbers")
        yield self.nulls()


def trial(root: str, manifest: Manifest, config: ToyConfig, previous: Manifest | None) -> _Trial:
    base = layout.version_uri(root, manifest.dataset, manifest.version)
    table = sample_rows([layout.join(base, file.path) for file in manifest.files], ["number", "square"], "number")
    sample, before = Sample(table=table), previous or manifest
    return _Trial(sample=sample, features=("square",), before=before, config=config, gate=judge_squares)


class SquaresAgain(TableAgain):
    time = AS_OF

    def rows(self, sampled: pa.Table) -> pa.Table:
        return squares(sampled["number"].to_numpy())


def explain_square(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    held = look_for(root, manifest, key, at, time=AS_OF, spellings=("number",))
    if isinstance(held, Explanation):
        return held
    sections = [held.section, *closing_sections(root, manifest, ("number", held.key), {})]
    return Explanation(manifest, key, "held", f"{key} squared is {held.row['square']}", sections)


KIND = Kind(
    config=ToyConfig,
    code=("tests.fifth_kind",),
    undeclared=(),
    judge=judge_squares,
    trial=trial,
    again=SquaresAgain,
    explain=explain_square,
    cures={"rows": "give a --count above 0"},
)
