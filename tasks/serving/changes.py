"""Effects of a changed declaration on features and models, and differences between two versions of a dataset.

Nothing is computed and no data is read. Two declarations of a feature are compared by their digests; the types of a new
one are found by evaluating it on no rows. Two versions are compared by their manifests.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from tasks.features.definitions import Definitions, EventSource, FeatureGroup, feature_digests
from tasks.features.kernel import evaluate
from tasks.features.rows import TIME
from tasks.io.errors import DefinitionError, VersionNotFound
from tasks.io.tensors import Int64Array
from tasks.io.text import closest, plural
from tasks.quality.profile import population_stability_index
from tasks.store import layout
from tasks.store.catalogue import declarations, feature_names
from tasks.store.layout import AS_OF, CREATED, VERSION
from tasks.store.manifest import ColumnProfile, Manifest
from tasks.store.reading import latest, list_datasets, overview, resolve
from tasks.training_sets.definition import ALL, FeatureReference, Model

Status = Literal["new", "unchanged", "changed", "undeclared"]
_MOMENT = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
_TYPES: dict[str, pl.DataType] = {"number": pl.Float64(), "time": TIME, "category": pl.String()}
_GUESSES: tuple[pl.DataType, ...] = (pl.Int64(), pl.Float64(), pl.String())
_TEXT = {"large_string", "string_view"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChange:
    """Change of a group by a declaration.

    status: 'undeclared' is published and not declared here: it stays as it is. version: the newest published version,
    the base of the comparison. retyped: feature → type before and after. recompute: times of the history whose
    features change.
    """

    group: str
    status: Status
    version: int | None = None
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    redeclared: tuple[str, ...] = ()
    retyped: Mapping[str, tuple[str, str]]
    recompute: tuple[dt.datetime, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Changes by declarations: of each group, and for each model what breaks (sentences) and what to know (notes)."""

    groups: tuple[GroupChange, ...]
    breaks: tuple[str, ...]
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """Return the changes in words."""
        lines: list[str] = []
        for change in self.groups:
            compared = "" if change.version is None else f", against v{change.version}"
            lines.append(f"{change.group}: {change.status}{compared}")
            for what, names in (("+", change.added), ("-", change.removed), ("~", change.redeclared)):
                lines += [f"  {what} {name}{_retyped(change, name)}" for name in names]
            if change.recompute:
                first, last = change.recompute[0], change.recompute[-1]
                span = f"{first:%Y-%m-%d}" if first == last else f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
                lines.append(f"  to compute again: {plural(len(change.recompute), 'as-of time')}, {span}")
        lines += [f"breaks: {sentence}" for sentence in self.breaks]
        lines += [f"note: {sentence}" for sentence in self.notes]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Reader:
    """A model and its inputs; trained: the newest version of its training set, if one is published."""

    name: str
    references: tuple[FeatureReference, ...]
    trained: int | None


@dataclass(frozen=True, slots=True)
class _Known:
    """Base for checking models' references; published: the newest live manifest of each group that has one."""

    root: str
    definitions: Definitions
    published: Mapping[str, Manifest]
    changes: Mapping[str, GroupChange]


def plan_changes(root: str, definitions: Definitions, models: Mapping[str, Model]) -> Changes:
    """Compare declarations with what is published.

    Args:
        root: Root of the store.
        definitions: New groups and sources.
        models: New models; those of published training sets are checked too.

    Raises:
        CorruptVersion: a manifest can't be read.
    """
    datasets = list_datasets(root)
    newest = {name: latest(root, layout.feature_dataset(name)) for name in _groups(datasets)}
    published = {name: manifest for name, manifest in newest.items() if manifest is not None}
    changes = {
        name: _compare(root, group, published.get(name), definitions) for name, group in definitions.groups.items()
    }
    for name, manifest in published.items():
        if name not in changes:
            changes[name] = GroupChange(group=name, status="undeclared", version=manifest.version, retyped={})
    known = _Known(root, definitions, published, changes)
    breaks: list[str] = []
    notes: list[str] = []
    for reader in _readers(root, datasets, models):
        for reference in reader.references:
            broken, worth_knowing = _effect(reader, reference, known)
            breaks += broken
            notes += worth_knowing
    return Changes(
        groups=tuple(changes.values()), breaks=tuple(dict.fromkeys(breaks)), notes=tuple(dict.fromkeys(notes))
    )


