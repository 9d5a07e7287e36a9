"""Finding a streaming-ready version by its place, and checking it against its manifest before a sample is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.io import storage
from tasks.io.errors import ConfigError, CorruptVersion
from tasks.io.tensors import TensorSpec
from tasks.loader.arguments import place
from tasks.loader.mapped import CURE
from tasks.store import layout, versions
from tasks.store.manifest import FileEntry, Manifest

_PLACES = f"…/{layout.STREAMING_READY}/<name>/vN, or without vN for the latest one"
_ODD_NUMBER = re.compile(r"v?-?[0-9.]+")


@dataclass(frozen=True, slots=True)
class Version:
    """A published streaming-ready version.

    Attributes:
        root: Root of the store.
        manifest: Everything known about the version.
    """

    root: str
    manifest: Manifest

    @property
    def uri(self) -> str:
        """Directory of the version."""
        return layout.version_uri(self.root, self.manifest.dataset, self.manifest.version)

    @property
    def definition(self) -> dict[str, Any]:
        """Definition of its samples: kind, sizes, features, label, constants to normalise by."""
        return self.manifest.definition

    def files(self, split: str) -> list[tuple[FileEntry, int]]:
        """Return the files of a split and the number of samples in each, in the manifest's order.

        Raises:
            ConfigError: there is no such split, or it has no samples.
        """
        inside = layout.split_directory(split) + "/"
        counts = self.definition["file_samples"]
        found = [(entry, int(counts[entry.path])) for entry in self.manifest.files if entry.path.startswith(inside)]
        if not sum(count for _, count in found):
            names = [name for name, count in self.definition["samples"].items() if count]
            raise ConfigError(f"{self.uri} has no samples in split {split!r}: use " + " or ".join(map(repr, names)))
        return found


def open_version(uri: str | os.PathLike[str]) -> Version:
    """Find a streaming-ready version by its directory, or the latest one by that of its dataset.

    Raises:
        ConfigError: it isn't a place, or not one of streaming-ready datasets.
        VersionNotFound: there is no such published version.
        CorruptVersion: its manifest can't be read.
    """
    uri = storage.normalise(place("uri", uri, f"name the directory of a version, {_PLACES}"))
    above, _, last = uri.rpartition("/")
    number = layout.parse_version(last)
    directory = uri if number is None else above
    root, found, name = directory.rpartition(f"/{layout.TRAINING_DATASETS}/")
    if not found or not name:
        raise ConfigError(f"{uri!r} is no streaming-ready version: name {_PLACES}")
    if number is None and _ODD_NUMBER.fullmatch(last):
        raise ConfigError(f"{uri!r} has no version {last!r}: versions are v1, v2, …; name {_PLACES}")
    dataset = layout.join(layout.TRAINING_DATASETS, name)
    manifest = versions.resolve(root, dataset, "latest" if number is None else number)
    version = Version(root, manifest)
    if not {"kind", "block_size", "samples", "file_samples", "normalise"} <= manifest.definition.keys():
        raise ConfigError(
            f"{version.uri} isn't streaming-ready; make a streaming-ready copy of it with the training-delivery flow"
        )
    if fault := _contradiction(manifest):
        raise CorruptVersion(f"{version.uri}: its manifest contradicts itself: {fault}: {CURE}")
    return version


def _contradiction(manifest: Manifest) -> str | None:
    """Return a contradiction in a streaming-ready version's definition; None if there is none."""
    said = manifest.definition
    try:
        counts = {path: int(count) for path, count in said["file_samples"].items()}
        size, samples = int(said["block_size"]), {split: int(count) for split, count in said["samples"].items()}
        sample_columns(said)
        constants = [[float(value) for value in said["normalise"][name]] for name in ("mean", "std")]
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        return f"definition ({type(fault).__name__}: {fault})"
    if size < 1 or said["kind"] not in ("table", "images"):
        return f"kind {said['kind']!r} in blocks of {size}"
    if len(constants[0]) != len(constants[1]):
        return f"{len(constants[0])} means and {len(constants[1])} deviations to normalise by"
    if counts.keys() != {entry.path for entry in manifest.files} or min(counts.values()) < 0:
        return "file_samples isn't about the files that it lists"
    for split, count in samples.items():
        inside = layout.split_directory(split) + "/"
        if (found := sum(own for path, own in counts.items() if path.startswith(inside))) != count:
            return f"{count} samples in split {split!r}, and {found} in its files"
    return None


def misfits(version: Version, files: Sequence[tuple[FileEntry, int]]) -> Iterator[tuple[int, CorruptVersion]]:
    """Yield the number and the error of each file that is missing or of the wrong size, found by one listing."""
    base = version.uri
    directories = {layout.join(base, entry.path.rpartition("/")[0]) for entry, _ in files}
    sizes = {info.uri: info.bytes for inside in directories for info in storage.list_files(inside)}
    for file, (entry, _) in enumerate(files):
        uri = layout.join(base, entry.path)
        if sizes.get(uri) == entry.bytes:
            continue
        if uri in sizes:
            problem = f"{uri}: bytes differ from its manifest: expected {entry.bytes}, found {sizes[uri]}"
        else:
            problem = f"{uri} is missing, but its manifest lists it"
        yield file, CorruptVersion(f"{problem}: {CURE}")


def sample_columns(definition: dict[str, Any]) -> dict[str, TensorSpec]:
    """Return the columns of a sample."""
    columns = {}
    if definition["kind"] == "table":
        columns["features"] = TensorSpec((int(definition["feature_count"]),), "float32")
    else:
        image = definition["image"]
        columns["image"] = TensorSpec(tuple(map(int, image["shape"])), str(image["dtype"]))
    if definition["label"] is not None:
        columns["label"] = TensorSpec((), "int64" if definition["label"]["kind"] == "class" else "float32")
    return {**columns, "sample_id": TensorSpec((), "int64")}
