"""Configuration of the feature-store flow."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal
from zoneinfo import available_timezones

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tasks.features.definitions import JoinHow
from tasks.features.rows import EpochUnit
from tasks.io.notation import Times
from tasks.store.settings import (
    Bounds,
    CommonBounds,
    Drift,
    FlowSettings,
    Location,
    Names,
    SchemaChange,
    Seed,
    SelfTest,
    Share,
    fails,
    warns,
)


def _utc(value: dt.datetime) -> dt.datetime:
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def _known_timezone(value: str) -> str:
    if value != "UTC" and value not in available_timezones():
        raise ValueError(f"'{value}' is no IANA time zone; give one such as UTC or Europe/Berlin")
    return value


Time = Annotated[dt.datetime, AfterValidator(_utc)]


class Thresholds(CommonBounds):
    """Bounds of the row and dataset checks."""

    falling = ("ready_warn",)

    missing: Share = Field(
        default=0.1, description="A row is training-ready below this share of missing feature values."
    )
    outliers: Share = Field(
        default=0.05,
        description="A row is training-ready below this share of numeric features outside the 1.5·IQR fences.",
    )
    score: Share = Field(
        default=0.8, description="A row is training-ready above this quality score, 1 − (missing + outliers)/2."
    )
    ready_warn: Share = warns(0.5, "below this share of training-ready rows")
    ready_fail: Share = fails(0.0, "below this share of training-ready rows")
    null_warn: Share = warns(0.1, "above this share of nulls in a feature")
    null_fail: Share = fails(0.5, "above this share of nulls in a feature")
    orphan_warn: Share = warns(0.05, "above this share of entities without a dimension row")
    orphan_fail: Share = fails(0.9, "above this share of entities without a dimension row")
    drift_fail: Drift = fails(0.25, "above this drift (PSI) against the last published version")
    outlier_warn: Share = warns(0.15, "above this share of outliers among all numeric feature values")
    outlier_fail: Share = fails(0.5, "above this share of outliers among all numeric feature values")
    fresh_warn_days: float | None = Field(
        default=None, gt=0, description="The gate warns if the newest event is older than this many days before as_of."
    )
    fresh_fail_days: float | None = Field(
        default=None, gt=0, description="The gate fails if the newest event is older than this many days before as_of."
    )


class LabelThresholds(Bounds):
    """Bounds of the checks of a model's training set."""

    leak_warn: Share = warns(
        0.95,
        "if a feature alone predicts the target better than this: area under the ROC curve "
        "for two classes, share of the variance that its bins explain for a number",
    )
    leak_fail: Share = fails(0.99, "if a feature alone predicts better than this")
    class_warn: Share = warns(0.02, "if a class has less than this share of rows")
    unmatched_warn: Share = warns(0.2, "above this share of rows for which a group has no features in time")
    unmatched_fail: Share = fails(0.95, "above this share of rows for which a group has no features in time")
    null_warn: Share = warns(0.3, "above this share of nulls in a feature")
    null_fail: Share = fails(1.0, "above this share of nulls in a feature")
    rejected_warn: Share = warns(0.01, "above this share of rejected spine rows")
    rejected_fail: Share = fails(0.2, "above this share of rejected spine rows")
    later_share: Share = Field(
        default=0.2, description="Share of the rows, the latest by event time, that drift is judged on."
    )
    later_drift_warn: Drift = warns(0.25, "above this drift (PSI) of the latest rows against the others")
    drift_warn: Drift = warns(0.25, "above this drift (PSI) against the last published version")


