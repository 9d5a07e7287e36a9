"""Image-augmentation flow: images and labels → augmented, validated, split, versioned training images.

Run it by hand with `python -m flows.image_augmentation --help`; deploy it as
`flows.image_augmentation.image_augmentation`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from tasks.by_hand import run_by_hand

    sys.exit(run_by_hand("flows.image_augmentation:image_augmentation", "tasks.images.config:ImageAugmentationConfig"))

from prefect import flow
from prefect.runtime import flow_run

from tasks.image_augmentation import augment, plan_run, prepare_images, validate_images
from tasks.images.config import ImageAugmentationConfig
from tasks.io.errors import VersionConflict
from tasks.publication import PublishedVersion, committed_version, flow_settings, publish_versions, reserve_versions
from tasks.runner import run_record, running
from tasks.store import layout

DEFAULTS = ImageAugmentationConfig()
TRIES = 3
"""Most plans of a run while other runs publish first."""


def _described(config: ImageAugmentationConfig) -> str:
    source = config.images or "the sample"
    return f"augment {source.rstrip('/').rpartition('/')[2]}"


@flow(name="image-augmentation", **flow_settings(_described))
def image_augmentation(config: ImageAugmentationConfig = DEFAULTS) -> list[PublishedVersion]:
    """Augment labelled images, check and split them, and publish them as a new version.

    Args:
        config: Settings for reading, augmenting, checking and publishing.

    Raises:
        VersionConflict: other runs published the dataset first each time.
    """
    with running(config) as settings:
        sourced = prepare_images.submit(settings).result()
        for _ in range(TRIES):
            # The finished files of an earlier attempt are taken over.
            datasets = [layout.image_dataset(settings.name)]
            [reservation] = reserve_versions(settings.root, datasets, str(flow_run.id), keep=True)
            if reservation.committed:  # an earlier attempt of this run has published
                return [committed_version(reservation)]
            plan = plan_run.submit(sourced, reservation).result()
            augmented = augment.submit(plan, sourced).result()
            judged = validate_images.submit(plan, augmented, sourced, run_record()).result()
            if published := publish_versions([judged], settings.root):
                return published
        raise VersionConflict(
            f"{reservation.dataset}: other runs published first each of {TRIES} times, nothing was published; "
            "let one run at a time write it, or publish under another --name"
        )
