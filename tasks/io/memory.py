"""Memory and garbage: allocators keep what a process has freed, and collecting garbage takes time while it imports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator


def collect_seldom() -> None:
    """Let Python look for garbage after 10,000 new objects, not 700: imports, whose objects stay, take a tenth less."""
    gc.set_threshold(10_000)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Return freed memory to the system at the end of a step, a block or a decorated function; takes milliseconds."""
    import pyarrow as pa

    try:
        yield
    finally:
        pa.default_memory_pool().release_unused()
        with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
