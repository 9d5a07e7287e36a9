"""HTML page of the report: the template's input, laid out in numbers and plain text.

Only plain values leave this module; the template escapes all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tasks.io.text import duration, number, plural, share, shortened
from tasks.report.lineage_graph import place
from tasks.report.plots import Distribution, distributions, short_name
from tasks.report.report import Report, self_test_section
from tasks.store.manifest import CheckResult, ColumnProfile, InputRecord, RowBalance


def template(name: str) -> Any:
    """Return a Jinja template of this package by its file name."""
    return _environment().get_template(name)


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("tasks.report").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, duration=duration, plural=plural, shortened=shortened)
    return environment


WIDTH, HEIGHT = 236.0, 84.0  # drawing area of one small multiple, in CSS pixels
_ROW = 19.0
_LABEL = 94.0
_FILES_SHOWN = 5
_ROWS_SHOWN = 200
_CHECKS_OPEN = 40  # with more, those that passed are folded away
_BOX, _BOX_GAP = 58, 12


@dataclass(frozen=True)
class Rectangle:
    """Bar: place and size in pixels, and the text shown on hover."""

    x: float
    y: float
    width: float
    height: float
    hint: str


@dataclass(frozen=True)
class Panel:
    """Small multiple: bars of this version, a line or marks for the last one, and labels."""

    column: str
    check: CheckResult | None
    height: float
    bars: tuple[Rectangle, ...]
    line: str
    marks: tuple[tuple[float, float], ...]
    ticks: tuple[tuple[float, str, str], ...]
    names: tuple[tuple[float, str, str], ...]


def html(report: Report) -> bytes:
    """Return a report as one self-contained page in UTF-8: no script, no external address, all data escaped."""
    drift = {check.column: check for check in report.gate.checks if check.name == "drift"}
    drawn = distributions(report.drawable, report.previous_profile, report.gate.checks)
    counted = {verdict: sum(c.verdict == verdict for c in report.checks) for verdict in ("fail", "warn", "pass")}
    text: str = template("report.html.j2").render(
        report=report,
        counted=counted,
        self_test=self_test_section(report.gate, report.self_test),
        rejected=sum(sum(balance.rejected.values()) for balance in report.balances),
        balances=[(balance, _segments(balance)) for balance in report.balances],
        panels=[_panel(one, drift.get(one.column)) for one in drawn],
        undrawn=[name for name in report.profile if name not in {one.column for one in drawn}],
        compared=any(one.before for one in drawn),
        statistics=[(name, column, _quantiles(column)) for name, column in report.profile.items()],
        picture=place(report.lineage) if report.lineage is not None else None,
        lineage=_lineage(report.inputs),
        files_shown=_FILES_SHOWN,
        rows_shown=_ROWS_SHOWN,
        checks_open=_CHECKS_OPEN,
        timings=_timings(report.timings),
        settings=[(name, _json(value)) for name, value in _settings(report) if value],
    )
    return text.encode()


def _panel(one: Distribution, check: CheckResult | None) -> Panel:
    return _rows_panel(one, check) if one.layout == "names" else _upright_panel(one, check)


def _upright_panel(one: Distribution, check: CheckResult | None) -> Panel:
    step = WIDTH / len(one.now)
    gap = 0.6 if one.layout == "range" else min(step * 0.15, 8)
    bars: list[Rectangle] = []
    line: list[str] = []
    for index, value in enumerate(one.now):
        tall = value / one.peak * (HEIGHT - 6)
        before = f", {share(one.before[index])} in the last version" if one.before else ""
        label = f"{one.labels[index]}: " if one.layout == "values" else ""
        bars.append(
            Rectangle(index * step + gap / 2, HEIGHT - tall, step - gap, tall, f"{label}{share(value)}{before}")
        )
    for index, value in enumerate(one.before or ()):
        y = HEIGHT - value / one.peak * (HEIGHT - 6)
        line.append(f"{'L' if line else 'M'}{index * step:.1f} {y:.1f}H{(index + 1) * step:.1f}")
    anchors = {0.0: "start", float(len(one.now)): "end"}
    ticks = [(place * step, anchors.get(place, "middle"), label) for place, label in one.ticks]
    return Panel(one.column, check, HEIGHT + 18, tuple(bars), "".join(line), (), tuple(ticks), ())


def _rows_panel(one: Distribution, check: CheckResult | None) -> Panel:
    room = WIDTH - _LABEL - 46
    bars, marks, names = [], [], []
    for index, (label, value) in enumerate(zip(one.labels, one.now, strict=True)):
        y = index * _ROW
        before = f", {share(one.before[index])} in the last version" if one.before else ""
        bars.append(
            Rectangle(_LABEL, y + 3, max(value / one.peak * room, 1), _ROW - 6, f"{label}: {share(value)}{before}")
        )
        names.append((y + _ROW / 2 + 4, short_name(label), share(value)))
        if one.before:
            marks.append((_LABEL + one.before[index] / one.peak * room, y + 1))
    height = max(len(one.now) * _ROW, HEIGHT + 18)
    return Panel(one.column, check, height, tuple(bars), "", tuple(marks), (), tuple(names))


def _segments(balance: RowBalance) -> list[tuple[str, int, float]]:
    """Return kind, rows and share of each part of a balance that isn't empty."""
    parts = {
        "out": balance.rows_out,
        "rejected": sum(balance.rejected.values()),
        "filtered": sum(balance.filtered.values()),
        "duplicates": balance.deduplicated,
        "missing": max(balance.missing, 0),
    }
    total = max(sum(parts.values()), 1)
    return [(kind, rows, rows / total) for kind, rows in parts.items() if rows]


def _quantiles(column: ColumnProfile) -> list[float | None]:
    return [column.quantiles.get(level) for level in ("0.05", "0.5", "0.95")]


def _lineage(inputs: tuple[InputRecord, ...]) -> dict[str, Any]:
    """Return places of the input boxes; the run and the version are at half the height."""
    boxes = []
    for index, one in enumerate(inputs):
        facts = [f"v{one.version}"] if one.version is not None else []
        facts += [plural(one.rows, "row")] if one.rows is not None else []
        facts += [plural(len(one.files), "file")] if one.files else []
        boxes.append(
            (index * (_BOX + _BOX_GAP) + 4, shortened(one.name, 26), ", ".join(facts) or shortened(one.uri, 36))
        )
    height = max(len(boxes), 1) * (_BOX + _BOX_GAP) - _BOX_GAP + 8
    return {"boxes": boxes, "height": height, "middle": (height - _BOX) / 2, "box": _BOX}


def _timings(timings: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Return each stage with its seconds and its share of the longest."""
    longest = max(timings.values(), default=0.0) or 1.0
    return [(stage, seconds, seconds / longest) for stage, seconds in timings.items()]


def _settings(report: Report) -> list[tuple[str, dict[str, Any]]]:
    return [("Parameters of the run", report.config), ("Definition", report.definition)]


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
