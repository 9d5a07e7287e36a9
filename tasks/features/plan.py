"""Plan of a run, made before it starts: files, columns, types, look-ups and joins. Pure.

A plan is a frozen value that goes to the workers.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl
import pyarrow as pa

from tasks.features.config import FeatureStoreConfig
from tasks.features.csv_text import polars_type
from tasks.features.definitions import Column, Definitions, DimensionSource, EventSource, FeatureGroup
from tasks.features.kernel import check_derived
from tasks.features.rows import ColumnPlan, KeyType, RowPlan, judge, key_type
from tasks.features.schema import check_kind, check_times, settled
from tasks.features.sources import INT64, ReadUnit, SourceTable, check_columns, inspect, read_units
from tasks.io.errors import DefinitionError, SourceError
from tasks.io.memory import released
from tasks.io.notation import MissingValues, missing_values
from tasks.io.text import closest


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """One source: its rows, and the way they are read."""

    table: SourceTable
    rows: RowPlan

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.table.name

    def units(self, rows_per_unit: int, table: SourceTable | None = None) -> list[ReadUnit]:
        """Return the pieces of the source, or of some of its files, that tasks read (`sources.read_units`)."""
        return units_of(table or self.table, self.rows, rows_per_unit)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about text that may mean 'no value', but is read as text."""
        kinds = {column.source_name: column for column in self.rows.columns}
        found = {
            (name, mark): None
            for file in self.table.files
            for name, values in file.values.items()
            if name in kinds and name not in self.rows.typed and values.kind == "text"
            for mark in values.marks
        }
        return tuple(
            f"{self.name}: in the column '{name}', which is text, {mark!r} is a value like any other; if it means "
            f"'missing', say so: --null-values={mark}"
            for name, mark in found
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupPlan:
    """Columns of a dimension that expressions over events use: joined to each event by the dimension's key."""

    dimension: SourcePlan
    key: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One feature group: its declaration, the events' columns that it needs and the dimension that it joins."""

    group: FeatureGroup
    columns: tuple[str, ...]
    dimension: SourcePlan | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLink:
    """The events kept by one version.

    buckets: number of them. files: URI by bucket; one without events has none. live: those of the source files that the
    version read that exist unchanged, number in that version's inputs → number among today's files.
    rows: their events. complete: True if all of its files exist.
    """

    version: int
    buckets: int
    files: Mapping[int, str]
    live: Mapping[int, int]
    rows: int
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePlan:
    """Sources of a group's events.

    digest: rules for reading and judging events; states of equal digests fit together. parent: version whose
    state is extended. depth: links of the chain, with the new one. new: numbers of the source files to read.
    whole: write all live events, not only the new ones, and begin a new chain.
    """

    digest: str
    parent: int | None
    depth: int
    links: tuple[StateLink, ...]
    new: frozenset[int]
    whole: bool

    @property
    def rows(self) -> int:
        """Number of live events kept by earlier versions."""
        return sum(link.rows for link in self.links)

    def record(self, rows: Mapping[int, int], files: int, buckets: int) -> dict[str, object]:
        """Return the manifest's definition of the version's own state.

        Args:
            rows: Number of written events, by the number of their source file.
            files: Number of source files.
            buckets: Number of buckets.
        """
        written = range(files) if self.whole else sorted(self.new)
        return {
            "digest": self.digest,
            "parent": None if self.whole else self.parent,
            "depth": 1 if self.whole else self.depth,
            "buckets": buckets,
            "files": [[number, rows.get(number, 0)] for number in written],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturePlan:
    """Everything that the workers need to know. All groups of one event source are computed from one reading.

    as_of: as-of times of the features, UTC, ascending. states, fingerprints: of an incremental run
    (`incremental.with_state`), for each group and each file of the events; empty otherwise. notes: sentences about
    the choice between columns, and about text taken for null.
    """

    events: SourcePlan
    time: str
    as_of: tuple[dt.datetime, ...]
    lookups: tuple[LookupPlan, ...]
    groups: tuple[GroupPlan, ...]
    rows_per_bucket: int
    states: tuple[StatePlan, ...] = ()
    fingerprints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def read_files(self) -> tuple[int, ...]:
        """Numbers of the events' files to read: all, or in an incremental run those that are new to a group."""
        if not self.states:
            return tuple(range(len(self.events.table.files)))
        return tuple(sorted(frozenset[int]().union(*(state.new for state in self.states))))

    @property
    def read_table(self) -> SourceTable:
        """The events' files to read."""
        return replace(self.events.table, files=tuple(self.events.table.files[number] for number in self.read_files))

    def reads(self, group: int, file: int) -> bool:
        """Return True if a group takes the rows of a file from the file, not from an earlier version."""
        return not self.states or file in self.states[group].new


@released()
def plan_features(
    definitions: Definitions,
    config: FeatureStoreConfig,
    as_of: Sequence[dt.datetime],
    known: Mapping[str, SourceTable] | None = None,
) -> list[FeaturePlan]:
    """Plan the configured groups, one plan an event source.

    Args:
        definitions: Declared sources and groups; sources without a URI count as missing.
        config: The user's configuration.
        as_of: Times up to which events count, UTC, ascending, at least one.
        known: Sources with known files, by name; the others are searched at their URIs.

    Raises:
        DefinitionError: a group needs a source or column that doesn't exist.
        SourceError: a source is missing, unreadable, or lacks a column.
    """
    groups = definitions.select(config.groups)
    plans = []
    for name in dict.fromkeys(group.source for group in groups):
        source = definitions.events[name]
        if source.uri is None:
            wanting = ", ".join(group.name for group in groups if group.source == name)
            place = "give --transactions" if name == "transactions" else f"give 'uri' of '{name}' in the definitions"
            raise SourceError(f"the source '{name}' that {wanting} reads has no URI; {place}")
        own = [group for group in groups if group.source == name]
        plans.append(_plan_source(source, own, definitions.dimensions, config, as_of, known=known or {}))
    return plans


def _plan_source(
    source: EventSource,
    groups: Sequence[FeatureGroup],
    dimensions: Mapping[str, DimensionSource],
    config: FeatureStoreConfig,
    as_of: Sequence[dt.datetime],
    *,
    known: Mapping[str, SourceTable],
) -> FeaturePlan:
    assert source.uri is not None
    missing = missing_values(config.null_values)
    events = known.get(source.name) or inspect(source.name, source.uri)
    tables = {n: known.get(n) or inspect(n, d.uri) for n, d in dimensions.items() if d.uri is not None}
    present = {name: dimensions[name] for name in tables}
    declared, source = source, replace(source, mapping=names_in_files(source, events))
    names = _event_columns(source, groups, events, present, tables)
    looked_up = {column: name for column, name in names.items() if name is not None}
    file_names = {column: source.mapping.get(column, column) for column, origin in names.items() if origin is None}
    check_columns(events, file_names)
    events = _settled_events(events, source, file_names, missing)
    tables = {name: _settled_dimension(table, present[name], missing) for name, table in tables.items()}
    keys = _key_types(source, events, present, tables)

    def dimension_plan(name: str, only: Sequence[str] | None = None) -> SourcePlan:
        return plan_dimension(present[name], tables[name], keys, only, missing=missing)

    check_times(events, file_names[source.time], config.epoch_unit)
    specs = {ours: _spec(source, ours, groups) for ours in file_names}
    for ours, theirs in file_names.items():
        check_kind(events, specs[ours].kind, ours, theirs)
    columns = tuple(_column(specs[ours], ours, theirs, events, keys) for ours, theirs in file_names.items())
    reject_negative = ("amount",) if config.negative_amounts == "reject" and "amount" in file_names else ()
    rows = RowPlan(
        source=source.name,
        columns=columns,
        time=source.time,
        as_of=as_of[-1],
        earliest=config.earliest,
        timezone=config.timezone,
        epoch_unit=config.epoch_unit,
        reject_negative=reject_negative,
        missing=missing,
    )
    lookups = tuple(
        LookupPlan(
            dimension=dimension_plan(name, [column for column, origin in looked_up.items() if origin == name]),
            key=present[name].key,
            columns=tuple(column for column, origin in looked_up.items() if origin == name),
        )
        for name in dict.fromkeys(looked_up.values())
    )
    empty = _no_rows(rows, lookups)
    for group in groups:
        check_derived(group, empty.select(*sorted(group.event_columns)), as_of[-1])
    planned = SourcePlan(table=events, rows=rows)
    of_groups = tuple(_plan_group(group, source, present, dimension_plan) for group in groups)
    joined = [*(group.dimension for group in of_groups), *(lookup.dimension for lookup in lookups)]
    return FeaturePlan(
        events=planned,
        time=source.time,
        as_of=tuple(as_of),
        lookups=lookups,
        groups=of_groups,
        rows_per_bucket=config.rows_per_bucket,
        notes=(
            *_choices(declared, file_names, events, lambda ours: _dimension_of(ours, names, present, tables)),
            *_taken_for_null([planned, *filter(None, joined)]),
        ),
    )


def names_in_files(source: EventSource, events: SourceTable) -> dict[str, str]:
    """Return our names → the files', where they differ: the mapped one, else another known name that a file has."""
    found = dict(source.mapping)
    known = {name for file in events.unlike for name in file.schema.names}
    for ours, spec in source.columns.items():
        theirs = next((name for name in spec.also if name in known), None)
        if theirs is not None and ours not in known:
            found.setdefault(ours, theirs)
    return found


def _choices(
    source: EventSource, columns: Mapping[str, str], events: SourceTable, elsewhere: Callable[[str], str | None]
) -> Iterator[str]:
    """Yield notes on event columns that could also mean another column, theirs or a dimension's, with other values.

    Args:
        source: The declaration, with the user's mapping.
        columns: Columns that the events' files have, our names to theirs.
        events: These files.
        elsewhere: Returns the dimension that has a column too.
    """
    for ours, theirs in columns.items():
        spec = source.columns.get(ours, Column())
        if ours in source.mapping or spec.required:  # a required column is never looked up
            continue
        known = (*spec.also, ours)
        others = [f"its column '{name}'" for name in known if name != theirs and events.has(name)]
        if (dimension := elsewhere(ours)) is not None:
            others.append(f"'{ours}' of {dimension}")
        if others:
            yield f"'{ours}' is the column '{theirs}' of {source.name}, not {' or '.join(others)}, which may differ"


def _dimension_of(
    column: str,
    needed: Collection[str],
    present: Mapping[str, DimensionSource],
    tables: Mapping[str, SourceTable],
) -> str | None:
    """Return the first dimension that has a column and whose key the events have."""
    for name, dimension in present.items():
        taken = column in dimension.mapping or not dimension.mapping or column in dimension.columns
        joins = dimension.key in needed and dimension.key != column
        if joins and taken and tables[name].has(dimension.mapping.get(column, column)):
            return name
    return None


def _no_rows(events: RowPlan, lookups: Sequence[LookupPlan]) -> pl.DataFrame:
    """Return no events, with the columns and types that expressions over them see."""
    frames = [judge(_unread(plan), plan).kept for plan in (events, *(lookup.dimension.rows for lookup in lookups))]
    return pl.DataFrame(schema={name: kind for frame in reversed(frames) for name, kind in frame.schema.items()})


def _unread(plan: RowPlan) -> pl.DataFrame:
    return pl.DataFrame(schema=dict.fromkeys([column.source_name for column in plan.columns], pl.String))


def _taken_for_null(sources: Sequence[SourcePlan]) -> tuple[str, ...]:
    """Return sentences about CSV text that is null, and about text that isn't, though it is in other columns."""
    if not any(file.format == "csv" for source in sources for file in source.table.files):
        return ()
    notes = [note for source in sources for note in source.notes]
    return tuple(dict.fromkeys([sources[0].rows.missing.described(), *notes]))


def _plan_group(
    group: FeatureGroup, source: EventSource, present: Mapping[str, DimensionSource], dimension_plan: object
) -> GroupPlan:
    assert callable(dimension_plan)
    dimension = None
    if group.dimension is not None and group.dimension in present:
        plan = dimension_plan(group.dimension)
        key = present[group.dimension].key
        if key != group.entity:
            raise DefinitionError(
                f"feature group '{group.name}' is about {group.entity}, but its dimension '{group.dimension}' is "
                f"keyed by {key}; map the key to '{group.entity}', or choose another dimension"
            )
        group.check_dimension(column.name for column in plan.rows.columns)
        dimension = plan
    columns = tuple(sorted(group.event_columns | {source.time}))
    return GroupPlan(group=group, columns=columns, dimension=dimension)


def _event_columns(
    source: EventSource,
    groups: Sequence[FeatureGroup],
    events: SourceTable,
    present: Mapping[str, DimensionSource],
    tables: Mapping[str, SourceTable],
) -> dict[str, str | None]:
    """Return the place of each needed column: None for the events' files, else a dimension's name."""
    needed = {column: None for column, spec in source.columns.items() if spec.required or column == source.time}
    for group in groups:
        needed |= dict.fromkeys(sorted(group.event_columns))
    found: dict[str, str | None] = {}
    for column in needed:
        own_name = source.mapping.get(column, column)
        # A column that only some files have isn't looked up for all: `check_columns` names the file without it.
        if column in source.mapping or any(own_name in file.schema.names for file in events.unlike):
            found[column] = None
            continue
        origin = _dimension_of(column, needed, present, tables)
        required = column in source.columns and source.columns[column].required
        if origin is None and not required:
            users = ", ".join(group.name for group in groups if column in group.event_columns)
            if users:
                own = {name: source.mapping.get(name, name) for name, place in found.items() if place is None}
                check_columns(events, own)  # another missing column may explain more: other separators, other capitals
                places = ", ".join([source.name, *present]) or source.name
                raise SourceError(
                    f"{users} needs the column '{column}', which stands in none of {places}; if it bears another "
                    f'name, map it (--transaction-columns or --product-columns \'{{"{column}": "…"}}\'), '
                    f"or choose other --groups. Columns of {source.name}: {', '.join(events.files[0].schema.names)}"
                )
        found[column] = origin
    return found


def _key_types(
    source: EventSource,
    events: SourceTable,
    present: Mapping[str, DimensionSource],
    tables: Mapping[str, SourceTable],
) -> dict[str, KeyType]:
    """Return the keys' types: integer if it is one in every file of every table that has it, else text."""
    types: dict[str, list[KeyType | None]] = {}
    for column, spec in source.columns.items():
        theirs = source.mapping.get(column, column)
        if spec.kind == "key":
            types[column] = [key_type_of(events, theirs)] if events.has(theirs) else []
    for name, dimension in present.items():
        theirs = dimension.mapping.get(dimension.key, dimension.key)
        types.setdefault(dimension.key, []).append(key_type_of(tables[name], theirs))
    return {key: "int64" if set(found) - {None} == {"int64"} else "string" for key, found in types.items()}


def key_type_of(table: SourceTable, column: str) -> KeyType | None:
    """Return the key type of a source's column (rows.py rejects fractions); None for one without any value."""
    types = [kind for kind in table.types(column) if not pa.types.is_null(kind)]
    if not types:
        return None
    return key_type(types) if table.largest(column) < INT64 else "string"


def _settled_events(
    events: SourceTable, source: EventSource, names: Mapping[str, str], missing: MissingValues
) -> SourceTable:
    """Settle the columns without a type by their kind; for the others a first block shows faults of all."""
    kinds = {theirs: source.columns.get(ours, Column()).kind for ours, theirs in names.items()}
    whole = [theirs for theirs, kind in kinds.items() if kind in ("key", "any")]
    return settled(events, whole, missing, sampled=kinds)


def _settled_dimension(table: SourceTable, dimension: DimensionSource, missing: MissingValues) -> SourceTable:
    names = [dimension.mapping.get(dimension.key, dimension.key)]
    check_columns(table, {dimension.key: names[0]})
    names += list(dimension.mapping.values()) or [column for column in dimension.columns if table.has(column)]
    return settled(table, [name for name in names if table.has(name)], missing)


def units_of(table: SourceTable, rows: RowPlan, rows_per_unit: int) -> list[ReadUnit]:
    """Return the pieces of some files that tasks read, by a plan."""
    return read_units(table, rows.file_columns, rows_per_unit, rows.categories, missing=rows.missing, typed=rows.typed)


def plan_dimension(
    dimension: DimensionSource,
    table: SourceTable,
    keys: Mapping[str, KeyType],
    only: Sequence[str] | None,
    *,
    missing: MissingValues,
) -> SourcePlan:
    """Plan the reading of a dimension.

    Args:
        dimension: Its declaration.
        table: Its files.
        keys: Types of keys.
        only: Columns to read beside the key; None: all declared ones.
        missing: Texts that are null.
    """
    if dimension.mapping:
        wanted = {ours: theirs for ours, theirs in dimension.mapping.items() if ours != dimension.key}
    else:
        wanted = {column: column for column in dimension.columns}
    if only is not None:
        wanted = {column: dimension.mapping.get(column, column) for column in only}
    names = {dimension.key: dimension.mapping.get(dimension.key, dimension.key), **wanted}
    check_columns(table, names)
    for ours, theirs in names.items():
        check_kind(table, "key" if ours == dimension.key else "any", ours, theirs)
    columns = [
        ColumnPlan(
            name=dimension.key,
            source_name=names[dimension.key],
            kind="key",
            required=True,
            key_type=keys[dimension.key],
        )
    ]
    columns += [
        ColumnPlan(name=ours, source_name=theirs, kind="any", dtype=polars_type(table.type_of(theirs)))
        for ours, theirs in wanted.items()
    ]
    return SourcePlan(table=table, rows=RowPlan(source=dimension.name, columns=tuple(columns), missing=missing))


def _spec(source: EventSource, column: str, groups: Sequence[FeatureGroup]) -> Column:
    """Return a column's declaration; an entity not declared as a key becomes one, so that look-ups can match it."""
    declared = source.columns.get(column, Column())
    is_entity = any(group.entity == column for group in groups)
    return replace(declared, kind="key") if is_entity and declared.kind == "any" else declared


def _column(spec: Column, ours: str, theirs: str, events: SourceTable, keys: Mapping[str, KeyType]) -> ColumnPlan:
    return ColumnPlan(
        name=ours,
        source_name=theirs,
        kind=spec.kind,
        required=spec.required,
        key_type=keys.get(ours) or key_type_of(events, theirs) or "string",
        dtype=polars_type(events.type_of(theirs)) if spec.kind == "any" else None,
    )


def check_mappings(definitions: Definitions, others: Iterable[FeatureGroup] = ()) -> None:
    """Check that each column that an event source's mapping names is read.

    Args:
        definitions: Sources with their mappings, and all groups that may read them.
        others: Other readers, such as labels.

    Raises:
        DefinitionError: nothing reads one; the message names the closest that is read.
    """
    for source in definitions.events.values():
        groups = [group for group in (*definitions.groups.values(), *others) if group.source == source.name]
        known = set(source.columns).union(*(group.event_columns for group in groups))
        for ours in source.mapping:
            if ours not in known:
                raise DefinitionError(
                    f"the mapping of {source.name} gives '{ours}', a column that nothing reads{closest(ours, known)}"
                )


def needs_sample(definitions: Definitions, config: FeatureStoreConfig) -> bool:
    """Return True if a requested group reads transactions, and their place isn't given.

    Raises:
        DefinitionError: a group is unknown, or names a source that isn't declared.
    """
    sources = {group.source for group in definitions.select(config.groups)}
    return "transactions" in sources and with_uris(definitions, config).events["transactions"].uri is None


def with_uris(definitions: Definitions, config: FeatureStoreConfig) -> Definitions:
    """Return definitions with the configuration's URIs and mappings of the standard sources."""
    events, dimensions = dict(definitions.events), dict(definitions.dimensions)
    if config.transactions is not None:
        events["transactions"] = replace(
            events["transactions"],
            uri=config.transactions,
            mapping=config.transaction_columns or events["transactions"].mapping,
        )
    for name, uri, mapping in (
        ("customers", config.customers, config.customer_columns),
        ("products", config.products, config.product_columns),
    ):
        if uri is not None:
            dimensions[name] = replace(dimensions[name], uri=uri, mapping=mapping or dimensions[name].mapping)
    return Definitions(events=events, dimensions=dimensions, groups=definitions.groups)
