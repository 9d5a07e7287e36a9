"""Self-test of a gate: faults are injected into a sample of a version, and its gate judges each again.

A gate that passes proves nothing unless it would fail on bad data. So each kind of dataset has faults
(`tasks.quality.faults`), and this module finds the checks that notice them. Each fault is aimed at a check: if the
verdict of that check doesn't get worse, the gate is blind to the fault on this data, whatever other check noticed it.

    sample ─┬─ as it is ──── the pipeline's own functions ─ gate ─ baseline ─┐
            └─ with a fault ─ the pipeline's own functions ─ gate ────────────┴─ refused, warned or blind
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.io.errors import PipelineError
from tasks.io.numerals import plural
from tasks.store.manifest import CheckResult, FaultResult, GateResult, Outcome, Verdict

SEVERITY: dict[Verdict, int] = {"pass": 0, "warn": 1, "fail": 2}
ORDER: dict[Outcome, int] = {"blind": 0, "warned": 1, "refused": 2, "not applicable": 3}
ITSELF = "self-test"
"""Name of the only fault of a self-test that could not be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Fault that data can have.

    Attributes:
        name: Short name, the same in all kinds: 'nulls', 'shift', 'label copy', 'split overlap', 'range', ….
        injected: Change of the sample, one sentence for a person.
        aims: Checks that must notice it, by name or by 'name of column'; one of them is enough.
        judge: Function that injects it into a copy of the sample and judges that; None if the fault isn't applicable to
            the data.
        why_not: Reason why there is none, one sentence.
        raises: Pipeline errors that may refuse the fault before the gate sees it.

    """

    name: str
    injected: str
    aims: tuple[str, ...]
    judge: Callable[[], GateResult] | None
    why_not: str = ""
    raises: tuple[type[PipelineError], ...] = ()


def inject(baseline: GateResult, faults: Iterable[Fault]) -> tuple[FaultResult, ...]:
    """Judge each fault and compare with the verdicts on the unchanged sample.

    Args:
        baseline: The gate's verdict on the sample without any fault.
        faults: The faults, each made when the one before is judged.

    """
    before = {_title(check): SEVERITY[check.verdict] for check in baseline.checks}
    results = []
    for fault in faults:
        outcome, message, caught = _outcome(before, fault)
        result = FaultResult(
            fault=fault.name, injected=fault.injected, outcome=outcome, caught_by=caught, message=message
        )
        results.append(result)
    return tuple(results)


def failed(error: BaseException) -> FaultResult:
    """Return the result of a self-test that could not be made: it proves nothing, and has a note of that."""
    reason = " ".join(str(error).split()) or "no reason is given"
    return FaultResult(
        fault=ITSELF,
        injected="Nothing: no fault was injected.",
        outcome="blind",
        message=f"The self-test failed: {type(error).__name__}: {reason}",
    )


def blind(results: Sequence[FaultResult]) -> tuple[str, ...]:
    """Name the faults that the gate is blind to."""
    return tuple(result.fault for result in results if result.outcome == "blind")


def unproven(gate: GateResult, results: Sequence[FaultResult]) -> tuple[str, ...]:
    """Name the checks that no fault made worse: nothing shows that they can fail."""
    caught = {title.partition(" of ")[0] for result in results for title in result.caught_by}
    return tuple(dict.fromkeys(check.name for check in gate.checks if check.name not in caught))


def summary(results: Sequence[FaultResult]) -> str:
    """Return one line: '9 of 10 faults refused, 1 warned', and the faults that the gate is blind to."""
    if [result.fault for result in results] == [ITSELF]:
        return results[0].message
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in ORDER}
    tried = len(results) - counts["not applicable"]
    parts = [f"{counts['refused']} of {plural(tried, 'fault')} refused"]
    parts += [f"{counts['warned']} warned"] if counts["warned"] else []
    parts += [f"blind to {counts['blind']} ({', '.join(blind(results))})"] if counts["blind"] else []
    return ", ".join(parts)


def _outcome(before: Mapping[str, int], fault: Fault) -> tuple[Outcome, str, tuple[str, ...]]:
    """Return the outcome of a fault, the reason, and the checks that noticed it."""
    if fault.judge is None:
        return "not applicable", fault.why_not, ()
    try:
        checks = fault.judge().checks
    except fault.raises as refusal:
        return "refused", str(refusal), fault.aims
    worse = [check for check in checks if SEVERITY[check.verdict] > before.get(_title(check), 0)]
    # First the checks that the fault is aimed at, then the worst.
    worse.sort(key=lambda check: (not _is_aimed(check, fault), -SEVERITY[check.verdict]))
    caught = tuple(dict.fromkeys(map(_title, worse)))
    if worse and _is_aimed(worse[0], fault):
        return "refused" if worse[0].verdict == "fail" else "warned", worse[0].message, caught
    aimed = [check for check in checks if _is_aimed(check, fault)]
    bad = next((check for check in aimed if check.verdict != "pass"), None)
    if bad is not None:
        word = "fails" if bad.verdict == "fail" else "warns"
        message = f"'{_title(bad)}' {word} on the sample as it is, so that the fault can't make it worse."
        return "not applicable", message, caught
    message = f"'{_title(aimed[0])}' still passes: {aimed[0].message}" if aimed else "No check looks at it."
    if worse:
        message += f" It was noticed elsewhere, by {', '.join(caught[:3])}."
    return "blind", message, caught


def _is_aimed(check: CheckResult, fault: Fault) -> bool:
    return check.name in fault.aims or _title(check) in fault.aims


def _title(check: CheckResult) -> str:
    """Return a check's name for a person: 'nulls of age'."""
    return check.name if check.column is None else f"{check.name} of {check.column}"
