"""Configuration of the image-augmentation flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from tasks.images.split import SPLITS
from tasks.store.settings import (
    CommonBounds,
    DatasetName,
    FlowSettings,
    ImportPath,
    Location,
    Names,
    Seed,
    SelfTest,
    Settings,
    Share,
    check_shares,
    fails,
    warns,
)

Positive = Annotated[float, Field(gt=0, le=1e6)]
Channel = Annotated[int, Field(ge=0, le=255)]


class Augmentation(Settings):
    """Augmentation of each image; the operations and their defaults are torchvision's."""

    variants: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Augmented variants of each image; 0: in all splits the image once, its shorter side resized to "
        "size and the middle taken, for a loader that augments.",
    )
    size: int = Field(default=224, ge=8, le=4096, description="Height and width of each variant, pixels.")
    scale: tuple[Positive, Positive] = Field(
        default=(0.08, 1.0), description="RandomResizedCrop: bounds of the crop's share of the image's area."
    )
    ratio: tuple[Positive, Positive] = Field(
        default=(3 / 4, 4 / 3), description="RandomResizedCrop: bounds of the crop's width by its height."
    )
    flip: Share = Field(default=0.5, description="RandomHorizontalFlip: probability.")
    degrees: float = Field(
        default=15.0, ge=0, le=180, description="RandomRotation: largest angle to either side, degrees."
    )
    brightness: float = Field(default=0.2, ge=0, le=100, description="ColorJitter: factor is drawn from 1 ± this.")
    contrast: float = Field(default=0.2, ge=0, le=100, description="ColorJitter: factor is drawn from 1 ± this.")
    saturation: float = Field(default=0.2, ge=0, le=100, description="ColorJitter: factor is drawn from 1 ± this.")
    hue: float = Field(default=0.1, ge=0, le=0.5, description="ColorJitter: shift is drawn from ± this, turns.")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="Normalize: mean of each channel, of values in [0, 1]."
    )
    std: tuple[Positive, Positive, Positive] = Field(
        default=(0.229, 0.224, 0.225), description="Normalize: standard deviation of each channel."
    )
    policy: ImportPath | None = Field(
        default=None,
        description="Import path of a torchvision.transforms.v2 transform of your own, 'package.module:name'; "
        "it replaces every operation above, gets a uint8 image and must give 3 × size × size.",
    )

    @model_validator(mode="after")
    def _bounds_ascend(self) -> Augmentation:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = {low}, {high} descends; give the smaller bound first")
        if self.scale[1] > 1:
            raise ValueError(
                f"scale = {self.scale[0]}, {self.scale[1]} asks for crops larger than the image; at most 1"
            )
        if self.policy is not None and not self.variants:
            raise ValueError(f"variants = 0 makes no use of policy = '{self.policy}'; give it to the loader")
        return self


class Centred(Augmentation):
    """One variant without randomness, for images that aren't trained on: resized whole, then cropped to the middle."""


class Original(Centred):
    """One variant without randomness, for a loader that augments: the shorter side resized to size, the middle taken.

    A `Centred` of 224 makes of an `Original` of 256 the same pixels as of the image itself.
    """


class ImageThresholds(CommonBounds):
    """Bounds of the row and dataset checks."""

    falling = ("ready_warn",)

    constant: float = Field(
        default=2.0, ge=0, description="A variant is invalid if its pixels' standard deviation is below this, of 255."
    )
    low_contrast: float = Field(
        default=10.0, ge=0, description="A variant has low contrast if its standard deviation is below this, of 255."
    )
    dark: float = Field(default=16.0, ge=0, le=255, description="A variant is dark if its mean is below this, of 255.")
    bright: float = Field(
        default=239.0, ge=0, le=255, description="A variant is bright if its mean is above this, of 255."
    )
    magnified: float = Field(
        default=4.0, ge=1, description="A variant is magnified if its crop was enlarged by more than this, in area."
    )
    score: Share = Field(default=0.5, description="A variant is training-ready from this quality score on.")
    invalid_warn: Share = warns(0.01, "above this share of invalid variants")
    invalid_fail: Share = fails(0.1, "above this share of invalid variants")
    ready_warn: Share = warns(0.8, "below this share of training-ready variants")
    ready_fail: Share = fails(0.0, "below this share of training-ready variants")
    balance_warn: Share = warns(0.2, "if the rarest class has less than this share of an equal part")


