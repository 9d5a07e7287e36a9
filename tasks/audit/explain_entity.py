"""The rows of one entity in a version that is partitioned by it: held, or rejected on the way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.audit.explain_rows import Found, closest_keys, find_rows, typed_key
from tasks.audit.explain_version import (
    gate_section,
    refuse,
    rejected_rows,
    rejected_section,
    rejected_sources,
    version_section,
)
from tasks.audit.explained import Explanation, explanation
from tasks.core.errors import ConfigError
from tasks.core.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Held:
    """An entity that a version holds: its key, its rows, and those of its rows that were rejected."""

    value: int | str
    found: Found
    rejected: list[dict[str, Any]]


def look_for(root: str, manifest: Manifest, key: str, spellings: Collection[str]) -> Held | Explanation:
    """Look for an entity's rows, kept and rejected; where there are only rejected ones, that is the whole answer.

    Args:
        root: Root of the store.
        manifest: The version's, which names its entity.
        key: The entity's key, as it was typed.
        spellings: Names of the key's column in the files of rejected rows.

    Raises:
        InputError: the version has no such row, and has rejected none.
        ConfigError: the key can't be one.

    """
    entity: str = manifest.definition["entity"]
    rejected = rejected_rows(root, manifest, spellings, {key})
    try:
        value = typed_key(manifest, entity, key)
    except ConfigError:
        if not rejected:
            raise
        return _only_rejected(root, manifest, key, rejected)
    if manifest.status == "rejected" and rejected:
        return _only_rejected(root, manifest, key, rejected)
    found = find_rows(root, manifest, entity, value)
    if found.table.num_rows:
        return Held(value, found, rejected)
    if not rejected:
        refuse(manifest, entity, key, closest_keys(root, manifest, entity, value))
    return _only_rejected(root, manifest, key, rejected)


def _only_rejected(root: str, manifest: Manifest, key: str, rows: Sequence[dict[str, Any]]) -> Explanation:
    entity = manifest.definition["entity"]
    headline = f"{entity} {key} isn't in {manifest.dataset} v{manifest.version}: all that it had was rejected"
    concerned = dict.fromkeys(rejected_sources(rows), "has rejected rows of it")
    sections = [rejected_section(rows), gate_section(manifest, concerned), version_section(root, manifest)]
    return explanation(manifest, key, "rejected", headline, sections)
