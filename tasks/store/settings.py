"""Bases and field types of the flows' configurations: parameter of the flow, command line, and deployment's parameters.

Credentials never appear in them (Prefect stores parameters); storage takes them from the environment.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tasks.io.errors import ConfigError
from tasks.io.location import normalise
from tasks.store import layout
from tasks.store.manifest import Manifest

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_STREAMING = layout.STREAMING_READY.rpartition("/")[2]  # a directory beside those of the images


def _names(value: object) -> object:
    """Split 'a,b' into ['a', 'b'], as on command lines."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _dataset_name(value: str) -> str:
    taken = re.fullmatch(r"v[0-9]+", value) or value == _STREAMING
    if not taken and _NAME.fullmatch(value):
        return value
    word = "-".join(re.findall(r"[a-z0-9._-]+", value.lower())).lstrip("._-")
    raise ValueError(
        f"'{value}' can't name a dataset; use lower case letters, digits, '.', '_' and '-', such as "
        f"'{'my-' if taken or not word else ''}{word or 'images'}'"
    )


def _location(value: str) -> str:
    normalise(value)  # reject invalid paths at once; a relative path is resolved when it is used
    return value


def _version(value: object) -> object:
    """Turn 'v3' and '3' into 3."""
    try:
        return value if value == "latest" else layout.version_number(value)
    except ConfigError as fault:
        raise ValueError(f"{fault}, or 'latest'") from fault


def _import_path(value: str) -> str:
    if not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise ValueError(f"'{value}' is no import path; write it like 'package.module:name'")
    return value


def in_order(schema: dict[str, Any]) -> None:
    """Number the fields of a model's JSON schema, by which Prefect's form sorts them (PostgreSQL forgets the order)."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Settings(BaseModel):
    """Base of every part of a flow's configuration: frozen, without unknown fields, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=in_order)

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a manifest, with those that older versions of this code left out."""
        return dict(values)


class Bounds(Settings):
    """Bounds of a gate's checks, such as drift_warn and drift_fail; None is open.

    Attributes:
        falling: Fields of lower bounds, at which a check warns.
    """

    falling: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _warn_before_fail(self) -> Self:
        values = dict(self)
        for warn, fail in ((name, name.replace("_warn", "_fail")) for name in values if "_warn" in name):
            low, high = (fail, warn) if warn in self.falling else (warn, fail)
            if None not in (values.get(low), values.get(high)) and values[low] > values[high]:
                pair = f"{low} = {values[low]} is above {high} = {values[high]}"
                raise ValueError(f"{pair}; a warning must come first")
        return self


Config = TypeVar("Config", bound=Settings)


def config_of(kind: type[Config], manifest: Manifest, **now: Any) -> Config:
    """Return the configuration that a version was made with.

    Args:
        kind: Configuration model.
        manifest: Manifest of the version.
        now: Settings with other values now, such as the root.

    Raises:
        ConfigError: this code can't use the configuration.
    """
    try:
        return kind.model_validate(kind.recorded(manifest.config) | now)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "as a whole"
        raise ConfigError(
            f"{manifest}: this code can't use its configuration ({where}: {first['msg']}); use the code that made it"
        ) from fault


def load_object(setting: str, path: str) -> Any:
    """Import an object by a user's import path, 'package.module:name'.

    Args:
        setting: Name of the setting, for messages.
        path: The import path; importing it runs the module.

    Raises:
        ConfigError: it is no import path, can't be imported, or doesn't exist; the message names the wrong part.
    """
    module, _, name = path.partition(":")
    if not (module and name):
        raise ConfigError(f"{setting} = '{path}' is no import path; write it like 'package.module:name'")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # any exception of the module's code
        raise ConfigError(
            f"{setting} = '{path}': can't import '{module}': {type(error).__name__}: {error}; "
            "check its name, that it is on the path of every worker, and that it can be imported by itself"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{setting} = '{path}': '{module}' has no '{name}'; check the name")
        found = getattr(found, part)
    return found


def warns(default: float, when: str) -> Any:
    """Return the field of a bound: the gate warns `when`, such as 'above this share of nulls'."""
    return Field(default=default, description=f"The gate warns {when}.")


def fails(default: float, when: str) -> Any:
    """Return the field of a bound, as `warns`: the gate fails."""
    return Field(default=default, description=f"The gate fails {when}.")


Share = Annotated[float, Field(ge=0, le=1)]
Drift = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Location = Annotated[str, Field(min_length=1), AfterValidator(_location)]
Version = Annotated[Annotated[int, Field(ge=1)] | Literal["latest"], BeforeValidator(_version)]
DatasetName = Annotated[str, AfterValidator(_dataset_name)]
ImportPath = Annotated[str, AfterValidator(_import_path)]
SelfTest = Annotated[
    bool, Field(description="Inject faults into a sample of the version, and report which its gate notices.")
]
SchemaChange = Annotated[
    bool, Field(description="Publish although columns, types or the label are others than in the last version.")
]


class CommonBounds(Bounds):
    """Bounds that gates of several kinds have."""

    rejected_warn: Share = warns(0.01, "above this share of rejected input")
    rejected_fail: Share = fails(0.2, "above this share of rejected input")
    drift_warn: Drift = warns(0.1, "above this drift (PSI) against the last published version")
    drift_fail: Drift = fails(1.0, "above this drift (PSI) against the last published version")


class FlowSettings(Settings):
    """Base of a flow's configuration."""

    root: Location = Field(default="data", description="Where datasets are kept: a directory or s3://bucket/prefix.")

    @property
    def less_at_once(self) -> str:
        """Advice for making a task take less memory."""
        raise NotImplementedError


def check_shares(validation_share: float, test_share: float) -> None:
    """Raise ValueError unless the two splits leave something to train on."""
    if validation_share + test_share >= 1:
        raise ValueError(
            f"validation_share + test_share = {validation_share + test_share:g}: "
            "nothing is left to train on; together they must stay below 1"
        )
