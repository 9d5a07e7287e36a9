"""Withdrawal of versions: readers skip them, and no published file is rewritten.

A withdrawal is one more record beside the manifest, made by put-if-absent: the first one counts. The data stays, so
that everything made from it can still be explained; `retention` deletes it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from pydantic import Field, ValidationError

from tasks.io import storage
from tasks.io.errors import DamagedManifest, VersionNotFound
from tasks.store import layout
from tasks.store.manifest import Record
from tasks.store.reservation import find_manifest, version_numbers
from tasks.store.version_index import mark


class Withdrawal(Record):
    """Reason, time and author of a version's withdrawal."""

    reason: str = Field(description="Why readers must not use it, in words.")
    when: dt.datetime | None = Field(
        default=None, description="When it was withdrawn, UTC; None if that can't be read."
    )
    by: str = Field(default="unknown", description="Who withdrew it.")

    def __str__(self) -> str:
        if self.when is None:
            return f"withdrawn: {self.reason}"
        return f"withdrawn by {self.by} at {self.when:%Y-%m-%d %H:%M} UTC: {self.reason}"


def withdraw(root: str, dataset: str, version: int, reason: str, by: str) -> None:
    """Withdraw a published version: readers skip it, and 'latest' is then the one before. A second call is no error.

    A version whose manifest is damaged can be withdrawn too: it causes no more warnings, and `prune` deletes it.

    Raises:
        VersionNotFound: the version isn't published.

    """
    root = storage.normalise(root)
    try:
        manifest = find_manifest(root, dataset, version)
        published = manifest is not None and manifest.status == "published"
    except DamagedManifest:
        published = True
    if not published:
        known = ", ".join(f"v{number}" for number in version_numbers(root, dataset)) or "none"
        state = "isn't published" if manifest is None else "was rejected by the quality gate: nobody reads it"
        raise VersionNotFound(f"{dataset} v{version} {state}; name a published version to withdraw (of {known})")
    mark(root, dataset, version)
    record = Withdrawal(reason=reason, when=dt.datetime.now(dt.UTC), by=by)
    storage.put_if_absent(withdrawal_uri(root, dataset, version), record.model_dump_json(indent=2).encode())


def withdrawal_of(root: str, dataset: str, version: int) -> Withdrawal | None:
    """Return the withdrawal of a version; None if it isn't withdrawn."""
    uris = {version: withdrawal_uri(storage.normalise(root), dataset, version)}
    return parse_withdrawals(uris, storage.read_many(uris.values())).get(version)


def withdrawn(root: str, dataset: str) -> dict[int, Withdrawal]:
    """Return the withdrawn versions of a dataset, ascending."""
    root = storage.normalise(root)
    uris = {version: withdrawal_uri(root, dataset, version) for version in version_numbers(root, dataset)}
    return parse_withdrawals(uris, storage.read_many(uris.values()))


def withdrawal_uri(root: str, dataset: str, version: int) -> str:
    """Return the URI of the record of a version's withdrawal, if it is withdrawn; `root` is normalised."""
    return layout.join(layout.version_uri(root, dataset, version), layout.WITHDRAWN)


def parse_withdrawals(uris: Mapping[int, str], contents: Mapping[str, bytes]) -> dict[int, Withdrawal]:
    """Return withdrawals by version, from the contents of the existing records.

    Every record counts: one that can't be read withdraws its version all the same.
    """
    found = {}
    for version, uri in uris.items():
        if uri in contents:
            try:
                found[version] = Withdrawal.model_validate_json(contents[uri])
            except ValidationError as fault:
                found[version] = Withdrawal(
                    reason=f"{uri} can't be read as a record ({fault.error_count()} errors in {len(contents[uri])} "
                    "bytes): delete that file to publish the version again, and withdraw it anew after that"
                )
    return found
