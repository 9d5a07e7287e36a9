"""Functions that numba compiles at their first call: importing numba takes longer than many a task that needs none."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class Compiled:
    """Decorator of a module's functions, which may call one another; compiled code is cached on disk.

    Args:
        module: The module's globals; at the first call of any function all are replaced there by numba's.
        intrinsics: Code of instructions that the functions use, by their names in the module.
        options: Further options of `numba.njit`.
    """

    def __init__(
        self, module: dict[str, Any], intrinsics: Mapping[str, Callable[..., Any]] | None = None, **options: Any
    ) -> None:
        self._module, self._intrinsics, self._options = module, intrinsics or {}, options
        self._plain: dict[str, Callable[..., Any]] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Function) -> Function:
        """Register a function; it takes positional arguments."""
        name = function.__name__
        self._plain[name] = function

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return (self._compiled.get(name) or self.functions()[name])(*arguments)

        return cast(Function, call)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Return all functions as numba's, by name, by which they call one another from then on."""
        with self._lock:
            if not self._compiled:
                import numba
                from numba.extending import intrinsic

                self._module.update({name: intrinsic(code) for name, code in self._intrinsics.items()})
                compile_ = numba.njit(nogil=True, cache=True, **self._options)
                found = {name: compile_(function) for name, function in self._plain.items()}
                self._module.update(found)
                self._compiled.update(found)
        return self._compiled
