"""The store's interface for data scientists, with Feast's names.

    store = FeatureStore("s3://bucket/prefix")
    store.get_historical_features(spine, ["customer-features:total_spent"]).to_pandas()   # to train
    store.get_online_features(["customer-features:*"], {"customer_id": [17, 42]}).to_dict()   # to serve

Historical features are as they were known at each row's time; online features are the newest ones.
"""

from __future__ import annotations

import datetime as dt
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from tasks.features.rows import as_given
from tasks.io import storage
from tasks.io.errors import ConfigError, DefinitionError, InputError, SourceError
from tasks.io.text import closest
from tasks.serving.online import CACHE_BYTES, Lookup
from tasks.store import catalogue, layout
from tasks.store.catalogue import DatasetSummary, Description, VersionSummary
from tasks.store.layout import AS_OF, EVENT_TIME
from tasks.store.manifest import Manifest
from tasks.store.reading import latest, overview, resolve
from tasks.store.version_index import IndexedVersion
from tasks.training_sets.definition import (
    ALL,
    STATUS,
    FeatureReference,
    Pin,
    expired,
    moment_of,
    statuses,
    time_to_live,
    without,
)

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import ray.data

    from tasks.serving.online import RedisLookup


REFRESH_SECONDS = 10.0
"""A look-up uses the newest version of at most this long ago; a withdrawal is also noticed this late."""


class _Values(Protocol):
    """Source of the newest values: a version's files, or Redis."""

    @property
    def entity(self) -> str: ...
    @property
    def ttl(self) -> dt.timedelta | None: ...
    @property
    def features(self) -> Sequence[str]: ...
    def rows(self, keys: Iterable[Any], columns: Sequence[str]) -> pa.Table: ...


class Features:
    """A table of features, convertible to several forms; computed once, on first use."""

    def __init__(self, compute: Callable[[], pa.Table]) -> None:
        self._compute = compute

    @cached_property
    def _table(self) -> pa.Table:
        return self._compute()

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table."""
        return self._table

    def to_pandas(self) -> pd.DataFrame:
        """Return a pandas data frame."""
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    to_df = to_pandas
    """Feast's name for it."""

    def to_polars(self) -> pl.DataFrame:
        """Return a Polars data frame."""
        import polars as pl

        frame = pl.from_arrow(self._table)
        assert isinstance(frame, pl.DataFrame)
        return frame

    def to_dict(self) -> dict[str, list[Any]]:
        """Return column name → values, in the order of the rows."""
        values: dict[str, list[Any]] = self._table.to_pydict()
        return values

    def to_ray(self) -> ray.data.Dataset:
        """Return a Ray Dataset."""
        import ray.data

        return ray.data.from_arrow(self._table)


