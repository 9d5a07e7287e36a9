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
    for place, (_, module) in layout.KINDS.items():
        if dataset.startswith(f"{place}/"):
            kind: Kind[Any] = importlib.import_module(module).KIND
            return kind
    raise InputError(f"{dataset} is of no kind that is known here; name a dataset under {', '.join(layout.KINDS)}")
