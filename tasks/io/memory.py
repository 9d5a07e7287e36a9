"""Memory that a process has freed: allocators keep it, often several times what was ever needed at once."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import pyarrow as pa


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Return freed memory to the system at the end of a step, a block or a decorated function; takes milliseconds."""
    try:
        yield
    finally:
        pa.default_memory_pool().release_unused()
        with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
