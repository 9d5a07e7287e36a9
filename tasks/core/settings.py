"""Types of fields that the configurations of several flows share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def _names(value: object) -> object:
    """Let 'a,b' stand for ['a', 'b'], as command lines have it."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _dataset_name(value: str) -> str:
    if not _NAME.fullmatch(value) or re.fullmatch(r"v[0-9]+", value):
        raise ValueError(f"'{value}' can't name a dataset; use lower case letters, digits, '.', '_' and '-'")
    return value


def in_order(schema: dict[str, Any]) -> None:
    """Number the fields of a model's JSON schema, by which Prefect's form sorts them (PostgreSQL forgets the order)."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
DatasetName = Annotated[str, AfterValidator(_dataset_name)]
