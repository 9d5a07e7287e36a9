"""One Prefect API, one S3 and one Ray for the whole test session, set up as in production but smaller.

The environment is set before Prefect and Ray are imported: both read parts of it at import.
"""

import os

os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",  # one user, one machine, loopback only
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # a missing API address fails instead of starting a server
        "PIPELINE_RETRY_DELAY_SECONDS": "0.05",
    }
)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("PREFECT_API_URL", None)

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler.loadfile import LoadFileScheduling

from tests.s3 import ENVIRONMENT, s3_endpoint
from tests.tables import proven, pytest_addoption, pytest_configure  # noqa: F401 - a fixture and hooks

settings.register_profile("untimed", parent=settings(), deadline=None)  # a busy machine would fail tests by the clock
settings.load_profile("untimed")

_LONGEST = ("tests/faults", "tests/test_readme.py", "tests/test_operations.py")
"""Tests that are dealt out first where they run side by side: begun last, one file would run alone at the end."""

_TOGETHER = {"tests/audit/": "tests/audit", "tests/faults/": "tests/faults"}
"""Directories whose tests share stores that are made once in a process."""

_APART = ("tests/faults/test_s3", "tests/faults/test_races")
"""Files there that have stores of their own."""


class _ByFile(LoadFileScheduling):
    """Tests of a file run in one process, and those of a directory that share stores."""

    def _split_scope(self, nodeid: str) -> str:
        for directory, scope in _TOGETHER.items():
            if nodeid.startswith(directory) and not nodeid.startswith(_APART):
                return scope
        return str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Deal out the tests of a run with several processes."""
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first where tests run side by side."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real API server of this session's own.

    Its database's migration (10 s) is done once per machine and Prefect release, for it and for `own_home`.
    """
    import prefect.settings as names
    from prefect.settings import temporary_settings

    from tasks.by_hand import _server
    from tasks.runner import drain_api_queues
    from tests.processes import migrated_template, own_home

    prefect_home = own_home(tmp_path_factory.mktemp("prefect"))
    database = prefect_home / "prefect.db"
    settings = {
        names.PREFECT_HOME: prefect_home,
        names.PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}",
    }
    with temporary_settings(settings), _server() as (url, ready):
        ready()
        _keep_template(database, migrated_template())
        with temporary_settings(
            {names.PREFECT_API_URL: url}, set_defaults={names.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        ):
            yield url
            drain_api_queues()  # before the server goes: at exit Prefect would try a dead API for a minute


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """URL of an S3 endpoint, to which the environment points from here on."""
    with s3_endpoint() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        yield url
        s3fs.S3FileSystem.clear_instance_cache()


def new_bucket(url: str, name: str = "bucket") -> str:
    """URI of a fresh prefix in a fresh bucket of an S3 endpoint."""
    bucket = f"{name}-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(endpoint_url=url).mkdir(bucket)
    return f"s3://{bucket}/prefix"


LOCAL_AND_S3 = ["local", pytest.param("s3", marks=pytest.mark.nightly)]
"""Parameters of a fixture that asks for a `new_root`."""


def new_root(request: pytest.FixtureRequest) -> str:
    """A fresh root, local or on S3, for a fixture of any scope."""
    if request.param == "local":
        places: pytest.TempPathFactory = request.getfixturevalue("tmp_path_factory")
        return str(places.mktemp("store") / "root")
    return new_bucket(request.getfixturevalue("s3_url"))


@pytest.fixture
def s3_root(s3_url: str) -> str:
    """A fresh prefix in a fresh bucket."""
    return new_bucket(s3_url)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh root, local and on S3 in turn."""
    if request.param == "local":
        path: Path = request.getfixturevalue("tmp_path")
        return str(path / "root")
    uri: str = request.getfixturevalue("s3_root")
    return uri


_RAYS: list[dict[str, str]] = []


@contextmanager
def another_ray(**environment: str) -> Iterator[None]:
    """A local Ray with 2 CPUs in place of the one that runs, which is started again at the end.

    Args:
        environment: Variables of its workers, besides those of this process.

    """
    import ray

    ray.shutdown()
    _start_ray(environment)
    _RAYS.append(environment)
    try:
        yield
    finally:
        _RAYS.pop()
        ray.shutdown()
        if _RAYS:
            _start_ray(_RAYS[-1])


def _start_ray(environment: dict[str, str]) -> None:
    from tasks.engine.cluster import connect

    # Between two tests a worker is idle; ended, the next test would wait for another one and pay for its imports.
    kept = {"RAY_num_workers_soft_limit": "6", "RAY_idle_worker_killing_time_threshold_ms": "120000"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**kept, **environment}.items():
            patch.setenv(name, value)
        assert connect(num_cpus=2, object_store_memory=200 * 2**20), "a test has left its Ray running"


@pytest.fixture(scope="session")
def ray_cluster(s3_url: str) -> Iterator[None]:
    """A local Ray with 2 CPUs, whose workers have the environment that they have in production.

    The S3 endpoint comes first: workers inherit the environment of the process that starts Ray.
    """
    with another_ray():
        yield


@pytest.fixture(scope="session")
def stack(prefect_api: str, ray_cluster: None) -> str:
    """Both, for flows; the value is the API's address."""
    return prefect_api


def _keep_template(database: Path, template: Path) -> None:
    if template.exists():
        return
    partial = template.with_suffix(f".{os.getpid()}")
    with sqlite3.connect(database) as source, sqlite3.connect(partial) as copy:
        source.backup(copy)
    partial.replace(template)  # two sessions at once: each has a whole file, the last one stays
