"""Commands about the store, such as `python -m flows.feature_store get NAME KEY…`.

Every flow's module accepts these commands: they work on datasets of all kinds.

Exit codes: 0 done, 1 not found or refused (one sentence on stderr, with the cure), 2 wrong arguments. Nothing here
starts Ray or Prefect, and each command imports what it needs.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tasks.io.errors import FAILED, WRONG_ARGUMENTS, ConfigError, InputError, PipelineError

PROG = "python -m flows.feature_store"

Arguments = argparse.Namespace
Command = Callable[[Arguments], int]
Added = Callable[[str, Command, str], argparse.ArgumentParser]


def run(argv: Sequence[str], prog: str = PROG) -> int:
    """Run one command and print its answer to stdout.

    Args:
        argv: The command and its arguments.
        prog: Name of the program, for help and errors.

    Returns:
        The exit code.
    """
    try:
        arguments = _parser(prog).parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        result: int = arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        sys.stderr.close()
        return 0
    except InputError as fault:
        return _complain(fault, WRONG_ARGUMENTS if isinstance(fault, ConfigError) else FAILED)
    except PipelineError as fault:
        return _complain(fault, FAILED)
    except (ConnectionError, TimeoutError, OSError) as fault:
        return _complain(fault, FAILED)
    return result


def _complain(fault: BaseException, code: int) -> int:
    notes = "".join(f" ({note})" for note in getattr(fault, "__notes__", ()))
    from tasks.io.text import printable

    text = " ".join(f"{fault}{notes}".split()) or type(fault).__name__
    print(f"error: {printable(text)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line, with the closest command."""

    def error(self, message: str) -> NoReturn:
        close: list[str] = []
        if "invalid choice: " in message:
            given = message.partition("invalid choice: '")[2].partition("'")[0]
            known = [name for action in self._subparsers._group_actions for name in action.choices or ()]  # type: ignore[union-attr]
            close = difflib.get_close_matches(given, known, n=1)
            message = f"no command is named '{given}'"
            message += "" if close else f"; there are {', '.join(known)}"
        cure = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        self.exit(WRONG_ARGUMENTS, f"error: {message}; {cure}\n")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Ask what is in the store, look values up, compare, withdraw, prune.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--root", default="data", help="Root of the store, a path or s3:// (default: data).")
        added.add_argument("--json", action="store_true", help="Answer in JSON, for programs.")
        added.set_defaults(command=function)
        return added

    _looking(command)
    _auditing(command)
    _keeping(command)
    return parser


def _looking(command: Added) -> None:
    from tasks.cli import store_commands as look

    command("list", look.list_datasets, "Every dataset, with its latest version.")
    describe = command("describe", look.describe, "What a dataset holds: versions, times, columns, origin.")
    _name(describe)
    _version(describe, "version", nargs="?", help="Version to describe, such as v3 (default: the latest).")
    get = command("get", look.get, "The newest features of some entities.")
    _name(get, "Feature group, such as customer-features.")
    get.add_argument("keys", metavar="KEY", nargs="+", help="Keys of entities.")
    get.add_argument("--features", metavar="A,B", help="Features to show (default: all).")
    _version(get, "--version", help="Version to look up in (default: the one with the newest as-of time).")
    _ttl(get, "Values older than this are none, and told as expired (default: any age).")
    get.add_argument("--redis", metavar="URL", help="Read what was exported to this Redis server.")
    diff = command("diff", look.diff, "What differs between two versions.")
    _name(diff)
    _version(diff, "before", help="Earlier version, such as v1.")
    _version(diff, "after", help="Later version, such as v2.")
    command("watermarks", look.watermarks, "How far each feature group has come.")
    lineage = command("lineage", look.lineage, "What a version was made from, back to the source files.")
    _name(lineage)
    _version(lineage, "version", nargs="?", help="Version (default: the latest).")
    lineage.add_argument("--mermaid", action="store_true", help="As a Mermaid flowchart.")


