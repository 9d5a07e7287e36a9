"""Self-test section of the report: the faults, the checks that noticed them, and the unproven checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.quality.self_test import ITSELF, ORDER, summary, unproven
from tasks.store.manifest import FaultResult, GateResult, Outcome

HEADING = "Self-test"
_SIGNS: dict[Outcome, str] = {"blind": "▲ BLIND", "warned": "✔ warned", "refused": "✔ refused", "not applicable": "–"}
_BADGES: dict[Outcome, str] = {"blind": "warn", "warned": "pass", "refused": "pass", "not applicable": ""}


@dataclass(frozen=True, slots=True)
class Section:
    """Content of the section in plain text, which the template escapes.

    rows: each fault with the badge of its outcome, the blind ones first.
    """

    heading: str
    summary: str
    unproven: str
    rows: tuple[tuple[FaultResult, str], ...]


def section(gate: GateResult, results: Sequence[FaultResult]) -> Section | None:
    """Return the section; None for a version without a self-test."""
    if not results:
        return None
    ordered = sorted(results, key=lambda result: ORDER[result.outcome])
    names = [] if results[0].fault == ITSELF else unproven(gate, results)
    words = f"No fault made these checks worse, so nothing shows that they can fail: {', '.join(names)}."
    return Section(
        heading=HEADING,
        summary=f"Faults were put into a sample of the rows, and the gate judged each again: {summary(results)}.",
        unproven=words if names else "",
        rows=tuple((result, _BADGES[result.outcome]) for result in ordered),
    )


def markdown(gate: GateResult, results: Sequence[FaultResult], text: Callable[[str], str]) -> list[str]:
    """Return the section as paragraphs of Markdown; `text` escapes data."""
    found = section(gate, results)
    if found is None:
        return []
    lines = ["| outcome | fault | what was injected | noticed by | |", "|---|---|---|---|---|"]
    for result, _ in found.rows:
        cells = (result.fault, result.injected, ", ".join(result.caught_by[:3]), result.message)
        lines.append(f"| {_SIGNS[result.outcome]} | {' | '.join(map(text, cells))} |")
    parts = [f"## {HEADING}", text(found.summary), "\n".join(lines)]
    return [*parts, *([text(found.unproven)] if found.unproven else [])]