class FeatureStore:
    """A store under a root; read-only, keeps the files of look-ups open, and may be shared by threads."""

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        refresh_seconds: float = REFRESH_SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Remember the place of the store.

        Args:
            root: Path or s3:// URI.
            refresh_seconds: Maximum age, for look-ups, of the knowledge which version is the newest.
            cache_bytes: Decoded rows that look-ups keep in memory, for each group.
        """
        if not isinstance(root, str | os.PathLike) or not str(root).strip():
            raise ConfigError(f"root = {root!r}: give the path or s3:// URI of a store, such as 'data'")
        _check_number("refresh_seconds", refresh_seconds)
        _check_number("cache_bytes", cache_bytes)
        self.root = storage.normalise(os.fspath(root))
        self._refresh_seconds = refresh_seconds
        self._cache_bytes = cache_bytes
        self._lookups: dict[tuple[str, Pin], _Held] = {}
        self._redis: dict[tuple[str, str], tuple[RedisLookup, float]] = {}
        self._lock = threading.Lock()

    def list(self) -> Sequence[DatasetSummary]:
        """Return every dataset under the root, by name."""
        return catalogue.summaries(self.root)

    def describe(self, group: str, version: int | str | None = None) -> Description:
        """Return a description of a dataset's version: columns, times and origin; the latest if none is given.

        Args:
            group: Name of a dataset, or its last part.
            version: Version number, as 3 or 'v3'.

        Raises:
            ConfigError: the version isn't a number.
            VersionNotFound: there is no such dataset or version.
        """
        number = None if version in (None, "latest") else layout.version_number(version)
        return catalogue.describe(self.root, catalogue.find_dataset(self.root, group), number)

    def versions(self, group: str) -> Sequence[VersionSummary]:
        """Return every committed version of a dataset, ascending, including those that readers skip.

        Raises:
            VersionNotFound: there is no such dataset.
        """
        return catalogue.version_summaries(self.root, catalogue.find_dataset(self.root, group))

    def get_historical_features(
        self,
        entity_df: pa.Table | pd.DataFrame | pl.DataFrame | str,
        features: Sequence[str],
        *,
        ttl_days: float | None = None,
        strict: bool = False,
        known_at: bool = False,
        full_feature_names: bool = False,
        include_status: bool = False,
    ) -> Features:
        """Return features as they were at each row's time: the newest with as_of ≤ event_timestamp.

        Args:
            entity_df: Rows with the groups' entity keys and `event_timestamp` (UTC if it has no time zone; a row
                without one gets nulls), in memory or as the URI of a Parquet or CSV file. Rows may repeat; other
                columns are kept as they are.
            features: References such as 'customer-features:total_spent', 'customer-features:*' or '…@v3'.
            ttl_days: Ignore features older than this (event_timestamp − as_of).
            strict: Require as_of before the event time.
            known_at: Ignore features created after the event time.
            full_feature_names: Name each column '<group>__<feature>', not only where names collide.
            include_status: As in `get_online_features`.

        Returns:
            The rows in their order, followed by the features' columns; null where there is no feature in time.

        Raises:
            DefinitionError: a reference is malformed, or the group or feature doesn't exist.
            VersionNotFound: a pinned version doesn't exist.
            InputError: another argument is invalid.
            SourceError: a column of the rows is missing, or the rows can't be read.
        """
        from tasks.serving.retrieval import retrieve

        references = _references(features)
        time_to_live(ttl_days)
        for reference in references:
            self._check(reference)
        return Features(
            lambda: retrieve(
                self.root,
                _table(entity_df),
                references,
                event_time=EVENT_TIME,
                ttl_days=ttl_days,
                strict=strict,
                known_at=known_at,
                full_feature_names=full_feature_names,
                include_status=include_status,
            )
        )

    def get_online_features(
        self,
        features: Sequence[str],
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        full_feature_names: bool = False,
        from_redis: str | None = None,
        ttl_days: float | None = None,
        now: dt.datetime | None = None,
        include_status: bool = False,
    ) -> Features:
        """Return the newest features of some entities, without loading the dataset.

        Args:
            features: References, as `get_historical_features` takes them.
            entity_rows: [{'customer_id': 17}, …], {'customer_id': [17, …]}, or a pandas, Polars or Arrow table.
            full_feature_names: As in `get_historical_features`.
            from_redis: URL of a Redis server with the exported groups, to read instead of the files.
            ttl_days: Ignore values older than this (now − as_of); Redis also applies the export's ttl_days.
            now: Time for measuring ages, with a time zone; the clock's if none is given.
            include_status: Add a column '<feature>__status' after each feature's: PRESENT, NULL, EXPIRED
                or NOT_FOUND.

        Returns:
            The keys as given and the features' columns, one row an entity; nulls for an unknown entity or
            expired values.

        Raises:
            DefinitionError: a reference is malformed, or the group or feature doesn't exist.
            InputError: a group's entity key is missing or of the wrong type; or another argument is invalid.
            VersionNotFound: a pinned version doesn't exist.
        """
        keys, references = _columns(entity_rows), _references(features)
        ttl, moment = time_to_live(ttl_days), moment_of(now)
        values = {(ref.group, ref.pin): self._values(ref.group, ref.pin, from_redis) for ref in references}
        spelled = _spelled_out(references, values)
        names = _names(spelled, full=full_feature_names)
        columns = [f"{name}{end}" for name in names for end in (("", STATUS) if include_status else ("",))]
        taken = next((name for name in columns if name in keys), None)
        if taken is not None:
            raise DefinitionError(
                f"the entities have a column '{taken}' already, as a feature is named; leave it out, or ask for "
                f"full_feature_names"
            )
        found: dict[str, Any] = {}
        for (group, pin), source in values.items():
            if source.entity not in keys:
                raise InputError(
                    f"'{group}' is looked up by '{source.entity}', which isn't among the keys"
                    f"{closest(source.entity, list(keys))}"
                )
            own = [ref.feature for ref in spelled if (ref.group, ref.pin) == (group, pin)]
            table = source.rows(keys[source.entity], list(dict.fromkeys([*own, AS_OF])))
            # Redis drops expired rows by the clock, whatever time the caller measures by.
            late = expired(table[AS_OF], moment, ttl) | expired(table[AS_OF], moment_of(None), source.ttl)
            there = table[AS_OF].is_valid().to_numpy().astype(np.bool_)
            for name, ref in zip(names, spelled, strict=True):
                if (ref.group, ref.pin) == (group, pin):
                    found[name] = without(table[ref.feature], late)
                    if include_status:
                        found[f"{name}{STATUS}"] = statuses(table[ref.feature], there, late)
        given = {name: as_given(some, f"values of '{name}'") for name, some in keys.items()}
        table = pa.table({**given, **{name: found[name] for name in columns}})
        return Features(lambda: table)

    def _values(self, group: str, pin: Pin, from_redis: str | None) -> _Values:
        if from_redis is not None:
            if pin is not None:
                raise DefinitionError(f"'{group}' is pinned, but Redis has its newest values only; leave the pin out")
            return self._exported(group, from_redis)
        with self._lock:
            held = self._lookups.get((group, pin))
            if held is None or (not isinstance(pin, int) and held.age() > self._refresh_seconds):
                held = self._lookups[group, pin] = self._refreshed(group, pin, held)
        return held

    def _exported(self, group: str, url: str) -> _Values:
        from tasks.serving.online import RedisLookup

        with self._lock:
            lookup, since = self._redis.get((group, url), (None, 0.0))
            if lookup is None or time.monotonic() - since > self._refresh_seconds:
                lookup, since = RedisLookup(group, url), time.monotonic()
                self._redis[group, url] = lookup, since
        return lookup

    def _refreshed(self, group: str, pin: Pin, before: _Held | None) -> _Held:
        """Return the group's look-up; the same object while its version is the newest."""
        dataset = layout.feature_dataset(group)
        known = before.known if before is not None else {}
        if isinstance(pin, int):
            self._find_group(group)
            chosen: Manifest | None = resolve(self.root, dataset, pin)
        elif pin is None:
            found = overview(self.root, dataset, known)
            known, chosen = found.settled, catalogue.newest(self.root, dataset, found)
        else:
            chosen = latest(self.root, dataset)
        if chosen is None:
            self._find_group(group)
            chosen = resolve(self.root, dataset)  # raises with the reason if there is none
        if before is not None and before.lookup.manifest.version == chosen.version:
            return _Held(before.lookup, known, time.monotonic())
        return _Held(Lookup(self.root, chosen, self._cache_bytes), known, time.monotonic())

    def _find_group(self, group: str) -> str:
        return catalogue.find_dataset(self.root, layout.feature_dataset(group), "features")

    def _check(self, reference: FeatureReference) -> None:
        """Raise at once if a group or feature doesn't exist, not only when the rows are computed."""
        names = self._values(reference.group, reference.pin, None).features
        if reference.feature not in (ALL, *names):
            raise DefinitionError(
                f"'{reference.group}' has no feature '{reference.feature}'{closest(reference.feature, names)}"
            )


