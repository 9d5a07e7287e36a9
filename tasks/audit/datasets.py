"""Rows of a published Ray Dataset: explained, and their ids made again.

A Ray Dataset has no source to be read again. But each row has its id by its values: whoever changed one, and made the
file's digest anew, would have to change the id, too, and with it the digest of the content.
"""

from __future__ import annotations

from tasks.audit.explanation import (
    Explanation,
    Section,
    absent,
    closest_keys,
    find_rows,
    gate_section,
    refuse,
    rejected_rows,
    rejected_sections,
    typed_key,
    version_section,
)
from tasks.audit.holders import holders_section
from tasks.audit.replay_rows import Again, Replayed, Unreadable, by_file, differences, missing
from tasks.datasets.rows import identified
from tasks.io.errors import ConfigError
from tasks.io.tensors import Int64Array
from tasks.io.text import plural
from tasks.store.manifest import Manifest

MOST_SHOWN = 20
"""Maximum number of an entity's rows that are shown."""


class DatasetAgain(Again):
    """The rows of one version, whose ids are made again from their values."""

    def replay(self, chosen: Int64Array) -> list[Replayed]:
        """Make some ids again, and compare them."""
        key = str(self.manifest.definition["key"])
        self.notes.append("A Ray Dataset can't be read again: the ids of rows are made again from the stored values.")
        replayed: list[Replayed] = []
        for entry, rows in by_file([(entry, entry.rows) for entry in self.manifest.files], chosen):
            names = [f"{entry.path} row {row}" for row in rows.tolist()]
            try:
                stored = self.stored.read(entry, rows)
            except Unreadable as fault:
                replayed += [missing(name, entry, fault.cause) for name in names]
                continue
            made = identified(stored.drop_columns([key]), key)
            found = differences(stored, made, range(stored.num_rows))
            causes = self.stored.check(entry)
            replayed += [
                Replayed(name=name, file=entry.path, differences=own, causes=causes)
                for name, own in zip(names, found, strict=True)
            ]
        return replayed


def explain_row(root: str, manifest: Manifest, key: str, at: str | None) -> Explanation:
    """Explain the rows of an entity, or the row of an id."""
    if at is not None:
        raise ConfigError(f"--at names a time, and the rows of {manifest.dataset} have none; leave it out")
    definition = manifest.definition
    entity, own = str(definition["entity"]), str(definition["key"])
    rejected = rejected_rows(root, manifest, {entity}, {key})
    columns = [column.name for column in manifest.columns if column.name != "image"]
    found = None
    for column in dict.fromkeys([entity, own]) if manifest.status == "published" else ():
        try:
            value = typed_key(manifest, column, key)
        except ConfigError:
            if rejected or column != own:
                continue
            raise
        found = find_rows(root, manifest, column, value, columns=columns)
        if found.places:
            break
    if found is None or not found.places:
        if not rejected:
            refuse(manifest, entity, key, closest_keys(root, manifest, entity, typed_key(manifest, entity, key)))
        return absent(root, manifest, (entity, key), rejected)
    rows = [
        {"file": path, "row": number, **values}
        for (path, number), values in zip(found.places[:MOST_SHOWN], found.rows[:MOST_SHOWN], strict=True)
    ]
    others = len(found.places) - len(rows)
    sections = [
        Section(
            title="rows",
            facts={"rows": len(found.places), "read": found.read_of(manifest)},
            rows=rows,
            notes=[f"{plural(others, 'further row')} of it aren't shown."] if others else (),
        ),
        *rejected_sections(rejected),
        gate_section(manifest, dict.fromkeys(columns, "a column of this row")),
        holders_section(root, manifest, column, value),
        version_section(root, manifest),
    ]
    what = f"{plural(len(found.places), 'row')} of {column} {key} in {manifest}"
    return Explanation(manifest, key, "held", what, sections)
