"""A reader in a process of its own that looks at a store all the time, as a training job might at the worst moment."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from tasks.store import versions
from tests.store.publishing import DATASET, PARTS, ROWS


@dataclass
class Sightings:
    """What a reader has seen."""

    looks: int = 0
    latest: list[int] = field(default_factory=list)
    """Versions that were the latest, each once, in the order seen; 0 stands for none."""
    problems: list[str] = field(default_factory=list)

    def look(self, root: str) -> None:
        """Read the latest version and check it against its manifest and itself."""
        self.looks += 1
        try:
            manifest = versions.latest(root, DATASET)
            number = 0 if manifest is None else manifest.version
            if manifest is not None:
                versions.verify(root, manifest)
                table = versions.read_table(root, DATASET, number)
                assert table["id"].to_pylist() == list(range(PARTS * ROWS)), "other rows than were written"
                assert table["run"].unique().to_pylist() == [manifest.run.flow_run_id], "rows of several runs"
            assert not self.latest or number >= self.latest[-1], f"latest went back from v{self.latest[-1]}"
        except Exception as error:  # noqa: BLE001 - whatever a reader meets is what the test is about
            self.problems.append(repr(error))
        else:
            if not self.latest or number > self.latest[-1]:
                self.latest.append(number)


class Reader:
    """The test's end of the reading process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def watch(self, root: str) -> None:
        """Look at another store from now on; the first look has ended when this returns."""
        self._pipe.send(root)
        assert self._pipe.recv() == root

    def stop(self) -> Sightings:
        """Look once more, and tell what was seen since `watch`."""
        self._pipe.send(None)
        found: Sightings = self._pipe.recv()
        return found


def _look_all_the_time(pipe: Connection, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    root, seen = "", Sightings()
    while True:
        if not root or pipe.poll():
            try:
                told = pipe.recv()
            except EOFError:
                return
            root, before = told or "", root
            if told:
                seen = Sightings()
            seen.look(root or before)
            pipe.send(told or seen)
        else:
            seen.look(root)


@contextmanager
def reader(environment: Mapping[str, str]) -> Iterator[Reader]:
    """Start a reader, which has some variables in its environment."""
    spawn = multiprocessing.get_context("spawn")
    mine, other = spawn.Pipe()
    process = spawn.Process(target=_look_all_the_time, args=(other, dict(environment)), daemon=True)
    process.start()
    other.close()
    try:
        yield Reader(mine)
    finally:
        mine.close()
        process.join(20)
        process.kill()