@dataclass(frozen=True, slots=True)
class _Held:
    """A look-up, and the time of the last check that it is the newest."""

    lookup: Lookup
    known: Mapping[int, IndexedVersion]
    since: float

    @property
    def entity(self) -> str:
        return self.lookup.entity

    @property
    def ttl(self) -> None:
        """Files keep their values for ever."""

    @property
    def features(self) -> Sequence[str]:
        return catalogue.feature_names(self.lookup.manifest)

    def rows(self, keys: Iterable[Any], columns: Sequence[str]) -> pa.Table:
        return self.lookup.rows(keys, columns)

    def age(self) -> float:
        return time.monotonic() - self.since


def _spelled_out(
    references: Sequence[FeatureReference], values: Mapping[tuple[str, Pin], _Values]
) -> list[FeatureReference]:
    """Return each feature by its name, once."""
    found: dict[FeatureReference, None] = {}
    for ref in references:
        known = values[ref.group, ref.pin].features
        if ref.feature != ALL and ref.feature not in known:
            raise DefinitionError(f"'{ref.group}' has no feature '{ref.feature}'{closest(ref.feature, known)}")
        for name in known if ref.feature == ALL else [ref.feature]:
            found[FeatureReference(ref.group, name, ref.pin)] = None
    return list(found)


