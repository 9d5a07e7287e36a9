"""What the source text may do with data: no unpickling, no text that is run, no imports that data names.

Each rule is a function from sources to complaints, so that it can be shown to complain.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_architecture import Sources, kept, sources

# They pickle what their own tasks made a moment ago; nothing that comes from storage gets there.
BETWEEN_OWN_TASKS = {"tasks/engine/jobs.py", "tasks/features/profiles.py"}
# Modules that import or run what a configuration names, and from which function.
BY_CONFIGURATION = {
    "tasks/store/settings.py": {"load_object"},
    "tasks/features/loading.py": {"python_values"},
    "tasks/by_hand.py": {"_run"},
    "tasks/kinds.py": {"kind_of"},  # of a table of our own modules
}
UNPICKLERS = ("pickle", "cPickle", "_pickle", "cloudpickle", "ray.cloudpickle", "dill", "joblib", "shelve", "marshal")
LOADERS = ("importlib.import_module", "runpy.run_path", "runpy.run_module", "__import__", "importlib.reload")


def calls(source: str) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call, its name with aliases resolved, and the function that it stands in, '' at module level."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(one.asname or one.name): one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {(one.asname or one.name): f"{node.module}.{one.name}" for one in node.names}

    def visit(node: ast.AST, function: str) -> Iterator[tuple[ast.Call, str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = function or node.name
        if isinstance(node, ast.Call):
            head, dot, rest = ast.unparse(node.func).partition(".")
            yield node, names.get(head, head) + dot + rest, function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, "")


def keyword(call: ast.Call, name: str) -> object:
    """Value of a literal keyword argument; None without it, or where it is computed."""
    found = next((one.value for one in call.keywords if one.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else None


def unpickled_data(found: Sources) -> list[str]:
    """Unpickling outside of the module that does it between its own tasks."""
    return [
        f"{path}:{call.lineno} {name}: unpickling runs code; keep it to what our own tasks have just made"
        for path, source in found.items()
        for call, name, _ in calls(source)
        if name.rpartition(".")[0] in UNPICKLERS
        and name.rpartition(".")[2] in ("load", "loads", "Unpickler", "open")
        and path not in BETWEEN_OWN_TASKS
    ] + [
        f"{path}:{call.lineno} {name}: reads pickles"
        for path, source in found.items()
        for call, name, _ in calls(source)
        if name.rpartition(".")[2] in ("read_pickle", "load_pickle") or name == "numpy.lib.format.read_array"
    ]


def loose_loads(found: Sources) -> list[str]:
    """Numpy's and torch's loaders without the setting that keeps them from unpickling."""
    complaints = []
    for path, source in found.items():
        for call, name, _ in calls(source):
            if name in ("torch.load", "torch.jit.load") and keyword(call, "weights_only") is not True:
                complaints.append(f"{path}:{call.lineno} {name} without weights_only=True")
            if name in ("numpy.load", "numpy.lib.npyio.load") and keyword(call, "allow_pickle") is not False:
                complaints.append(f"{path}:{call.lineno} {name} without allow_pickle=False")
            if keyword(call, "allow_pickle") is True:
                complaints.append(f"{path}:{call.lineno} {name} with allow_pickle=True")
    return complaints


def unsafe_yaml(found: Sources) -> list[str]:
    """YAML that isn't read by a SafeLoader."""
    complaints = []
    for path, source in found.items():
        safe = {"yaml.SafeLoader", "SafeLoader", "yaml.CSafeLoader"}
        for node in ast.walk(ast.parse(source)):  # one that is built upon a SafeLoader
            if isinstance(node, ast.ClassDef) and node.bases and {*map(ast.unparse, node.bases)} <= safe:
                safe |= {node.name}
        for call, name, _ in calls(source):
            if not name.startswith("yaml.") or "load" not in name:
                continue
            loader = call.args[1:2] or [one.value for one in call.keywords if one.arg == "Loader"]
            plain = name in ("yaml.load", "yaml.load_all") and loader and ast.unparse(loader[0]) in safe
            if name not in ("yaml.safe_load", "yaml.safe_load_all") and not plain:
                complaints.append(f"{path}:{call.lineno} {name} may make any object; use a SafeLoader")
    return complaints


def run_text(found: Sources) -> list[str]:
    """Text that is run as Python, or by a shell."""
    complaints = []
    for path, source in found.items():
        for call, name, _ in calls(source):
            if name in ("eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput"):
                complaints.append(f"{path}:{call.lineno} {name} runs text")
            if keyword(call, "shell") is True:
                complaints.append(f"{path}:{call.lineno} {name} with shell=True")
    return complaints


