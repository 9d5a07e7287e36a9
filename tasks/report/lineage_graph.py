"""Lineage drawings: a tree of text, a Mermaid flowchart, and boxes for a picture.

Many versions of one dataset, as in a history of features, are drawn as one box.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.io.numerals import plural, shortened
from tasks.store.lineage import Lineage, SourceNode, TrainingNode, VersionNode

MOST_BOXES = 3  # of one dataset; more versions share a box


@dataclass(frozen=True, slots=True)
class Box:
    """Box of the drawing: its id, lines of text, kind, all details as a hint, and True if it was asked for."""

    id: str
    name: str
    lines: tuple[str, ...]
    kind: Literal["source", "version", "training"]
    hint: str
    marked: bool

    @property
    def title(self) -> str:
        """Name for a small space: a dataset's without its first directory."""
        return self.name.partition("/")[2] if self.kind == "version" else self.name


def text(lineage: Lineage) -> str:
    """Return a tree from the version back to the sources; a repeated part isn't unfolded again."""
    boxes, edges = drawn(lineage)
    before: dict[str, list[str]] = {}
    for source, target in edges:
        before.setdefault(target, []).append(source)
    lines: list[str] = []
    seen: set[str] = set()

    def unfold(key: str, lead: str, rest: str) -> None:
        box = boxes[key]
        again = key in seen and key in before
        lines.append(lead + " · ".join([box.name, *box.lines, *(["see above"] if again else [])]))
        if key in seen:
            return
        seen.add(key)
        behind = before.get(key, [])
        for place, one in enumerate(behind):
            last = place == len(behind) - 1
            unfold(one, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    for key, box in boxes.items():
        if box.kind == "training" or (box.marked and not lineage.trainings):
            unfold(key, "", "")
    return "\n".join(lines) + "\n"


def mermaid(lineage: Lineage) -> str:
    """Return a flowchart in Mermaid's language."""
    boxes, edges = drawn(lineage)
    names = {key: f"n{place}" for place, key in enumerate(boxes)}
    shapes = {"source": ("[(", ")]"), "version": ("[", "]"), "training": ("([", "])")}
    lines = ["flowchart LR"]
    for key, box in boxes.items():
        label = "<br>".join(_quoted(line) for line in (box.name, *box.lines))
        lines.append(f'  {names[key]}{shapes[box.kind][0]}"{label}"{shapes[box.kind][1]}')
    lines += [f"  {names[source]} --> {names[target]}" for source, target in edges]
    return "\n".join(lines) + "\n"


def drawn(lineage: Lineage) -> tuple[dict[str, Box], list[tuple[str, str]]]:
    """Return boxes by id, the requested version first, and edges between them; many versions share a box."""
    by_dataset: dict[str, list[VersionNode]] = {}
    for version in lineage.versions:
        by_dataset.setdefault(version.dataset, []).append(version)
    runs = {run.flow_run_id: run.flow_run_name or run.flow_run_id for run in lineage.runs}
    boxes: dict[str, Box] = {}
    owner: dict[str, str] = {}
    for dataset, versions in by_dataset.items():
        alone = [version for version in versions if version.id == lineage.of]
        others = [version for version in versions if version.id != lineage.of]
        groups = [[one] for one in alone + others] if len(others) <= MOST_BOXES else [*([one] for one in alone), others]
        for group in groups:
            box = _versions(dataset, sorted(group, key=lambda one: one.version), runs, lineage.of)
            boxes[box.id] = box
            owner |= {version.id: box.id for version in group}
    for source in lineage.sources:
        boxes[source.id] = _source(source)
    for training in lineage.trainings:
        boxes[training.id] = _training(training, runs)
    edges = [(owner.get(edge.source, edge.source), owner.get(edge.target, edge.target)) for edge in lineage.edges]
    return boxes, [edge for edge in dict.fromkeys(edges) if edge[0] != edge[1]]


def _versions(dataset: str, group: Sequence[VersionNode], runs: Mapping[str, str], asked: str) -> Box:
    first, last = group[0], group[-1]
    numbers = f"v{first.version}" if len(group) == 1 else f"v{first.version}–v{last.version}"
    rows = sum(one.rows or 0 for one in group)
    times = sorted({moment for one in group for moment in one.as_of})
    facts = [numbers, plural(rows, "row"), *([plural(len(times), "time")] if len(times) > 1 else [])]
    states = [one.status for one in group if one.status != "published"]
    facts += [f"{states.count(state)} {state}" if len(group) > 1 else state for state in dict.fromkeys(states)]
    by = list(dict.fromkeys(runs.get(one.run or "", "") for one in group))
    made = f"by {by[0]}" if len(by) == 1 and by[0] else plural(len(by), "run") if len(by) > 1 else ""
    lines = [", ".join(facts), *([f"as of {_span(times)}"] if times else []), *([made] if made else [])]
    hint = "\n".join(_hint(one) for one in group[:20])
    return Box(
        id=first.id if len(group) == 1 else f"{dataset}@{numbers}",
        name=dataset,
        lines=tuple(lines[:3]),
        kind="version",
        hint=hint,
        marked=any(one.id == asked for one in group),
    )


def _hint(one: VersionNode) -> str:
    made = "" if one.created_at is None else f", made {one.created_at:%Y-%m-%d %H:%M} UTC"
    digests = [
        f"{what} {digest[:12]}" for what, digest in (("definition", one.definition), ("code", one.code)) if digest
    ]
    return ", ".join([f"{one.uri} ({one.status}){made}", *digests, *([f"run {one.run}"] if one.run else [])])


def _source(source: SourceNode) -> Box:
    count, size = len(source.files), sum(file.bytes for file in source.files)
    hint = "\n".join(f"{file.uri}  {shortened(file.fingerprint, 31)}" for file in source.files[:20])
    lines = (source.uri, f"{plural(count, 'file')}, {plural(size, 'byte')}")
    return Box(source.id, source.name, lines, "source", f"{source.uri}\n{hint}", False)


def _training(training: TrainingNode, runs: Mapping[str, str]) -> Box:
    lines = (
        f"{training.created_at:%Y-%m-%d %H:%M} UTC, {training.verdict}",
        f"by {runs.get(training.run, training.run)}",
    )
    return Box(training.id, "training", lines, "training", training.uri, False)


def _span(times: Sequence[dt.datetime]) -> str:
    whole = all(moment.time() == dt.time() for moment in times)
    first, last = (moment.strftime("%Y-%m-%d" if whole else "%Y-%m-%d %H:%M") for moment in (times[0], times[-1]))
    return first if len(times) == 1 else f"{first} … {last}"


def _quoted(line: str) -> str:
    """Quote text for a Mermaid label: no markup, no quotes, one line."""
    for mark, instead in (("#", "#35;"), ("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "'")):
        line = line.replace(mark, instead)
    return " ".join(line.split())
