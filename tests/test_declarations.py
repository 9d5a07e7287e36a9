"""Files that declare feature groups or models: mistakes in them are named, and nothing in YAML is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tasks.features.loading import load_definitions
from tasks.io.errors import DefinitionError
from tasks.training_sets.definition import load_models
from tests.features import test_loading as groups
from tests.features.test_loading import written
from tests.training_sets import test_loading as models

Load = Callable[[str], object]
LOADED: dict[ModuleType, Load] = {groups: load_definitions, models: load_models}
OF_ANY_FILE = [
    # why, file name, text, message
    ("another kind of file", "own.json", "{}", r"own\.json': give a \.py, \.yaml or \.yml file"),
    ("broken YAML", "own.yaml", "models: {", r"own\.yaml' is no valid YAML: "),
    ("no text at all", "own.yaml", "\x00", r"is no valid YAML"),
    ("Python that doesn't run", "own.py", "1 / 0", r"own\.py' can't be run: ZeroDivisionError: division by zero"),
    ("Python that doesn't parse", "own.py", "def", r"own\.py' can't be run: SyntaxError"),
    ("Python without a module", "own.py", "import no_such_module", r"ModuleNotFoundError: .*no_such_module"),
]
MISTAKES = [
    pytest.param(load, name, text, message, id=f"{declared.__name__.split('.')[1]}-{why}")
    for declared, load in LOADED.items()
    for why, name, text, message in (
        *OF_ANY_FILE,
        *((why, "own.yaml", text, message) for why, text, message in declared.MISTAKES),
        *((why, "own.py", text, message) for why, text, message in declared.PYTHON_MISTAKES),
    )
]
ATTACKS = [
    pytest.param(load, text, id=f"{declared.__name__.split('.')[1]}-{why}")
    for declared, load in LOADED.items()
    for why, text in (
        ("a Python object", "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{marker}]]"),
        *declared.ATTACKS,
    )
]


@pytest.mark.parametrize(("load", "name", "text", "message"), MISTAKES)
def test_a_mistake_is_named(tmp_path: Path, load: Load, name: str, text: str, message: str) -> None:
    with pytest.raises(DefinitionError, match=f"(?s){message}") as caught:
        load(written(tmp_path, name, text))
    assert name in "".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


@pytest.mark.parametrize("load", LOADED.values())
@pytest.mark.parametrize("name", ["none.py", "none.yaml"])
def test_no_such_file(tmp_path: Path, load: Load, name: str) -> None:
    with pytest.raises(DefinitionError, match=rf"{name}': no such file"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(("declared", "message"), [(groups, "'g' declares no features"), (models, "'m' reads no feat")])
def test_a_wrong_declaration_in_python_names_the_file(tmp_path: Path, declared: ModuleType, message: str) -> None:
    with pytest.raises(DefinitionError, match=message) as caught:
        LOADED[declared](written(tmp_path, "own.py", declared.WRONG))
    assert caught.value.__notes__ == [f"in {tmp_path / 'own.py'}"]


@pytest.mark.parametrize(("load", "text"), ATTACKS)
def test_nothing_in_yaml_is_executed(tmp_path: Path, load: Load, text: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(DefinitionError):
        load(written(tmp_path, "own.yaml", text.format(marker=marker)))
    assert not marker.exists()
