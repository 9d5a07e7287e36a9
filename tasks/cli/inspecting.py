"""Read-only commands: each prints its answer and returns the exit code."""

from __future__ import annotations

import datetime as dt
import sys
from argparse import Namespace
from typing import Any

from tasks.io import storage
from tasks.io.numerals import number, share
from tasks.report import lineage_graph
from tasks.report.tables import as_json, brief, facts, moment, moments, printable, show, size
from tasks.serving.differences import Difference, compare
from tasks.store import catalogue
from tasks.store.catalogue import find_dataset
from tasks.store.reading import CURE, read_manifest, resolve
from tasks.training_sets.freshness import STATUS


def list_datasets(arguments: Namespace) -> int:
    """List every dataset."""
    found = catalogue.summaries(arguments.root)
    if arguments.json:
        print(as_json(found))
        return 0
    if not found:
        print(f"no datasets under {storage.normalise(arguments.root)}: run the flow, or correct --root")
        return 0
    show(
        ["NAME", "KIND", "LATEST", "VERSIONS", "STATUS", "ROWS", "COLUMNS", "AS OF", "CREATED"],
        [
            (
                one.name,
                one.kind,
                _v(one.version),
                one.versions,
                one.status,
                one.rows,
                one.columns,
                one.as_of,
                moment(one.created),
            )
            for one in found
        ],
        right=("VERSIONS", "ROWS", "COLUMNS"),
    )
    return 0


def describe(arguments: Namespace) -> int:
    """Describe one dataset: its versions, and the columns of one version."""
    dataset = find_dataset(arguments.root, arguments.name)
    versions = catalogue.version_summaries(arguments.root, dataset)
    one = catalogue.describe(arguments.root, dataset, arguments.version)
    if arguments.json:
        print(as_json({"description": one, "versions": versions}))
        return 0
    facts(
        {
            "dataset": f"{one.dataset} v{one.version} ({one.kind})",
            "data": one.uri,
            "created": moment(one.created),
            "by run": one.run,
            "rows": f"{one.rows:,} in {one.files} files, {size(one.bytes)}",
            "entity": one.entity,
            "partition": one.partition,
            "as of": moments(one.as_of) if one.as_of else None,
            "verdict": one.verdict,
            "damaged": f"{'; '.join(one.faults)}: {CURE}" if one.faults else None,
            "made from": ", ".join(one.inputs),
        }
    )
    print()
    show(
        ["COLUMN", "TYPE", "NULLS", "MIN", "MEAN", "MAX", "DECLARED AS"],
        [
            (c.name, c.type, _share(c.nulls), _bound(c.minimum), c.mean, _bound(c.maximum), brief(c.declared))
            for c in one.columns
        ],
        right=("NULLS", "MIN", "MEAN", "MAX"),
    )
    print()
    show(
        ["VERSION", "STATUS", "CREATED", "ROWS", "SIZE", "AS OF", "VERDICT", "NOTE"],
        [
            (
                _v(v.version),
                v.status,
                moment(v.created),
                v.rows,
                None if v.bytes is None else size(v.bytes),
                moments(v.as_of),
                v.verdict,
                brief(v.note),
            )
            for v in versions
        ],
        right=("ROWS", "SIZE"),
    )
    for v in versions:
        if v.status in ("damaged", "incomplete"):
            print(f"v{v.version} is {v.status}: {printable(v.note)}")
    return 0


def get(arguments: Namespace) -> int:
    """Show the newest features of some entities."""
    from tasks.serving.feature_store import FeatureStore
    from tasks.serving.redis import RedisLookup

    if arguments.redis is None:
        dataset = find_dataset(arguments.root, arguments.name, "features")
        group, pin = catalogue.short_name(dataset), f"@v{arguments.version}" if arguments.version else ""
        entity = resolve(arguments.root, dataset, arguments.version or "latest").definition["entity"]
    else:
        group, pin = catalogue.short_name(arguments.name), ""
        entity = RedisLookup(group, arguments.redis).entity
    names = [name.strip() for name in arguments.features.split(",")] if arguments.features else ["*"]
    table = FeatureStore(arguments.root).get_online_features(
        [f"{group}:{name}{pin}" for name in names],
        {entity: arguments.keys},
        from_redis=arguments.redis,
        ttl_days=arguments.ttl_days,
        include_status=True,
    )
    told = table.to_arrow().to_pylist()
    rows = [{name: value for name, value in row.items() if not name.endswith(STATUS)} for row in told]
    by_status = {
        status: [row[entity] for row in told if any(row[name] == status for name in row if name.endswith(STATUS))]
        for status in ("NOT_FOUND", "EXPIRED")
    }
    none = by_status["NOT_FOUND"] + by_status["EXPIRED"]
    if arguments.json:
        print(as_json(rows))
    elif len(rows) > 4:
        show([name.upper() for name in rows[0]], [[_exact(value) for value in row.values()] for row in rows])
    else:
        features = [name for name in rows[0] if name != entity]
        show([entity.upper(), *arguments.keys], [[name, *(_exact(row[name]) for row in rows)] for name in features])
    for status, words in (("NOT_FOUND", f"not in {group}"), ("EXPIRED", f"expired in {group}")):
        if by_status[status]:
            print(f"{words}: {', '.join(map(str, by_status[status]))}", file=sys.stderr)
    return 1 if len(none) == len(rows) else 0


