"""The architecture as rules over the source text: what may import what, and what a module looks like.

Each rule is a function from sources to complaints, so that it can be shown to complain.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import pytest
from pydantic import BaseModel

import tasks
from tasks.store import layout

ROOT = Path(__file__).parent.parent
MAX_LINES = 700  # a module is as long as its subject; beyond this it has two
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}

# Layers from the ground up; a module imports from its own layer and from those below.
IO, STORE, QUALITY, REPORT, ENGINE, DOMAIN, KIND, JOBS, TASKS, FLOWS = range(10)
GROUND = {"io": IO, "store": STORE, "quality": QUALITY, "report": REPORT, "engine": ENGINE}
NAMES = (*(f"tasks/{name}" for name in GROUND), "a domain", "a kind of dataset", "a pipeline", "tasks/*.py", "flows")
RAY_BESIDE_PIPELINES = (
    "tasks/engine/cluster.py",
    "tasks/engine/jobs.py",
    "tasks/engine/watchers.py",
    "tasks/loader/dataset.py",
    "tasks/training/trainer.py",
    "tasks/serving/feature_store.py",
)
# Domains that build on others; the audit is about the datasets of all.
BUILDS_ON = {
    ("training_sets", "features"),
    ("serving", "features"),
    ("serving", "training_sets"),
    ("training", "loader"),
    ("training", "delivery"),
    ("delivery", "loader"),  # the format of its files
    ("loader", "images"),  # augmentation at delivery
    ("datasets", "delivery"),  # the keys of its samples
    ("datasets", "images"),  # the decoder
    ("datasets", "loader"),  # samples for other formats
    *(("audit", domain) for domain in ("images", "features", "training_sets", "delivery", "loader", "datasets")),
}

Sources = Mapping[str, str]


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in ("flows", "tasks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def layer(path: str) -> int:
    """Layer of a module, by its path."""
    match PurePosixPath(path).parts:
        case ("flows", *_):
            return FLOWS
        case ("tasks", _) | ("tasks", "cli", *_):
            return TASKS
        case ("tasks", folder, *_) if folder in GROUND:
            return GROUND[folder]
        case ("tasks", _, "kind.py"):  # joins a domain with the audit of its datasets; loaded by `tasks.kinds`
            return KIND
        case ("tasks", _, *_, "pipeline.py"):
            return JOBS
        case ("tasks", *_):
            return DOMAIN
    raise AssertionError(f"{path} is in no layer")


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Modules and names that a source imports anywhere in it, also within functions, as (line, dotted name)."""
    package = list(PurePosixPath(path).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, name) for name in names)


def module_path(name: str, known: Sources) -> str | None:
    """File of one of our modules, of which `name` may be a member; None for the modules of others."""
    parts = name.split(".")
    if parts[0] not in ("flows", "tasks"):
        return None
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[:length])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in known:
                return path
    return "/".join(parts) + ".py"


def upward_imports(found: Sources) -> list[str]:
    """Imports that go up, or across from one domain to another."""
    complaints = []
    known = {**sources(), **found}
    for path, source in found.items():
        for line, name in imports(path, source):
            target = module_path(name, known)
            if target is None or target.endswith("__init__.py"):
                continue
            own, other = layer(path), layer(target)
            if other > own:
                complaints.append(f"{path}:{line} ({NAMES[own]}) imports {name} ({NAMES[other]}), which is above it")
            domains = tuple(PurePosixPath(module).parts[1] for module in (path, target))
            across = {own, other} <= {DOMAIN, JOBS} and domains[0] != domains[1]
            if across and domains not in BUILDS_ON:
                complaints.append(f"{path}:{line} imports {name}, which is another domain's")
    return complaints


def stray_imports(found: Sources) -> list[str]:
    """Imports of Prefect and Ray in modules that must do without."""
    complaints = []
    for path, source in found.items():
        orchestrates = layer(path) in (TASKS, FLOWS)
        on_ray = orchestrates or layer(path) == JOBS or path in RAY_BESIDE_PIPELINES
        for line, name in imports(path, source):
            package = name.partition(".")[0]
            if package in ("prefect", "prefect_ray") and not orchestrates:
                complaints.append(f"{path}:{line} imports {name}: only tasks/*.py and flows know Prefect")
            if package == "ray" and not on_ray:
                complaints.append(
                    f"{path}:{line} imports {name}: only pipelines, the cluster's modules and training know Ray"
                )
    return complaints


