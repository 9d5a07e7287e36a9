"""Validation report: one value in three forms, JSON beside the data, an HTML page, and a Prefect artifact.

Only plain values go to the page's template, which escapes all of them.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.io.text import duration, number, plural, share, shortened
from tasks.quality.faults import ITSELF, ORDER, summary, unproven
from tasks.report import lineage_graph
from tasks.report.plots import Distribution, distributions, short_name
from tasks.store.lineage import Lineage
from tasks.store.manifest import (
    CheckResult,
    ColumnProfile,
    Count,
    FaultResult,
    GateResult,
    InputRecord,
    Manifest,
    Outcome,
    Record,
    RowBalance,
    RunRecord,
    Status,
    Verdict,
)

HEADING = "Self-test"
_OUTCOME_SIGNS: dict[Outcome, str] = {
    "blind": "▲ BLIND",
    "warned": "✔ warned",
    "refused": "✔ refused",
    "not applicable": "–",
}
_BADGES: dict[Outcome, str] = {"blind": "warn", "warned": "pass", "refused": "pass", "not applicable": ""}


@dataclass(frozen=True, slots=True)
class SelfTestSection:
    """Content of the section in plain text, which the template escapes.

    rows: each fault with the badge of its outcome, the blind ones first.
    """

    heading: str
    summary: str
    unproven: str
    rows: tuple[tuple[FaultResult, str], ...]


def self_test_section(gate: GateResult, results: Sequence[FaultResult]) -> SelfTestSection | None:
    """Return the section; None for a version without a self-test."""
    if not results:
        return None
    ordered = sorted(results, key=lambda result: ORDER[result.outcome])
    names = [] if results[0].fault == ITSELF else unproven(gate, results)
    words = f"No fault made these checks worse, so nothing shows that they can fail: {', '.join(names)}."
    return SelfTestSection(
        heading=HEADING,
        summary=f"Faults were put into a sample of the rows, and the gate judged each again: {summary(results)}.",
        unproven=words if names else "",
        rows=tuple((result, _BADGES[result.outcome]) for result in ordered),
    )


def self_test_markdown(gate: GateResult, results: Sequence[FaultResult], text: Callable[[str], str]) -> list[str]:
    """Return the section as paragraphs of Markdown; `text` escapes data."""
    found = self_test_section(gate, results)
    if found is None:
        return []
    lines = ["| outcome | fault | what was injected | noticed by | |", "|---|---|---|---|---|"]
    for result, _ in found.rows:
        cells = (result.fault, result.injected, ", ".join(result.caught_by[:3]), result.message)
        lines.append(f"| {_OUTCOME_SIGNS[result.outcome]} | {' | '.join(map(text, cells))} |")
    parts = [f"## {HEADING}", text(found.summary), "\n".join(lines)]
    return [*parts, *([text(found.unproven)] if found.unproven else [])]


MARKDOWN_BYTES = 400_000
MARKDOWN_ROWS = 20
MediaType = Literal["image/png", "image/webp", "image/jpeg"]
_MARKS = {"image/png": rb"\x89PNG", "image/webp": rb"RIFF....WEBP", "image/jpeg": rb"\xff\xd8\xff"}
_ORDER: dict[Verdict, int] = {"fail": 0, "warn": 1, "pass": 2}
_SIGNS: dict[Verdict, str] = {"fail": "✖ FAIL", "warn": "▲ WARN", "pass": "✔ PASS"}


class Picture(Record):
    """Picture with a description, held within the report."""

    title: str = Field(description="Heading of the picture.")
    caption: str = Field(description="What is to be seen, in a sentence or two.")
    media_type: MediaType = Field(description="Kind of its bytes.")
    data: str = Field(description="Its bytes, base64.")

    @classmethod
    def of(cls, title: str, caption: str, media_type: MediaType, data: bytes) -> Picture:
        """Make a picture from its bytes."""
        return cls(title=title, caption=caption, media_type=media_type, data=base64.b64encode(data).decode())

    @model_validator(mode="after")
    def _kind_is_true(self) -> Picture:
        try:
            data = base64.b64decode(self.data, validate=True)
        except ValueError as error:
            raise ValueError(f"the data of picture '{self.title}' isn't base64: {error}") from error
        if not re.match(_MARKS[self.media_type], data, re.DOTALL):
            raise ValueError(f"picture '{self.title}' isn't {self.media_type}: it begins with {data[:8]!r}")
        return self

    @property
    def uri(self) -> str:
        """Picture as a data URI."""
        return f"data:{self.media_type};base64,{self.data}"


class DataTable(Record):
    """Small table of figures and names."""

    title: str = Field(description="Heading of the table.")
    columns: tuple[str, ...] = Field(description="Name of each column.")
    rows: tuple[tuple[str | float | int | None, ...], ...] = Field(description="Rows, as long as there are columns.")
    note: str = Field(default="", description="A sentence below the table.")

    @model_validator(mode="after")
    def _rows_fit(self) -> DataTable:
        for place, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {place} of table '{self.title}' has {len(row)} cells for {len(self.columns)} columns"
                )
        return self

    @property
    def numeric(self) -> tuple[bool, ...]:
        """True for each column that holds only numbers and gaps."""
        columns = [[row[place] for row in self.rows if row[place] is not None] for place in range(len(self.columns))]
        return tuple(bool(cells) and not any(isinstance(cell, str) for cell in cells) for cells in columns)


class Report(Record):
    """Everything a person needs to judge one version."""

    dataset: str = Field(description="Dataset name, such as 'feature-store/customer-features'.")
    version: int = Field(ge=1, description="Version number N of vN.")
    status: Status = Field(description="'published', or 'rejected' by the quality gate.")
    verdict: Verdict = Field(description="Verdict of the quality gate.")
    created_at: dt.datetime = Field(description="When the report was made, UTC.")
    title: str = Field(description="Heading of the page.")
    rows: Count = Field(description="Rows in the data files.")
    balances: tuple[RowBalance, ...] = Field(default=(), description="Row balances of the sources and the entities.")
    gate: GateResult = Field(description="Every check that was made.")
    self_test: tuple[FaultResult, ...] = Field(
        default=(), description="What the gate made of faults that were injected into a sample of the version."
    )
    profile: dict[str, ColumnProfile] = Field(default_factory=dict, description="Profile of each column.")
    previous_version: int | None = Field(default=None, description="Version that the data is compared with.")
    previous_profile: dict[str, ColumnProfile] = Field(default_factory=dict, description="Profile of that version.")
    inputs: tuple[InputRecord, ...] = Field(default=(), description="What the version was made from.")
    lineage: Lineage | None = Field(default=None, description="All that it was made from, back to the sources.")
    run: RunRecord = Field(description="The run that made it.")
    config: dict[str, Any] = Field(default_factory=dict, description="The full configuration of the run.")
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds that each stage took.")
    definition: dict[str, Any] = Field(default_factory=dict, description="The declaration that was computed.")
    identifiers: tuple[str, ...] = Field(default=(), description="Columns that name or stamp a row: never drawn.")
    notes: tuple[str, ...] = Field(default=(), description="Sentences worth a reader's attention.")
    pictures: tuple[Picture, ...] = Field(default=(), description="Pictures, the most telling first.")
    tables: tuple[DataTable, ...] = Field(default=(), description="Tables, the most telling first.")

    @classmethod
    def of(cls, manifest: Manifest, previous: Manifest | None, title: str | None = None, **more: Any) -> Report:
        """Make the report of a version from its manifest.

        Args:
            manifest: Manifest of the version.
            previous: Manifest of the version it is compared with.
            title: Heading of the page; the last part of the dataset's name and the version, if none is given.
            more: Further fields, and overrides of the manifest's.
        """
        fields: dict[str, Any] = {
            "dataset": manifest.dataset,
            "version": manifest.version,
            "status": manifest.status,
            "verdict": manifest.gate.verdict,
            "created_at": manifest.created_at,
            "title": title or f"{manifest.dataset.rpartition('/')[2]} v{manifest.version}",
            "rows": manifest.rows,
            "balances": manifest.balances,
            "gate": manifest.gate,
            "self_test": manifest.self_test,
            "profile": manifest.profile,
            "previous_version": previous.version if previous else None,
            "previous_profile": previous.profile if previous else {},
            "inputs": manifest.inputs,
            "run": manifest.run,
            "config": manifest.config,
            "definition": manifest.definition,
        }
        return cls(**{**fields, **more})

    @property
    def checks(self) -> list[CheckResult]:
        """Checks: failures, then warnings, then the rest; in the order they were made within each."""
        return sorted(self.gate.checks, key=lambda check: _ORDER[check.verdict])

    @property
    def reason(self) -> str:
        """Reason of the verdict in one line."""
        worst = [check for check in self.checks if check.verdict == self.verdict]
        total = plural(len(self.gate.checks), "check")
        if self.verdict == "pass" or not worst:
            return f"{total} passed." if self.verdict == "pass" else f"The verdict of {total} is {self.verdict}."
        more = f" And {len(worst) - 1} more." if len(worst) > 1 else ""
        return f"{len(worst)} of {total} {'failed' if self.verdict == 'fail' else 'warned'}: {worst[0].message}{more}"

    @property
    def drawable(self) -> dict[str, ColumnProfile]:
        """Profiles of the columns that have a meaningful distribution."""
        return {name: column for name, column in self.profile.items() if name not in self.identifiers}

    def to_json(self) -> bytes:
        """Return canonical JSON (sorted keys, UTF-8); `Report.model_validate_json` reads it back."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, indent=1)
        return text.encode() + b"\n"

    def to_markdown(self, html_uri: str | None = None, max_bytes: int = MARKDOWN_BYTES) -> str:
        """Return a summary for a Prefect artifact: verdict, reason, failed checks, warnings, pictures, rows, lineage.

        Content beyond `max_bytes` of UTF-8 is left out with a note: first pictures, from the last one on, then the end
        of the text.

        Args:
            html_uri: location of the full report, for a link.
            max_bytes: most bytes of the result, at least 1,000.
        """
        head = [
            f"# {_SIGNS[self.verdict]} · {_text(self.title)}",
            f"**{self.status.capitalize()}** `{self.dataset.replace('`', '')}` v{self.version}, "
            f"{plural(self.rows, 'row')}, {self.created_at:%Y-%m-%d %H:%M} UTC. {_text(self.reason)}",
            *([f"[Full report]({_target(html_uri)})"] if html_uri else []),
            *(f"> {_text(note)}" for note in self.notes),
        ]
        serious = [check for check in self.checks if check.verdict != "pass"]
        head += _markdown_checks(serious, passed=len(self.checks) - len(serious))
        head += self_test_markdown(self.gate, self.self_test, _text)
        tail = [*self._markdown_balances(), *_markdown_tables(self.tables), *self._markdown_lineage()]
        drawn = self._markdown_pictures()
        parts = [[instead] for _, instead in drawn]
        text = _page(head, parts, tail)
        for place, (whole, _) in enumerate(drawn):
            with_it = _page(head, [*parts[:place], whole, *parts[place + 1 :]], tail)
            if len(with_it.encode()) <= max_bytes:
                parts[place], text = whole, with_it
        if len(text.encode()) <= max_bytes:
            return text
        ending = "\n\n*The rest is left out here: see the full report.*\n"
        kept = text.encode()[: max_bytes - len(ending.encode())].decode(errors="ignore")
        return kept[: kept.rfind("\n")] + ending

    def checks_table(self) -> list[dict[str, str | float | None]]:
        """Return the checks as rows for a Prefect table artifact: text and finite numbers only, None for the rest."""
        return [
            {
                "verdict": check.verdict,
                "check": check.name,
                "column": check.column,
                "figure": _finite(check.figure),
                "bound": check.bound,
                "message": check.message,
            }
            for check in self.checks
        ]

    def _markdown_balances(self) -> list[str]:
        if not self.balances:
            return []
        lines = ["| source | in | out | rejected | filtered | duplicates |", "|---|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {_text(b.name)} | {b.rows_in:,} | {b.rows_out:,} | {_reasons(b.rejected)} | {_reasons(b.filtered)} "
            f"| {b.deduplicated:,} |"
            for b in self.balances
        ]
        return ["## Rows", "\n".join(lines)]

    def _markdown_lineage(self) -> list[str]:
        if not self.inputs:
            return []
        lines = []
        for one in self.inputs:
            version = f" v{one.version}" if one.version is not None else ""
            rows = f", {plural(one.rows, 'row')}" if one.rows is not None else ""
            files = f", {plural(len(one.files), 'file')}" if one.files else ""
            lines.append(f"- **{_text(one.name)}**{version}: {_text(one.uri)}{rows}{files}")
        run = _text(self.run.flow_run_name or self.run.flow_run_id)
        spent = f", {duration(sum(self.timings.values()))}" if self.timings else ""
        parts = ["## Made from", "\n".join(lines), f"By run {run}, attempt {self.run.attempt}{spent}."]
        if self.lineage is not None:
            tree = "\n".join(shortened(line, 400) for line in lineage_graph.text(self.lineage).splitlines())
            parts += ["## Lineage", "```text\n" + tree.replace("`", "'") + "\n```"]
        return parts

    def _markdown_pictures(self) -> list[tuple[list[str], str]]:
        """Return the Markdown of each picture, and a note if there is no room for it; the first have priority."""
        from tasks.report.plots import distributions, histogram_grid

        shown = []
        for picture in self.pictures:
            title = _text(picture.title)
            whole = [
                f"## {title}",
                f"![{title}]({picture.uri})",
                *([_text(picture.caption)] if picture.caption else []),
            ]
            shown.append((whole, _left_out(f"picture “{title}” is")))
        drawn = distributions(self.drawable, self.previous_profile, self.gate.checks)
        if drawn:
            encoded = base64.b64encode(histogram_grid(drawn)).decode()
            whole = ["## Distributions", f"![Distributions of the columns](data:image/png;base64,{encoded})"]
            shown.append((whole, _left_out("picture “Distributions” is" if self.pictures else "pictures are")))
        return shown


