"""The commands and examples of the README and its chapters, in order, in one directory."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from tasks.by_hand import run_by_hand
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import ImageAugmentationConfig
from tests.conftest import another_ray
from tests.processes import ran

CONFIGS: dict[str, type[BaseModel]] = {
    "flows.image_augmentation": ImageAugmentationConfig,
    "flows.feature_store": FeatureStoreConfig,
    "flows.training_delivery": DeliveryConfig,
}
ROOT = Path(__file__).parents[1]
CHAPTERS = [
    ROOT / place / "README.md"
    for place in (
        *(".", "tasks/images", "tasks/loader", "tasks/features", "tasks/serving", "tasks/audit", "tasks/store"),
        "tests/benchmarks",
    )
]
OFTEN = [ROOT / "README.md", ROOT / "tasks" / "loader" / "README.md"]
"""Those whose commands are run by default; the nightly test runs all of them, each as a process."""
README = "\n".join(chapter.read_text() for chapter in CHAPTERS)
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str = README) -> list[tuple[str, str, str]]:
    """Return language, attributes and text of each fenced block."""
    return [(language, attributes.strip(), block) for language, attributes, block in BLOCK.findall(text)]


def commands(chapters: Sequence[Path]) -> list[str]:
    """Shell commands and Python examples, as shell scripts, in the chapters' order."""
    scripts = []
    for language, attributes, text in blocks("\n".join(chapter.read_text() for chapter in chapters)):
        if language == "sh" and attributes == "install":
            # What comes before is the installation, which the environment of this test has behind it.
            scripts += [text.split("&&", 1)[1]] if "flows." in text else []
        elif (language, attributes) == ("sh", "operate"):
            continue  # they need a server, and a worker never ends: tests/test_operations.py runs exactly these
        elif language == "sh":
            scripts.append(text)
        elif attributes.startswith("file="):
            scripts.append(f"cat > {attributes.removeprefix('file=')} <<'END_OF_FILE'\n{text}END_OF_FILE\n")
        elif language == "python":
            scripts.append(f"python3 - <<'END_OF_FILE'\n{text}END_OF_FILE\n")
    return scripts


def in_this_process(script: str) -> None:
    """Do what a script does, on the Prefect API and the Ray that run: starting those takes most of a command's time."""
    first, _, rest = script.partition("\n")
    here = rest.removesuffix("END_OF_FILE\n")
    if match := re.fullmatch(r"cat > (\S+) <<'END_OF_FILE'", first):
        Path(match[1]).write_text(here)
    elif first == "python3 - <<'END_OF_FILE'":
        exec(compile(here, "an example of the README", "exec"), {"__name__": "__main__"})
    else:
        lines = script.replace("\\\n", " ").replace("&&", "\n").splitlines()
        for line in filter(None, map(str.strip, lines)):
            run_line(line)


def run_line(line: str) -> None:
    """Run a command of one line."""
    match shlex.split(line):
        case ["python3", "-m", module, *argv] if module in CONFIGS:
            entry = f"{module}:{module.rpartition('.')[2]}"
            try:
                config = CONFIGS[module]
                status = run_by_hand(entry, f"{config.__module__}:{config.__name__}", argv)
            except SystemExit as end:  # of --help
                status = int(end.code or 0)
            assert status == 0, line
        case ["python3", "-m", "pip", "install", package]:
            assert importlib.util.find_spec(package.replace("-", "_")), f"{package} isn't installed"
        case ["export", *_]:
            name = line.removeprefix("export ").partition("=")[0]
            environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            told = subprocess.check_output(["bash", "-euc", f"{line}; echo ${name}"], text=True, env=environment)
            os.environ[name] = told.strip()
        case _:
            raise AssertionError(f"unknown command: {line}")


