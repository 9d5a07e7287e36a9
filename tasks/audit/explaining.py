"""The command `explain`: origin of a row, its treatment, and its present holders.

Neither Ray nor Prefect is started, and no version is read as a whole: a row is found by the partition of its version
and the smallest and largest keys in the footers of its files.
"""

from __future__ import annotations

import argparse

from tasks.audit.kinds import kind_of
from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.store import layout
from tasks.store.catalogue import find_dataset
from tasks.store.reading import read_manifest

PICTURES = (".png", ".webp")


def explain(arguments: argparse.Namespace) -> int:
    """Run the command `explain`.

    Args:
        arguments: name, version, key, at, picture, json, root.

    Raises:
        ConfigError: the arguments contradict each other, or the key is invalid.
        InputError: the version neither has nor rejected such a row.
        VersionNotFound: there is no such version.

    """
    root, picture = storage.normalise(arguments.root), arguments.picture
    manifest = read_manifest(root, find_dataset(root, arguments.name), arguments.version)
    kind = kind_of(manifest)
    if picture is not None and kind.option != "picture":
        rows = layout.kind(manifest.dataset).replace("-", " ")
        raise ConfigError(
            f"--picture shows images, and {manifest.dataset} holds {rows} rows; leave it out, or name a dataset of "
            "images"
        )
    if picture is not None and not picture.lower().endswith(PICTURES):
        raise ConfigError(f"--picture {picture}: give a name that ends with {' or '.join(PICTURES)}")
    if arguments.at is not None and kind.option != "at":
        raise ConfigError("--at names a time, and images have none; leave it out")
    found = kind.explain(root, manifest, arguments.key, getattr(arguments, kind.option))
    if arguments.json:
        print(found.to_json())
    else:
        found.show()
    return 0
