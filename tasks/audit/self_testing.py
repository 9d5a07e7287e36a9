"""The command `self-test NAME [vN]`: judge faults in a sample of a published version by its gate."""

from __future__ import annotations

from argparse import Namespace
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tasks.io import storage
from tasks.io.errors import InputError
from tasks.quality.self_test import ORDER, blind, summary, unproven
from tasks.report.tables import as_json, show
from tasks.store import layout
from tasks.store.catalogue import find_dataset
from tasks.store.manifest import FaultResult, Manifest
from tasks.store.reading import first_live, resolve
from tasks.store.reservation import version_numbers

Config = TypeVar("Config", bound=BaseModel)


def self_test(arguments: Namespace) -> int:
    """Test the gate of one version.

    Returns:
        0 if no fault is blind, 1 otherwise.

    Raises:
        VersionNotFound: there is no such version.
        InputError: it can't be tested: it is of another kind, or its configuration is unknown here.

    """
    root = storage.normalise(arguments.root)
    manifest = resolve(root, find_dataset(root, arguments.name), arguments.version or "latest")
    results = results_of(root, manifest)
    unseen, checks = blind(results), unproven(manifest.gate, results)
    if arguments.json:
        faults = [result.model_dump(mode="json") for result in results]
        answer = {"faults": faults, "blind": unseen, "unproven": checks}
        print(as_json({"dataset": manifest.dataset, "version": manifest.version, **answer}))
        return 1 if unseen else 0
    rows = [
        (one.outcome, one.fault, one.injected, ", ".join(one.caught_by[:2]), one.message)
        for one in sorted(results, key=lambda result: ORDER[result.outcome])
    ]
    show(["OUTCOME", "FAULT", "INJECTED", "NOTICED BY", "IN WORDS"], rows)
    print(f"\n{manifest.dataset} v{manifest.version}: {summary(results)}")
    if checks:
        print(f"checks that no fault made worse: {', '.join(checks)}")
    return 1 if unseen else 0


def results_of(root: str, manifest: Manifest) -> tuple[FaultResult, ...]:
    """Inject faults into a sample of a published version, by its manifest's configuration.

    Raises:
        InputError: the version can't be tested.

    """
    earlier = [number for number in version_numbers(root, manifest.dataset) if number < manifest.version]
    previous = first_live(root, manifest.dataset, earlier[::-1])
    match layout.kind(manifest.dataset):
        case "features":
            from tasks.features import self_test as features
            from tasks.features.config import FeatureStoreConfig

            return features.self_test(root, manifest, _config(FeatureStoreConfig, manifest), previous)
        case "training-set":
            from tasks.features.config import FeatureStoreConfig
            from tasks.training_sets import self_test as serving

            return serving.self_test(root, manifest, _config(FeatureStoreConfig, manifest), previous)
        case "images":
            from tasks.images import self_test as images
            from tasks.images.config import ImageAugmentationConfig

            # A configuration without it is from a time when all splits were augmented.
            of_images = _config(ImageAugmentationConfig, manifest, evaluation="augmented")
            return images.self_test(root, manifest, of_images, previous)
        case "streaming-copy":
            from tasks.delivery import self_test as delivery
            from tasks.delivery.config import DeliveryConfig
            from tasks.delivery.source import find_source

            config = _config(DeliveryConfig, manifest)
            version = manifest.definition["source"]["version"]
            source = find_source(config.model_copy(update={"root": root, "version": version}))
            return delivery.self_test(source, manifest, config, previous)
    raise InputError(f"{manifest.dataset} is no dataset of these flows: it has no gate to test")


def _config(model: type[Config], manifest: Manifest, **older: str) -> Config:
    """Return the configuration of a version; `older` are values of fields that older ones lack."""
    try:
        return model.model_validate({**older, **manifest.config})
    except ValidationError as error:
        name = f"{manifest.dataset} v{manifest.version}"
        raise InputError(
            f"the configuration of {name} can't be used here: {error.errors()[0]['msg']}; it was made by another "
            "version of this project: publish the dataset anew"
        ) from error