def _groups(datasets: Sequence[str]) -> list[str]:
    """Return the feature groups among datasets: directly under the feature store."""
    under = [
        name.removeprefix(layout.FEATURE_STORE + "/") for name in datasets if name.startswith(layout.FEATURE_STORE)
    ]
    return [name for name in under if "/" not in name]


def _readers(root: str, datasets: Sequence[str], models: Mapping[str, Model]) -> list[_Reader]:
    """Return models of the file, and those of published training sets that it doesn't redeclare."""
    readers = []
    base = layout.TRAINING_READY + "/"
    trained = {name.removeprefix(base): latest(root, name) for name in datasets if name.startswith(base)}
    for name in dict.fromkeys([*models, *trained]):
        newest = trained.get(name)
        if name in models:
            references = models[name].features
        elif newest is not None:
            references = tuple(FeatureReference.parse(text) for text in newest.definition.get("features", ()))
        else:
            continue
        readers.append(_Reader(name, references, newest.version if newest is not None else None))
    return readers


def _compare(root: str, group: FeatureGroup, newest: Manifest | None, definitions: Definitions) -> GroupChange:
    if newest is None:
        return GroupChange(group=group.name, status="new", added=tuple(group.feature_names), retyped={})
    before, now = feature_digests(newest.definition), feature_digests(group.describe())
    had = feature_names(newest)
    has = [*now, *_dimension_columns(group, newest, definitions)]
    added = tuple(name for name in has if name not in had)
    removed = tuple(name for name in had if name not in has)
    redeclared = tuple(name for name in now if name in had and now[name] != before.get(name))
    types = _types(group, definitions.events.get(group.source), newest) if redeclared else {}
    old = {column.name: _plain(column.type) for column in newest.columns}
    retyped = {name: (types[name], old[name]) for name in redeclared if name in types and types[name] != old[name]}
    moved = added or redeclared
    return GroupChange(
        group=group.name,
        status="changed" if moved or removed else "unchanged",
        version=newest.version,
        added=added,
        removed=removed,
        redeclared=redeclared,
        retyped=retyped,
        recompute=_times(root, newest.dataset) if moved else (),
    )


def _times(root: str, dataset: str) -> tuple[dt.datetime, ...]:
    """Return the as-of times of all live versions, ascending."""
    live = overview(root, dataset).warned().live
    return tuple(sorted({moment for one in live for moment in one.as_of}))


def _dimension_columns(group: FeatureGroup, newest: Manifest, definitions: Definitions) -> list[str]:
    """Return the columns that the dimension will add: for an unchanged one the same as before, as its file decides."""
    if group.dimension is None:
        return []
    if group.dimension == newest.definition.get("dimension"):
        declared = feature_digests(newest.definition)
        return [name for name in feature_names(newest) if name not in declared]
    source = definitions.dimensions.get(group.dimension)
    return [] if source is None else [name for name in source.mapping or source.columns if name != source.key]


def _types(group: FeatureGroup, source: EventSource | None, newest: Manifest) -> dict[str, str]:
    """Return the type of each feature that the declaration alone decides, from an evaluation on no rows."""
    if source is None:
        return {}
    types = {column.name: column.type for column in newest.columns}
    key = pl.String() if _plain(types.get(group.entity, "int64")) == "string" else pl.Int64()
    names = group.event_columns | {source.time}
    kinds = {name: source.columns[name].kind if name in source.columns else "any" for name in names}
    found: list[dict[str, str]] = []
    for guess in _GUESSES:
        schema = {name: key if name == group.entity else _TYPES.get(kind, guess) for name, kind in kinds.items()}
        try:
            frame = evaluate(group, pl.DataFrame(schema=schema), source.time, _MOMENT)
        except (DefinitionError, pl.exceptions.PolarsError):
            continue
        found.append({field.name: _plain(str(field.type)) for field in frame.to_arrow().schema})
    agreed = found[0] if found else {}
    return {name: kind for name, kind in agreed.items() if all(other[name] == kind for other in found)}


