"""Provenance of a version: digest of the code, versions of the libraries."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("ray", "prefect", "prefect-ray", "polars", "pyarrow", "numpy", "pandas"),
    *("numba", "pillow", "simplejpeg", "torch", "torchvision"),
)

_TASKS = Path(__file__).parents[1]
_SHARED = ("io", "store", "quality", "engine")
_OWN = {
    "images": ("images",),
    "features": ("features",),
    "training-set": ("features", "training_sets"),
    "streaming-copy": ("delivery", "loader"),
}
"""Packages whose code makes a dataset, by its kind in `layout.kind`, besides the shared ones."""


def job_digest(kind: str, extra: str = "") -> str:
    """Return the digest of the code that makes a kind of dataset, as `code_digest`."""
    return code_digest(*(_TASKS / name for name in (*_SHARED, *_OWN[kind])), extra=extra)


def code_digest(*packages: Path, extra: str = "") -> str:
    """Return the SHA-256 over the Python files of some directories and a text, hexadecimal; independent of location.

    Args:
        packages: Directories of Python files.
        extra: Anything else that affects the result, such as the digest of a declaration.

    """
    digest = hashlib.sha256(extra.encode())
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"\0{package.name}/{file.relative_to(package).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that affect the results."""
    versions = {"python": platform.python_version()}
    for name in ("training-data-pipelines", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree that isn't installed
            versions[name] = "unknown"
    return versions
