"""Gates that are made blind, for the tests of what tells of blindness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.store.manifest import CheckResult


def calm(check: Callable[..., Any]) -> Callable[..., Any]:
    """A check, or several, that finds what it finds and never complains."""

    def passing(*args: Any, **more: Any) -> Any:
        found = check(*args, **more)
        one = isinstance(found, CheckResult)
        passed = [result.model_copy(update={"verdict": "pass"}) for result in ([found] if one else found)]
        return passed[0] if one else passed

    return passing
