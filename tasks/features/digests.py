"""Digests of features' definitions: features with equal digests mean the same, in any version.

A group changes often and most of its features don't: versions are comparable feature by feature.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_COLUMN = re.compile(r'col\("((?:[^"\\]|\\.)*)"\)')


def feature_digests(definition: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each declared feature of a group, in order of declaration, without its dimension's columns.

    Args:
        definition: A group in the form of `FeatureGroup.describe` and the manifest.

    Returns:
        Name → SHA-256, hexadecimal, of the entity, the source, the expression, the window's days, and for a derived
        feature the digests of the features that it names. Bounds and other features don't affect values.

    """
    base = {"entity": definition["entity"], "source": definition.get("source")}
    found = {
        name: _digest(base | {"days": None, "expression": text})
        for name, text in definition.get("features", {}).items()
    }
    for window in definition.get("windows", ()):
        days = window["days"]
        found |= {
            f"{name}_{days}d": _digest(base | {"days": days, "expression": text})
            for name, text in window["features"].items()
        }
    for name, text in definition.get("derived", {}).items():
        uses = {column: found[column] for column in sorted(set(_COLUMN.findall(text))) if column in found}
        found[name] = _digest({"entity": base["entity"], "expression": text, "of": uses})
    return found


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
