"""Commands about the store: each prints its answer and returns the exit code."""

from __future__ import annotations

import datetime as dt
import getpass
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.io.listing import Upload, abort_upload, unfinished_uploads
from tasks.io.storage import delete, normalise
from tasks.io.text import as_json, brief, facts, moment, moments, number, plural, printable, share, show, size
from tasks.report import lineage_graph
from tasks.serving.changes import Difference, compare
from tasks.store import catalogue, layout, retention
from tasks.store.catalogue import find_dataset, short_name
from tasks.store.reading import (
    CURE,
    overview,
    published_versions,
    read_committed,
    read_manifest,
    resolve,
    withdrawal_of,
)
from tasks.store.reading import list_datasets as stored_datasets
from tasks.store.versions import withdraw
from tasks.training_sets.definition import STATUS


def list_datasets(arguments: Namespace) -> int:
    """List every dataset."""
    datasets = catalogue.summaries(arguments.root)
    if arguments.json:
        print(as_json(datasets))
        return 0
    if not datasets:
        print(f"no datasets under {storage.normalise(arguments.root)}: run the flow, or correct --root")
        return 0
    show(
        ["NAME", "KIND", "LATEST", "VERSIONS", "STATUS", "ROWS", "COLUMNS", "AS OF", "CREATED"],
        [
            (
                summary.name,
                summary.kind,
                _v(summary.version),
                summary.versions,
                summary.status,
                summary.rows,
                summary.columns,
                summary.as_of,
                moment(summary.created),
            )
            for summary in datasets
        ],
        right=("VERSIONS", "ROWS", "COLUMNS"),
    )
    return 0


