"""Differences between two versions of a dataset, from their manifests alone: no data is read."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.features.definitions import feature_digests
from tasks.quality.profile import population_stability_index
from tasks.store.catalogue import declarations
from tasks.store.layout import AS_OF, CREATED, VERSION
from tasks.store.manifest import ColumnProfile, Manifest

Counts = npt.NDArray[np.int64]


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
