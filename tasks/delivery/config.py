"""Configuration of the training-delivery flow."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from tasks.store.settings import (
    CommonBounds,
    DatasetName,
    FlowSettings,
    ImportPath,
    Location,
    Names,
    SchemaChange,
    Seed,
    SelfTest,
    Settings,
    Share,
    Version,
    check_shares,
    fails,
    warns,
)


class TrainingConfig(Settings):
    """Training on the streaming-ready version, and its number of workers."""

    enabled: bool = Field(default=True, description="Train after publishing; without it, only the copy is made.")
    function: ImportPath | None = Field(
        default=None,
        description="Import path of a training function of your own, 'package.module:name', of one TrainingRun "
        "(an MLP for tables and a small CNN for images, by default).",
    )
    epochs: int = Field(default=10, ge=1, le=100_000, description="Passes over the train split.")
    batch_size: int = Field(default=32, ge=1, le=1_000_000, description="Samples in a batch of each worker.")
    learning_rate: float = Field(
        default=1e-2,
        gt=0,
        le=100,
        description="Highest learning rate of AdamW, reached after three tenths of the training; then it falls to 0.",
    )
    weight_decay: float = Field(default=0.01, ge=0, le=100, description="Weight decay of AdamW.")
    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        default=(128, 64), description="Sizes of the MLP's hidden layers, units."
    )
    width: int = Field(default=16, ge=1, le=1024, description="Channels of the CNN's first layer.")
    workers: int = Field(default=2, ge=1, le=4096, description="Workers that share each epoch.")
    cpus_per_worker: float = Field(
        default=0.5,
        gt=0,
        le=1024,
        description="CPUs that each worker holds; below 1 leaves some to others.",
    )
    use_gpu: bool = Field(default=False, description="Whether each worker gets a GPU.")
    max_failures: int = Field(
        default=2, ge=0, le=1000, description="Times that the training goes on from its last checkpoint."
    )
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="Also save a checkpoint after so many steps (at the end of each epoch only)."
    )
    remainder: Literal["pad", "drop"] = Field(
        default="pad", description="The last, incomplete step of an epoch: pad it with masked samples, or drop it."
    )
    balance: Literal["class", "weight"] | None = Field(
        default=None,
        description="'class' to draw each class equally often in each epoch, 'weight' to draw each sample as often as "
        "its stored weight says (each sample once, by default).",
    )
    mix: dict[DatasetName, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Copies under training-datasets/streaming-ready/ to mix, each with its share of the samples, such "
        "as images=3,hard=1: this run's own copy and the latest versions of others (its own alone, by default).",
    )
    seed: Seed = Field(default=0, description="Seed of the model's weights and of the epochs' orders.")
    cache_dir: Location | None = Field(
        default=None,
        min_length=1,
        description="Directory that keeps files of S3 on each node (in the user's cache directory, by default).",
    )
    cache_gigabytes: float = Field(default=20.0, gt=0, le=1e6, description="Limit of the cache of a node, 10⁹ bytes.")

    @model_validator(mode="after")
    def _one_choice_of_samples(self) -> TrainingConfig:
        if self.mix and self.balance is not None:
            raise ValueError(f"balance = '{self.balance}' and mix = {self.mix} both choose samples; give one of them")
        return self


class DeliveryThresholds(CommonBounds):
    """Bounds of the quality gate."""

    minimum_samples: int = Field(default=1, ge=1, description="The gate fails below so many samples to train on.")
    missing_warn: Share = warns(0.1, "above this share of nulls in a feature")
    missing_fail: Share = fails(0.5, "above this share of nulls in a feature")
    balance_warn: Share = warns(0.2, "if the rarest class has less than this share of an equal part")


class DeliveryConfig(FlowSettings):
    """Make a streaming-ready copy of a published version, deliver it to PyTorch workers, and train."""

    model_config = ConfigDict(title="Training delivery")

    dataset: str = Field(
        default="feature-store/customer-features",
        min_length=1,
        description="Published dataset to deliver: features, or images such as training-datasets/images. If none is "
        "given and nothing is published, the features of a sample are made first.",
    )
    version: Version = Field(
        default="latest", description="Version of the dataset: a number such as 3 or v3, or 'latest'."
    )
    name: DatasetName | None = Field(
        default=None,
        description="Name of the copy under training-datasets/streaming-ready/ (the dataset's last part, by default).",
    )
    target: str | None = Field(
        default=None,
        description="Column to learn (column 'target' if there is one, or the class of images); a list of numbers of "
        "one size, or several columns of one kind separated by commas, such as height,weight, are several labels.",
    )
    target_kind: Literal["auto", "class", "number"] = Field(
        default="auto",
        description="Whether the target is a class or a number; auto takes text, booleans and whole numbers of at "
        "most 50 different values for classes.",
    )
    weight: str | None = Field(
        default=None,
        description="Column of the samples' weights, numbers of 0 or more, which are stored beside them to draw by; it "
        "is no feature unless it is named as one (no weights, by default).",
    )
    sequence: str | None = Field(
        default=None,
        min_length=1,
        description="Column whose values are the samples, of any length each: text (its bytes in UTF-8), bytes, or "
        "lists of numbers (the features of a row, or its image, by default).",
    )
    entity: str | None = Field(
        default=None,
        description="Column whose equal values share a split (the feature group's entity, or an image's original).",
    )
    features: Names = Field(
        default=(),
        description="Columns or patterns such as 'total_*', separated by commas (columns that begin with feature_ if "
        "there are any, else all but identifiers, times, quality columns and the target).",
    )
    exclude: Names = Field(default=(), description="Columns or patterns that are no features, separated by commas.")
    ready_only: bool = Field(default=True, description="Leave out rows that aren't marked as training-ready.")
    nulls: Literal["mean", "zero", "reject"] = Field(
        default="mean",
        description="What stands for a missing number (null, NaN or infinite): the train split's mean or zero, with "
        "a column <name>_missing beside it; or reject the row.",
    )
    max_categories: int = Field(
        default=32,
        ge=1,
        le=1024,
        description="Most frequent values of a text column that get a 0/1 column each; the rest share one.",
    )
    validation_share: Share = Field(
        default=0.2, description="Share of the entities in the validation split; images keep the split that they have."
    )
    test_share: Share = Field(default=0.0, description="Share of the entities in the test split.")
    seed: Seed = Field(default=0, description="Seed of the split and of the samples' order.")
    batch_size: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Rows of a table, or sequences, that share a checksum; images have one each.",
    )
    file_megabytes: float = Field(
        default=128.0, gt=0, le=2000, description="Size that a file has about, MiB; a task needs some times its memory."
    )
    allow_schema_change: SchemaChange = False
    thresholds: DeliveryThresholds = Field(
        default_factory=DeliveryThresholds, description="Bounds of the quality gate."
    )
    self_test: SelfTest = True
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="What is trained, and how.")

    @model_validator(mode="after")
    def _choices_agree(self) -> DeliveryConfig:
        check_shares(self.validation_share, self.test_share)
        for target in self.targets:
            if target in (*self.features, self.entity):
                raise ValueError(f"target = '{target}' is also a feature or the entity; a model would only copy it")
        if self.sequence is not None:
            if self.features or self.sequence in (*self.targets, self.entity):
                raise ValueError(
                    f"sequence = '{self.sequence}' is all that a sample has, beside its label: leave out features, and "
                    "name another target and entity"
                )
            if self.training.enabled and self.training.function is None:
                raise ValueError(
                    f"sequence = '{self.sequence}' has no default model: name a function of your own with "
                    "--training.function, or make the copy alone with --no-training.enabled"
                )
        if len(set(self.targets)) < len(self.targets) or not all(self.targets):
            raise ValueError(f"target = '{self.target}' names a column twice, or none; name each label once")
        if self.training.balance == "weight" and self.weight is None:
            raise ValueError("training.balance = 'weight' draws by stored weights; name their column with weight")
        if self.training.mix and self.dataset_name not in self.training.mix:
            raise ValueError(
                f"training.mix = {self.training.mix} leaves out '{self.dataset_name}', which this run makes; give it a "
                "share"
            )
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Columns to learn, in the order of their labels; none if the source says which."""
        return () if self.target is None else tuple(name.strip() for name in self.target.split(","))

    @property
    def dataset_name(self) -> str:
        """Name of the copy under training-datasets/streaming-ready/."""
        return self.name or self.dataset.rstrip("/").rpartition("/")[2]

    @property
    def less_at_once(self) -> str:
        """Advice for making a task take less memory."""
        return f"lower --file-megabytes (it is {self.file_megabytes:g})"
