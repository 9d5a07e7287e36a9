"""The digest of the code follows the code, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.store import provenance
from tasks.store.provenance import code_digest, package_versions


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two modules, one of them in a directory below."""
    root = tmp_path / "here" / "features"
    (root / "deep").mkdir(parents=True)
    (root / "kernel.py").write_text("x = 1\n")
    (root / "deep" / "rows.py").write_text("y = 2\n")
    return root


def _move_line(root: Path) -> None:
    (root / "kernel.py").write_text("")
    (root / "deep" / "rows.py").write_text("x = 1\ny = 2\n")


CHANGES: list[tuple[str, Callable[[Path], object], bool]] = [
    # what happens to the package, whether the digest tells
    ("nothing", lambda root: root.stat(), False),
    ("another line", lambda root: (root / "kernel.py").write_text("x = 2\n"), True),
    ("another line below", lambda root: (root / "deep" / "rows.py").write_text("y = 3\n"), True),
    ("a new module", lambda root: (root / "gate.py").write_text(""), True),
    ("a module goes", lambda root: (root / "kernel.py").unlink(), True),
    ("a module is renamed", lambda root: (root / "kernel.py").rename(root / "core.py"), True),
    ("a module moves", lambda root: (root / "kernel.py").rename(root / "deep" / "kernel.py"), True),
    ("a line moves to another module", _move_line, True),
    ("text beside the code", lambda root: (root / "README.md").write_text("hello"), False),
    ("compiled code", lambda root: (root / "kernel.pyc").write_bytes(b"\0"), False),
    ("a module is touched", lambda root: (root / "kernel.py").touch(), False),
]


@pytest.mark.parametrize(("why", "change", "tells"), CHANGES, ids=[case[0] for case in CHANGES])
def test_the_digest_follows_the_code(package: Path, why: str, change: Callable[[Path], object], tells: bool) -> None:
    before = code_digest(package)
    change(package)
    assert (code_digest(package) != before) == tells


def test_it_is_the_same_wherever_the_code_is(package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "features"
    shutil.copytree(package, elsewhere)
    assert code_digest(elsewhere) == code_digest(package)


def test_packages_and_the_extra_text_count(package: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "delivery"
    shutil.copytree(package, renamed)
    digests = [
        code_digest(package),
        code_digest(renamed),
        code_digest(package, renamed),
        code_digest(package, extra="declaration"),
        code_digest(extra="declaration"),
    ]
    assert len(set(digests)) == len(digests)


def test_versions_name_python_the_project_and_the_libraries() -> None:
    versions = package_versions()
    assert set(versions) == {"python", "training-data-pipelines", *provenance.PACKAGES}
    assert all(versions.values())
    assert versions["polars"].split(".")[0].isdigit()


def test_what_isnt_installed_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-anywhere",))
    assert package_versions()["no-such-package-anywhere"] == "unknown"
