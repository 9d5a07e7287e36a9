"""Kind of dataset: one object with all that the shared programs need from it.

A new kind is a folder with a `kind.py`, which assigns `KIND`, and a line in `layout.KINDS`. Publication, self-test,
report, replay and explain are the same programs for all kinds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tasks.audit.explanation import Explanation
from tasks.audit.replay_rows import Again
from tasks.quality.faults import Trial
from tasks.store.lineage import job_digest
from tasks.store.manifest import FaultResult, GateResult, Manifest
from tasks.store.settings import Settings, config_of

Config = TypeVar("Config", bound=Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[Config]):
    """Kind of dataset.

    Attributes:
        config: Model of the configuration that a version is made with.
        code: Packages whose code makes a version, besides the shared ones.
        undeclared: Entries of a version's definition that aren't declared by the user; None if none of it is declared.
        judge: The gate: function that judges figures by the configuration, against the last published version if there
            is one.
        trial: Function that samples a version for the self-test of its gate: its faults, and how each is judged. It
            takes the root of the store, the manifest, the configuration, and the version to compare with; it raises
            InputError if the version can't be tested. The version need not be committed.
        again: Class that makes rows again and compares them.
        explain: Function that explains a row's origin, treatment and holders. It takes the root of the store,
            the manifest, the key as it was typed, and the value of `option`; raises InputError if the version has no
            such row and has rejected none, and ConfigError if the key or the value is invalid.
        option: Argument that may be given beside a key: `at`, the time of a row, or `picture`, a file to draw to.
        cures: Advice about a failed check, by the check's name.
    """

    config: type[Config]
    code: tuple[str, ...]
    undeclared: tuple[str, ...] | None = None
    judge: Callable[[Config, Any, Manifest | None], GateResult]
    trial: Callable[[str, Manifest, Config, Manifest | None], Trial[Any]]
    again: Callable[[str, Manifest], Again]
    explain: Callable[[str, Manifest, str, str | None], Explanation]
    option: str = "at"
    cures: Mapping[str, str] = field(default_factory=dict)

    def digest(self, definition: Mapping[str, Any]) -> str:
        """Return the digest of the present code that makes a version, and of the user's declaration."""
        extra = ""
        if self.undeclared is not None:
            declared = {name: value for name, value in definition.items() if name not in self.undeclared}
            extra = hashlib.sha256(json.dumps(declared, sort_keys=True).encode()).hexdigest()
        return job_digest(*self.code, extra=extra)

    def self_test(self, root: str, manifest: Manifest, previous: Manifest | None) -> tuple[FaultResult, ...]:
        """Inject faults into a sample of a version, by its manifest's configuration, and judge each.

        Raises:
            ConfigError: this code can't use the version's configuration.
            InputError: the version can't be tested.
        """
        return self.trial(root, manifest, config_of(self.config, manifest), previous).results()
