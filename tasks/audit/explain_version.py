"""What is known of a version as a whole, as far as it concerns one of its rows: gate, run, and what was rejected."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.audit.explained import Section
from tasks.core import layout, storage
from tasks.core.errors import ConfigError, CorruptVersion, InputError
from tasks.core.manifest import Manifest
from tasks.core.times import expand
from tasks.core.withdrawal import withdrawal_of

_STYLES = (("_reason", "_file", "_row"), ("reason", "uri", "row"))
"""Reason, file and row as rejected rows bear them: those of features' sources, of copies, of images and labels."""


def version_section(root: str, manifest: Manifest) -> Section:
    """Where the version stands, who made it, and with what."""
    withdrawal = withdrawal_of(root, manifest.dataset, manifest.version)
    facts = {
        "version": f"{manifest.dataset} v{manifest.version}",
        "status": "withdrawn" if withdrawal else manifest.status,
        "withdrawn": None if withdrawal is None else str(withdrawal),
        "data": layout.version_uri(root, manifest.dataset, manifest.version),
        "created": manifest.created_at,
        "run": manifest.run.flow_run_name or manifest.run.flow_run_id,
        "code": manifest.code_digest,
    }
    return Section(title="version", facts={name: value for name, value in facts.items() if value is not None})


def gate_section(manifest: Manifest, concerned: Mapping[str, str]) -> Section:
    """The gate's verdict, and the checks that didn't pass.

    Args:
        manifest: The version.
        concerned: Columns (and names of sources) that have to do with the row, and what.

    """
    open_checks = [check for check in manifest.gate.checks if check.verdict != "pass"]
    rows = [
        {
            "check": check.name,
            "column": check.column,
            "verdict": check.verdict,
            "concerns": "the version as a whole"
            if check.column is None
            else concerned.get(check.column, "not this row"),
            "message": check.message,
        }
        for check in sorted(open_checks, key=lambda check: check.column not in concerned)
    ]
    facts = {"verdict": manifest.gate.verdict, "checks": len(manifest.gate.checks), "not passed": len(open_checks)}
    return Section(title="gate", facts=facts, rows=rows)


def rejected_rows(
    root: str, manifest: Manifest, columns: Collection[str], keys: Collection[str]
) -> list[dict[str, Any]]:
    """Rejected rows that have one of some keys in one of some columns, with the reason and where they stood.

    Args:
        root: Root of the store.
        manifest: The version.
        columns: Columns that may have the key, by the names of the sources.
        keys: The key, as sources may spell it.

    Raises:
        CorruptVersion: a file of rejected rows is missing.

    """
    base = layout.version_uri(storage.normalise(root), manifest.dataset, manifest.version)
    found = []
    for entry in manifest.rejected_files:
        uri = layout.join(base, entry.path)
        try:
            source = storage.open_input(uri)
        except FileNotFoundError as fault:
            raise CorruptVersion(f"{uri} is missing, but its manifest lists it; restore it from a copy") from fault
        with source:
            file = pq.ParquetFile(source)
            named = [name for name in file.schema_arrow.names if name in columns]
            if named and pc.any(matching(file.read(columns=named), keys)).as_py():
                table = file.read()
                rows = table.filter(matching(table.select(named), keys)).to_pylist()
                found += [_told(row, entry.path) for row in rows]
    return found


def matching(table: pa.Table, keys: Collection[str]) -> pa.Array:
    """Which rows have one of some keys in any column, whatever its type; '7.0' is 7."""
    hits = pa.array([False] * table.num_rows)
    for column in table.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pc.utf8_trim_whitespace(column.cast(kind).cast(pa.string()))
        plain = pc.replace_substring_regex(text, r"\.0$", "")
        wanted = pa.array(list(keys), pa.string())
        own = pc.or_(pc.is_in(text, wanted), pc.is_in(plain, wanted))
        hits = pc.or_(hits, own.combine_chunks() if isinstance(own, pa.ChunkedArray) else own)
    return hits


def _told(row: Mapping[str, Any], path: str) -> dict[str, Any]:
    style = _STYLES[0] if "_reason" in row else _STYLES[1]
    reason, file, number = (row.get(name) for name in style)
    detail = _meaning(str(reason)) if "_reason" in row else row.get("detail") or _meaning(str(reason))
    names = {*style, *(() if "_reason" in row else ("detail",))}
    return {
        "reason": reason,
        "source file": file,
        "source row": number,
        "detail": detail,
        "values": {name: value for name, value in row.items() if name not in names},
        "kept in": path,
    }


def _meaning(reason: str) -> str | None:
    """A reason in words."""
    if reason in _MEANINGS:
        return _MEANINGS[reason]
    if reason.startswith("no_") and reason.endswith("_row"):
        return f"{reason[3:-4]} has no row of this key, and join = inner"
    kind = next((one for one in _PREFIXES if reason.startswith(f"{one}_")), None)
    return None if kind is None else _PREFIXES[kind].format(reason.removeprefix(f"{kind}_"))


_MEANINGS = {"malformed_row": "the line has another number of fields than the header"}
_PREFIXES = {
    "null": "{} is missing",
    "unparsable": "{} can't be read as what it should be",
    "not_finite": "{} is NaN or infinite",
    "negative": "{} is negative, and negative_amounts = reject",
    "too_early": "{} is before the setting `earliest`",
    "conflicting": "a row before it has the same {} and says something else",
}


def rejected_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Rejected rows as a section; people see their values as text."""
    names = ("reason", "source file", "source row", "detail", "values", "kept in")
    shown = tuple(name for name in names if any(row[name] is not None for row in rows))
    return Section(title="rejected", rows=rows, shown=shown)


def rejected_sources(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the sources of rejected rows, as the files that keep these are named."""
    return {row["kept in"].partition("/")[2].rsplit("-", 2)[0].removesuffix("-conflicts") for row in rows}


def refuse(manifest: Manifest, what: str, key: str, close: Sequence[str]) -> NoReturn:
    """Say that a version hasn't a key.

    Raises:
        InputError: always; its message names the closest keys.

    """
    cure = f"closest: {', '.join(close)}" if close else "none is like it; see `describe` for what the version holds"
    raise InputError(
        f"{manifest.dataset} v{manifest.version} has no {what} '{key}', among its rows or its rejected ones; {cure}"
    )


def parse_time(text: str) -> dt.datetime:
    """The time of `--at`.

    Raises:
        ConfigError: it is no time.

    """
    try:
        (moment,) = expand((text,))
    except ValueError as fault:
        raise ConfigError(f"--at: {str(fault).removesuffix('.')}") from fault
    return moment


def pick_time(manifest: Manifest, key: str, times: Sequence[dt.datetime], at: str | None) -> dt.datetime:
    """Which of the times of a key's rows is meant: the newest, unless one is asked for.

    Raises:
        ConfigError: what is asked for is no time.
        InputError: there is no row of that time; the message names those that there are.

    """
    if at is None:
        return max(times)
    wanted = parse_time(at)
    if wanted not in times:
        near = sorted(times, key=lambda moment: abs(moment - wanted))[:3]
        known = ", ".join(moment.isoformat() for moment in sorted(near))
        raise InputError(
            f"{manifest.dataset} v{manifest.version} has no row of '{key}' at {wanted.isoformat()}; closest: {known}"
        )
    return wanted
