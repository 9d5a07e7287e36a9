"""Loader of a user's models from a Python or a YAML file.

A Python file declares values of `Model` at module level. A YAML file declares the same: labels by name, with their
targets in SQL, and models that name a label or a user's table; nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.features.loading import by_name, first_mistake, is_yaml, python_values, sql_expression, yaml_content
from tasks.io.errors import DefinitionError
from tasks.io.notation import Times
from tasks.io.text import closest
from tasks.training_sets.definition import FeatureReference, Label, Model, SpineSource

_WHAT = "models"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _LabelText(_Strict):
    entity: str
    at: Times
    days: int
    target: str
    source: str = "transactions"
    active_days: int | None = None


class _SpineText(_Strict):
    uri: str
    columns: dict[str, str] = Field(default_factory=dict)


class _ModelText(_Strict):
    label: str | None = None
    spine: _SpineText | None = None
    entity: str | None = None
    features: list[str]
    ttl_days: float | None = None
    strict: bool = False
    known_at: bool = False


class _File(_Strict):
    labels: dict[str, _LabelText] = Field(default_factory=dict)
    models: dict[str, _ModelText] = Field(default_factory=dict)


def load_models(path: str) -> dict[str, Model]:
    """Read a models file (local, or YAML in any supported storage): models by name, in order of declaration.

    Raises:
        DefinitionError: The file is missing, of another kind, or invalid; the message says where and why.

    """
    return _from_yaml(path) if is_yaml(_WHAT, path) else _from_python(path)


def select(models: Mapping[str, Model], names: Sequence[str]) -> list[Model]:
    """Return the models of these names (all if none is given), in order of declaration.

    Raises:
        DefinitionError: A name is unknown.

    """
    for name in names:
        if name not in models:
            raise DefinitionError(f"no model is named '{name}'{closest(name, list(models))}")
    return [model for name, model in models.items() if not names or name in names]


def _from_python(path: str) -> dict[str, Model]:
    found = by_name(path, python_values(_WHAT, path), Model)
    if not found:
        raise DefinitionError(f"models '{path}' declares nothing; assign a Model to a module-level name")
    return found


def _from_yaml(path: str) -> dict[str, Model]:
    content = yaml_content(_WHAT, path)
    try:
        file = _File.model_validate(content)
    except ValidationError as fault:
        raise DefinitionError(f"models '{path}': {first_mistake(_File, fault)}") from fault
    if not file.models:
        raise DefinitionError(f"models '{path}' declares nothing; give models")
    try:
        labels = {name: _label(name, text) for name, text in file.labels.items()}
        return {name: _model(name, text, labels) for name, text in file.models.items()}
    except DefinitionError as fault:
        raise DefinitionError(f"models '{path}': {fault}") from fault


def _label(name: str, text: _LabelText) -> Label:
    target = sql_expression(f"label '{name}': target", text.target)
    return Label(name=name, **{**dict(text), "target": target})


def _model(name: str, text: _ModelText, labels: Mapping[str, Label]) -> Model:
    if (text.label is None) == (text.spine is None):
        what = "has neither a label nor a spine" if text.label is None else "has a label and a spine"
        raise DefinitionError(
            f"model '{name}' {what}; give one of the two: label, a name under labels, or spine, the uri of a table"
        )
    spine: Label | SpineSource
    if text.spine is not None:
        spine = SpineSource(uri=text.spine.uri, columns=text.spine.columns)
    else:
        assert text.label is not None, "one of the two is given"
        if text.label not in labels:
            raise DefinitionError(
                f"model '{name}' names the label '{text.label}', which isn't declared"
                f"{closest(text.label, list(labels))}"
            )
        spine = labels[text.label]
    entity = text.entity or (spine.entity if isinstance(spine, Label) else None)
    if entity is None:
        raise DefinitionError(f"model '{name}' has no entity; give the key column of its spine, such as customer_id")
    return Model(
        name=name,
        entity=entity,
        spine=spine,
        features=tuple(_reference(name, reference) for reference in text.features),
        ttl_days=text.ttl_days,
        strict=text.strict,
        known_at=text.known_at,
    )


def _reference(model: str, text: str) -> FeatureReference:
    try:
        return FeatureReference.parse(text)
    except DefinitionError as fault:
        raise DefinitionError(f"model '{model}': {fault}") from fault
