"""Command-line arguments of a flow: options from its configuration model, over a YAML file of the same settings."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tasks.io import storage
from tasks.io.errors import WRONG_ARGUMENTS, ConfigError, PipelineError
from tasks.io.notation import load_yaml
from tasks.io.text import printable

Config = TypeVar("Config", bound=BaseModel)
Path = tuple[str, ...]


_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_MAPPING = 'give a JSON mapping such as {"name": "value"}, or name=value'
_TIME = "give a time in ISO 8601, such as 2025-01-31 or 2025-01-31T12:00:00+01:00"
_CURES = {
    "int_": "give a whole number",
    "float_": "give a number",
    "finite_number": "give a finite number",
    "bool_": "give true or false",
    "string_type": "give a text",
    "string_too_short": "give a text that isn't empty",
    "greater_than_equal": "give {ge} or more",
    "greater_than": "give more than {gt}",
    "less_than_equal": "give {le} or less",
    "less_than": "give less than {lt}",
    "literal_error": "give {expected}",
    "tuple_type": "give values separated by commas, or a list in a file",
    "dict_type": _MAPPING,
    "model_": _MAPPING,
    "date": _TIME,
    "missing": "give {max_length} values, separated by commas",
    "too_long": "give {max_length} values, separated by commas",
}
"""Cure of a pydantic error, by the beginning of its type."""


def parse_arguments(
    config_type: type[Config], argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[Config, bool]:
    """Return the configuration from the command line and, below it, a YAML file; and whether --debug was given.

    Raises:
        ConfigError: a value is wrong; the message names the option, the value and the expected values.
        SystemExit: --help was given (0), or an option is unknown (2).
    """
    parser = _parser(config_type, prog)
    given = vars(parser.parse_args(argv))
    file, debug = _once("--config", given.pop("config", [])), given.pop("debug")
    values = _values(config_type, given)
    merged = _merge(_read_file(file), values, config_type) if file is not None else values
    try:
        return config_type.model_validate(merged), debug
    except ValidationError as fault:
        raise ConfigError(_explain(fault, config_type, values, file)) from fault


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line: forty lines of usage would push it out of sight."""
        message = " ".join(message.split())
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.75)
        cure = f"did you mean {close[0]}?" if close else "see --help"
        if message.startswith("unrecognized arguments: ") and not unknown.startswith("-"):
            cure = "separate the values of an option by commas, and turn a switch off by --no-…; see --help"
        self.exit(WRONG_ARGUMENTS, f"error: {message}; {cure}\n")


class _Collect(argparse.Action):
    """Action that keeps every value of an option; of a switch, which of its two names was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = not str(option_string).startswith("--no-") if self.nargs == 0 else values
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), value])


def _parser(config_type: type[BaseModel], prog: str | None) -> _Parser:
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--OPTION VALUE …], or %(prog)s COMMAND --help",
        allow_abbrev=False,
        description=config_type.__doc__,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    text = "YAML file with any of these settings; options win over it."
    parser.add_argument("--config", metavar="FILE", action=_Collect, help=text)
    parser.add_argument("--debug", action="store_true", default=False, help="Show the traceback when the run fails.")
    groups: dict[Path, argparse._ActionsContainer] = {(): parser}
    for path, field in _fields(config_type):
        if _model(field) is not None:
            groups[path] = parser.add_argument_group(f"{'.'.join(path)} options", field.description)
        container = groups[path if path in groups else path[:-1]]
        names = [_option(path)]
        kind = _kind(field)
        options: dict[str, Any] = {"metavar": _METAVARS.get(kind, "TEXT")}
        if kind is bool:
            names, options = [*names, f"--no-{names[0].removeprefix('--')}"], {"nargs": 0}
        elif get_origin(kind) is Literal:
            options = {"metavar": f"{{{','.join(map(str, get_args(kind)))}}}"}
        described = " ".join(f"{field.description} (default: {_default(field)})".split())
        container.add_argument(
            *names, dest=".".join(path), action=_Collect, help=described.replace("%", "%%"), **options
        )
    return parser


_METAVARS: dict[Any, str] = {int: "N", float: "X", tuple: "A,B", dict: "JSON", BaseModel: "JSON"}


def _fields(model: type[BaseModel], prefix: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Yield every setting with its path in the configuration; nested settings follow their parents."""
    nested = []
    for name, field in model.model_fields.items():
        inner = _model(field)
        if inner is None:
            yield (*prefix, name), field
        else:
            nested.append((name, field, inner))
    for name, field, inner in nested:
        yield (*prefix, name), field
        yield from _fields(inner, (*prefix, name))


