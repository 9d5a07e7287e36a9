"""The store as a data scientist reads it, with the names that users of Feast know.

    store = FeatureStore("s3://bucket/prefix")
    store.get_historical_features(spine, ["customer-features:total_spent"]).to_pandas()   # to train
    store.get_online_features(["customer-features:*"], {"customer_id": [17, 42]}).to_dict()   # to serve

Historical features are as they were known at each row's time; online features are the newest ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from tasks.core import layout, storage
from tasks.core.errors import DefinitionError, InputError, SourceError
from tasks.core.manifest import Manifest
from tasks.core.names import closest
from tasks.core.own_columns import EVENT_TIME
from tasks.core.reading import live_manifests, resolve
from tasks.features.keys import as_given
from tasks.serving import catalogue
from tasks.serving.catalogue import DatasetSummary, Description, VersionSummary
from tasks.serving.definition import ALL, FeatureReference, Pin
from tasks.serving.online import CACHE_BYTES, Lookup

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import ray.data

    from tasks.serving.redis import RedisLookup


REFRESH_SECONDS = 10.0
"""A look-up uses the newest version of at most this long ago; a withdrawal, too, is seen that late."""


class _Values(Protocol):
    """Where newest values are looked up: a version's files, or Redis."""

    @property
    def entity(self) -> str: ...
    @property
    def features(self) -> Sequence[str]: ...
    def rows(self, keys: Iterable[Any], columns: Sequence[str]) -> pa.Table: ...


class Features:
    """A table of features, in the form that one wants; computed once, when it is first asked for."""

    def __init__(self, compute: Callable[[], pa.Table]) -> None:
        self._compute = compute

    @cached_property
    def _table(self) -> pa.Table:
        return self._compute()

    def to_arrow(self) -> pa.Table:
        """As an Arrow table."""
        return self._table

    def to_pandas(self) -> pd.DataFrame:
        """As a pandas data frame."""
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    to_df = to_pandas
    """The name that Feast has for it."""

    def to_polars(self) -> pl.DataFrame:
        """As a Polars data frame."""
        import polars as pl

        frame = pl.from_arrow(self._table)
        assert isinstance(frame, pl.DataFrame)
        return frame

    def to_dict(self) -> dict[str, list[Any]]:
        """As column name → values, in the order of the rows."""
        values: dict[str, list[Any]] = self._table.to_pydict()
        return values

    def to_ray(self) -> ray.data.Dataset:
        """As a Ray Dataset."""
        import ray.data

        return ray.data.from_arrow(self._table)


class FeatureStore:
    """A store under a root; reads only, keeps open what look-ups use, and may be shared by threads."""

    def __init__(
        self, root: str = "data", *, refresh_seconds: float = REFRESH_SECONDS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Remember where the store is.

        Args:
            root: Path or s3:// URI.
            refresh_seconds: How old the knowledge of which version is the newest may be, for look-ups.
            cache_bytes: Decoded rows that look-ups keep in memory, for each group.

        """
        self.root = storage.normalise(root)
        self._refresh_seconds = refresh_seconds
        self._cache_bytes = cache_bytes
        self._lookups: dict[tuple[str, Pin], _Held] = {}
        self._redis: dict[tuple[str, str], tuple[RedisLookup, float]] = {}
        self._lock = threading.Lock()

    def list(self) -> Sequence[DatasetSummary]:
        """Every dataset under the root, by name."""
        return catalogue.summaries(self.root)

    def describe(self, group: str, version: int | None = None) -> Description:
        """What a version of a dataset holds: its columns, times and origin; the latest if none is given.

        Raises:
            VersionNotFound: there is no such dataset or version.

        """
        return catalogue.describe(self.root, catalogue.find_dataset(self.root, group), version)

    def versions(self, group: str) -> Sequence[VersionSummary]:
        """Every committed version of a dataset, ascending, also those that readers pass over.

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
    ) -> Features:
        """Features as they were at each row's time: the newest with as_of ≤ event_timestamp.

        Args:
            entity_df: Rows with the groups' entity keys and `event_timestamp`, in memory or as the URI of a Parquet or
                CSV file. Other columns are kept as they are.
            features: References such as 'customer-features:total_spent', 'customer-features:*' or '…@v3'.
            ttl_days: Features older than this are none.
            strict: Whether as_of must be before the event time.
            known_at: Whether only features count that had been created by the event time.
            full_feature_names: Whether each feature's column is named '<group>__<feature>', not only where names meet.

        Returns:
            The rows in their order, with the features' columns behind theirs; nulls where there were none in time.

        Raises:
            DefinitionError: a reference is none, or the group or feature doesn't exist.
            VersionNotFound: a pinned version doesn't exist.
            SourceError: a column of the rows is missing.

        """
        from tasks.serving.retrieval import retrieve

        references = [FeatureReference.parse(text) for text in features]
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
            )
        )

    def get_online_features(
        self,
        features: Sequence[str],
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        full_feature_names: bool = False,
        from_redis: str | None = None,
    ) -> Features:
        """The newest features of some entities, without loading the dataset.

        Args:
            features: References, as `get_historical_features` takes them.
            entity_rows: [{'customer_id': 17}, …], or {'customer_id': [17, …]}.
            full_feature_names: As in `get_historical_features`.
            from_redis: URL of a Redis server that the groups were exported to, to read from it instead of the files.

        Returns:
            The keys as they were given and the features' columns, one row an entity; nulls for one that is unknown.

        Raises:
            DefinitionError: a reference is none, or the group or feature doesn't exist.
            InputError: a group's entity key isn't given, or is of the wrong type.
            VersionNotFound: a pinned version doesn't exist.

        """
        keys = _columns(entity_rows)
        references = [FeatureReference.parse(text) for text in features]
        if not references:
            raise DefinitionError("no features are asked for; give some, such as customer-features:*")
        values = {(ref.group, ref.pin): self._values(ref.group, ref.pin, from_redis) for ref in references}
        spelled = _spelled_out(references, values)
        names = _names(spelled, full=full_feature_names)
        found: dict[str, Any] = {}
        for (group, pin), source in values.items():
            if source.entity not in keys:
                raise InputError(
                    f"'{group}' is looked up by '{source.entity}', which isn't among the keys"
                    f"{closest(source.entity, list(keys))}"
                )
            own = [ref.feature for ref in spelled if (ref.group, ref.pin) == (group, pin)]
            table = source.rows(keys[source.entity], list(dict.fromkeys(own)))
            found |= {
                name: table[ref.feature]
                for name, ref in zip(names, spelled, strict=True)
                if (ref.group, ref.pin) == (group, pin)
            }
        given = {name: as_given(some, f"values of '{name}'") for name, some in keys.items()}
        table = pa.table({**given, **{name: found[name] for name in names}})
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
        from tasks.serving.redis import RedisLookup

        with self._lock:
            lookup, since = self._redis.get((group, url), (None, 0.0))
            if lookup is None or time.monotonic() - since > self._refresh_seconds:
                lookup, since = RedisLookup(group, url), time.monotonic()
                self._redis[group, url] = lookup, since
        return lookup

    def _refreshed(self, group: str, pin: Pin, before: _Held | None) -> _Held:
        """The group's look-up, which stays what it is while its version is the newest."""
        dataset = layout.feature_dataset(group)
        known = dict(before.manifests) if before is not None else {}
        if isinstance(pin, int):
            self._find_group(group)
            chosen: Manifest | None = resolve(self.root, dataset, pin)
        else:
            live = live_manifests(self.root, dataset, known)
            known = {manifest.version: manifest for manifest in live}
            chosen = catalogue.newest(live) if pin is None else live[-1] if live else None
        if chosen is None:
            self._find_group(group)
            chosen = resolve(self.root, dataset)  # which says why there is none
        if before is not None and before.lookup.manifest.version == chosen.version:
            return _Held(before.lookup, known, time.monotonic())
        return _Held(Lookup(self.root, chosen, self._cache_bytes), known, time.monotonic())

    def _find_group(self, group: str) -> str:
        return catalogue.find_dataset(self.root, layout.feature_dataset(group), "features")

    def _check(self, reference: FeatureReference) -> None:
        """Complain at once of a group or feature that doesn't exist, not only when the rows are computed."""
        names = self._values(reference.group, reference.pin, None).features
        if reference.feature not in (ALL, *names):
            raise DefinitionError(
                f"'{reference.group}' has no feature '{reference.feature}'{closest(reference.feature, names)}"
            )