def _effect(reader: _Reader, reference: FeatureReference, known: _Known) -> tuple[list[str], list[str]]:
    """Return sentences about a model's reference: what breaks, and what is worth knowing."""
    group, feature = reference.group, reference.feature
    who = f"model '{reader.name}' reads"
    if group not in known.changes:
        cure = closest(group, list(known.changes))
        return [f"{who} '{group}', which is neither declared nor published{cure}"], []
    if isinstance(reference.pin, int):
        return _pinned(reader, reference, reference.pin, known.root), []
    change, newest = known.changes[group], known.published.get(group)
    had = feature_names(newest) if newest is not None else []
    # 'group:*' takes the present features; a missing former one matters only to models trained on it.
    asked = [feature] if feature != ALL else had if reader.trained is not None else []
    breaks = [f"{who} {group}:{name}, which {why}" for name in asked if (why := _broken(name, change, had, known))]
    changed = [name for name in asked or had if name in change.redeclared and name not in change.retyped]
    if not changed:
        return breaks, []
    what = ", ".join(f"{group}:{name}" for name in changed[:5]) + (" and more" if len(changed) > 5 else "")
    cure = "compute the history again, or its times are without them"
    return breaks, [f"{who} {what}, declared otherwise from now on: {cure}"]


def _broken(name: str, change: GroupChange, had: Sequence[str], known: _Known) -> str:
    """Return why a feature can't be read as before, with the cure; empty if it can."""
    if name in change.removed:
        return f"v{change.version} has and the declaration hasn't any more; keep it, or take it out of the model"
    if name in change.retyped:
        now, then = change.retyped[name]
        return f"would be {now} instead of {then}; cast it in the declaration, or give the new one another name"
    names = [*had, *change.added]
    return "" if name in names or _may_come(change.group, known) else f"isn't declared{closest(name, names)}"


def _may_come(name: str, known: _Known) -> bool:
    """Return True if the group has unknown columns: those of a dimension that was never joined."""
    group = known.definitions.groups.get(name)
    return group is not None and group.dimension is not None and name not in known.published


def _pinned(reader: _Reader, reference: FeatureReference, pin: int, root: str) -> list[str]:
    try:
        manifest = resolve(root, layout.feature_dataset(reference.group), pin)
    except VersionNotFound as fault:
        return [f"model '{reader.name}' reads {reference}: {fault}"]
    names = feature_names(manifest)
    if reference.feature in (ALL, *names):
        return []
    return [f"model '{reader.name}' reads {reference}, which that version hasn't{closest(reference.feature, names)}"]


def _plain(kind: str) -> str:
    """Return an Arrow type's name, with one name for text."""
    return "string" if kind in _TEXT else kind


def _retyped(change: GroupChange, name: str) -> str:
    return f" ({change.retyped[name][1]} → {change.retyped[name][0]})" if name in change.retyped else ""


