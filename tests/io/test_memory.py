"""Freed memory goes back to the system when a step ends."""

from __future__ import annotations

import platform

import psutil
import pytest

from tasks.io.memory import released


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide for themselves")
def test_what_a_step_has_freed_is_given_back() -> None:
    process = psutil.Process()

    def step() -> bytes:
        many = [bytes(4000) for _ in range(50_000)]
        return many[-1]  # behind all others, so that malloc doesn't give them back by itself

    last = step()
    kept = process.memory_info().rss
    again = released()(step)()
    assert last == again
    assert process.memory_info().rss < kept - 100 * 2**20
