"""Exceptions of the project, all in one tree.

PipelineError
├── InputError (also ValueError)          wrong input from the user; a retry can't help
│   ├── ConfigError                       a setting: names the field, the value and the cure
│   ├── SourceError                       a source: missing, empty, unreadable, wrong columns
│   └── DefinitionError                   a feature-group or mapping file that can't be used
├── GateFailed                            the quality gate refused the data; nothing was published
├── BalanceError                          rows vanished or appeared: in ≠ out + rejected + filtered + deduplicated
├── LeakFound                             the output changed when a row from the future was added
├── ResourceError                         a machine has too little room for the work; more room helps, a retry doesn't
│   ├── DiskFull (also OSError)           no room, or no quota, for a file
│   └── WorkersKilled                     a task's worker died at each of several tries, mostly for want of memory
├── VersionNotFound (also LookupError)    no such published version
├── CredentialsRefused                    the store doesn't accept the credentials: expired, unknown or missing
├── VersionConflict                       another publisher holds or has committed this version
│   └── Superseded                        another publisher went on first from the version that this one began from
└── CorruptVersion                        a published file is missing or differs from its manifest
    └── DamagedManifest                   a manifest was read and is none: readers pass its version over

Anything else that reaches the user is a fault of the environment (network, disk, a lost worker) or of ours.
"""

from __future__ import annotations

from collections.abc import Iterator

FAILED, WRONG_ARGUMENTS = 1, 2
"""Exit codes of a command: for a failed run, and for unusable input."""


class PipelineError(Exception):
    """Base of every error that this project raises on purpose."""


class InputError(PipelineError, ValueError):
    """Unusable input from the user; trying again can't help."""


class ConfigError(InputError):
    """Wrong setting."""


class SourceError(InputError):
    """Source table that is missing, empty, unreadable or has the wrong columns."""


class DefinitionError(InputError):
    """Unusable feature-group or mapping definition."""


class GateFailed(PipelineError):
    """The quality gate refused the data; nothing was published."""


class BalanceError(PipelineError):
    """Rows that vanished or appeared between input and output."""


class LeakFound(PipelineError):
    """The output changed when a row from the future was added."""


class ResourceError(PipelineError):
    """A machine has too little room for the work."""


class DiskFull(ResourceError, OSError):
    """There is no room, or no quota, for a file."""


class WorkersKilled(ResourceError):
    """A task's worker died at each of several tries."""


class VersionNotFound(PipelineError, LookupError):
    """No such version is published."""


class CredentialsRefused(PipelineError):
    """The store doesn't accept the credentials: they have expired, or are unknown or missing."""


class VersionConflict(PipelineError):
    """Another publisher holds or has committed this version."""


class Superseded(VersionConflict):
    """Another publisher went on first from the version that this one began from."""


class CorruptVersion(PipelineError):
    """A published file is missing or differs from its manifest."""


class DamagedManifest(CorruptVersion):
    """Complete but invalid manifest: cut short, altered, or another version's."""


def causes(error: BaseException | None, *, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error, the error that Ray carried from a worker, and the error's causes, each once.

    Args:
        error: The outermost error.
        contexts: Follow also errors that were being handled, if no cause is named.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        handled = link.__context__ if contexts and not link.__suppress_context__ else None
        carried = getattr(link, "cause", None)  # of Ray's RayTaskError
        waiting += [link.__cause__ or handled, carried if isinstance(carried, BaseException) else None]
