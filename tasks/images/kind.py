"""Augmented images, as a kind of dataset."""

from __future__ import annotations

from tasks.audit.images import ImagesAgain, explain_image
from tasks.audit.kind import Kind
from tasks.images.config import ImageAugmentationConfig
from tasks.images.gate import judge_images, trial

KIND = Kind(
    config=ImageAugmentationConfig,
    code=("tasks.images",),
    judge=judge_images,
    trial=trial,
    again=ImagesAgain,
    explain=explain_image,
    option="picture",
    cures={
        "rejected": "see _rejected/ for each image and its reason, or raise --thresholds.rejected-fail",
        "invalid": "look at the contact sheet, or raise --thresholds.invalid-fail",
        "ready": "look at the contact sheet, or lower --thresholds.ready-fail",
        "drift": "if the change is meant, raise --thresholds.drift-fail",
        "schema": "publish under another --name",
        "rows": "see _rejected/: no image came through",
    },
)
