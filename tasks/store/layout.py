"""Layout of the store: the only module that spells paths under a root, and names the pipelines' own columns.

    {root}/{dataset}/v{N}/part-00000-a1.parquet     data (a1: first attempt)
    {root}/{dataset}/v{N}/_reservation.json         who holds N
    {root}/{dataset}/v{N}/_manifest.json            the commit
    {root}/{dataset}/v{N}/_withdrawn.json           readers skip it; the data stays
    {root}/{dataset}/v{N}/_rejected/….parquet       rejected rows with a reason
    {root}/{dataset}/v{N}/_originals/….parquet      facts about each input, such as an image
    {root}/{dataset}/v{N}/_work/….parquet           notes of finished work, for a later attempt; deleted by the commit
    {root}/{dataset}/v{N}/_report.html, _report.json
    {root}/{dataset}/_index/versions.json           summary of the manifests; derived from them
    {root}/{dataset}/_index/changing-v{N}           vN is withdrawn or pruned, or about to be

    {root}/training-runs/{name}/{run}/…             checkpoints, records and the report of a training

Names that begin with '_' are skipped by the directory readers of pyarrow, pandas, Spark and Ray.

A user's column with the name of one that the pipelines add would be replaced: it is refused where it is declared, as is
any name that begins with '_', which rows have only within a job (`tasks.io.text`).
"""

from __future__ import annotations

import re

from tasks.io.errors import ConfigError

FEATURE_STORE = "feature-store"
TRAINING_READY = f"{FEATURE_STORE}/training-ready"
TRAINING_DATASETS = "training-datasets"
STREAMING_READY = f"{TRAINING_DATASETS}/streaming-ready"
DATASETS = "datasets"
KINDS = {
    TRAINING_READY: ("training-set", "tasks.training_sets.kind"),
    FEATURE_STORE: ("features", "tasks.features.kind"),
    STREAMING_READY: ("streaming-copy", "tasks.delivery.kind"),
    TRAINING_DATASETS: ("images", "tasks.images.kind"),
    DATASETS: ("dataset", "tasks.datasets.kind"),
}
"""Kinds of datasets by their places: name and module (`tasks.kinds`). A place precedes those that it is in."""
METADATA = f"{FEATURE_STORE}/metadata/feature_versions.csv"

MANIFEST = "_manifest.json"
WITHDRAWN = "_withdrawn.json"
INDEX = "_index"
REPORT_HTML = "_report.html"
REPORT_JSON = "_report.json"
REJECTED = "_rejected"
WORK = "_work"
CLASS_SUMMARY = "_class_summary.csv"

