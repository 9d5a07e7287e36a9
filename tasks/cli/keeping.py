"""Commands that change the store, or preview a change: each prints its answer and returns the exit code."""

from __future__ import annotations

import datetime as dt
import getpass
import re
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence

from tasks.io.errors import ConfigError
from tasks.io.numerals import plural
from tasks.io.storage import delete, normalise
from tasks.io.uploads import Upload, abort_upload, unfinished_uploads
from tasks.report.tables import as_json, moment, moments, show, size
from tasks.store import layout, retention
from tasks.store.catalogue import find_dataset, short_name
from tasks.store.reading import list_datasets, overview, published_versions, read_committed, resolve
from tasks.store.withdrawal import withdraw, withdrawal_of

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
    datasets = [find_dataset(root, arguments.name)] if arguments.name else list_datasets(root)
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
    """Write a group's newest values to Redis."""
    from tasks.serving.redis import export_latest

    group = short_name(find_dataset(arguments.root, arguments.name, "features"))
    rows = export_latest(arguments.root, group, arguments.redis, ttl_days=arguments.ttl_days)
    print(as_json({"group": group, "rows": rows}) if arguments.json else f"{group}: {rows:,} entities are in Redis")
    return 0


def plan(arguments: Namespace) -> int:
    """Show the effect of changed definitions on the store and on models."""
    from tasks.features.loading import load_definitions
    from tasks.features.standard import STANDARD
    from tasks.serving.changes import plan_changes
    from tasks.training_sets.loading import load_models

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
        for other in list_datasets(root)
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
