"""Loader of a user's definitions from a Python or a YAML file.

A Python file declares values of `FeatureGroup`, `EventSource` and `DimensionSource` at module level. A YAML file
declares the same, with features in SQL (`SUM(amount) FILTER (WHERE …)`), which Polars turns into
expressions; nothing in it is executed. As in SQL, a SUM over no rows is null: COALESCE(SUM(x), 0) makes it 0.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin

import polars as pl
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tasks.features.definitions import (
    Column,
    ColumnKind,
    Definitions,
    DimensionSource,
    EventSource,
    FeatureGroup,
    Window,
)
from tasks.features.standard import STANDARD
from tasks.io import storage
from tasks.io.errors import DefinitionError
from tasks.io.notation import load_yaml
from tasks.io.text import closest, shortened

_WHAT = "definitions"
_SHOWN = 60

_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""")
_AMBIGUOUS = re.compile(r"[$\\`]|--|/\*")  # where a quote may be no quote
_SUBQUERY = re.compile(r"\bselect\b|\(\s*(from|with|values|table)\b|\b(read|scan)_\w+\s*\(", re.IGNORECASE)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Kind = TypeVar("_Kind", bound=_Named)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ColumnText(_Strict):
    kind: ColumnKind = "any"
    required: bool = False
    also: tuple[str, ...] = ()


class _EventText(_Strict):
    time: str
    columns: dict[str, Annotated[_ColumnText, BeforeValidator(lambda v: {"kind": v} if isinstance(v, str) else v)]]
    uri: str | None = None
    mapping: dict[str, str] = Field(default_factory=dict)


class _DimensionText(_Strict):
    key: str
    columns: tuple[str, ...] = ()
    uri: str | None = None
    mapping: dict[str, str] = Field(default_factory=dict)


class _WindowText(_Strict):
    days: Annotated[list[int], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
    features: dict[str, str]


class _GroupText(_Strict):
    entity: str
    source: str = "transactions"
    features: dict[str, str]
    windows: list[_WindowText] = Field(default_factory=list)
    derived: dict[str, str] = Field(default_factory=dict)
    dimension: str | None = None
    bounds: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)


class _File(_Strict):
    events: dict[str, _EventText] = Field(default_factory=dict)
    dimensions: dict[str, _DimensionText] = Field(default_factory=dict)
    groups: dict[str, _GroupText] = Field(default_factory=dict)


def is_yaml(what: str, path: str) -> bool:
    """Return True for a YAML file of declarations, False for Python.

    Raises:
        DefinitionError: It is neither.
    """
    if not path.endswith((".yaml", ".yml", ".py")):
        raise DefinitionError(f"{what} '{path}': give a .py, .yaml or .yml file")
    return not path.endswith(".py")


def python_values(what: str, path: str) -> list[Any]:
    """Run a user's Python file; return the values of its module-level names.

    Raises:
        DefinitionError: It is missing, or fails; the message says which file and why.
    """
    if not Path(path).is_file():
        raise DefinitionError(f"{what} '{path}': no such file (a Python file must be local)")
    try:
        return list(runpy.run_path(path).values())
    except DefinitionError as fault:
        fault.add_note(f"in {path}")
        raise
    except Exception as fault:
        raise DefinitionError(f"{what} '{path}' can't be run: {type(fault).__name__}: {fault}") from fault


def by_name(
    path: str, values: Iterable[object], kind: type[_Kind], base: Mapping[str, _Kind] = MappingProxyType({})
) -> dict[str, _Kind]:
    """Return the values of a kind that a Python file declares, by their names.

    Args:
        path: The file.
        values: Its values.
        kind: A class with a name.
        base: Values that the file may import and extend: another of the same name replaces one.

    Raises:
        DefinitionError: two of them have the same name.
    """
    found: dict[str, _Kind] = {}
    for value in values:
        if not isinstance(value, kind):
            continue
        before = found.setdefault(value.name, value)
        if before is base.get(value.name):
            found[value.name] = value
        elif before is not value and value is not base.get(value.name):
            raise DefinitionError(f"'{path}' declares '{value.name}' twice; rename one of them")
    return found


def yaml_content(what: str, path: str) -> Any:
    """Return the content of a YAML file; an empty mapping for an empty file. Nothing in it is executed.

    Raises:
        DefinitionError: It is missing, or isn't YAML.
    """
    try:
        return load_yaml(storage.read_bytes(path)) or {}
    except FileNotFoundError as fault:
        raise DefinitionError(f"{what} '{path}': no such file") from fault
    except ValueError as fault:
        raise DefinitionError(f"{what} '{path}' is no valid YAML: {fault}") from fault