@dataclass(frozen=True, slots=True)
class _Held:
    """A look-up, and since when it is known to be the newest."""

    lookup: Lookup
    manifests: Mapping[int, Manifest]
    since: float

    @property
    def entity(self) -> str:
        return self.lookup.entity

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
    """Each feature by its name, once."""
    found: dict[FeatureReference, None] = {}
    for ref in references:
        known = values[ref.group, ref.pin].features
        if ref.feature != ALL and ref.feature not in known:
            raise DefinitionError(f"'{ref.group}' has no feature '{ref.feature}'{closest(ref.feature, known)}")
        for name in known if ref.feature == ALL else [ref.feature]:
            found[FeatureReference(ref.group, name, ref.pin)] = None
    return list(found)


def _names(references: Sequence[FeatureReference], *, full: bool) -> list[str]:
    """Column of each feature: its name, with its group where names meet or if the full names are asked for."""
    features = [ref.feature for ref in references]
    names = [
        f"{ref.group}__{ref.feature}" if full or features.count(ref.feature) > 1 else ref.feature for ref in references
    ]
    for name, ref in zip(names, references, strict=True):
        if names.count(name) > 1:
            raise DefinitionError(f"'{ref}' is asked for in two versions at once, whose columns would have one name")
    return names


def _columns(entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    if isinstance(entity_rows, Mapping):
        lengths = {name: len(values) for name, values in entity_rows.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"entity keys are of different lengths: {lengths}; give each row a value of every key")
        return dict(entity_rows)
    names = list(dict.fromkeys(name for row in entity_rows for name in row))
    return {name: [row.get(name) for row in entity_rows] for name in names}


def _table(entity_df: pa.Table | pd.DataFrame | pl.DataFrame | str) -> pa.Table:
    """Rows as an Arrow table; a URI is read."""
    if isinstance(entity_df, str):
        return _read(entity_df)
    if isinstance(entity_df, pa.Table):
        return entity_df
    import pandas as pd
    import polars as pl

    if isinstance(entity_df, pl.DataFrame):
        return entity_df.to_arrow()
    if isinstance(entity_df, pd.DataFrame):
        return pa.Table.from_pandas(entity_df, preserve_index=False)
    raise InputError(
        f"rows of type {type(entity_df).__name__} can't be read; give a pandas, Polars or Arrow table, or a URI"
    )


def _read(uri: str) -> pa.Table:
    import pyarrow.parquet as pq

    from tasks.features.settling import read_csv
    from tasks.features.sources import SUFFIXES

    files = storage.list_files(uri, SUFFIXES)
    if not files:
        raise SourceError(f"no Parquet or CSV file at {uri!r}; correct the location")
    tables, texts = [], []
    for info in files:
        if not info.uri.lower().endswith(".parquet"):
            texts.append(info)
            continue
        with storage.open_input(info.uri) as source:
            tables.append(pq.ParquetFile(source).read())
    if texts:
        tables.append(read_csv("rows", uri, texts))
    return pa.concat_tables(tables, promote_options="permissive")