def stray_imports_by_name(found: Sources) -> list[str]:
    """Imports by a name that is no literal, elsewhere than where a configuration's import path is resolved."""
    return [
        f"{path}:{call.lineno} {name} in {function or 'the module'}: only a configuration may name what is imported"
        for path, source in found.items()
        for call, name, function in calls(source)
        if name in LOADERS
        and not (call.args and isinstance(call.args[0], ast.Constant))
        and function not in BY_CONFIGURATION.get(path, set())
    ]


def unpickling_extensions(found: Sources) -> list[str]:
    """Settings by which Ray Data unpickles what a Parquet file holds, and Arrow types of the project's own."""
    complaints = []
    for path, source in found.items():
        for node in ast.walk(ast.parse(source)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"RAY_DATA_AUTOLOAD_\w+", text):
                complaints.append(f"{path}:{node.lineno} {text} lets data be unpickled")
        complaints += [
            f"{path}:{call.lineno} {name}: files could then choose our code"
            for call, name, _ in calls(source)
            if name.rpartition(".")[2] in ("register_extension_type", "PyExtensionType", "map_elements_pickle")
        ]
    return complaints


RULES = [unpickled_data, loose_loads, unsafe_yaml, run_text, stray_imports_by_name, unpickling_extensions]


test_the_project_keeps_the_rule = kept(RULES)


def test_what_is_allowed_is_still_there() -> None:
    """An exception that nobody needs any more is a hole."""
    found = sources()
    assert {path for path in BETWEEN_OWN_TASKS if unpickled_data({f"x/{path}": found[path]})} == BETWEEN_OWN_TASKS
    for path, functions in BY_CONFIGURATION.items():
        used = {function for _, name, function in calls(found[path]) if name in LOADERS}
        assert used == functions, path


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (unpickled_data, "import pickle\npickle.loads(data)"),
        (unpickled_data, "from pickle import load as read\nread(file)"),
        (unpickled_data, "import ray.cloudpickle as cp\ncp.loads(data)"),
        (unpickled_data, "def f():\n    import joblib\n    return joblib.load(path)"),
        (unpickled_data, "import pickle\npickle.Unpickler(file)"),
        (unpickled_data, "import pandas as pd\npd.read_pickle(path)"),
        (loose_loads, "import torch\ntorch.load(path)"),
        (loose_loads, "import torch\ntorch.load(path, weights_only=False)"),
        (loose_loads, "import torch\ntorch.load(path, weights_only=given)"),
        (loose_loads, "import numpy as np\nnp.load(path)"),
        (loose_loads, "from numpy import load\nload(path)"),
        (loose_loads, "read(path, allow_pickle=True)"),
        (unsafe_yaml, "import yaml\nyaml.load(text, yaml.Loader)"),
        (unsafe_yaml, "import yaml\nyaml.load(text)"),
        (unsafe_yaml, "import yaml\nyaml.full_load(text)"),
        (unsafe_yaml, "import yaml\nyaml.unsafe_load(text)"),
        (unsafe_yaml, "import yaml\nclass Own(yaml.Loader):\n    pass\nyaml.load(text, Own)"),
        (run_text, "eval(text)"),
        (run_text, "import os\nos.system(text)"),
        (run_text, "import subprocess\nsubprocess.run(text, shell=True)"),
        (stray_imports_by_name, "import importlib\nimportlib.import_module(manifest.config['policy'])"),
        (stray_imports_by_name, "from runpy import run_path\nrun_path(given)"),
        (unpickling_extensions, "import os\nos.environ['RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR'] = '1'"),
        (unpickling_extensions, "import pyarrow as pa\npa.register_extension_type(Mine())"),
    ],
)
def test_each_rule_can_fail(rule, source: str) -> None:
    assert len(rule({"tasks/store/x.py": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.dumps(value)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "import yaml\nclass Own(yaml.SafeLoader):\n    pass\nyaml.load(text, Own)",
        "import importlib\nimportlib.import_module('prefect')",
        "model.eval()\nre.compile(pattern)\njson.loads(text)",
    ],
)
def test_no_rule_complains_of_what_is_right(source: str) -> None:
    assert [complaint for rule in RULES for complaint in rule({"tasks/store/x.py": source})] == []