def declared(definitions: str | None) -> Definitions:
    """Return the standard definitions, overridden by those of a user's file, if there is one; sources as declared.

    Raises:
        DefinitionError: as `load_definitions`.
    """
    return STANDARD if definitions is None else load_definitions(definitions).over(STANDARD)


def load_definitions(path: str) -> Definitions:
    """Read a definitions file (local, or YAML in any supported storage).

    Raises:
        DefinitionError: The file is missing, of another kind, or invalid; the message says where and why.
    """
    return _from_yaml(path) if is_yaml(_WHAT, path) else _from_python(path)


def _from_python(path: str) -> Definitions:
    values = python_values(_WHAT, path)
    found = Definitions(
        events=by_name(path, values, EventSource, STANDARD.events),
        dimensions=by_name(path, values, DimensionSource, STANDARD.dimensions),
        groups=by_name(path, values, FeatureGroup, STANDARD.groups),
    )
    if not (found.events or found.dimensions or found.groups):
        raise DefinitionError(
            f"definitions '{path}' declares nothing; assign a FeatureGroup, EventSource or DimensionSource "
            f"to a module-level name"
        )
    return found


def _from_yaml(path: str) -> Definitions:
    try:
        file = _File.model_validate(yaml_content(_WHAT, path))
    except ValidationError as fault:
        raise DefinitionError(f"definitions '{path}': {first_mistake(_File, fault)}") from fault
    if not (file.events or file.dimensions or file.groups):
        raise DefinitionError(f"definitions '{path}' declares nothing; give groups, events or dimensions")
    try:
        return Definitions(
            events={name: _event(name, text) for name, text in file.events.items()},
            dimensions={
                name: DimensionSource(name=name, **text.model_dump()) for name, text in file.dimensions.items()
            },
            groups={name: _group(name, text) for name, text in file.groups.items()},
        )
    except DefinitionError as fault:
        raise DefinitionError(f"definitions '{path}': {fault}") from fault


def first_mistake(file: type[BaseModel], fault: ValidationError) -> str:
    """Return place, error and value of a file's first mistake; for an unknown field the closest ones."""
    first = min(
        fault.errors(), key=lambda error: error["type"] != "extra_forbidden"
    )  # it may be the one that is missing
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        return f"{where} is unknown{closest(str(first['loc'][-1]), _model_at(file, first['loc'][:-1]).model_fields)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (found {shortened(repr(first['input']), _SHOWN)})"


def _model_at(model: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """Return the model at a place: a path of fields, and of keys and numbers in mappings and lists."""
    names = iter(place)
    for name in names:
        kind: Any = model.model_fields[str(name)].annotation
        while not isinstance(kind, type) or not issubclass(kind, BaseModel):
            if get_origin(kind) in (dict, list):
                next(names, None)
            parts = [part for part in get_args(kind) if part is not type(None)]
            kind = parts[-1 if get_origin(kind) is dict else 0]
        model = kind
    return model


def _event(name: str, text: _EventText) -> EventSource:
    columns = {column: Column(**spec.model_dump()) for column, spec in text.columns.items()}
    return EventSource(name=name, time=text.time, columns=columns, uri=text.uri, mapping=text.mapping)


def _group(name: str, text: _GroupText) -> FeatureGroup:
    return FeatureGroup(
        name=name,
        entity=text.entity,
        source=text.source,
        dimension=text.dimension,
        features=_expressions(name, text.features),
        windows=tuple(
            Window(days=days, features=_expressions(name, window.features))
            for window in text.windows
            for days in window.days
        ),
        derived=_expressions(name, text.derived),
        bounds=text.bounds,
    )


def _expressions(group: str, features: dict[str, str]) -> dict[str, pl.Expr]:
    return {name: _expression(group, name, sql) for name, sql in features.items()}


def sql_expression(what: str, sql: str) -> pl.Expr:
    """Return a user's SQL as an expression over only the columns of its rows.

    Polars reads the files that a subquery names (`(SELECT x FROM read_csv('/etc/passwd'))`) while it parses, so these
    are refused before.

    Raises:
        DefinitionError: It isn't such an expression; the message says where and why.
    """
    bare = sql if _AMBIGUOUS.search(sql) else _QUOTED.sub("''", sql)
    if _SUBQUERY.search(bare):
        raise DefinitionError(f"{what} '{sql}' has a subquery or names a file: write an expression over the columns")
    try:
        return pl.sql_expr(sql)
    except pl.exceptions.PolarsError as fault:
        raise DefinitionError(f"{what} '{sql}' is no SQL expression: {fault}") from fault
    except UnicodeEncodeError as fault:  # half a character, as YAML's '\\ud800'
        raise DefinitionError(f"{what} {sql!a} has a character that is none: write it out") from fault


def _expression(group: str, name: str, sql: str) -> pl.Expr:
    return sql_expression(f"feature group '{group}', feature '{name}':", sql)
