"""Look-up dimensions: read once, in the driver, and given to every task, so they fit in memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from tasks.features.parts import write_rejected
from tasks.features.plan import FeaturePlan, LookupPlan
from tasks.features.stages import read_and_judge, unique_dimension_rows
from tasks.features.tallies import Tally, check_rows_read
from tasks.store.manifest import FileEntry, RowBalance
from tasks.store.reservation import Reservation


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A dimension by key: the rows to join to events, and the counts of the others.

    rejected: frames of rejected rows with their reason, each with the name of its file.
    """

    plan: LookupPlan
    rows: pl.DataFrame
    balance: RowBalance
    rejected: tuple[tuple[str, int, pl.DataFrame], ...]

    def write_rejected(self, reservation: Reservation) -> list[FileEntry]:
        """Write the rejected rows beside a version that was made with this dimension."""
        return [write_rejected(reservation, name, index, frame) for name, index, frame in self.rejected]


def read_lookup(plan: LookupPlan, rows_per_unit: int) -> LookedUp:
    """Read a dimension and return one row a key.

    Args:
        plan: The look-up.
        rows_per_unit: Rows that are read at once.

    Raises:
        SourceError: a file can't be read.
        BalanceError: rows were lost.

    """
    source = plan.dimension
    tally, kept = Tally(), Tally()
    frames, rejected = [], []
    units = source.units(rows_per_unit)
    for index, unit in enumerate(units):
        rows, own, bad = read_and_judge(source, unit)
        frames.append(rows)
        tally.add(own)
        if bad is not None:
            rejected.append((source.name, index, bad))
    check_rows_read(source, units, tally)
    unique, conflicting = unique_dimension_rows(pl.concat(frames), plan.key, kept)
    if conflicting.height:
        rejected.append((f"{source.name}-conflicts", 0, conflicting))
    tally.pass_on(kept)
    balance = tally.balance(source.name)
    balance.check()
    return LookedUp(plan, unique, balance, tuple(rejected))


def categorised(plan: FeaturePlan, lookup: LookedUp) -> pl.DataFrame:
    """Return the rows to join to the events of a plan; columns that are categories in the events become categories."""
    categories = {column.name for column in plan.events.rows.columns if column.kind == "category"}
    names = [name for name in lookup.plan.columns if name in categories]
    return lookup.rows.with_columns(pl.col(name).cast(pl.Categorical) for name in names)


def lookup_tables(plan: FeaturePlan) -> tuple[pl.DataFrame, ...]:
    """Return the rows of all look-up dimensions of a plan, in the form for its tasks."""
    return tuple(categorised(plan, read_lookup(lookup, plan.rows_per_bucket)) for lookup in plan.lookups)