Counts = Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnChange:
    """A column of both versions, before and after.

    nulls: shares. psi: population stability index (`core.drift`) from the profiles' histograms, whose bins differ:
    exact where a bin is one value, else as near as straight lines within bins come; None where there is none.
    """

    name: str
    nulls: tuple[float, float]
    mean: tuple[float | None, float | None]
    psi: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two versions side by side; pairs are (before, after)."""

    dataset: str
    versions: tuple[int, int]
    rows: tuple[int, int]
    bytes: tuple[int, int]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    retyped: Mapping[str, tuple[str, str]]
    declared: Mapping[str, tuple[str, str]]
    as_of_added: tuple[dt.datetime, ...]
    as_of_removed: tuple[dt.datetime, ...]
    inputs: Mapping[str, tuple[str, str]]
    config: Mapping[str, tuple[Any, Any]]
    columns: tuple[ColumnChange, ...]


def compare(before: Manifest, after: Manifest) -> Difference:
    """Return the changes from one version of a dataset to another."""
    types = {column.name: column.type for column in before.columns}, {c.name: c.type for c in after.columns}
    times = before.as_of, after.as_of
    both = [name for name in types[1] if name in types[0]]
    # They differ between versions by their nature.
    stamps = {after.definition.get("entity"), AS_OF, CREATED, VERSION}
    return Difference(
        dataset=after.dataset,
        versions=(before.version, after.version),
        rows=(before.rows, after.rows),
        bytes=(sum(file.bytes for file in before.files), sum(file.bytes for file in after.files)),
        added=tuple(name for name in types[1] if name not in types[0]),
        removed=tuple(name for name in types[0] if name not in types[1]),
        retyped={name: (types[0][name], types[1][name]) for name in both if types[0][name] != types[1][name]},
        declared=_declared(before, after),
        as_of_added=tuple(moment for moment in times[1] if moment not in times[0]),
        as_of_removed=tuple(moment for moment in times[0] if moment not in times[1]),
        inputs=_changed(_inputs(before), _inputs(after)),
        config=_changed(_flat(before.config), _flat(after.config)),
        columns=tuple(
            _column(name, before.profile[name], after.profile[name])
            for name in both
            if name in before.profile and name in after.profile and name not in stamps
        ),
    )


def _declared(before: Manifest, after: Manifest) -> dict[str, tuple[str, str]]:
    """Return redefined features of a group; for other datasets, changed declarations."""
    if "features" not in after.definition or not isinstance(after.definition["features"], Mapping):
        return {
            n: (str(a), str(b)) for n, (a, b) in _changed(_flat(before.definition), _flat(after.definition)).items()
        }
    digests = feature_digests(before.definition), feature_digests(after.definition)
    texts = declarations(before), declarations(after)
    return {
        name: (texts[0].get(name, ""), texts[1].get(name, ""))
        for name, digest in digests[1].items()
        if name in digests[0] and digests[0][name] != digest
    }


def _inputs(manifest: Manifest) -> dict[str, str]:
    """Return the inputs of a version; versions of one dataset are grouped."""
    found: dict[str, list[str]] = {}
    for record in manifest.inputs:
        what = f"v{record.version}" if record.version else f"{len(record.files):,} files, {record.uri}"
        found.setdefault(record.name, []).append(what)
    return {name: ", ".join(parts) for name, parts in found.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _column(name: str, before: ColumnProfile, after: ColumnProfile) -> ColumnChange:
    nulls = tuple(profile.nulls / profile.count if profile.count else 0.0 for profile in (before, after))
    return ColumnChange(name=name, nulls=(nulls[0], nulls[1]), mean=(before.mean, after.mean), psi=psi(before, after))


def psi(before: ColumnProfile, after: ColumnProfile) -> float | None:
    """Return the population stability index of a column from two profiles; None for kinds without bins."""
    if before.kind != after.kind or before.kind not in ("numeric", "boolean", "string"):
        return None
    counts = _by_number(before, after) if before.kind == "numeric" else _by_value(before, after)
    missing = [profile.nulls + profile.nans + profile.infinities for profile in (before, after)]
    old, new = (np.append(some, gone) for some, gone in zip(counts, missing, strict=True))
    occupied = (old > 0) | (new > 0)
    value = population_stability_index(new[occupied], old[occupied])
    return None if math.isnan(value) else value


def _by_number(before: ColumnProfile, after: ColumnProfile) -> tuple[Counts, Counts]:
    if before.histogram is None or after.histogram is None or not before.histogram.counts:
        sizes = [sum(p.histogram.counts) if p.histogram is not None else 0 for p in (before, after)]
        return np.array([sizes[0]]), np.array([sizes[1]])
    edges = np.array(before.histogram.edges)
    # Number of the later values below each edge, if they are spread evenly within their bins.
    below = np.interp(edges, after.histogram.edges, np.append(0, np.cumsum(after.histogram.counts)))
    total = sum(after.histogram.counts)
    inner = np.rint(np.diff(below)).astype(np.int64)
    outside = [round(below[0]), round(total - below[-1])]
    return np.array([0, *before.histogram.counts, 0]), np.array([outside[0], *inner, outside[1]])


def _by_value(before: ColumnProfile, after: ColumnProfile) -> tuple[Counts, Counts]:
    old, new = dict(before.top_values), dict(after.top_values)
    listed = list(dict.fromkeys([*old, *new])) if before.distinct_exact and after.distinct_exact else list(old)
    counts = [np.array([values.get(value, 0) for value in listed], dtype=np.int64) for values in (old, new)]
    rest = [
        profile.count - profile.nulls - int(some.sum()) for profile, some in zip((before, after), counts, strict=True)
    ]
    return np.append(counts[0], rest[0]), np.append(counts[1], rest[1])
