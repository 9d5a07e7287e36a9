"""Picture of a lineage: its boxes in columns, sources to the left, with few crossing lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.report.lineage_graph import Box, drawn
from tasks.store.lineage import Lineage

WIDTH, HEIGHT = 240.0, 74.0  # of a box, pixels
ACROSS, DOWN = 38.0, 14.0  # between boxes
MARGIN = 4.0
_TIP = 9.0  # length of an arrow's tip
_PASSING = 10.0  # height that a line takes which passes by a column
_TURNS = 4


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