_VERSION = re.compile(r"v([1-9][0-9]*)")
_MARK = re.compile(r"changing-(v[1-9][0-9]*)")
_PART = re.compile(r"(?:^|/)part-([0-9]+)-a[0-9]+\.parquet$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def join(base: str, *parts: str) -> str:
    """Join URI or path parts with single slashes."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def escape_of(path: str) -> str | None:
    """Explain how an external path might lead out of the directory it belongs to; None for a safe one.

    Such a path consists of names: no scheme, no slash in front, behind or twice, no '.' or '..', no backslash, no
    control characters, and nothing that s3fs reads as a version of another object. A name may begin with a dot.
    """
    if not path:
        return "is empty"
    if "://" in path or path.startswith("/"):
        return "is a place of its own"
    if "\\" in path:
        return "has a backslash"
    if _CONTROL.search(path):
        return "has control characters"
    if "?versionId=" in path:
        return "has '?versionId='"
    odd = {"", ".", ".."} & set(path.split("/"))
    return f"has a part {min(odd)!r}" if odd else None


def dataset_uri(root: str, dataset: str) -> str:
    """Return the directory of a dataset.

    Raises:
        ConfigError: the name would lead out of the root.
    """
    fault = escape_of(dataset)
    if fault is not None:
        raise ConfigError(
            f"{dataset!r} can't name a dataset, as it {fault}: give its name below the root, such as "
            f"'{FEATURE_STORE}/customer-features'"
        )
    return join(root, dataset)


def feature_dataset(group: str) -> str:
    """Return the dataset name of a feature group: 'customer-features' → 'feature-store/customer-features'."""
    return join(FEATURE_STORE, group)


def training_ready_dataset(model: str) -> str:
    """Return the dataset name of a model's training set: 'churn' → 'feature-store/training-ready/churn'."""
    return join(TRAINING_READY, model)


def kind(dataset: str) -> str:
    """Return the name of a dataset's kind by its place: one of `KINDS`, else 'other'; nothing is imported."""
    place = kind_place(dataset)
    return "other" if place is None else KINDS[place][0]


def kind_place(dataset: str) -> str | None:
    """Return the key of a dataset's kind in `KINDS`; None for a dataset of no known kind."""
    return next((place for place in KINDS if dataset.startswith(f"{place}/")), None)


def sample(root: str, flow: str, name: str) -> str:
    """Return the directory of a flow's sample input."""
    return join(root, "samples", flow, name)


def version_uri(root: str, dataset: str, version: int) -> str:
    """Return the directory of a version.

    Raises:
        ConfigError: as `dataset_uri`.
    """
    return join(dataset_uri(root, dataset), f"v{version}")


def parse_version(name: str) -> int | None:
    """Return the version number of a directory name 'v12', or None for any other name."""
    match = _VERSION.fullmatch(name)
    return int(match[1]) if match else None


def version_and_path(root: str, dataset: str, uri: str) -> tuple[int | None, str]:
    """Return the version number of a dataset's file, None if it belongs to no version, and its path within the version.

    Raises:
        ConfigError: as `dataset_uri`.
    """
    name, _, path = uri.removeprefix(dataset_uri(root, dataset) + "/").partition("/")
    return parse_version(name), path


def index_uri(root: str, dataset: str) -> str:
    """Return the URI of the index of a dataset's versions.

    Raises:
        ConfigError: as `dataset_uri`.
    """
    return join(dataset_uri(root, dataset), INDEX, "versions.json")


def mark_uri(root: str, dataset: str, version: int) -> str:
    """Return the URI of the mark of a version whose index entry must not be used.

    Raises:
        ConfigError: as `dataset_uri`.
    """
    return join(dataset_uri(root, dataset), INDEX, f"changing-v{version}")


def marked_version(uri: str) -> int | None:
    """Return the version number of a mark; None for any other file."""
    match = _MARK.fullmatch(uri.rpartition("/")[2])
    return parse_version(match[1]) if match else None


def version_number(given: object) -> int:
    """Return the number of a version given as 3, '3' or 'v3'.

    Raises:
        ConfigError: it is no version number.
    """
    digits = str(given).strip().removeprefix("v")
    if isinstance(given, bool) or not digits.isascii() or not digits.isdecimal() or int(digits) < 1:
        raise ConfigError(f"{given!r} is no version; write it as v3 or 3")
    return int(digits)


def reservation_name(attempt: int) -> str:
    """Return the file that marks an attempt: _reservation.json for the first, _reservation-2.json for the second."""
    return "_reservation.json" if attempt == 1 else f"_reservation-{attempt}.json"


def part_name(index: int, attempt: int) -> str:
    """Return the name of a data file; it contains the attempt, to tell apart the files of a crashed attempt."""
    return f"part-{index:05d}-a{attempt}.parquet"


def part_number(path: str) -> int | None:
    """Return the number of a data file, of which the path may be a URI; None for another name."""
    match = _PART.search(path)
    return int(match[1]) if match else None


def rejected_name(source: str, index: int, attempt: int) -> str:
    """Return the name of a file of rejected rows, relative to the version's directory."""
    return f"{REJECTED}/{source}-{index:05d}-a{attempt}.parquet"


def image_dataset(name: str) -> str:
    """Return the dataset name of augmented images: 'images' → 'training-datasets/images'."""
    return join(TRAINING_DATASETS, name)


def ray_dataset(name: str) -> str:
    """Return the dataset name of a published Ray Dataset: 'clicks' → 'datasets/clicks'."""
    return join(DATASETS, name)


def streaming_dataset(name: str) -> str:
    """Return the dataset name of a streaming-ready copy: 'images' → 'training-datasets/streaming-ready/images'."""
    return join(STREAMING_READY, name)


def training_runs(root: str, name: str) -> str:
    """Return the directory of the trainings on a streaming-ready copy, one directory a run."""
    return join(root, "training-runs", name)


def split_directory(split: str) -> str:
    """Return the directory of a split's data files within a version, named as a Hive-style partition."""
    return f"split={split}"


def work_name(kind: str, index: int, attempt: int) -> str:
    """Return the name of a note of finished work, relative to the version's directory."""
    return f"{WORK}/{kind}-{index:05d}-a{attempt}.parquet"


def side_name(name: str, attempt: int) -> str:
    """Return the name of a file with more details of a version, relative to its directory."""
    return f"_{name}/{part_name(0, attempt)}"


AS_OF = "as_of"
CREATED, VERSION = "feature_creation_date", "feature_version"
QUALITY = ("missing_value_ratio", "outlier_ratio", "feature_quality_score", "is_training_ready")
MISSING, OUTLYING, SCORE, READY = QUALITY

FEATURES = (*QUALITY, AS_OF, CREATED, VERSION)
"""Columns of feature rows, beside the entity, its features and its dimension's columns."""

ROW_ID, IMAGE_ID = "row_id", "image_id"
"""Ids of rows, and of images."""

EVENT_TIME, TARGET = "event_timestamp", "target"
TRAINING_SET = (EVENT_TIME, TARGET)
"""Columns of training sets, beside the entities and the 'feature_…' columns."""

IMAGE_SCORE, IMAGE_PASSED = "data_quality_score", "validation_passed"
"""Columns of images: their quality verdict."""

RECORDS = frozenset({*QUALITY, CREATED, VERSION, IMAGE_SCORE, IMAGE_PASSED})
"""Columns about how a row was made; a model must not learn from them."""
