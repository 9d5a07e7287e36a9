"""What a gate notices, and gates that are made blind, for the tests of what tells of blindness."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest

from tasks.quality import rules
from tasks.quality.faults import Trial
from tasks.quality.rules import SEVERITY
from tasks.store.manifest import CheckResult, FaultResult, GateResult


def of(result: GateResult, name: str, column: str | None = None) -> CheckResult:
    """The check of a name, on a column if there are several."""
    (check,) = (c for c in result.checks if c.name == name and (column is None or c.column == column))
    return check


def passes_every_check(result: GateResult, names: str) -> None:
    """Assert that a gate makes just these checks (names, separated by commas), and that all of them pass."""
    assert [check for check in result.checks if check.verdict != "pass"] == []
    assert result.verdict == "pass"
    assert {check.name for check in result.checks} == set(names.split(", "))


def one_check(cases: Sequence[tuple[str, Callable[[], GateResult], str, str | None, str]]) -> Callable[..., None]:
    """A test of a gate on each case: why, the judgement, the check, its column, and its verdict."""

    @pytest.mark.parametrize(("why", "judged", "name", "column", "verdict"), cases, ids=[case[0] for case in cases])
    def test(why: str, judged: Callable[[], GateResult], name: str, column: str | None, verdict: str) -> None:
        result = judged()
        assert of(result, name, column).verdict == verdict, why
        assert result.verdict == max((check.verdict for check in result.checks), key=SEVERITY.__getitem__)
        assert all(check.message.endswith((".", "?")) for check in result.checks)

    return test


def outcomes(table: str) -> dict[str, tuple[str, str]]:
    """Outcome and check of each fault, from lines of these three, two spaces or more between them."""
    rows = [re.split(r"  +", line.strip()) for line in table.strip().splitlines()]
    return {fault: (outcome, check) for fault, outcome, check in rows}


def made_by(owner: ModuleType, **names: str) -> dict[str, tuple[ModuleType, str]]:
    """The functions of a module that notice some faults ('_' for a space)."""
    return {fault.replace("_", " "): (owner, name) for fault, name in names.items()}


RULES = made_by(
    rules,
    no_rows="check_rows",
    duplicates="check_unique",
    lost_rows="check_balance",
    schema="check_schema",
    not_finite="check_finite",
    range="check_range",
)
"""The rules that notice faults of several kinds of dataset."""


def lax(**prefixes: str) -> dict[str, dict[str, Any]]:
    """The largest thresholds of some faults ('_' for a space), by the prefix of their settings; drift has no end."""
    return {
        fault.replace("_", " "): dict.fromkeys((f"{prefix}_warn", f"{prefix}_fail"), 1e9 if prefix == "drift" else 1)
        for fault, prefix in prefixes.items()
    }


def by_fault(trial: Trial[Any]) -> dict[str, FaultResult]:
    """The results of a self-test, by the faults' names."""
    return {result.fault: result for result in trial.results()}


def noticed(results: Mapping[str, FaultResult]) -> dict[str, tuple[str, str]]:
    """The outcome of each fault, and the first check that noticed it."""
    return {name: (result.outcome, (*result.caught_by, "")[0]) for name, result in results.items()}


def calm(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check, or several, that finds what it finds and never complains."""

    def passing(*args: Any, **more: Any) -> Any:
        found = check(*args, **more)
        one = isinstance(found, CheckResult)
        passed = [result.model_copy(update={"verdict": "pass"}) for result in ([found] if one else found)]
        return passed[0] if one else passed

    return passing
