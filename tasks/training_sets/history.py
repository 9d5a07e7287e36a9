"""A feature group over time: all its live versions together, and their rows by bucket.

    v1  ──Jan──Feb──Mar──            as_of times that each version holds
    v2            Mar'──Apr──        computed later: its March supersedes v1's as a whole
    history: Jan Feb Mar' Apr        with known_at: March from v1 until v2 was created, then from v2

Only versions with the same definition of the requested features count together: a version whose definition differs
from the newest one's is left out, with the reason.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.engine.partition import bucket_of, frame_of
from tasks.features.definitions import feature_digests
from tasks.io import storage
from tasks.io.errors import CorruptVersion, DefinitionError
from tasks.io.text import closest
from tasks.store import layout
from tasks.store.catalogue import feature_names, find_dataset
from tasks.store.layout import AS_OF, CREATED
from tasks.store.manifest import Manifest, Partition
from tasks.store.reading import data_files, groups_with, live_manifests, opened, read_manifest, resolve
from tasks.training_sets.definition import ALL, Pin

FROM, UNTIL = "_created", "_superseded"
"""Columns with the times at which a row became known and was superseded by a newer version (null: never)."""

TIME = pl.Datetime("us", "UTC")
_BATCH = 1 << 18  # rows decoded at a time where most are another bucket's


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryVersion:
    """One version in a history.

    created: time at which its features were computed. as_of: times that it holds, ascending, UTC. files: URIs in the
    manifest's order, their digests, and their sizes in bytes by URI. superseded: as_of → creation time of the newer
    version that holds it too.
    """

    version: int
    created: dt.datetime
    as_of: tuple[dt.datetime, ...]
    files: tuple[str, ...]
    digests: tuple[str, ...]
    sizes: Mapping[str, int]
    rows: int
    partition: Partition | None = None
    superseded: Mapping[dt.datetime, dt.datetime] = field(default_factory=dict)

    def files_of(self, entity: str, bucket: int, buckets: int) -> tuple[list[str], bool]:
        """Return the files with rows of a bucket, and True if they have other rows as well.

        Args:
            entity: Key whose stable hash gives the bucket.
            bucket: Number of the bucket.
            buckets: Number of buckets, a power of two.
        """
        if self.partition is None or self.partition.key != entity:
            return list(self.files), buckets > 1
        own = self.partition.buckets
        shared = min(own, buckets)
        return [uri for uri in self.files if _number(uri) % shared == bucket % shared], own < buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Features of a group over time: their types, and their versions, oldest first.

    left_out: versions that aren't read, each with the reason.
    """

    group: str
    entity: str
    key_type: pa.DataType
    features: tuple[str, ...]
    types: Mapping[str, pa.DataType]
    versions: tuple[HistoryVersion, ...]
    left_out: tuple[tuple[int, str], ...] = ()

    @property
    def buckets(self) -> int:
        """Number of buckets by which the files of every version can be separated."""
        return max([1, *(version.partition.buckets for version in self.versions if version.partition is not None)])


def resolve_history(root: str, group: str, features: Sequence[str], pin: Pin = None) -> History:
    """Return the history of some features of a group, from the present manifests.

    Args:
        root: Root of the store.
        group: Name of the feature group.
        features: Names of features; '*' means all features of the newest version.
        pin: None: all live versions; a number or 'latest': that version alone.

    Raises:
        VersionNotFound: there is no such group, or no such live version.
        DefinitionError: the newest of the versions lacks one of the features; the message names the closest.
    """
    root = storage.normalise(root)
    dataset = layout.feature_dataset(group)
    live = live_manifests(root, dataset) if pin is None else [resolve(root, dataset, pin)] if pin == "latest" else []
    if isinstance(pin, int) or not live:
        find_dataset(root, dataset, "features")
        live = [resolve(root, dataset, "latest" if pin is None else pin)]
    return history_among(root, group, features, live)


def history_among(root: str, group: str, features: Sequence[str], live: Sequence[Manifest]) -> History:
    """Return the history of some features in those of a group's versions that fit the newest; one or more, ascending.

    Raises:
        DefinitionError: the newest of the versions lacks one of the features; the message names the closest.
    """
    newest = live[-1]
    known = feature_names(newest)
    for name in features:
        if name not in (ALL, *known):
            raise DefinitionError(f"'{group}' v{newest.version} has no feature '{name}'{closest(name, known)}")
    names = tuple(dict.fromkeys(n for name in features for n in (known if name == ALL else [name])))
    reasons = {manifest.version: _differs(manifest, newest, names) for manifest in live}
    kept = [manifest for manifest in live if not reasons[manifest.version]]
    left_out = tuple((version, reason) for version, reason in reasons.items() if reason)
    return history_of(root, group, names, kept, left_out)


