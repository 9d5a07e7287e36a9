"""Arguments of the loader as they must be, or a sentence that says which one isn't, what it is, and what to give."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.io.errors import ConfigError

LIMIT = 1 << 63
"""Above every whole number that is taken: they are kept as int64."""


def whole_number(name: str, value: Any, cure: str, *, least: int = 0, below: int = LIMIT) -> int:
    """A whole number in [least, below), of Python or numpy; no truth value, and no fraction even if it is whole.

    Raises:
        ConfigError: it is something else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool | np.bool_) or not least <= number < below:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return number


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what isn't one of some words.

    Raises:
        ConfigError: it isn't.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} = {value!r}: use {' or '.join(map(repr, choices))}")


def truth_values(**values: Any) -> None:
    """Refuse what is neither True nor False, by its name.

    Raises:
        ConfigError: one of them isn't.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r}: use True or False")


def place(name: str, value: Any, cure: str) -> str:
    """A path or URI as text.

    Raises:
        ConfigError: it is neither text nor a path, or it is empty.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{name} = {value!r}: {cure}")
    return text


def picked_columns(columns: Any, there: Sequence[str]) -> list[str]:
    """Some of the columns that there are, each once in the order that was asked for; None for all.

    Raises:
        ConfigError: it is no list, an empty one, or names something else.
    """
    if columns is None:
        return list(there)
    names = list(columns) if isinstance(columns, list | tuple | set | frozenset) else []
    if not names or not all(isinstance(name, str) and name in there for name in names):
        raise ConfigError(f"columns = {columns!r}: give a list of some of {', '.join(map(repr, there))}")
    return list(dict.fromkeys(names))