def describe(arguments: Namespace) -> int:
    """Describe one dataset: its versions, and the columns of one version."""
    dataset = find_dataset(arguments.root, arguments.name)
    versions = catalogue.version_summaries(arguments.root, dataset)
    described = catalogue.describe(arguments.root, dataset, arguments.version)
    if arguments.json:
        print(as_json({"description": described, "versions": versions}))
        return 0
    facts(
        {
            "dataset": f"{described.dataset} v{described.version} ({described.kind})",
            "data": described.uri,
            "created": moment(described.created),
            "by run": described.run,
            "rows": f"{described.rows:,} in {described.files} files, {size(described.bytes)}",
            "entity": described.entity,
            "partition": described.partition,
            "as of": moments(described.as_of) if described.as_of else None,
            "verdict": described.verdict,
            "damaged": f"{'; '.join(described.faults)}: {CURE}" if described.faults else None,
            "made from": ", ".join(described.inputs),
        }
    )
    print()
    show(
        ["COLUMN", "TYPE", "NULLS", "MIN", "MEAN", "MAX", "DECLARED AS"],
        [
            (c.name, c.type, _share(c.nulls), _bound(c.minimum), c.mean, _bound(c.maximum), brief(c.declared))
            for c in described.columns
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
    from tasks.serving.online import RedisLookup

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
    difference = compare(*(read_manifest(root, dataset, version) for version in (arguments.before, arguments.after)))
    if arguments.json:
        print(as_json(difference))
        return 0
    before, after = (f"v{version}" for version in difference.versions)
    facts(
        {
            "dataset": f"{difference.dataset}, {before} → {after}",
            "rows": f"{difference.rows[0]:,} → {difference.rows[1]:,}",
            "size": f"{size(difference.bytes[0])} → {size(difference.bytes[1])}",
            "added": ", ".join(difference.added),
            "removed": ", ".join(difference.removed),
            "only after": moments(difference.as_of_added) if difference.as_of_added else None,
            "only before": moments(difference.as_of_removed) if difference.as_of_removed else None,
        }
    )
    _show_changes("TYPE OF", difference.retyped, before, after)
    _show_changes("DECLARED OTHERWISE", difference.declared, before, after)
    _show_changes("INPUT", difference.inputs, before, after)
    _show_changes("SETTING", difference.config, before, after)
    _show_columns(difference)
    return 0


def _show_changes(heading: str, changes: Any, before: str, after: str) -> None:
    if changes:
        print()
        show([heading, before, after], [(name, *(brief(value) for value in pair)) for name, pair in changes.items()])


def _show_columns(difference: Difference) -> None:
    changed = [
        column
        for column in difference.columns
        if column.nulls[0] != column.nulls[1] or column.mean[0] != column.mean[1]
    ]
    changed += [column for column in difference.columns if column not in changed and (column.psi or 0) >= 0.0005]
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

    groups = [group for group in catalogue.summaries(arguments.root) if group.kind == "features"]
    reached = [(group, watermark(arguments.root, group.dataset)) for group in groups]
    if arguments.json:
        print(as_json({group.name: mark for group, mark in reached}))
        return 0
    show(
        ["NAME", "LATEST", "AS OF", "NEWEST EVENT", "CREATED"],
        [
            (group.name, _v(group.version), mark.as_of, mark.newest_event, moment(group.created))
            for group, mark in reached
        ],
    )
    return 0


def lineage(arguments: Namespace) -> int:
    """Show the lineage of a version."""
    from tasks.store.lineage import trace

    dataset = find_dataset(arguments.root, arguments.name)
    version = arguments.version or resolve(arguments.root, dataset).version
    traced = trace(arguments.root, dataset, version)
    if arguments.json:
        sys.stdout.write(traced.to_json().decode())
    else:
        print((lineage_graph.mermaid(traced) if arguments.mermaid else lineage_graph.text(traced)).rstrip("\n"))
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


_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}
REFUSED = 1


def rollback(arguments: Namespace) -> int:
    """Withdraw a version."""
    root, version = arguments.root, arguments.version
    dataset = find_dataset(root, arguments.name)
    before = withdrawal_of(root, dataset, version)
    if before is None:
        if version not in read_committed(root, dataset, [version]).damaged:
            resolve(root, dataset, version)
        left = [number for number in published_versions(root, dataset) if number != version]
        if not left and not arguments.force:
            print(
                f"error: v{version} is the only version of {dataset}, so that readers would find none; "
                f"publish another one first, or give --force",
                file=sys.stderr,
            )
            return REFUSED
        withdraw(root, dataset, version, arguments.reason, f"{_user()}@{socket.gethostname()}")
    latest = max(published_versions(root, dataset), default=None)
    users = _made_from(root, dataset, version)
    if arguments.json:
        print(as_json({"dataset": dataset, "withdrawn": version, "latest": latest, "made_from_it": users}))
        return 0
    print(f"{dataset} v{version} was {before}" if before else f"{dataset} v{version} is withdrawn; its data stays")
    print(f"latest is v{latest}" if latest else "no version is left to readers")
    if users:
        print(f"made from it, and still read: {', '.join(users)}; build them again, or withdraw them too")
    return 0


def prune(arguments: Namespace) -> int:
    """Show or delete the versions that may be deleted."""
    root = arguments.root
    datasets = [find_dataset(root, arguments.name)] if arguments.name else stored_datasets(root)
    age = _age(arguments.older_than) if arguments.older_than else None
    surveys = {name: retention.survey(root, name, keep=arguments.keep, older_than=age) for name in datasets}
    chosen = [version for found in surveys.values() for version in found.prunable]
    going = tuple(layout.version_uri(normalise(root), one.dataset, one.version) + "/" for one in chosen)
    left = [info for info in retention.leftovers(root, datasets) if not info.uri.startswith(going)]
    uploads = _unfinished_uploads(root)
    if arguments.yes:
        retention.prune(root, chosen)
        for info in left:
            delete(info.uri)
        for upload in uploads:
            abort_upload(upload.uri, upload.upload_id)
    if arguments.json:
        held = {name: found.held for name, found in surveys.items() if found.held}
        left_over = {"left": [info.uri for info in left], "uploads": [upload.uri for upload in uploads]}
        print(as_json({"deleted": arguments.yes, "versions": chosen, "held": held, **left_over}))
        return 0
    _show_versions(chosen)
    for name, found in surveys.items():
        for version, why in found.held.items():
            print(f"{name} v{version} stays: {why}")
    items = []
    if left:
        total = size(sum(info.bytes for info in left))
        items.append(("delete", f"{plural(len(left), 'file')} that killed runs have left, {total}"))
    if uploads:
        items.append(("abort", f"{plural(len(uploads), 'upload')} to S3 that killed runs have left unfinished"))
    if chosen:
        total = size(sum(version.bytes for version in chosen))
        items.append(("delete", f"{plural(len(chosen), 'version')}, {total}"))
    done = {"delete": "deleted", "abort": "aborted"}
    for verb, what in items:
        print(f"{done[verb]} {what}" if arguments.yes else f"would {verb} {what}; give --yes to do it")
    if not items:
        print("nothing to delete" + ("" if arguments.keep or age else "; --keep N or --older-than AGE select more"))
    return 0


def _show_versions(chosen: Sequence[retention.Prunable]) -> None:
    if not chosen:
        return
    show(
        ["DATASET", "VERSION", "STATE", "CREATED", "FILES", "SIZE", "HISTORY THAT NO OTHER VERSION HAS"],
        [
            (v.dataset, f"v{v.version}", v.state, moment(v.created), v.files, size(v.bytes), moments(v.only_here))
            for v in chosen
        ],
        right=("FILES", "SIZE"),
    )


def _unfinished_uploads(root: str) -> list[Upload]:
    """Return uploads to S3 of killed runs; without permission to list them the rest is pruned all the same."""
    try:
        return unfinished_uploads(root, dt.datetime.now(dt.UTC) - retention.CUT_OFF_AFTER)
    except PermissionError as error:
        print(
            f"unfinished uploads stay, as they can't be listed (s3:ListBucketMultipartUploads): {error}",
            file=sys.stderr,
        )
        return []


def export(arguments: Namespace) -> int:
    """Write a group's newest values to Redis, or a streaming copy as an MDS directory."""
    if arguments.mds is not None:
        return _export_mds(arguments)
    from tasks.serving.online import export_latest

    group = short_name(find_dataset(arguments.root, arguments.name, "features"))
    rows = export_latest(arguments.root, group, arguments.redis, ttl_days=arguments.ttl_days)
    print(as_json({"group": group, "rows": rows}) if arguments.json else f"{group}: {rows:,} entities are in Redis")
    return 0


def _export_mds(arguments: Namespace) -> int:
    from tasks.datasets.mds import export_mds

    if arguments.ttl_days is not None:
        raise ConfigError("--ttl-days is for --redis: files of MDS don't expire; leave it out")
    dataset = find_dataset(arguments.root, arguments.name, "streaming copy")
    uri = layout.dataset_uri(arguments.root, dataset)
    samples = export_mds(uri, arguments.mds, split=arguments.split, compression=arguments.compression)
    told = {"dataset": dataset, "split": arguments.split, "samples": samples, "directory": arguments.mds}
    print(as_json(told) if arguments.json else f"{dataset}: {samples:,} samples are in {arguments.mds}")
    return 0


def plan(arguments: Namespace) -> int:
    """Show the effect of changed definitions on the store and on models."""
    from tasks.features.loading import load_definitions
    from tasks.features.standard import STANDARD
    from tasks.serving.changes import plan_changes
    from tasks.training_sets.definition import load_models

    definitions = load_definitions(arguments.definitions).over(STANDARD) if arguments.definitions else STANDARD
    models = load_models(arguments.models) if arguments.models else {}
    changes = plan_changes(arguments.root, definitions, models)
    print(as_json(changes) if arguments.json else changes.to_text())
    if changes.breaks and not arguments.force:
        print("error: models would break; mend them first, or give --force", file=sys.stderr)
        return REFUSED
    return 0


def _made_from(root: str, dataset: str, version: int) -> list[str]:
    """Return live versions of other datasets that were made from a version."""
    return [
        f"{other} v{one.version}"
        for other in stored_datasets(root)
        if other != dataset
        for one in overview(root, other).warned().live
        if (dataset, version) in one.made_from
    ]


def _age(text: str) -> dt.timedelta:
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--older-than {text}: write a number of hours, days or weeks, such as 12h, 90d or 4w")
    return dt.timedelta(hours=float(match[1]) * _HOURS[match[2]])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