def history_of(
    root: str,
    group: str,
    names: Sequence[str],
    manifests: Sequence[Manifest],
    left_out: tuple[tuple[int, str], ...] = (),
) -> History:
    """Return the history that certain versions form for some of their features.

    Args:
        root: Root of the store.
        group: Name of the feature group.
        names: Names of features that all of the versions have.
        manifests: The versions, ascending, at least one.
        left_out: Versions that aren't read, each with the reason.
    """
    newest = manifests[-1]
    schema = _schema(root, newest)
    entity: str = newest.definition["entity"]
    return History(
        group=group,
        entity=entity,
        key_type=schema.field(entity).type,
        features=tuple(names),
        types={name: schema.field(name).type for name in names},
        versions=_versions(root, manifests),
        left_out=left_out,
    )


def _differs(manifest: Manifest, newest: Manifest, features: Sequence[str]) -> str:
    """Return why a version can't be read together with the newest one; empty if it can."""
    entity, own = newest.definition["entity"], manifest.definition.get("entity")
    if own != entity:
        return f"it is about '{own}', v{newest.version} about '{entity}'"
    types, wanted = ({column.name: column.type for column in some.columns} for some in (manifest, newest))
    missing = [name for name in features if name not in types]
    if missing:
        return f"it has no {_listed(missing)}"
    retyped = [name for name in (entity, *features) if types[name] != wanted[name]]
    if retyped:
        name = retyped[0]
        return f"'{name}' is of type {types[name]} in it, of {wanted[name]} in v{newest.version}"
    before, now = feature_digests(manifest.definition), feature_digests(newest.definition)
    changed = [name for name in features if before.get(name) != now.get(name)]
    return f"it declares {_listed(changed)} otherwise than v{newest.version}" if changed else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _versions(root: str, manifests: Sequence[Manifest]) -> tuple[HistoryVersion, ...]:
    """Return the versions, oldest first, each with its superseded times."""
    found: list[HistoryVersion] = []
    newer: dict[dt.datetime, dt.datetime] = {}
    for manifest in reversed(manifests):
        created, times = created_of(manifest), _times(manifest)
        files = tuple(data_files(root, manifest))
        found.append(
            HistoryVersion(
                version=manifest.version,
                created=created,
                as_of=times,
                files=files,
                digests=tuple(file.digest for file in manifest.files),
                sizes={uri: file.bytes for uri, file in zip(files, manifest.files, strict=True)},
                rows=manifest.rows,
                partition=manifest.partition,
                superseded={moment: newer[moment] for moment in times if moment in newer},
            )
        )
        # The earliest of all newer ones: numbers are given in the order of reservation, not of computation.
        newer |= {moment: min(created, newer.get(moment, created)) for moment in times}
    return tuple(reversed(found))


def created_of(manifest: Manifest) -> dt.datetime:
    """Return the time at which a version's features were computed, the stamp of its rows."""
    profile = manifest.profile.get(CREATED)
    return _moment(profile.maximum) if profile and isinstance(profile.maximum, str) else manifest.created_at


def _times(manifest: Manifest) -> tuple[dt.datetime, ...]:
    """Return the as-of times of a version; a version older than histories has its time only in its profile."""
    times = manifest.as_of
    profile = manifest.profile.get(AS_OF)
    if not times and profile and isinstance(profile.maximum, str) and profile.minimum == profile.maximum:
        times = (_moment(profile.maximum),)
    return tuple(moment.astimezone(dt.UTC) for moment in times)


def _moment(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)


def _schema(root: str, manifest: Manifest) -> pa.Schema:
    with _pruned_told(root, manifest.dataset, manifest.version):
        uri = data_files(root, manifest)[0]
        with opened(uri, manifest.files[0].bytes) as source:
            return pq.read_schema(source)


@contextmanager
def _pruned_told(root: str, dataset: str, version: int) -> Iterator[None]:
    """Replace an error about missing files by a clear one if the whole version was pruned during the reading.

    Raises:
        VersionNotFound: it was pruned.
        CorruptVersion: a file is missing, of another size, or can't be read.
    """
    try:
        yield
    except CorruptVersion:
        read_manifest(root, dataset, version)
        raise