class ImageAugmentationConfig(FlowSettings):
    """Augment labelled images, check and split them, and publish a version."""

    model_config = ConfigDict(title="Image augmentation")

    name: DatasetName = Field(default="images", description="Name of the dataset under training-datasets/.")
    images: Location | None = Field(
        default=None,
        description="Directory or s3:// prefix of the images, with all below it. "
        "If none is given, a small deterministic sample is made.",
    )
    labels: Location | None = Field(
        default=None,
        description="CSV or Parquet file of labels. If none is given, the first directory below `images` is the class.",
    )
    id_column: str = Field(default="image_id", min_length=1, description="Column of the labels that names the image.")
    class_column: str = Field(
        default="class_name", min_length=1, description="Column of the labels that names the class."
    )
    group_column: str | None = Field(
        default=None,
        description="Column of the labels whose images must share a split, such as a patient or a scene.",
    )
    null_values: Names | None = Field(
        default=None,
        description="Text of CSV fields, quoted or not, that means 'no value', as blank fields do: separated by "
        "commas, for every column. By default null, NULL, \\N, #N/A and <NA>, and in the columns of ids and groups "
        "also NA, N/A, NaN, nan and None, which may be classes.",
    )
    classes: Names = Field(
        default=(), description="Classes to take, separated by commas; any other is rejected (all, by default)."
    )
    augmentation: Augmentation = Field(
        default_factory=Augmentation, description="What becomes of each image: torchvision's operations."
    )
    seed: Seed = Field(default=0, description="Seed of every draw and of the split.")
    validation_share: Share = Field(default=0.2, description="Share of the images in the validation split.")
    test_share: Share = Field(default=0.0, description="Share of the images in the test split.")
    evaluation: Literal["center", "augmented"] = Field(
        default="center",
        description="What becomes of validation and test images: one variant without chance, the shorter side resized "
        "to size × 256/224 and the middle taken, or variants as in training.",
    )
    near_duplicates: int | None = Field(
        default=6,
        ge=0,
        le=16,
        description="Images whose perceptual hashes differ in at most this many of 64 bits share a split "
        "(none: only exact copies do).",
    )
    format: Literal["uint8", "float32", "jpeg", "webp"] = Field(
        default="uint8",
        description="How variants are stored: uint8 tensors, normalised float32 tensors, or compressed.",
    )
    quality: int = Field(default=95, ge=1, le=100, description="Quality of jpeg and webp.")
    background: tuple[Channel, Channel, Channel] = Field(
        default=(255, 255, 255), description="Colour behind transparent pixels: red, green, blue."
    )
    max_pixels: int = Field(
        default=89_478_485, ge=1, description="Larger images are rejected as decompression bombs, pixels."
    )
    images_per_file: int = Field(
        default=128, ge=1, le=100_000, description="Images that one task augments and writes together."
    )
    workers: Literal["tasks", "actors"] = Field(
        default="tasks", description="Ray tasks, or a pool of actors that load a policy or a GPU once."
    )
    actors: int | None = Field(default=None, ge=1, description="Size of the pool of actors (one a CPU or GPU).")
    num_gpus: float = Field(
        default=0.0, ge=0, le=8, description="GPUs of each worker; above 0 the transforms run there, on batches."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where transforms run; auto is cuda with num_gpus, else the compiled CPU kernel."
    )
    thresholds: ImageThresholds = Field(
        default_factory=ImageThresholds, description="Bounds of the row and dataset checks."
    )
    self_test: SelfTest = True
    sample_images: int = Field(default=500, ge=10, le=1_000_000, description="Size of the sample, images.")

    @property
    def less_at_once(self) -> str:
        """Advice for making a task take less memory."""
        return f"lower --images-per-file (it is {self.images_per_file})"

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a manifest's values; versions without `evaluation` were made when all splits were augmented."""
        return {"evaluation": "augmented", **values}

    def of_split(self, split: str) -> ImageAugmentationConfig:
        """Return the configuration for the variants of a split's images."""
        augmented = self.augmentation.variants and (split == SPLITS[0] or self.evaluation == "augmented")
        if augmented or isinstance(self.augmentation, Centred):
            return self
        kept = self.augmentation.model_dump(include={"size", "mean", "std"})
        kind = Centred if self.augmentation.variants else Original
        return self.model_copy(update={"augmentation": kind(**kept, variants=1, degrees=0.0)})

    def alike(self, split: str, other: str) -> bool:
        """Return True if images of two splits become the same variants."""
        return self.of_split(split) == self.of_split(other)

    def variants_in(self, split: str) -> int:
        """Return the number of variants of each image of a split."""
        return self.of_split(split).augmentation.variants

    @model_validator(mode="after")
    def _choices_agree(self) -> ImageAugmentationConfig:
        if self.labels is not None and self.images is None:
            raise ValueError("labels are given without images; give images too, or neither to use the sample")
        if self.group_column is not None and self.labels is None:
            raise ValueError(f"group_column = '{self.group_column}' is a column of the labels; give labels too")
        check_shares(self.validation_share, self.test_share)
        if self.device == "cuda" and not self.num_gpus:
            raise ValueError("device = cuda needs num_gpus above 0, so that Ray gives the worker a GPU")
        if self.num_gpus and self.device == "cpu":
            raise ValueError(f"num_gpus = {self.num_gpus:g} with device = cpu would hold GPUs idle; leave one of them")
        return self
