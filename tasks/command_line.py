"""A flow's command line, made from its configuration model: `python -m flows.feature_store --help`.

Exit codes: 0 published, 1 the run failed (one sentence on stderr, the traceback with --debug), 2 wrong arguments
(field, value and cure on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from tasks.core import storage
from tasks.core.errors import ConfigError, InputError, PipelineError
from tasks.core.yaml_text import load_yaml

Config = TypeVar("Config", bound=BaseModel)

FAILED, WRONG_ARGUMENTS = 1, 2

_TOLD_ONCE = ("Encountered exception during execution",)
_STATE_DETAILS = re.compile(r"(Finished in state \w+)\(.*\)", re.DOTALL)
_NO_DEFAULT = re.compile(r"\(default: (None|\(\))\)|\(default factory: dict\)")


def run_by_hand(entry: str, config_type: type[BaseModel], argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the flow on a local API and Ray (or those that the environment names), print the end.

    A first argument that is no option is a command about the store (`commands`), not a run.

    Args:
        entry: The flow as 'module:name'. It is imported only once the arguments are right, which takes seconds.
        config_type: The flow's configuration model.
        argv: Arguments; those of the process if None.

    Returns:
        The exit code.

    """
    module, name = entry.split(":")
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        from tasks import commands

        return commands.run(argv, f"python -m {module}")
    try:
        config, debug = parse_arguments(config_type, argv, prog=f"python -m {module}")
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return WRONG_ARGUMENTS
    started = time.monotonic()
    try:
        with _quiet_failures(debug):
            from tasks.local_api import local_stack

            with local_stack():
                from prefect import tags

                flow = getattr(importlib.import_module(module), name)
                with tags(flow.name, "by hand"):
                    result = flow(config)
    except KeyboardInterrupt:
        print("interrupted: nothing more was published", file=sys.stderr)
        return 130
    except Exception as fault:
        if debug:
            raise
        # On a line of its own: Prefect ends some of its complaints without a line break.
        print(f"\nfailed: {one_sentence(fault)}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(_own(fault), ConfigError) else FAILED
    print(summary(result))
    print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


def parse_arguments(
    config_type: type[Config], argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[Config, bool]:
    """The configuration from the command line and, below it, a YAML file; and whether --debug was given.

    Raises:
        ConfigError: a value is wrong; names the option, the value and what is asked for.
        SystemExit: --help was given (0), or an option is unknown (2).

    """
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        description=config_type.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; options win over it.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback when the run fails.")

    # Only the arguments count: a settings class of its own would also read ROOT or SEED from the environment.
    class _Arguments(config_type, BaseSettings):  # type: ignore[misc, valid-type]
        pass

    source: CliSettingsSource[Any] = CliSettingsSource(
        _Arguments,
        root_parser=parser,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )
    for action in parser._actions:
        action.help = _NO_DEFAULT.sub("(default: none)", action.help or "")
    given = parser.parse_args(argv)
    file, debug = given.config, given.debug
    del given.config, given.debug
    try:
        values = source(parsed_args=given)()
    except SettingsError as fault:
        raise ConfigError(_explain_mapping(fault, vars(given))) from fault
    merged = _merge(_read_file(file), values, _nested(config_type)) if file else values
    try:
        return config_type.model_validate(merged), debug
    except ValidationError as fault:
        raise ConfigError(_explain(fault, file)) from fault


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line: forty lines of usage would push it out of sight."""
        unknown = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.75)
        self.exit(WRONG_ARGUMENTS, f"error: {message}; " + (f"did you mean {close[0]}?\n" if close else "see --help\n"))


def one_sentence(fault: BaseException) -> str:
    """What went wrong, in one sentence: our own error if one is among the causes, else the last line of the fault."""
    own = _own(fault)
    if own is None and (lost := _lost_api(fault)) is not None:
        url = os.environ.get("PREFECT_API_URL", "its address")
        return f"the Prefect API at {url} can't be reached ({type(lost).__name__}); start it again, then run this again"
    text = str(own if own is not None else fault).strip() or type(fault).__name__
    notes = getattr(own, "__notes__", ())
    last = text.splitlines()[-1] if own is None else " ".join(text.split())
    kind = "" if own is not None else f"{type(fault).__name__}: "
    return f"{kind}{last}" + "".join(f" ({note})" for note in notes)


def summary(result: Sequence[Any]) -> str:
    """The published versions as a person reads them: where, verdict, rows, balances and report."""
    lines = []
    for version in result:
        lines.append(f"{version.dataset} v{version.version}: {version.rows:,} rows, verdict {version.verdict}")
        lines.append(f"  data     {version.uri}")
        lines.append(f"  report   {version.report}")
        for balance in version.balances:
            parts = [f"{balance.rows_in:,} in", f"{balance.rows_out:,} out"]
            for word, counts in (("rejected", balance.rejected), ("filtered", balance.filtered)):
                if counts:
                    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
                    parts.append(f"{sum(counts.values()):,} {word} ({reasons})")
            if balance.deduplicated:
                parts.append(f"{balance.deduplicated:,} deduplicated")
            lines.append(f"  balance  {balance.name}: {', '.join(parts)}")
        lines += [f"  {word:8s} {text}" for word, text in version.notes]
    return "\n".join(lines)


def _own(fault: BaseException | None) -> PipelineError | None:
    """The first of our own errors in a chain of causes."""
    for link in _causes(fault):
        for own in (getattr(link, "cause", None), link):  # what Ray carried is of its kind too, but with a traceback
            if isinstance(own, PipelineError):
                return own
    return None


def _lost_api(fault: BaseException | None) -> BaseException | None:
    """The first error of a connection to Prefect's API, which nothing but Prefect's client raises."""
    names = {"TransportError", "ConcurrencySlotAcquisitionError"}
    return next((link for link in _causes(fault) if names & {kind.__name__ for kind in type(link).__mro__}), None)


def _causes(fault: BaseException | None) -> Iterator[BaseException]:
    """A chain of causes; Ray and Prefect wrap what a worker raised."""
    seen: set[int] = set()
    while fault is not None and id(fault) not in seen:
        seen.add(id(fault))
        yield fault
        carried = getattr(fault, "cause", None)
        fault = carried if isinstance(carried, BaseException) else fault.__cause__ or fault.__context__


def _read_file(path: str) -> dict[str, Any]:
    try:
        content = load_yaml(os.path.expandvars(storage.read_bytes(path).decode()))
    except FileNotFoundError as fault:
        raise ConfigError(f"--config {path}: no such file") from fault
    except ValueError as fault:
        raise ConfigError(f"--config {path}: no valid YAML: {fault}") from fault
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: it must hold settings as 'name: value' lines")
    return content


def _nested(config_type: type[BaseModel]) -> list[str]:
    """Fields that hold settings of their own."""
    fields = config_type.model_fields.items()
    return [
        name for name, field in fields if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
    ]


def _merge(below: dict[str, Any], above: dict[str, Any], nested: Sequence[str]) -> dict[str, Any]:
    """Values of `above` laid over `below`; only nested settings are merged, mappings of columns are replaced."""
    merged = {**below, **above}
    for name in nested:
        if isinstance(below.get(name), dict) and isinstance(above.get(name), dict):
            merged[name] = {**below[name], **above[name]}
    return merged


def _explain(fault: ValidationError, file: str | None) -> str:
    """Each wrong value as option, value and cure."""
    sentences = []
    for error in fault.errors():
        option = "--" + ".".join(str(part).replace("_", "-") for part in error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"].startswith("datetime"):
            message = "give a time in ISO 8601, such as 2025-01-31 or 2025-01-31T12:00:00+01:00"
        if error["type"] == "extra_forbidden":
            sentences.append(f"{option} is no setting; see --help for those there are")
        elif not error["loc"] or isinstance(error["input"], dict):
            sentences.append(message if not error["loc"] else f"{option}: {message}")
        else:
            sentences.append(f"{option} = {error['input']!r}: {message[0].lower()}{message[1:]}")
    return "; ".join(sentences) + (f" (from the command line or {file})" if file else "")


def _explain_mapping(fault: SettingsError, given: dict[str, Any]) -> str:
    """A mapping that can't be read at all; pydantic-settings tells only of which field it is."""
    for name, value in given.items():
        if value is not None and re.search(rf"\b{name.replace('-', '_')}\b", str(fault)):
            option, text = name.replace("_", "-"), value[-1] if isinstance(value, list) else value
            return f'--{option} = {text!r}: give a JSON mapping such as {{"name": "value"}}, or name=value'
    return str(fault)


@contextmanager
def _quiet_failures(debug: bool) -> Iterator[None]:
    """Without --debug, leave out of the console what the one sentence says anyway; the API keeps all of it."""
    if debug:
        yield
        return
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    import prefect.main  # noqa: F401 - sets logging up: before, there is no console to put a filter on
    from prefect.settings import PREFECT_API_URL

    # The page of an embedded server is gone when somebody wants to open it.
    left_out = _TOLD_ONCE if PREFECT_API_URL.value() else (*_TOLD_ONCE, "View at ")

    def for_a_person(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        message = record.getMessage()
        record.msg, record.args = _STATE_DETAILS.sub(r"\1", message), ()
        return not message.startswith(left_out)

    # On the handlers, not the loggers: those also feed the API. The API's handler comes first, so it has seen it all.
    consoles = logging.getLogger().handlers[:]
    for console in consoles:
        console.addFilter(for_a_person)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(for_a_person)
