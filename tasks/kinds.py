"""Look-up of a dataset's kind, by its place in the store."""

from __future__ import annotations

import importlib
from typing import Any

from tasks.audit.kind import Kind
from tasks.io.errors import InputError
from tasks.store import layout


def kind_of(dataset: str) -> Kind[Any]:
    """Return the kind of a dataset; the modules of other kinds aren't loaded.

    Raises:
        InputError: its kind is unknown.
    """
    place = layout.kind_place(dataset)
    if place is None:
        raise InputError(f"{dataset} is of no kind that is known here; name a dataset under {', '.join(layout.KINDS)}")
    kind: Kind[Any] = importlib.import_module(layout.KINDS[place][1]).KIND
    return kind