def _left_out(what: str) -> str:
    return f"*The {what} left out, being too large here: see the full report.*"


def _page(head: list[str], parts: list[list[str]], tail: list[str]) -> str:
    return "\n\n".join([*head, *(line for part in parts for line in part), *tail]) + "\n"


def _markdown_tables(tables: tuple[DataTable, ...]) -> list[str]:
    """Return each table with its heading, and the first of its rows."""
    parts = []
    for table in tables:
        shown = table.rows[:MARKDOWN_ROWS]
        lines = [
            "".join(f"| {_text(name)} " for name in table.columns) + "|",
            "".join("|---:" if numeric else "|---" for numeric in table.numeric) + "|",
            *("".join(f"| {_text(number(cell))} " for cell in row) + "|" for row in shown),
        ]
        more = f"and {plural(len(table.rows) - len(shown), 'more row')}" if len(table.rows) > len(shown) else ""
        parts += [f"## {_text(table.title)}", "\n".join(lines), *(_text(word) for word in (more, table.note) if word)]
    return parts


def _markdown_checks(serious: list[CheckResult], passed: int) -> list[str]:
    """Return the checks that failed or warned, and the number that passed: those are in the table of checks."""
    lines = ["| verdict | check | column | figure | bound | |", "|---|---|---|---:|---:|---|"]
    lines += [
        f"| {_SIGNS[c.verdict]} | {_text(c.name)} | {_text(c.column or '')} | {_text(number(c.figure))} "
        f"| {_text(c.bound)} | {_text(c.message)} |"
        for c in serious
    ]
    return ["## Checks", *(["\n".join(lines)] if serious else []), f"{plural(passed, 'check')} passed."]


def _reasons(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    named = [f"{_text(reason)} {count:,}" for reason, count in counts.items() if count]
    return f"{total:,} ({', '.join(named)})" if named else f"{total:,}"


def _text(text: str) -> str:
    """Escape text for a Markdown table: no markup, no line break, and limited length."""
    escaped = shortened(" ".join(text.split()), 400).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|#!":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped.replace("](", "]\\(")  # no link, however a reader treats the escaped bracket


def _target(uri: str) -> str:
    return uri.replace(" ", "%20").replace("(", "%28").replace(")", "%29").replace("<", "%3C").replace(">", "%3E")


def _finite(figure: float | str | None) -> float | str | None:
    if isinstance(figure, float):
        return float(f"{figure:.6g}") if math.isfinite(figure) else None
    return figure


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


def to_html(report: Report) -> bytes:
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
        picture=lineage_graph.place(report.lineage) if report.lineage is not None else None,
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
