"""Configuration of a published Ray Dataset; it is recorded in the version's manifest."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from tasks.store.settings import CommonBounds, DatasetName, FlowSettings, SchemaChange, SelfTest, Share, fails, warns

Side = Annotated[int, Field(ge=1, le=65_536)]


class DatasetThresholds(CommonBounds):
    """Bounds of the quality gate."""

    minimum_rows: int = Field(default=1, ge=1, description="The gate fails below so many rows.")
    missing_warn: Share = warns(0.5, "above this share of nulls in a column")
    missing_fail: Share = fails(0.95, "above this share of nulls in a column")
    class_warn: Share = warns(0.01, "if the rarest class has less than this share of the rows")


class DatasetConfig(FlowSettings):
    """Publish a Ray Dataset as a version."""

    model_config = ConfigDict(title="Published dataset")

    name: DatasetName = Field(default="dataset", description="Name of the dataset under datasets/.")
    label: Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="Column to learn, or several; rows without a value in one of them are rejected."
    )
    entity: str | None = Field(
        default=None,
        min_length=1,
        description="Column whose equal values share a split in streaming-ready copies; rows without a value in it are "
        "rejected (each row has an id of its own, by default).",
    )
    image: str | None = Field(
        default=None,
        min_length=1,
        description="Column of images: uint8 tensors, height × width × channels or channels first, or encoded files.",
    )
    image_size: tuple[Side, Side] | None = Field(
        default=None,
        description="Height and width that images are resized to, pixels; needed unless all tensors have one shape.",
    )
    max_pixels: int = Field(
        default=89_478_485, ge=1, description="Larger encoded images are rejected as decompression bombs, pixels."
    )
    allow_schema_change: SchemaChange = False
    thresholds: DatasetThresholds = Field(default_factory=DatasetThresholds, description="Bounds of the quality gate.")
    self_test: SelfTest = True

    @model_validator(mode="after")
    def _columns_differ(self) -> DatasetConfig:
        if self.entity is not None and self.entity in self.labels:
            raise ValueError(f"label = '{self.entity}' is also the entity; a split would hold all rows of a class")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"label = {self.label} names a column twice; name each label once")
        if self.image is not None and self.image in (*self.labels, self.entity):
            raise ValueError(f"image = '{self.image}' is also the label or the entity; name another column")
        if self.image_size is not None and self.image is None:
            raise ValueError(f"image_size = {self.image_size} needs a column of images: name it with image")
        return self

    @property
    def less_at_once(self) -> str:
        """Advice for making a task take less memory."""
        return "cut the dataset into smaller blocks (dataset.repartition)"

    @property
    def required(self) -> tuple[str, ...]:
        """Columns without which a row is rejected."""
        return tuple(name for name in (self.entity, *self.labels, self.image) if name is not None)

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns to learn."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else self.label