def _auditing(command: Added) -> None:
    replay = command("replay", _replay, "Make some rows of a version again, and compare: is it what its manifest says?")
    _name(replay)
    _version(replay, "version", help="Version to replay, such as v3.")
    replay.add_argument("--sample", type=_count, default=100, metavar="K", help="Rows to make again (default: 100).")
    replay.add_argument("--seed", type=int, default=0, metavar="N", help="Which rows: of another seed others.")
    explain = command("explain", _explain, "Where a row comes from, what was done to it, and who has it now.")
    _name(explain)
    _version(explain, "version", help="Version that has the row, such as v3.")
    explain.add_argument("key", metavar="KEY", nargs="?", help="Image id, or key of the row's entity.")
    explain.add_argument("--at", metavar="TIME", help="Time of the row, where an entity has several (ISO 8601, UTC).")
    explain.add_argument(
        "--picture",
        metavar="FILE",
        help="Write an image before and after, or the images of a step, as a picture, .png or .webp.",
    )
    step = explain.add_argument_group("what a step of a training on a streaming copy saw, instead of a row")
    step.add_argument(
        "--state", metavar="FILE", help="Saved state_dict() of the stream, JSON: the batch that follows it."
    )
    step.add_argument("--epoch", type=int, metavar="N", help="Epoch, from 0 (default: of the state, else 0).")
    step.add_argument(
        "--step", type=int, metavar="N", help="Step in the epoch, from 0 (default: after the state, else 0)."
    )
    step.add_argument("--rank", type=int, metavar="N", help="Worker whose batch is shown (default: 0).")
    step.add_argument("--world-size", type=int, metavar="N", help="Workers (default: of the training; with a state 1).")
    step.add_argument("--seed", type=int, metavar="N", help="Seed of the order (default: of the last training).")
    step.add_argument("--batch-size", type=int, metavar="N", help="Samples of a batch (default: of the last training).")
    step.add_argument(
        "--transform", metavar="T", help="The stream's transform: package.module:name, or an Augmentation as JSON."
    )
    for name in ("mixup", "cutmix"):
        step.add_argument(
            f"--{name}", type=float, metavar="A", help="The stream's alpha (default: of the state, else none)."
        )
    test = command("self-test", _self_test, "Inject faults into a sample of a version: which does the gate notice?")
    _name(test)
    _version(test, "version", nargs="?", help="Version (default: the latest).")


def _keeping(command: Added) -> None:
    from tasks.cli import store_commands as keep

    plan = command("plan", keep.plan, "What changed definitions would compute again, and which models they break.")
    plan.add_argument("--definitions", metavar="FILE", help="The changed definitions (.py, .yaml).")
    plan.add_argument("--models", metavar="FILE", help="Models that read the store (.py, .yaml).")
    plan.add_argument("--force", action="store_true", help="Exit with 0 although models break.")
    rollback = command("rollback", keep.rollback, "Withdraw a version: readers get the one before; no data is changed.")
    _name(rollback)
    _version(rollback, "version", help="Version to withdraw, such as v3.")
    rollback.add_argument("--reason", default="rolled back by hand", help="Why, for those who ask later.")
    rollback.add_argument("--force", action="store_true", help="Also where no version is left to readers.")
    prune = command("prune", keep.prune, "Delete versions; without --yes only show which. What is in use stays.")
    _name(prune, nargs="?", text="Dataset (default: all of them).")
    prune.add_argument("--keep", type=int, metavar="N", help="Live versions that stay, from the newest.")
    prune.add_argument("--older-than", metavar="AGE", help="Only what is older, such as 90d, 12h or 4w.")
    prune.add_argument("--yes", action="store_true", help="Delete.")
    export = command("export", keep.export, "Write a group's newest values to Redis, or a streaming copy as MDS.")
    _name(export, "Feature group, such as customer-features; with --mds a streaming copy.")
    target = export.add_mutually_exclusive_group(required=True)
    target.add_argument("--redis", metavar="URL", help="Server for look-ups, such as redis://localhost:6379/0.")
    target.add_argument("--mds", metavar="DIR", help="New directory, local or on S3, for MosaicML's StreamingDataset.")
    export.add_argument("--split", default="train", help="Split of the copy to export (default: train).")
    export.add_argument("--compression", choices=["zstd"], help="Compression of the MDS shards (default: none).")
    _ttl(export, "Days after its as-of time at which Redis drops a row (default: never).")


def _replay(arguments: Arguments) -> int:
    from tasks.cli.audit_commands import replay

    return replay(arguments)


def _explain(arguments: Arguments) -> int:
    from tasks.cli.audit_commands import explain

    return explain(arguments)


def _self_test(arguments: Arguments) -> int:
    from tasks.cli.audit_commands import self_test

    return self_test(arguments)


def _name(
    parser: argparse.ArgumentParser, text: str = "Dataset, by its name or the last part of it.", **more: Any
) -> None:
    parser.add_argument("name", metavar="NAME", help=text, **more)


def _version(parser: argparse.ArgumentParser, name: str, **more: Any) -> None:
    parser.add_argument(name, metavar="vN", type=_number, **more)


def _ttl(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--ttl-days", type=float, metavar="DAYS", help=text)


def _number(text: str) -> int:
    from tasks.store.layout import version_number

    try:
        return version_number(text)
    except ConfigError as fault:
        raise argparse.ArgumentTypeError(str(fault)) from fault


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of rows; write it as 100")
    return int(text)
