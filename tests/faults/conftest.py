"""The Ray of these tests: faults can be planted in its workers. In each flow's store, one version is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.features.standard import write_sample
from tasks.images.sample import write_sample as write_images
from tests.conftest import another_ray
from tests.faults.small_disk import disk  # noqa: F401 - a fixture
from tests.faults.three_flows import DELIVERY, FEATURES, FLOWS, IMAGES, Planted, Runner, Starter, Store


@pytest.fixture(scope="package")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="package")
def ray_cluster(s3_url: str, planted: Planted) -> Iterator[None]:
    """In place of the session's: its workers have the planted functions."""
    with another_ray(**planted.environment()):
        yield


@pytest.fixture(scope="package")
def stack(prefect_api: str, ray_cluster: None) -> str:
    return prefect_api


@pytest.fixture(scope="package")
def undisturbed(stack: str, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which each flow has published a v1."""
    base = tmp_path_factory.mktemp("undisturbed")
    store = Store(base / "root", base / "sources")
    images = write_images(str(store.sources), 100, 0)
    tables = write_sample(str(store.sources), 6000, 0)
    (store.sources / "images.json").write_text(json.dumps(images))
    (store.sources / "tables.json").write_text(json.dumps(tables))
    for name in (IMAGES, FEATURES, DELIVERY):
        FLOWS[name](store.config(name))
    return store


@pytest.fixture
def run(stack: str, planted: Planted) -> Iterator[Runner]:
    yield Runner(planted)
    planted.arm()


@pytest.fixture
def start(prefect_api: str, tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.stop()
