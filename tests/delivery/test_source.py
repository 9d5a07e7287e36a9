"""What is taken of a version, and what is said where it can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.source import find_source, needs_sample, read_pieces, read_units
from tasks.io.errors import ConfigError, CorruptVersion, VersionNotFound
from tasks.store import layout
from tests.delivery import sources
from tests.delivery.sources import FEATURES, IMAGES, configured, customers, publish, publish_customers, publish_pictures

ALONE = {"training": {"enabled": False}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("shop"))
    publish_customers(root, rows=300, files=3, row_group=40)
    publish_pictures(root)
    return root


def test_a_sample_is_made_only_where_nothing_is_published_and_nothing_is_asked_for(shop: str, tmp_path: Path) -> None:
    empty = str(tmp_path)
    (tmp_path / FEATURES / "v1").mkdir(parents=True)  # what a run that was stopped has left
    assert needs_sample(DeliveryConfig(root=empty, target="total_spent"))
    assert not needs_sample(DeliveryConfig(root=shop))
    for asked in ({"dataset": FEATURES}, {"version": 1}):
        assert not needs_sample(DeliveryConfig(root=empty, **asked))


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        # neither the entity, the target, times, quality columns nor feature_version
        ({}, ("visits", "spent", "member", "city")),
        ({"exclude": "c*,spent"}, ("visits", "member")),
        ({"features": "city,vis*"}, ("visits", "city")),
        (
            {"features": "*", "exclude": "feature_version"},
            ("visits", "spent", "member", "city", "is_training_ready", "data_quality_score"),
        ),
        ({"features": "customer_id,city"}, ("customer_id", "city")),
        ({"target": "city"}, ("visits", "spent", "member")),
    ],
)
def test_features_are_chosen(shop: str, settings: dict[str, Any], features: tuple[str, ...]) -> None:
    if settings.get("target") == "city":
        features = (*features, "target")
    source = find_source(configured(shop, **settings))
    assert set(source.features) == set(features)
    assert (source.kind, source.entity, source.keys) == ("table", "customer_id", ("customer_id", "as_of"))
    assert source.targets == (settings.get("target", "target"),)
    assert source.ready == "is_training_ready"


def test_columns_that_begin_with_feature_are_all_there_is_if_there_are_some(tmp_path: Path) -> None:
    table = pa.table({"k": [1], "feature_a": [1.0], "other": [2.0], "feature_version": ["v1"], "feature_day": ["x"]})
    publish(str(tmp_path), FEATURES, [("", table)], {"entity": "k"})
    assert find_source(configured(str(tmp_path), **ALONE)).features == ("feature_a", "feature_day")


def test_images_are_known_by_their_tensors_and_keep_their_classes_and_splits(shop: str) -> None:
    source = find_source(configured(shop, dataset=IMAGES))
    assert (source.kind, source.targets, source.entity, source.keys, source.features) == (
        "images",
        ("class_id",),
        "original_image_id",
        ("image_id",),
        (),
    )
    assert source.image is not None
    assert source.image.shape == (3, 4, 5)
    assert source.classes == ("cat", "dog", "owl")
    assert [file.split for file in source.files] == [0, 0, 1, 1]
    assert source.record().version == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "vistis"}, "did you mean 'visits'"),
        ({"exclude": "town"}, "has no column 'town'"),
        ({"target": "targt"}, "did you mean 'target'"),
        ({"entity": "customer"}, "did you mean 'customer_id'"),
        ({"features": "since"}, "'since' is date32.*derive one"),
        (
            {"target": "since"},
            "'since' is date32.*only text, booleans, numbers and lists of numbers of one size can",
        ),
        ({"target": "spent,targt"}, "did you mean 'target'"),
        ({"target": "visits,since"}, "target = 'since' is date32"),
        ({"target": "city,spent", "target_kind": "number"}, "target = 'city' is string, no number"),
        ({"target_kind": "number"}, "no number"),
        ({"target": "spent", "target_kind": "class"}, "can be classes"),
        ({"exclude": "*"}, "has no features"),
        ({"weight": "visit"}, "weight: .* has no column 'visit'; did you mean 'visits'"),
        ({"weight": "city"}, "weight = 'city' is string: weights are numbers of 0 or more; derive one"),
        ({"weight": "spent", "target": "spent"}, "weight = 'spent' is also the target; derive a column of weights"),
    ],
)
def test_a_column_that_cannot_be_used_is_named_with_the_cure(shop: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_source(configured(shop, **settings))


def test_a_weight_is_no_feature_unless_it_is_named_as_one(shop: str) -> None:
    source = find_source(configured(shop, weight="visits"))
    assert (source.weight, "visits" in source.columns) == ("visits", True)
    assert set(source.features) == {"spent", "member", "city"}
    assert find_source(configured(shop, weight="visits", features="visits,city")).features == ("visits", "city")
    assert find_source(configured(shop, dataset=IMAGES, weight="class_id", target="image_id")).weight == "class_id"


def test_without_a_target_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    publish(str(tmp_path), FEATURES, [("", customers(10).drop_columns("target"))], {"entity": "customer_id"})
    with pytest.raises(ConfigError, match="--target, such as city; or make the copy alone"):
        find_source(configured(str(tmp_path)))
    assert find_source(configured(str(tmp_path), **ALONE)).targets == ()


def test_a_table_that_does_not_say_its_entity_needs_one(tmp_path: Path) -> None:
    publish(str(tmp_path), FEATURES, [("", customers(10))], {})
    with pytest.raises(ConfigError, match="--entity"):
        find_source(configured(str(tmp_path)))
    assert find_source(configured(str(tmp_path), entity="city")).entity == "city"


def test_images_that_are_stored_otherwise_are_refused_with_the_cure(tmp_path: Path) -> None:
    publish_pictures(str(tmp_path / "a"), dtype="float32")
    with pytest.raises(ConfigError, match=r"float32 tensors.*--format uint8"):
        find_source(configured(str(tmp_path / "a"), dataset=IMAGES))
    table = pa.table({"image_id": ["x"], "original_image_id": ["x"], "image": [b"jpeg"], "class_id": [0]})
    publish(str(tmp_path / "b"), IMAGES, [("split=train", table)], {"image": {"format": "jpeg"}})
    with pytest.raises(
        ConfigError, match=r"images as binary; only uint8 tensors .* and JPEGs .*--format uint8` or jpeg"
    ):
        find_source(configured(str(tmp_path / "b"), dataset=IMAGES))
    publish_pictures(str(tmp_path / "c"), encoding="webp")
    with pytest.raises(ConfigError, match=r"images as webp; only"):
        find_source(configured(str(tmp_path / "c"), dataset=IMAGES))


def test_jpegs_are_known_by_what_they_are_decoded_to(tmp_path: Path) -> None:
    publish_pictures(str(tmp_path), encoding="jpeg")
    source = find_source(configured(str(tmp_path), dataset=IMAGES))
    assert source.image is not None
    assert (source.kind, source.encoding, source.image.shape) == ("images", "jpeg", (3, 4, 5))
    assert 600 < source.image_bytes < 1500


def test_a_version_that_is_not_there_is_named(shop: str) -> None:
    with pytest.raises(VersionNotFound, match="did you mean 'feature-store/customer-features'"):
        find_source(configured(shop, dataset="feature-store/customers-features"))


@pytest.mark.parametrize("unit_bytes", [1, 5_000, 20_000, 10**9])
def test_units_are_all_rows_once_in_the_files_order(shop: str, unit_bytes: int) -> None:
    source = find_source(configured(shop))
    units = read_units(source, unit_bytes)
    assert [unit.index for unit in units] == list(range(len(units)))
    rows = [table for unit in units for _, table in read_pieces(unit, ["customer_id"])]
    assert pa.concat_tables(rows)["customer_id"].to_pylist() == customers(300)["customer_id"].to_pylist()
    if unit_bytes == 1:
        assert len(units) == 9  # three row groups in each file
    sizes = [sum(sum(file.row_groups[g] for g in groups) for file, groups in unit.pieces) for unit in units]
    assert max(sizes) <= max(40, unit_bytes // source.row_bytes)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_that_is_damaged_is_named(tmp_path: Path, damage: str) -> None:
    publish_customers(str(tmp_path), rows=30, files=2)
    path = Path(layout.version_uri(str(tmp_path), FEATURES, 1)) / "part-00001-a1.parquet"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptVersion, match=r"part-00001-a1.parquet"):
        find_source(sources.configured(str(tmp_path)))


def test_a_list_of_numbers_is_several_labels_and_stands_alone(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    table = pa.table({"k": [1, 2], "x": [1.0, 2.0], "y": [3.0, 4.0], "z": [1, 0], "place": lists, "odd": [[1.0], []]})
    publish(str(tmp_path), FEATURES, [("", table)], {"entity": "k"})
    source = find_source(configured(str(tmp_path), target="place"))
    assert (source.targets, source.features) == (("place",), ("x", "y", "z"))
    assert find_source(configured(str(tmp_path), target="y, x")).targets == ("y", "x")
    for target, kind, message in (
        ("place,x", "auto", "column 'place' is fixed_size_list.*, several labels by itself; name it alone"),
        ("place", "class", "target = 'place' is fixed_size_list.*can be classes"),
        ("odd", "auto", "target = 'odd' is list.*lists of numbers of one size can be learned"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_source(configured(str(tmp_path), target=target, target_kind=kind))


def test_a_column_of_sequences_is_found_or_refused(tmp_path: Path) -> None:
    table = pa.table({"k": [1], "text": ["a"], "tokens": [[1]], "x": [1.0], "words": [["a"]], "target": [1]})
    publish(str(tmp_path), FEATURES, [("", table)], {"entity": "k"})
    source = find_source(configured(str(tmp_path), sequence="tokens", **ALONE))
    assert (source.kind, source.sequence, source.features, source.targets) == ("sequences", "tokens", (), ("target",))
    assert set(source.columns) == {"k", "target", "tokens"}
    for name, message in (
        ("x", "sequence = 'x' is double: only text"),
        ("words", "'words' is list"),
        ("txt", "mean 'text'"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_source(configured(str(tmp_path), sequence=name, **ALONE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "x", **ALONE}, "sequence = 's' is all that a sample has, beside its label: leave out features"),
        ({"target": "a,s", **ALONE}, "name another target and entity"),
        ({}, "sequence = 's' has no default model: name a function of your own"),
    ],
)
def test_what_does_not_go_with_sequences_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured("data", sequence="s", **options)