def _model(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _kind(field: FieldInfo) -> Any:
    """Return the type of a setting as far as its text must be split: bool, tuple, dict, BaseModel; or another type."""
    if _model(field) is not None:
        return BaseModel
    kinds = [kind for kind in _members(field.annotation) if kind is not types.NoneType]
    return get_origin(kinds[0]) if get_origin(kinds[0]) in (tuple, dict) else kinds[0]


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, without annotations."""
    if hasattr(annotation, "__metadata__"):
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _option(path: Sequence[object]) -> str:
    return "--" + ".".join(str(part).replace("_", "-") for part in path)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _values(config_type: type[BaseModel], given: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the settings of the command line, as the model takes them."""
    values: dict[str, Any] = {}
    for path, field in _fields(config_type):
        texts = given.get(".".join(path))
        if texts is None:
            continue
        *parents, name = path
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _value(_option(path), _kind(field), types.NoneType in _members(field.annotation), texts)
    return values


def _value(option: str, kind: Any, optional: bool, texts: list[Any]) -> Any:
    if optional and [str(text).strip().lower() for text in texts] == ["none"]:
        return None
    if kind is tuple:
        return [part for text in texts for part in _parts(option, text)]
    if kind in (dict, BaseModel):
        return {key: value for text in texts for key, value in _pairs(option, text).items()}
    return _once(option, texts)


def _once(option: str, texts: Sequence[Any]) -> Any:
    if len(texts) > 1:
        raise ConfigError(f"{option} is given {len(texts)} times ({', '.join(map(repr, texts))}); give it once")
    return texts[0] if texts else None


def _parts(option: str, text: str) -> list[Any]:
    if not text.strip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    return list(_json(option, text, list, 'give values separated by commas, or a JSON list such as ["a", "b"]'))


def _pairs(option: str, text: str) -> dict[str, Any]:
    if text.strip().startswith("{"):
        return dict(_json(option, text, dict, _MAPPING))
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        raise ConfigError(f"{option} = {text!r}: {_MAPPING}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _json(option: str, text: str, kind: type, cure: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"{option} = {text!r}: {cure}") from fault
    if not isinstance(value, kind):
        raise ConfigError(f"{option} = {text!r}: {cure}")
    return value


def _read_file(path: str) -> dict[str, Any]:
    try:
        content = load_yaml(storage.read_bytes(path))
    except PipelineError as fault:
        raise ConfigError(f"--config {path}: {fault}") from fault
    except FileNotFoundError as fault:
        raise ConfigError(f"--config {path}: no such file; correct the path") from fault
    except IsADirectoryError as fault:
        raise ConfigError(f"--config {path}: that is a directory; name a YAML file in it") from fault
    except PermissionError as fault:
        raise ConfigError(f"--config {path}: no permission to read it; let this user read it") from fault
    except ValueError as fault:
        raise ConfigError(f"--config {path}: no valid YAML: {fault}; correct it there") from fault
    if not isinstance(content, dict):
        found = "it is empty" if content is None else f"it holds {content!r:.40}"
        raise ConfigError(f"--config {path}: {found}; it must hold settings as 'name: value' lines")
    return {str(name): _expanded(path, value) for name, value in content.items()}


def _expanded(path: str, value: Any) -> Any:
    """Return a value of the file with environment variables expanded."""
    if isinstance(value, dict):
        return {str(name): _expanded(path, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_expanded(path, part) for part in value]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name.strip("{}") not in os.environ:
            raise ConfigError(f"--config {path}: the variable in {value!r} isn't set; export {name.strip('{}')}")
    return os.path.expandvars(value)


def _merge(below: dict[str, Any], above: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Lay the values of `above` over `below`; only nested settings are merged, mappings of columns are replaced."""
    merged = {**below, **above}
    for name, field in model.model_fields.items():
        inner = _model(field)
        if inner is not None and isinstance(below.get(name), dict) and isinstance(above.get(name), dict):
            merged[name] = _merge(below[name], above[name], inner)
    return merged


def _explain(fault: ValidationError, config_type: type[BaseModel], values: Mapping[str, Any], file: str | None) -> str:
    """Describe each wrong value as option, value and cure; and the file, if the value is in it."""
    sentences: dict[str, str] = {}
    for error in fault.errors():
        location = [part for part in error["loc"] if isinstance(part, str) and part != "[key]"]
        if error["type"] in ("extra_forbidden", "invalid_key"):
            sentence = _unknown(location, config_type)
        else:
            sentence = _sentence(_option(location) if location else "", error)
        place = f" (in {file})" if file is not None and not _has(values, location) else ""
        if error["type"] == "missing" or ".".join(location) not in sentences:  # it says how many are needed
            sentences[".".join(location)] = f"{sentence}{place}"
    return printable("; ".join(sentences.values()))


def _has(values: Any, location: Sequence[str]) -> bool:
    """Return True if the command line gives a setting, or one nested in it."""
    for part in location:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return bool(location)


def _unknown(location: Sequence[str], model: type[BaseModel]) -> str:
    for part in location[:-1]:
        model = _model(model.model_fields[part]) or model
    close = difflib.get_close_matches(location[-1].replace("-", "_"), model.model_fields, n=1)
    cure = f"did you mean '{close[0]}'?" if close else "see --help for those there are"
    return f"'{'.'.join(location)}' is no setting; {cure}"


def _sentence(option: str, error: Mapping[str, Any]) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":  # the last place of a tuple
        context = {"max_length": error["loc"][-1] + 1}
    if kind == "value_error":
        told = str(context["error"])
        # Our message names the value itself, and leaves out possible passwords.
        parts = value if isinstance(value, list) else [value]
        named = (
            isinstance(context["error"], PipelineError)
            or isinstance(value, dict)
            or any(repr(part) in told for part in parts)
        )
        return (f"{option}: {told}" if named else f"{option} = {value!r}: {told}") if option else told
    cure = next((cure for start, cure in _CURES.items() if kind.startswith(start)), None)
    told = cure or f"{error['msg'][0].lower()}{error['msg'][1:]}"
    for name, bound in context.items():
        told = told.replace(f"{{{name}}}", f"{bound:.15g}" if isinstance(bound, float) else str(bound))
    return f"{option} = {value!r}: {told}"
