"""Lineage drawings: a tree of text, a Mermaid flowchart, and a picture of boxes.

Many versions of one dataset, as in a history of features, are drawn as one box.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.io.text import plural, shortened
from tasks.store.lineage import Lineage, SourceNode, TrainingNode, VersionNode

MOST_BOXES = 3  # of one dataset; more versions share a box
WIDTH, HEIGHT = 240.0, 74.0  # of a box, pixels
ACROSS, DOWN = 38.0, 14.0  # between boxes
MARGIN = 4.0
_TIP = 9.0  # length of an arrow's tip
_PASSING = 10.0  # height that a line takes which passes by a column
_TURNS = 4


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


@dataclass(frozen=True, slots=True)
class Placed:
    """Box with the position of its upper left corner, pixels."""

    box: Box
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Picture:
    """Laid-out lineage: boxes, lines as SVG paths, and the tips of arrows; pixels."""

    width: float
    height: float
    boxes: tuple[Placed, ...]
    paths: tuple[str, ...]
    tips: tuple[tuple[float, float], ...]
    box_width: float = WIDTH
    box_height: float = HEIGHT


@dataclass(frozen=True, slots=True)
class _Passing:
    """Waypoint of a line over several columns, in each column between, so that no box is in its way."""

    source: str
    target: str
    column: int


_Point = str | _Passing
_Corners = dict[_Point, tuple[float, float]]


def place(lineage: Lineage) -> Picture:
    """Lay the boxes out in columns, each after all its inputs."""
    boxes, edges = drawn(lineage)
    column = _columns(boxes, edges)
    routes = [_route(source, target, column) for source, target in edges]
    rows: list[list[_Point]] = [[] for _ in range(max(column.values()) + 1)]
    for key, number in column.items():
        rows[number].append(key)
    for route in routes:
        for point in route:
            if isinstance(point, _Passing):
                rows[point.column].append(point)
    _untangle(rows, [(route[n], route[n + 1]) for route in routes for n in range(len(route) - 1)])
    height = max(sum(_height(point) + DOWN for point in row) - DOWN for row in rows)
    corners: _Corners = {}
    for number, row in enumerate(rows):
        y = MARGIN + (height - sum(_height(point) + DOWN for point in row) + DOWN) / 2
        for point in row:
            corners[point] = MARGIN + number * (WIDTH + ACROSS), y
            y += _height(point) + DOWN
    ends = dict.fromkeys(corners[target] for _, target in edges)
    return Picture(
        width=len(rows) * (WIDTH + ACROSS) - ACROSS + 2 * MARGIN,
        height=height + 2 * MARGIN,
        boxes=tuple(Placed(box, *corners[key]) for key, box in boxes.items()),
        paths=tuple(_path(corners, route) for route in routes),
        tips=tuple((x - _TIP, y + HEIGHT / 2) for x, y in ends),
    )


def _columns(boxes: Mapping[str, Box], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the column of each box: one after the last of its inputs; sources right before their first reader."""
    column = dict.fromkeys(boxes, 0)
    for _ in boxes:  # a path has no more steps than there are boxes
        for source, target in edges:
            column[target] = max(column[target], column[source] + 1)
    for key, box in boxes.items():
        readers = [column[target] for source, target in edges if source == key]
        if box.kind == "source" and readers:
            column[key] = min(readers) - 1
    return column


def _route(source: str, target: str, column: Mapping[str, int]) -> list[_Point]:
    return [source, *(_Passing(source, target, n) for n in range(column[source] + 1, column[target])), target]


def _untangle(rows: list[list[_Point]], links: Sequence[tuple[_Point, _Point]]) -> None:
    """Order each column by the mean of neighbours' places, back and forth; few lines cross (Sugiyama et al. 1981)."""
    for turn in range(_TURNS):
        forth = turn % 2 == 0
        near: dict[_Point, list[_Point]] = {}
        for source, target in links:
            near.setdefault(target if forth else source, []).append(source if forth else target)
        height = {point: (number + 0.5) / len(row) for row in rows for number, point in enumerate(row)}
        for row in rows if forth else reversed(rows):
            wanted = {p: sum(height[one] for one in near[p]) / len(near[p]) if p in near else height[p] for p in row}
            row.sort(key=wanted.__getitem__)
            height |= {point: (number + 0.5) / len(row) for number, point in enumerate(row)}


def _height(point: _Point) -> float:
    return _PASSING if isinstance(point, _Passing) else HEIGHT


def _path(corners: _Corners, route: Sequence[_Point]) -> str:
    """Return a curve from the right side of a box to the left side of another, straight through the columns between."""
    x, y = corners[route[0]]
    x, y = x + WIDTH, y + _height(route[0]) / 2
    parts = [f"M{x:.1f} {y:.1f}"]
    for point in route[1:]:
        left, top = corners[point]
        passing = isinstance(point, _Passing)
        end, level, bend = left - (0 if passing else _TIP), top + _height(point) / 2, ACROSS / 2
        parts.append(f"C{x + bend:.1f} {y:.1f} {end - bend:.1f} {level:.1f} {end:.1f} {level:.1f}")
        x, y = left + WIDTH, level
        if passing:
            parts.append(f"H{x:.1f}")
    return "".join(parts)