def diff(arguments: Namespace) -> int:
    """Show the differences between two versions."""
    root, dataset = arguments.root, find_dataset(arguments.root, arguments.name)
    found = compare(*(read_manifest(root, dataset, version) for version in (arguments.before, arguments.after)))
    if arguments.json:
        print(as_json(found))
        return 0
    before, after = (f"v{version}" for version in found.versions)
    facts(
        {
            "dataset": f"{found.dataset}, {before} → {after}",
            "rows": f"{found.rows[0]:,} → {found.rows[1]:,}",
            "size": f"{size(found.bytes[0])} → {size(found.bytes[1])}",
            "added": ", ".join(found.added),
            "removed": ", ".join(found.removed),
            "only after": moments(found.as_of_added) if found.as_of_added else None,
            "only before": moments(found.as_of_removed) if found.as_of_removed else None,
        }
    )
    _show_changes("TYPE OF", found.retyped, before, after)
    _show_changes("DECLARED OTHERWISE", found.declared, before, after)
    _show_changes("INPUT", found.inputs, before, after)
    _show_changes("SETTING", found.config, before, after)
    _show_columns(found)
    return 0


def _show_changes(heading: str, changes: Any, before: str, after: str) -> None:
    if changes:
        print()
        show([heading, before, after], [(name, *(brief(value) for value in pair)) for name, pair in changes.items()])


def _show_columns(found: Difference) -> None:
    changed = [
        column for column in found.columns if column.nulls[0] != column.nulls[1] or column.mean[0] != column.mean[1]
    ]
    changed += [column for column in found.columns if column not in changed and (column.psi or 0) >= 0.0005]
    print()
    if not changed:
        print("no column's profile differs")
        return
    show(
        ["COLUMN", "NULLS", "MEAN", "PSI"],
        [
            (
                c.name,
                _pair(*map(_share, c.nulls)),
                _pair(*map(number, c.mean)),
                "–" if c.psi is None else f"{c.psi:.3f}",
            )
            for c in changed
        ],
        right=("PSI",),
    )


def watermarks(arguments: Namespace) -> int:
    """Show the watermark of each feature group."""
    from tasks.features.incremental import watermark

    groups = [one for one in catalogue.summaries(arguments.root) if one.kind == "features"]
    found = [(one, watermark(arguments.root, one.dataset)) for one in groups]
    if arguments.json:
        print(as_json({one.name: mark for one, mark in found}))
        return 0
    show(
        ["NAME", "LATEST", "AS OF", "NEWEST EVENT", "CREATED"],
        [(one.name, _v(one.version), mark.as_of, mark.newest_event, moment(one.created)) for one, mark in found],
    )
    return 0


def lineage(arguments: Namespace) -> int:
    """Show the lineage of a version."""
    from tasks.store.lineage import trace

    dataset = find_dataset(arguments.root, arguments.name)
    version = arguments.version or resolve(arguments.root, dataset).version
    found = trace(arguments.root, dataset, version)
    if arguments.json:
        sys.stdout.write(found.to_json().decode())
    else:
        print((lineage_graph.mermaid(found) if arguments.mermaid else lineage_graph.text(found)).rstrip("\n"))
    return 0


def _exact(value: object) -> object:
    """Return a feature's value with all its digits."""
    return value if value is None or isinstance(value, bool | dt.datetime) else str(value)


def _v(version: int | None) -> str | None:
    return None if version is None else f"v{version}"


def _bound(value: float | str | None) -> str:
    text = value.removesuffix("Z").removesuffix("T00:00:00") if isinstance(value, str) else number(value)
    return brief(text, 24)


def _share(value: float | None) -> str:
    return "–" if value is None else share(value)


def _pair(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"
