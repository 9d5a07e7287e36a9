"""Row balances of a feature job, from three independent counts. Pure.

The rows that the tasks sent, that the shuffle carried, and that the tasks took must be equal in number;
the rows that were read must equal the counts in the files' footers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tasks.features.rows import AFTER_AS_OF
from tasks.features.stages import Job
from tasks.features.tallies import BucketSummary, EventTally, Tally, UnitNote, check_rows_read, check_way
from tasks.store.conservation import check_equal
from tasks.store.manifest import RowBalance

Int64Array = npt.NDArray[np.int64]


def group_balances(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> tuple[RowBalance, ...]:
    """Return the balances of the events, the dimension and the entities of a group, each checked.

    Events kept by earlier versions have a separate balance.

    Args:
        job: The job.
        number: Number of the group.
        notes: One a split.
        summaries: One a bucket of the group.
        sent: Rows that each split sent to the group's buckets.

    Raises:
        BalanceError: rows were lost or doubled; it has the figures.

    """
    planned = job.plan.groups[number]
    balances = _event_balances(job, number, notes, summaries, sent)
    if planned.dimension is not None:
        balances.append(_dimension_balance(job, number, notes, summaries, sent))
    entities = Tally()
    for summary in summaries:
        entities.add(summary.entities)
    balances.append(entities.balance(planned.group.name))
    for balance in balances:
        balance.check()
    return tuple(balances)


def _event_balances(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> list[RowBalance]:
    """Return the balance of the events read and, in an incremental run, of those kept by earlier versions."""
    planned, source = job.plan.groups[number], job.plan.events
    own = [index for index, split in enumerate(job.splits) if job.reads(number, split)]
    events = Tally()
    for index in own:
        events.add(notes[index].tally)
    check_rows_read(source, [unit for index in own for unit in job.splits[index].units], events)
    _filter(events, f"null_{planned.group.entity}", sum(notes[index].without_entity[number] for index in own))
    arrived = [summary.events for summary in summaries]
    check_way(source.name, events.rows_out, int(sent[own].sum()), sum(tally.new for tally in arrived))
    _filter(events, AFTER_AS_OF, sum(tally.new_late for tally in arrived))
    balances = [events.balance(source.name)]
    if job.plan.states and job.plan.states[number].links:
        balances.append(_kept_balance(job, number, arrived))
    return balances


def _kept_balance(job: Job, number: int, arrived: Sequence[EventTally]) -> RowBalance:
    """Return the balance of the events kept by earlier versions."""
    state, count = job.plan.states[number], sum(tally.kept for tally in arrived)
    name = f"{job.plan.events.name} kept by v{state.parent}"
    check_equal(name, state.rows, count, "are kept, {} were read")
    kept = Tally(rows_in=count, rows_out=count)
    _filter(kept, AFTER_AS_OF, sum(tally.kept_late for tally in arrived))
    return kept.balance(name)


def _dimension_balance(
    job: Job, number: int, notes: Sequence[UnitNote], summaries: Sequence[BucketSummary], sent: Int64Array
) -> RowBalance:
    dimension = job.plan.groups[number].dimension
    assert dimension is not None, "only a group with a dimension has its balance"
    own = [index for index, split in enumerate(job.splits) if split.group == number]
    read, kept = Tally(), Tally()
    for index in own:
        read.add(notes[index].tally)
    for summary in summaries:
        kept.add(summary.dimension)
    check_rows_read(dimension, [unit for index in own for unit in job.splits[index].units], read)
    check_way(dimension.name, read.rows_out, int(sent[own].sum()), kept.rows_in)
    read.pass_on(kept)
    return read.balance(dimension.name)


def _filter(tally: Tally, reason: str, rows: int) -> None:
    """Count kept rows as filtered."""
    if rows:
        tally.rows_out -= rows
        tally.filtered[reason] += rows
