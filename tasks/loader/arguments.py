"""Checks of the loader's arguments; each error names the argument, its value and the cure."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.io.errors import ConfigError

LIMIT = 1 << 63
"""Upper bound, exclusive, of all whole numbers: they are kept as int64."""


def whole_number(name: str, value: Any, cure: str, *, least: int = 0, below: int = LIMIT) -> int:
    """Return a whole number in [least, below), of Python or numpy; refuse truth values, and floats even if whole.

    Raises:
        ConfigError: it is anything else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool | np.bool_) or not least <= number < below:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return number


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a value is one of some words.

    Raises:
        ConfigError: it isn't.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} = {value!r}: use {' or '.join(map(repr, choices))}")


def truth_values(**values: Any) -> None:
    """Check that values are True or False; an error names the argument.

    Raises:
        ConfigError: one of them isn't.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r}: use True or False")


def place(name: str, value: Any, cure: str) -> str:
    """Return a path or URI as text.

    Raises:
        ConfigError: it is neither text nor a path, or it is empty.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return text


def picked_columns(columns: Any, there: Sequence[str]) -> list[str]:
    """Return the chosen columns, each once in the requested order; all for None.

    Raises:
        ConfigError: it isn't a list, is empty, or names another column.
    """
    if columns is None:
        return list(there)
    names = list(columns) if isinstance(columns, list | tuple | set | frozenset) else []
    if not names or not all(isinstance(name, str) and name in there for name in names):
        raise ConfigError(f"columns = {columns!r}: give a list of some of {', '.join(map(repr, there))}")
    return list(dict.fromkeys(names))
