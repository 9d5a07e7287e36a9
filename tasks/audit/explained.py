"""An answer of `explain` as a value: sections of facts, tables and sentences, for people and for programs."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tasks.core import layout
from tasks.core.manifest import Manifest
from tasks.serving.tables import as_json, brief, facts, moment, printable, show

_WIDEST = 120
Answer = Literal["held", "rejected", "left out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One side of the answer.

    Attributes:
        title: What it is about; programs find it under this name in lower case.
        facts: Names and values.
        rows: A table, one mapping a row; all have the same names.
        shown: Names of the columns that people see; all, if none are given.
        notes: Sentences.

    """

    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    rows: Sequence[Mapping[str, object]] = ()
    shown: tuple[str, ...] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that is known of a row.

    Attributes:
        dataset: Dataset name.
        version: Its version.
        kind: As `layout.kind` has it.
        key: What was asked for.
        answer: 'held' by the version; 'rejected' on the way to it; 'left out' of it by intent.
        headline: The answer in a sentence.
        sections: The rest.

    """

    dataset: str
    version: int
    kind: str
    key: str
    answer: Answer
    headline: str
    sections: tuple[Section, ...]

    def to_json(self) -> str:
        """The answer for programs: sections by their names, every value in its own unit."""
        told = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "sections"}
        sections = {
            one.title.replace(" ", "_"): {"facts": dict(one.facts), "rows": list(one.rows), "notes": list(one.notes)}
            for one in self.sections
        }
        return as_json({**told, "sections": sections})

    def show(self) -> None:
        """Print the answer for people."""
        print(printable(self.headline))
        for section in self.sections:
            print(f"\n{printable(section.title.upper())}")
            facts({name: _plain(value) for name, value in section.facts.items()})
            if section.rows:
                if section.facts:
                    print()
                names = section.shown or tuple(section.rows[0])
                rows = [[_cell(row.get(name)) for name in names] for row in section.rows]
                numbers = [
                    name for name in names if all(isinstance(row.get(name), int | float | None) for row in section.rows)
                ]
                show([printable(name) for name in names], rows, right=numbers)
            for note in section.notes:
                print(printable(note))


def _plain(value: object) -> object:
    """Lists and mappings in a line; numbers of the data with all their digits."""
    match value:
        case dt.datetime():
            return moment(value)
        case list() | tuple() | set():
            return ", ".join(str(_plain(one)) for one in value)
        case dict():
            return ", ".join(f"{name} {'–' if one is None else _plain(one)}" for name, one in value.items())
        case float():
            return str(value)
    return value


def _cell(value: object) -> object:
    """A value in a table; programs get all of it."""
    plain = _plain(value)
    return brief(plain, _WIDEST) if isinstance(plain, str) else plain


def explanation(
    manifest: Manifest, key: str, answer: Answer, headline: str, sections: Sequence[Section]
) -> Explanation:
    """The answer about a row of a version."""
    return Explanation(
        dataset=manifest.dataset,
        version=manifest.version,
        kind=layout.kind(manifest.dataset),
        key=key,
        answer=answer,
        headline=headline,
        sections=tuple(sections),
    )
