"""A flow that is killed while it writes, and the same command again: it goes on with what was finished."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.core import layout, storage, versions
from tasks.core.manifest import Manifest
from tasks.images.sample import write_sample
from tests.processes import Command, own_home

pytestmark = pytest.mark.slow

IMAGES = "training-datasets/images"


@pytest.fixture
def start(prefect_home: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a flow by its module's name, with options."""
    started: list[Command] = []

    def run(flow: str, *options: str) -> Command:
        home = own_home(prefect_home, tmp_path / f"home-{len(started)}")
        started.append(Command.start(f"flows.{flow}", options, home))
        return started[-1]

    yield run
    for command in started:
        command.stop()


def files(root: str | Path, dataset: str, version: int) -> set[str]:
    base = layout.version_uri(str(root), dataset, version)
    return {info.uri.removeprefix(base + "/") for info in storage.list_files(base, include_hidden=True)}


def contents(manifest: Manifest) -> dict[str, str]:
    """Digest of each file, by its name without the attempt."""
    entries = (*manifest.files, *manifest.rejected_files, *manifest.side_files)
    return {re.sub(r"-a\d+\.", ".", entry.path): entry.digest for entry in entries}


def units(version: Path, pattern: str) -> set[int]:
    """Numbers of the units of which there is a file."""
    return {int(path.name.split("-")[1]) for path in version.glob(pattern)}


def test_a_killed_augmentation_goes_on_where_it_was(start: Callable[..., Command], tmp_path: Path) -> None:
    # One source for both roots: the rows name their files, so others would make other bytes.
    source = write_sample(str(tmp_path / "source"), 600, 0)
    options = ["--images-per-file", "16", "--augmentation.size", "64"]
    options += [word for name, uri in source.items() for word in (f"--{name}", uri)]
    undisturbed, root = str(tmp_path / "undisturbed"), str(tmp_path / "root")
    start("image_augmentation", "--root", undisturbed, *options).finish()
    whole = versions.resolve(undisturbed, IMAGES)

    killed = start("image_augmentation", "--root", root, *options)
    version = Path(layout.version_uri(root, IMAGES, 1))
    killed.kill_when(lambda: len(units(version, "_work/unit-*")) >= 4)
    assert killed.end_family() == set(), "the killed flow's Ray or API server goes on"
    finished = units(version, "_work/unit-*")
    begun = units(version, "split=*/part-*") - finished
    assert len(begun) <= (os.cpu_count() or 1), "more units than there are workers are lost"
    assert versions.published_versions(root, IMAGES) == [], "a reader sees the killed run's files"

    told = start("image_augmentation", "--root", root, *options).finish()
    [(taken, planned)] = re.findall(r"(\d+) of (\d+) units were there from an earlier attempt", told)
    assert int(taken) == len(finished) < int(planned), "the kill came too late, or finished work was thrown away"
    assert versions.published_versions(root, IMAGES) == [1], "the dead run's number wasn't taken over"
    manifest = versions.resolve(root, IMAGES)
    assert manifest.run.attempt == 2
    versions.verify(root, manifest)
    kept = [entry.path for entry in (*manifest.files, *manifest.rejected_files) if "-a1." in entry.path]
    assert {int(path.split("/")[1].split("-")[1]) for path in kept} <= finished
    assert kept, "nothing of what was finished is in the version"
    assert contents(manifest) == contents(whole)
    assert manifest.balances == whole.balances
    assert manifest.profile == whole.profile
    listed = {entry.path for entry in (*manifest.files, *manifest.rejected_files, *manifest.side_files)}
    protocol = {layout.MANIFEST, layout.REPORT_HTML, layout.REPORT_JSON, layout.CLASS_SUMMARY}
    protocol |= {layout.reservation_name(attempt) for attempt in (1, 2)}
    assert files(root, IMAGES, 1) == listed | protocol, "orphans of the killed run, or files missing"