def circles(found: Sources) -> list[str]:
    """Modules that import one another, also within functions."""
    known = {**sources(), **found}
    graph = {
        path: {target for _, name in imports(path, source) if (target := module_path(name, known)) in known} - {path}
        for path, source in known.items()
    }
    graph["tasks/kinds.py"] |= {f"{module.replace('.', '/')}.py" for _, module in layout.KINDS.values()}
    complaints = []
    for path in found:
        came: dict[str, str] = {}
        waiting = [path]
        while waiting and path not in came:
            here = waiting.pop(0)
            for target in sorted(graph[here] - came.keys()):
                came[target] = here
                waiting.append(target)
        if path in came:
            trail = [path, came[path]]
            while trail[-1] != path:
                trail.append(came[trail[-1]])
            complaints.append(" imports ".join(reversed(trail)))
    return complaints


def full_packages(found: Sources) -> list[str]:
    """An `__init__.py` that isn't empty: whoever imports a kernel would run it."""
    return [f"{path} isn't empty" for path, text in found.items() if path.endswith("__init__.py") and text.strip()]


def long_modules(found: Sources) -> list[str]:
    """Modules that want to be split."""
    lengths = {path: len(text.splitlines()) for path, text in found.items()}
    return [f"{path} has {lines} lines: split it" for path, lines in lengths.items() if lines > MAX_LINES]


def vague_names(found: Sources) -> list[str]:
    """Modules whose name doesn't say what is in them."""
    return [
        f"{path}: '{part}' says nothing"
        for path in found
        for part in PurePosixPath(path).with_suffix("").parts
        if VAGUE & set(part.split("_"))
    ]


def undescribed_fields(models: list[type[BaseModel]]) -> list[str]:
    """Fields of models that have no description, or one that is no sentence."""
    return [
        f"{model.__name__}.{name} has no description that ends in a full stop"
        for model in models
        for name, field in model.model_fields.items()
        if not (field.description or "").strip().endswith(".")
    ]


def unbound_config(models: list[type[BaseModel]]) -> list[str]:
    """Configuration models that can be changed, or that take a misspelt field for nothing."""
    return [
        f"{model.__name__} must be frozen and forbid extra fields"
        for model in models
        if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid"
    ]


def config_models() -> list[type[BaseModel]]:
    """Every model that a `config.py` of a domain defines."""
    found = []
    for info in pkgutil.walk_packages(tasks.__path__, "tasks."):
        if info.name.endswith(".config"):
            module = importlib.import_module(info.name)
            found += [
                model
                for _, model in inspect.getmembers(module, inspect.isclass)
                if issubclass(model, BaseModel) and model.__module__ == info.name
            ]
    return found


RULES = [upward_imports, stray_imports, circles, full_packages, long_modules, vague_names]


def kept(rules: Sequence[Callable[[Sources], list[str]]]) -> Callable[..., None]:
    """A test that the project keeps each of some rules."""

    @pytest.mark.parametrize("rule", rules)
    def test(rule: Callable[[Sources], list[str]]) -> None:
        found = sources()
        assert len(found) > 30, "the rules look at too few modules"
        assert rule(found) == []

    return test


test_the_project_keeps_the_rule = kept(RULES)


def test_every_setting_is_described_and_no_configuration_can_be_changed() -> None:
    models = config_models()
    assert {"FeatureStoreConfig", "Thresholds"} <= {model.__name__ for model in models}
    assert undescribed_fields(models) == []
    assert unbound_config(models) == []
    for model in models:  # the form in Prefect's UI, whatever its database makes of the order
        fields = model.model_json_schema()["properties"]
        assert [fields[name]["position"] for name in model.model_fields] == list(range(len(fields))), model.__name__