class FeatureStoreConfig(FlowSettings):
    """Compute customer and product features (and your own) from transactions, check them and publish a version."""

    model_config = ConfigDict(title="Feature store")

    transactions: Location | None = Field(
        default=None,
        description="Transactions, Parquet or CSV: a file, directory, glob or s3:// prefix. "
        "If none is given, a small deterministic sample is made.",
    )
    customers: Location | None = Field(
        default=None, description="Customers table, likewise. If none is given, customer features aren't joined."
    )
    products: Location | None = Field(
        default=None, description="Products table, likewise. If none is given, product features aren't joined."
    )
    transaction_columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our column names to yours: customer_id, product_id, timestamp, amount, category, "
        'as JSON such as {"amount": "sales_value"}. Names that aren\'t given are taken as they are; a product_category '
        "is the category.",
    )
    customer_columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our column names to yours: customer_id, age, gender, location, signup_date or any other. "
        "If given, exactly these columns are taken.",
    )
    product_columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our column names to yours: product_id, category, brand, price, launch_date or any other. "
        "If given, exactly these columns are taken.",
    )
    definitions: Location | None = Field(
        default=None, description="Python or YAML file that declares feature groups or sources of your own."
    )
    groups: Names = Field(
        default=(), description="Feature groups to compute, separated by commas (all that are declared, by default)."
    )
    as_of: Times = Field(
        default=(),
        description="Features cover all events up to this time, ISO 8601, of `timezone` if it has no offset (the start "
        "of the run by default; the sample has its own); several, separated by commas, or a range START/END/STEP such "
        "as 2024-01-31/2024-12-31/1mo, for a history: END is its last time, also where no step meets it.",
    )
    incremental: bool = Field(
        default=False,
        description="Keep the judged events beside the versions, so that the next run reads only new, changed or "
        "late files.",
    )
    models: Location | None = Field(
        default=None,
        description="Python or YAML file that declares models, whose training sets are built and published.",
    )
    only_models: Names = Field(
        default=(), description="Models to build, separated by commas (all of the file, by default)."
    )
    compute: bool = Field(
        default=True, description="Compute and publish features; without, models are built from what is published."
    )
    timezone: Annotated[str, AfterValidator(_known_timezone)] = Field(
        default="UTC", description="IANA time zone of source times and of as_of that have no offset."
    )
    epoch_unit: EpochUnit | None = Field(
        default=None, description="What integer times count since 1970-01-01 UTC: s, ms, us or ns."
    )
    null_values: Names | None = Field(
        default=None,
        description="Text of CSV fields, quoted or not, that means 'no value', as blank fields do: separated by "
        "commas, for every column. By default null, NULL, \\N, #N/A and <NA>, and in columns of keys, numbers and "
        "times also NA, N/A, NaN, nan and None, which in columns of text may be Namibia or a name.",
    )
    earliest: Time = Field(
        default=dt.datetime(1970, 1, 1, tzinfo=dt.UTC), description="Events before this time are rejected as errors."
    )
    negative_amounts: Literal["keep", "reject"] = Field(
        default="keep", description="Negative amounts are refunds and count (keep), or are errors (reject)."
    )
    allow_schema_change: SchemaChange = False
    join: JoinHow = Field(
        default="inner",
        description="inner: an entity without a row in its dimension table is rejected; left: it stays, with nulls.",
    )
    label_thresholds: LabelThresholds = Field(
        default_factory=LabelThresholds, description="Bounds of the checks of models' training sets."
    )
    thresholds: Thresholds = Field(default_factory=Thresholds, description="Bounds of the row and dataset checks.")
    self_test: SelfTest = True
    rows_per_bucket: int = Field(
        default=2_000_000,
        ge=1_000,
        description="Events whose entities one task computes, rows: less takes less memory, more less scheduling.",
    )
    sample_transactions: int = Field(
        default=20_000, ge=100, le=100_000_000, description="Size of the sample, transactions."
    )
    seed: Seed = Field(default=0, description="Seed of the sample.")

    @property
    def less_at_once(self) -> str:
        """Advice for making a task take less memory."""
        return f"lower --rows-per-bucket (it is {self.rows_per_bucket:,})"

    @model_validator(mode="after")
    def _something_to_do(self) -> FeatureStoreConfig:
        if self.models is None and (self.only_models or not self.compute):
            what = "only_models is given" if self.only_models else "compute is off"
            raise ValueError(f"{what} without models; give models, the file that declares them")
        return self

    @model_validator(mode="after")
    def _tables_belong_together(self) -> FeatureStoreConfig:
        if self.transactions is None and (self.customers or self.products) and self.definitions is None:
            raise ValueError(
                "customers or products are given without transactions; give transactions too, "
                "or none of the three to use the sample"
            )
        for name in ("transaction", "customer", "product"):
            if getattr(self, f"{name}_columns") and getattr(self, f"{name}s") is None:
                raise ValueError(f"{name}_columns is given without {name}s, so it maps nothing; give {name}s too")
        return self
