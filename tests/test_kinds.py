"""Laws of every kind: its gate notices every fault, and is called blind to one that no check can notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tasks.io.errors import InputError
from tasks.kinds import kind_of
from tasks.quality.faults import unproven
from tasks.store import layout
from tests.datasets import test_self_test as datasets
from tests.delivery import test_self_test as copies
from tests.features import test_self_test as features
from tests.gates import by_fault, calm, noticed
from tests.images import test_self_test as images
from tests.training_sets import test_self_test as training_sets

GATES = (features, training_sets, images, copies, datasets)


def cases(table: str) -> list[object]:
    """The faults of a table that each kind has, with their kinds."""
    return [
        pytest.param(gate, fault, id=f"{gate.__name__.split('.')[1]}-{fault}")
        for gate in GATES
        for fault in getattr(gate, table)
    ]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__.split(".")[1])
def test_every_fault_is_noticed_by_the_check_that_it_is_aimed_at(tmp_path: Path, gate: ModuleType) -> None:
    trial = gate.tried(tmp_path)
    baseline, results = trial.judge(trial.sample), by_fault(trial)
    assert noticed(results) == gate.EXPECTED
    for fault, (injected, message) in gate.SAID.items():
        assert results[fault].injected.startswith(injected)
        assert message in results[fault].message
    odd = {check.name: check.message for check in baseline.checks if check.verdict != "pass"}
    assert odd.keys() == getattr(gate, "ODD", set()), odd
    assert unproven(baseline, tuple(results.values())) == (), "checks that no fault made worse"


@pytest.mark.parametrize(("gate", "fault"), cases("LAXEST"))
def test_a_threshold_too_lax_makes_the_gate_blind(tmp_path: Path, gate: ModuleType, fault: str) -> None:
    result = by_fault(gate.tried(tmp_path, **gate.LAXEST[fault]))[fault]
    assert result.outcome == "blind"
    assert result.message.startswith(f"'{gate.EXPECTED[fault][1]}' still passes: ")


@pytest.mark.parametrize(("gate", "fault"), cases("CHECKS"))
def test_a_check_that_never_complains_makes_the_gate_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: ModuleType, fault: str
) -> None:
    owner, name = gate.CHECKS[fault]
    monkeypatch.setattr(owner, name, calm(getattr(owner, name)))
    assert by_fault(gate.tried(tmp_path))[fault].outcome == "blind"


@pytest.mark.parametrize("place", layout.KINDS)
def test_the_others_are_not_loaded_with_a_kind_that_is_looked_up(place: str) -> None:
    code = (
        f"import sys; from tasks.kinds import kind_of; kind_of('{place}/x')\n"
        "print(*(name for name in sys.modules if name.startswith('tasks.') and name.endswith('.kind')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == {"tasks.audit.kind", layout.KINDS[place][1]}


def test_a_dataset_of_no_kind_is_refused_with_the_places_that_are_known() -> None:
    with pytest.raises(InputError, match="elsewhere/x is of no kind that is known here; name a dataset under feature"):
        kind_of("elsewhere/x")