@pytest.mark.parametrize(
    ("rule", "path", "source", "complaint"),
    [
        (upward_imports, "tasks/engine/x.py", "from tasks.features.rows import judge", r"\(tasks/engine\) imports"),
        (upward_imports, "tasks/io/x.py", "from tasks.store import layout", r"layout \(tasks/store\)"),
        (upward_imports, "tasks/store/x.py", "import tasks.runner", "which is above it"),
        (upward_imports, "tasks/store/x.py", "from tasks import runner", "which is above it"),
        (upward_imports, "tasks/features/x.py", "from .pipeline import compute_groups", "pipeline.*which is above it"),
        (upward_imports, "tasks/features/x.py", "from .. import runner", "imports tasks.runner"),
        (upward_imports, "tasks/audit/x.py", "from tasks.images.kind import KIND", r"\(a kind of dataset\), which is"),
        (upward_imports, "tasks/images/kind.py", "from tasks.images import pipeline", r"\(a pipeline\), which is"),
        (upward_imports, "tasks/features/pipeline.py", "def f():\n    from tasks import artifacts", ":2 "),
        (upward_imports, "tasks/x.py", "from flows.feature_store import feature_store", "which is above it"),
        (upward_imports, "tasks/x.py", "import importlib\nimportlib.import_module('flows.feature_store')", ":2 "),
        (upward_imports, "tasks/images/x.py", "from tasks.features.rows import judge", "another domain's"),
        (upward_imports, "tasks/images/pipeline.py", "import tasks.features.rows", "another domain's"),
        (stray_imports, "tasks/store/x.py", "import prefect.artifacts", "know Prefect"),
        (stray_imports, "tasks/features/pipeline.py", "from prefect import task", "know Prefect"),
        (stray_imports, "tasks/features/x.py", "from prefect_ray import RayTaskRunner", "know Prefect"),
        (stray_imports, "tasks/features/x.py", "import ray", "know Ray"),
        (stray_imports, "tasks/store/x.py", "def f():\n    import ray.data", "know Ray"),
        (stray_imports, "tasks/training/loops.py", "import ray.train", "know Ray"),
        (stray_imports, "tasks/loader/stream.py", "def f():\n    from ray import train", "know Ray"),
        (stray_imports, "tasks/features/trainer.py", "import ray.train", "know Ray"),
        (stray_imports, "tasks/training/trainer.py", "from prefect import task", "know Prefect"),
        (circles, "tasks/io/errors.py", "def f():\n    from tasks.io import storage", "errors.py imports .*errors.py"),
        (circles, "tasks/audit/kind.py", "from tasks.kinds import kind_of", "kind.py imports tasks/kinds.py imports"),
        (full_packages, "tasks/features/__init__.py", "from tasks.features.rows import judge", "isn't empty"),
        (long_modules, "tasks/x.py", "x = 1\n" * (MAX_LINES + 1), "701 lines"),
        (vague_names, "tasks/io/utils.py", "", "'utils'"),
        (vague_names, "tasks/io/data_manager.py", "", "'data_manager'"),
        (vague_names, "tasks/common/x.py", "", "'common'"),
    ],
)
def test_each_rule_can_fail(rule, path: str, source: str, complaint: str) -> None:
    complaints = rule({path: source})
    assert len(complaints) == 1, complaints
    assert re.search(complaint, complaints[0]), complaints[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("flows/x.py", "import ray\nfrom prefect import flow\nfrom tasks.runner import ray_runner"),
        ("tasks/x.py", "import ray\nfrom prefect import task\nfrom tasks.features.pipeline import compute_groups"),
        ("tasks/features/pipeline.py", "import ray.data\nfrom tasks.engine.jobs import shuffle"),
        ("tasks/features/x.py", "from tasks.features.rows import judge\nfrom . import kernel\nfrom tasks import store"),
        ("tasks/engine/cluster.py", "import ray\nimport prefecture"),
        ("tasks/training/trainer.py", "import ray.train\nfrom tasks.training.loops import train"),
        ("tasks/loader/dataset.py", "def f():\n    import ray.data"),
        ("tasks/features/__init__.py", "\n"),
        ("tasks/x.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_no_rule_complains_of_what_is_right(path: str, source: str) -> None:
    assert [complaint for rule in RULES for complaint in rule({path: source})] == []


def test_the_rules_on_models_can_fail() -> None:
    class Loose(BaseModel):
        seed: int = 0

    assert undescribed_fields([Loose]) == ["Loose.seed has no description that ends in a full stop"]
    assert unbound_config([Loose]) == ["Loose must be frozen and forbid extra fields"]


def test_every_module_is_in_a_layer() -> None:
    assert {layer(path) for path in sources()} == set(range(len(NAMES)))
    with pytest.raises(AssertionError, match="in no layer"):
        layer("elsewhere/x.py")
