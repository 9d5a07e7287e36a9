"""Time for these tests: FAULTS_UNTIL, in seconds since 1970, from which on no further one begins."""

from __future__ import annotations

import os
import time

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("FAULTS_UNTIL", "inf")):
        pytest.skip("the time for the tests of faults is over (FAULTS_UNTIL)")