@pytest.mark.slow
def test_commands_and_examples_do_what_they_say(
    prefect_api: str, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deployments").symlink_to(ROOT / "deployments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COMPLETE_JOURNEY", "")  # is set by the README, and undone
    with another_ray(PYTHONPATH=str(tmp_path)):
        monkeypatch.setattr("ray.init", lambda **_: None)  # of the examples: there is one
        for script in commands(OFTEN):
            in_this_process(script)
    assert_first_published(tmp_path, capsys.readouterr().out)


@pytest.mark.nightly
def test_commands_and_examples_work(tmp_path: Path) -> None:
    """As in a shell: each command is a process, with a Prefect API and a Ray of its own."""
    (tmp_path / "deployments").symlink_to(ROOT / "deployments")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    outputs = []
    for script in commands(CHAPTERS):
        done = ran(["bash", "-euo", "pipefail", "-c", script], 900, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        outputs.append(done.stdout)
    assert_first_published(tmp_path, "\n".join(outputs))
    assert_published(tmp_path, "\n".join(outputs))


def assert_first_published(tmp_path: Path, whole: str) -> None:
    for published in ("feature-store/customer-features", "feature-store/product-features", "training-datasets/images"):
        assert (tmp_path / "data" / published / "v1" / "_manifest.json").exists(), published
    for published in ("customer-features", "images"):
        copy = tmp_path / "data" / "training-datasets" / "streaming-ready" / published
        assert (copy / "v1" / "_manifest.json").exists(), published
    assert "508 in, 503 out, 5 rejected" in whole
    assert "20,000 in, 19,856 out, 94 rejected" in whole


def assert_published(tmp_path: Path, whole: str) -> None:
    store = tmp_path / "data" / "feature-store"
    for published in ("product-features/v2", "category-features/v1", "loyalty-features/v1"):
        assert (store / published / "_manifest.json").exists(), published
    for published in ("small", "blurred"):
        assert (tmp_path / "data" / "training-datasets" / published / "v1" / "_manifest.json").exists(), published
    for published in ("churn", "revenue"):
        assert (store / "training-ready" / published / "v1" / "_manifest.json").exists(), published
    assert (store / "product-features" / "v2" / "_withdrawn.json").exists()
    assert "store-features v1: 457 rows" in whole
    assert (store / "metadata" / "feature_versions.csv").exists()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (test_command,) = [
        text for language, kind, text in blocks() if (language, kind) == ("sh", "install") and "[dev]" in text
    ]
    ci = (ROOT / ".ci" / "run").read_text()
    assert test_command.strip() == "python3 -m pip install -e '.[dev]' && python3 -m pytest"
    assert "python3 -m pip install --quiet -e '.[dev]'" in ci
    assert re.search(r"^python3 -m pytest -m 'not nightly' ", ci, re.MULTILINE)
    assert "`python3 -m pytest -m 'not nightly'`" in README


@pytest.mark.parametrize("path", re.findall(r"`((?:tasks|flows|tests|deployments)/[\w/.]+\.\w+)`", README))
def test_files_that_are_named_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("chapter", [*CHAPTERS, ROOT / "deployments" / "README.md"], ids=lambda path: path.parent.name)
def test_links_lead_somewhere(chapter: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", chapter.read_text())
    assert [link for link in links if not (chapter.parent / link).exists()] == []


def test_the_readme_is_read_within_minutes() -> None:
    assert len(CHAPTERS[0].read_bytes()) <= 12_000


def test_options_that_are_named_exist() -> None:
    fields = {name: field for flow in CONFIGS.values() for name, field in flow.model_fields.items()}
    known = {f"--{name.replace('_', '-')}" for name in fields}
    known |= {"--config", "--help", "--debug"}
    known |= {
        "--redis",
        "--ttl-days",
        "--force",
        "--yes",
        "--no-compute",
        "--no-self-test",
        "--label-thresholds",
        "--state",
        "--step",
        "--transform",
    }  # the commands', and flags
    known |= {"--map-groups", "--memory", "--photographs", "--rows"}  # the benchmarks'
    prose = BLOCK.sub("", README).replace("ruff format --check", "")
    assert set(re.findall(r"--[a-z][a-z-]+", prose)) <= known
