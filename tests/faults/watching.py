"""A reader that looks all the time, as a consumer of the store would: what it saw must be whole, and stay as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow.dataset as pads

from tasks.io import storage
from tasks.store import layout, versions


@dataclass
class Reader:
    """What a reader has seen so far."""

    looks: int = 0
    seen: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    """Files with their digests, by dataset and version."""
    faults: list[str] = field(default_factory=list)

    def look(self, root: str) -> None:
        """Look at the latest version of each dataset and check all that are published."""
        for dataset in versions.list_datasets(root):
            newest = versions.latest(root, dataset)
            for number in versions.published_versions(root, dataset):
                manifest = versions.resolve(root, dataset, number)
                files = {entry.path: entry.digest for entry in manifest.files}
                if self.seen.setdefault((dataset, number), files) != files:
                    self.faults.append(f"{dataset} v{number} has changed")
                if newest is not None and number >= newest.version:
                    versions.verify(root, manifest)
                    self._look_at_directory(root, dataset, number, manifest.rows)
        self.looks += 1

    def _look_at_directory(self, root: str, dataset: str, number: int, rows: int) -> None:
        """A reader that knows nothing of manifests, only the directory."""
        uri = layout.version_uri(root, dataset, number)
        if storage.is_s3(uri):
            return
        found = pads.dataset(uri, format="parquet").count_rows()
        if found != rows:
            self.faults.append(f"the directory of {dataset} v{number} shows {found} rows, its manifest {rows}")


@contextlib.contextmanager
def watching(root: str) -> Iterator[Reader]:
    """A reader that looks all the time while the block runs, and must see nothing but whole versions."""
    reader, over = Reader(), threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            try:
                reader.look(root)
            except Exception as fault:  # noqa: BLE001 - whatever it is, a reader mustn't meet it
                reader.faults.append(repr(fault))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield reader
    finally:
        over.set()
        thread.join()
    reader.look(root)
    assert reader.faults == [], f"after {reader.looks} looks: {reader.faults[:3]}"
