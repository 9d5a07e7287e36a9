"""The command `explain`: where a row comes from, what was done to it, and who has it now.

Neither Ray nor Prefect is started, and no version is read as a whole: a row is found by the partition of its version
and the least and greatest keys in the footers of its files.
"""

from __future__ import annotations

import argparse

from tasks.audit.explained import Explanation
from tasks.core import layout, storage
from tasks.core.errors import ConfigError
from tasks.core.manifest import Manifest
from tasks.core.reading import read_manifest
from tasks.serving.catalogue import find_dataset

PICTURES = (".png", ".webp")


def explain(arguments: argparse.Namespace) -> int:
    """Answer `explain`.

    Args:
        arguments: name, version, key, at, picture, json, root.

    Raises:
        ConfigError: arguments that don't belong together, or a key that can't be one.
        InputError: the version has no such row, nor has it rejected one.
        VersionNotFound: there is no such version.

    """
    root = storage.normalise(arguments.root)
    manifest = read_manifest(root, find_dataset(root, arguments.name), arguments.version)
    _check(manifest, arguments.at, arguments.picture)
    found = _explained(root, manifest, arguments)
    if arguments.json:
        print(found.to_json())
    else:
        found.show()
    return 0


def _check(manifest: Manifest, at: str | None, picture: str | None) -> None:
    kind = layout.kind(manifest.dataset)
    if picture is not None and kind != "images":
        raise ConfigError(
            f"--picture shows images, and {manifest.dataset} holds {kind.replace('-', ' ')} rows; leave it out, or "
            "name a dataset of images"
        )
    if picture is not None and not picture.lower().endswith(PICTURES):
        raise ConfigError(f"--picture {picture}: give a name that ends with {' or '.join(PICTURES)}")
    if at is not None and kind == "images":
        raise ConfigError("--at names a time, and images have none; leave it out")


def _explained(root: str, manifest: Manifest, arguments: argparse.Namespace) -> Explanation:
    key: str = arguments.key
    match layout.kind(manifest.dataset):
        case "features":
            from tasks.audit.explain_features import explain_features

            return explain_features(root, manifest, key, arguments.at)
        case "training-set":
            from tasks.audit.explain_training_row import explain_training_row

            return explain_training_row(root, manifest, key, arguments.at)
        case "images":
            from tasks.audit.explain_image import explain_image

            return explain_image(root, manifest, key, arguments.picture)
        case "streaming-copy":
            from tasks.audit.explain_sample import explain_sample

            return explain_sample(root, manifest, key, arguments.at)
    raise ConfigError(f"{manifest.dataset} is of no kind that can be explained")
