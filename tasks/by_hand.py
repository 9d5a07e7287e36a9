"""Manual runs of a flow, `python -m flows.feature_store`: arguments, a Prefect API and a Ray, and the exit code.

Exit codes: 0 published, 1 the run failed (one sentence on stderr, the traceback with --debug), 2 wrong arguments
(option, value and cure on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM; both report the versions published
before.

The flows start this before they import anything else: help, errors and Ctrl-C needn't wait for libraries.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tasks.engine.signals import stops_unwind
from tasks.io.errors import FAILED, WRONG_ARGUMENTS, ConfigError, InputError, PipelineError, causes

_TOLD_ONCE = ("Encountered exception during execution",)
_STATE_DETAILS = re.compile(r"(Finished in state \w+)\(.*\)", re.DOTALL)


def run_by_hand(entry: str, config: str, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the flow on a local API and Ray (or those of the environment), print the result.

    A first argument that isn't an option is a command about the store (`commands`), not a run.

    Args:
        entry: The flow as 'module:name'. It is imported only once the arguments are right, which takes seconds.
        config: The flow's configuration model, likewise.
        argv: Arguments; those of the process if None.

    Returns:
        The exit code.

    """
    argv = sys.argv[1:] if argv is None else argv
    earlier = len(_commits())

    def ending(number: int) -> str:
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        return f"{word}: {_published(earlier)}"

    with stops_unwind(lambda: ending(stopped[0])) as stopped:
        try:
            return _run(entry, config, argv, earlier, stopped)
        except BaseException as fault:
            if not stopped and not isinstance(fault, KeyboardInterrupt):
                raise
        # On a line of its own, whatever Prefect and Ray have turned the exception into: a progress bar may be
        # unfinished.
        number = stopped[0] if stopped else signal.SIGINT
        print(f"\n{ending(number)}", file=sys.stderr)
        return 128 + number


def _run(entry: str, config: str, argv: Sequence[str], earlier: int, stopped: Sequence[int]) -> int:
    module, name = entry.split(":")
    if argv and not argv[0].startswith("-"):
        from tasks.cli import commands

        return commands.run(argv, f"python -m {module}")
    from tasks.cli.command_line import parse_arguments
    from tasks.io.storage import check_root

    holder, model = config.split(":")
    try:
        config_type = getattr(importlib.import_module(holder), model)
        settings, debug = parse_arguments(config_type, argv, prog=f"python -m {module}")
        check_root(settings.root)
    except InputError as fault:
        print(f"error: {one_sentence(fault)}", file=sys.stderr)
        return WRONG_ARGUMENTS
    except PipelineError as fault:
        print(f"error: {one_sentence(fault)}", file=sys.stderr)
        return FAILED
    started = time.monotonic()
    try:
        with _quiet_failures(debug):
            from tasks.local_api import local_stack

            with local_stack():
                from prefect import tags

                flow = getattr(importlib.import_module(module), name)
                with tags(flow.name, "by hand"):
                    result = flow(settings)
    except Exception as fault:
        if debug or stopped:
            raise
        published = f"; before that, {_published(earlier)}" if len(_commits()) > earlier else ""
        # On a line of its own: Prefect ends some of its messages without a line break.
        print(f"\nfailed: {one_sentence(fault)}{published}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(_own(fault), ConfigError) else FAILED
    print(summary(result))
    print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


def _commits() -> Sequence[Any]:
    """Return the versions that this process has begun to commit; none before the module that does it is imported."""
    publication = sys.modules.get("tasks.publication")
    return getattr(publication, "COMMITTING", ())


def _published(earlier: int) -> str:
    """Describe which of this run's versions readers see, by the store."""
    told = []
    for judged in _commits()[earlier:]:
        manifest = judged.manifest
        name = f"{manifest.dataset} v{manifest.version}"
        try:
            from tasks.publication import is_published

            if is_published(judged):
                told.append(name)
        except Exception as fault:  # noqa: BLE001 - the store itself may have failed
            told.append(f"perhaps {name} (the store doesn't say: {one_sentence(fault)})")
    verb = "was" if len(told) == 1 else "were"
    return f"{' and '.join(told)} {verb} published, nothing else" if told else "nothing was published"


def one_sentence(fault: BaseException) -> str:
    """Return a failure as one sentence: our error if one is among the causes, else the last line of the fault."""
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
    """Describe the published versions for a person: location, verdict, rows, balances and report."""
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
    """Return the first of our errors in a chain of causes."""
    for link in causes(fault, contexts=True):
        for own in (getattr(link, "cause", None), link):  # Ray's error is also of its class, but has a traceback
            if isinstance(own, PipelineError):
                return own
    return None


def _lost_api(fault: BaseException | None) -> BaseException | None:
    """Return the first connection error to Prefect's API, which only Prefect's client raises."""
    names = {"TransportError", "ConcurrencySlotAcquisitionError"}
    return next(
        (link for link in causes(fault, contexts=True) if names & {kind.__name__ for kind in type(link).__mro__}), None
    )


@contextmanager
def _quiet_failures(debug: bool) -> Iterator[None]:
    """Without --debug, keep text that the one sentence repeats off the console; the API gets all of it."""
    if debug:
        yield
        return
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
    import prefect.main  # noqa: F401 - sets logging up: before, there is no console to put a filter on
    from prefect.settings import PREFECT_API_URL

    # The page of an embedded server no longer exists when somebody opens it.
    left_out = _TOLD_ONCE if PREFECT_API_URL.value() else (*_TOLD_ONCE, "View at ")

    def for_a_person(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        message = record.getMessage()
        record.msg, record.args = _STATE_DETAILS.sub(r"\1", message), ()
        return not message.startswith(left_out)

    # On the handlers, not the loggers: those also feed the API. The API's handler comes first, so it gets every record.
    consoles = logging.getLogger().handlers[:]
    for console in consoles:
        console.addFilter(for_a_person)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(for_a_person)