def _names(references: Sequence[FeatureReference], *, full: bool) -> list[str]:
    """Return each feature's column: its name, with its group where names collide or full names are requested."""
    features = [ref.feature for ref in references]
    names = [
        f"{ref.group}__{ref.feature}" if full or features.count(ref.feature) > 1 else ref.feature for ref in references
    ]
    for name, ref in zip(names, references, strict=True):
        if names.count(name) > 1:
            raise DefinitionError(f"'{ref}' is asked for in two versions at once, whose columns would have one name")
    return names


def _references(features: Sequence[str]) -> list[FeatureReference]:
    if isinstance(features, str) or not isinstance(features, Iterable):
        raise DefinitionError(f"features = {features!r}: give a list, such as ['customer-features:*']")
    references = [FeatureReference.parse(text) for text in features]
    if not references:
        raise DefinitionError("no features are asked for; give some, such as customer-features:*")
    return references


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} = {value!r}: give a number of at least 0")


def _columns(entity_rows: Any) -> dict[str, Any]:
    """Return keys by column name, for entities in any accepted form."""
    if not isinstance(entity_rows, Mapping | list | tuple):
        table = _table(entity_rows)
        return {name: table[name] for name in table.column_names}
    if not entity_rows:
        raise InputError("no entities are asked for; give some, such as {'customer_id': [17]}")
    if isinstance(entity_rows, Mapping):
        for name, values in entity_rows.items():
            if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
                raise InputError(f"'{name}' is {values!r}; give a list of keys, such as {{'{name}': [17]}}")
        lengths = {name: len(values) for name, values in entity_rows.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"entity keys are of different lengths: {lengths}; give each row a value of every key")
        return dict(entity_rows)
    for number, row in enumerate(entity_rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {number} of the entities is {row!r}; give each as {{'customer_id': 17}}")
    names = list(dict.fromkeys(name for row in entity_rows for name in row))
    for number, row in enumerate(entity_rows):
        for name in names:
            if name not in row:
                raise InputError(
                    f"row {number} of the entities has no '{name}', as others have; give None where it has none"
                )
    return {name: [row[name] for row in entity_rows] for name in names}


def _table(entity_df: pa.Table | pd.DataFrame | pl.DataFrame | str) -> pa.Table:
    """Return rows as an Arrow table; read a URI."""
    if isinstance(entity_df, str):
        return _single(_read(entity_df))
    if isinstance(entity_df, pa.Table):
        return _single(entity_df)
    import pandas as pd
    import polars as pl

    if isinstance(entity_df, pl.DataFrame):
        return entity_df.to_arrow()
    if isinstance(entity_df, pd.DataFrame):
        try:
            return pa.Table.from_pandas(entity_df, preserve_index=False)
        except (pa.ArrowException, ValueError, TypeError) as fault:
            raise SourceError(f"the rows can't be read: {fault}; give each column values of one type") from fault
    raise InputError(
        f"rows of type {type(entity_df).__name__} can't be read; give a pandas, Polars or Arrow table, or a URI"
    )


def _read(uri: str) -> pa.Table:
    import pyarrow.parquet as pq

    from tasks.features.schema import read_csv
    from tasks.features.sources import SUFFIXES

    files = storage.list_files(uri, SUFFIXES)
    if not files:
        raise SourceError(f"no Parquet or CSV file at {uri!r}; correct the location")
    tables, texts = [], []
    for info in files:
        if not info.uri.lower().endswith(".parquet"):
            texts.append(info)
            continue
        try:
            with storage.open_input(info.uri) as source:
                tables.append(pq.ParquetFile(source).read())
        except pa.ArrowInvalid as fault:
            raise SourceError(f"{info.uri} can't be read: {fault}; mend or remove the file") from fault
    if texts:
        tables.append(read_csv("rows", uri, texts))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as fault:
        raise SourceError(f"the files at {uri!r} don't have the same columns: {fault}") from fault


def _single(table: pa.Table) -> pa.Table:
    """Return the table if its column names are unique."""
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise SourceError(f"the rows have several columns named '{twice[0]}'; rename or leave out all but one")
    return table