def read_bucket(
    root: str, history: History, bucket: int, buckets: int, *, known_at: bool = False, keys: pl.Series | None = None
) -> pl.DataFrame:
    """Return the rows of one bucket of the entities, from all versions of a history.

    Args:
        root: Root of the store.
        history: The history.
        bucket: Number of the bucket: rows with stable_hash(entity) % buckets == bucket.
        buckets: Number of buckets, a power of two.
        known_at: True to include superseded rows.
        keys: Entities to return; None for all. Row groups without any of them aren't read.

    Returns:
        <entity>, as_of, _created, _superseded (timestamps in microseconds, UTC) and the features; versions oldest
        first, in each the order of its files.

    Raises:
        CorruptVersion: a file is missing, of another size, or can't be read.
        VersionNotFound: a version was pruned during the reading.
    """
    assert buckets & (buckets - 1) == 0, "not a power of two"
    assert 0 <= bucket < buckets, "no such bucket"
    wanted = keys.to_frame().unique() if keys is not None else None
    frames = [_empty(history)]
    for version in history.versions:
        if not known_at and version.as_of and len(version.superseded) == len(version.as_of):
            continue
        files, mixed = version.files_of(history.entity, bucket, buckets)
        with _pruned_told(root, layout.feature_dataset(history.group), version.version):
            for table in _tables(files, history, version.sizes, mixed=mixed, wanted=wanted):
                frame = _own(table, history, bucket, buckets) if mixed else frame_of(table, rechunk=False)
                if wanted is not None:
                    frame = frame.join(wanted, on=history.entity, how="semi", maintain_order="left")
                frames.append(_stamped(frame, version, history, known_at=known_at))
    return pl.concat(frames)


def _empty(history: History) -> pl.DataFrame:
    fields = [pa.field(history.entity, history.key_type)]
    schema = pa.schema([*fields, *(pa.field(n, history.types[n]) for n in history.features)])
    times = [pl.lit(None, TIME).alias(name) for name in (AS_OF, FROM, UNTIL)]
    return (
        frame_of(schema.empty_table()).with_columns(times).select(history.entity, AS_OF, FROM, UNTIL, *history.features)
    )


def _tables(
    uris: Sequence[str], history: History, sizes: Mapping[str, int], *, mixed: bool, wanted: pl.DataFrame | None
) -> Iterator[pa.Table]:
    """Yield the needed columns of files: each file at once if all of it is needed, otherwise in pieces."""
    columns = [history.entity, AS_OF, *history.features]
    keys = [] if wanted is None else wanted[history.entity].drop_nulls().sort().to_list()
    for uri in uris:
        with opened(uri, sizes[uri]) as source:
            file = pq.ParquetFile(source, pre_buffer=True)
            groups = range(file.num_row_groups) if wanted is None else groups_with(file, history.entity, keys)
            if mixed:
                batches = file.iter_batches(_BATCH, row_groups=groups, columns=columns)
                yield from (pa.Table.from_batches([batch]) for batch in batches)
            else:
                yield file.read_row_groups(groups, columns=columns)


def _own(table: pa.Table, history: History, bucket: int, buckets: int) -> pl.DataFrame:
    return frame_of(table, rechunk=False).filter(pl.Series(bucket_of(table[history.entity], buckets) == bucket))


def _stamped(frame: pl.DataFrame, version: HistoryVersion, history: History, *, known_at: bool) -> pl.DataFrame:
    """Return rows with the times in which they were known; without superseded ones, unless these count."""
    frame = frame.with_columns(pl.col(AS_OF).cast(TIME), pl.lit(version.created, TIME).alias(FROM))
    until = pl.lit(None, TIME)
    if version.superseded and not known_at:
        frame = frame.filter(~pl.col(AS_OF).is_in(_series(version.superseded).implode()))
    elif version.superseded:
        until = pl.col(AS_OF).replace_strict(
            _series(version.superseded), _series(version.superseded.values()), default=None, return_dtype=TIME
        )
    return frame.with_columns(until.alias(UNTIL)).select(history.entity, AS_OF, FROM, UNTIL, *history.features)


def _series(times: Iterable[dt.datetime]) -> pl.Series:
    return pl.Series(list(times), dtype=TIME)


def _number(uri: str) -> int:
    number = layout.part_number(uri)
    assert number is not None, f"{uri} isn't named as a part of a partitioned version"
    return number
