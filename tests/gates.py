"""What a gate notices, and gates that are made blind, for the tests of what tells of blindness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tasks.quality.faults import Trial
from tasks.store.manifest import CheckResult, FaultResult


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
