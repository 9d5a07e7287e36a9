"""The command that makes some rows of a version again and compares: is the version what its manifest says?

manifest ─ inputs by fingerprint, configuration, seed, declaration ─ the rows again ─ compare ─ ok, or why not
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tasks.audit.replay_causes import digest_now, other_libraries
from tasks.audit.replay_rows import Answer, Cause, Replayed
from tasks.core import layout, storage
from tasks.core.errors import InputError
from tasks.core.manifest import Manifest
from tasks.core.numerals import plural
from tasks.core.reading import data_files, read_manifest
from tasks.serving.catalogue import find_dataset
from tasks.serving.tables import as_json, facts, show

SHOWN = 20
"""Rows that differ, of which the text says more; the JSON has all of them."""
ALARM = Cause("nondeterminism", "nothing explains it: nondeterminism")

Replayer = Callable[[str, Manifest, int, int], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer about one version; code: digests (then, now); libraries: name → (then, now), of those that differ."""

    dataset: str
    version: int
    seed: int
    answer: Answer
    code: tuple[str, str]
    libraries: Mapping[str, tuple[str, str]]

    @property
    def causes(self) -> tuple[Cause, ...]:
        """All that is otherwise than it was when the version was made."""
        found = list(self.answer.causes)
        if self.code[0] != self.code[1]:
            found.append(Cause("code", f"the code isn't the same ({_codes(self.code)})"))
        named = ", ".join(f"{name} {then} → {now}" for name, (then, now) in self.libraries.items())
        return (*found, *([Cause("library", f"libraries aren't the same ({named})")] if named else []))

    def reasons(self, one: Replayed) -> tuple[Cause, ...]:
        """Why something differs; the alarm, if one of its differences is explained by nothing."""
        known = (*one.causes, *self.causes)
        columns = [difference.column for difference in one.differences]
        reasons = [cause for cause in known if any(_explains(cause, column) for column in columns)]
        explained = all(any(_explains(cause, column) for cause in known) for column in columns)
        return (*reasons, *([] if explained else [ALARM]))

    @property
    def differing(self) -> tuple[Replayed, ...]:
        """What isn't as it is stored."""
        return tuple(one for one in self.answer.replayed if one.differences)

    @property
    def ok(self) -> bool:
        """Whether everything is as it is stored, and every stored file that was read as the manifest says."""
        return not self.differing and not self.answer.altered

    @property
    def sentence(self) -> str:
        """What made them again, and with what outcome."""
        outcome = "the same" if not self.differing else "not the same"
        parts = []
        if self.code[0] != self.code[1]:
            parts.append(f"made again by other code ({_codes(self.code)}): {outcome}")
        if self.libraries:
            pairs = ", ".join(f"{name} {then} → {now}" for name, (then, now) in self.libraries.items())
            parts.append(f"made again with other libraries ({pairs}): {outcome}")
        return "; ".join(parts) or "code and libraries are the same"

    def as_values(self) -> dict[str, Any]:
        """Everything, for programs."""
        rows = [
            {
                "name": one.name,
                "file": one.file,
                "outcome": "differs" if one.differences else "ok",
                "differences": [asdict(difference) for difference in one.differences],
                "reasons": [_said(cause) for cause in self.reasons(one)],
            }
            for one in self.answer.replayed
        ]
        return {
            "dataset": self.dataset,
            "version": self.version,
            "outcome": "ok" if self.ok else "differs",
            "seed": self.seed,
            "unit": self.answer.unit,
            "total": self.answer.total,
            "replayed": len(rows),
            "differing": len(self.differing),
            "made_by": self.sentence,
            "code": {"then": self.code[0], "now": self.code[1]},
            "libraries": {name: {"then": then, "now": now} for name, (then, now) in self.libraries.items()},
            "changed": [_said(cause) for cause in self.answer.causes],
            "altered": [cause.text for cause in self.answer.altered],
            "notes": list(self.answer.notes),
            "rows": rows,
        }


def replay(arguments: Namespace) -> int:
    """Make some rows of a version again, compare them, and print what was found.

    Returns:
        0 if all of them are the same, 1 if not.

    """
    root = storage.normalise(arguments.root)
    dataset = find_dataset(root, arguments.name)
    verdict = replayed(root, read_manifest(root, dataset, arguments.version), arguments.sample, arguments.seed)
    if arguments.json:
        print(as_json(verdict.as_values()))
    else:
        _print(verdict)
    return 0 if verdict.ok else 1


def replayed(root: str, manifest: Manifest, sample: int, seed: int) -> Verdict:
    """Make some rows of a version again, and compare them.

    Args:
        root: Root of the store.
        manifest: The version's.
        sample: Number of rows, images or samples; all of them, if there are no more.
        seed: Decides which.

    Raises:
        VersionNotFound: the gate rejected the version, so that it has no data.
        InputError: the dataset is of no kind that can be made again.
        ConfigError: this code can't use the version's configuration.
        CorruptVersion: a stored file has the right digest and can't be read.

    """
    data_files(root, manifest)
    answer = _replayer(manifest)(root, manifest, sample, seed)
    return Verdict(
        dataset=manifest.dataset,
        version=manifest.version,
        seed=seed,
        answer=answer,
        code=(manifest.code_digest, digest_now(manifest)),
        libraries=other_libraries(manifest),
    )


def _replayer(manifest: Manifest) -> Replayer:
    match layout.kind(manifest.dataset):
        case "images":
            from tasks.audit.replay_images import replay_images

            return replay_images
        case "features":
            from tasks.audit.replay_features import replay_features

            return replay_features
        case "training-set":
            from tasks.audit.replay_training import replay_training_set

            return replay_training_set
        case "streaming-copy":
            from tasks.audit.replay_copies import replay_copy

            return replay_copy
        case kind:
            raise InputError(
                f"{manifest.dataset} is of no kind that is known here ({kind}); replay features, training sets, images "
                "or streaming-ready copies"
            )


def _explains(cause: Cause, column: str) -> bool:
    return not cause.columns or column in cause.columns


def _codes(code: tuple[str, str]) -> str:
    return f"{code[0][:12]} then, {code[1][:12]} now"


def _said(cause: Cause) -> dict[str, str]:
    return {"kind": cause.kind, "text": cause.text}


def _print(verdict: Verdict) -> None:
    answer, differing = verdict.answer, verdict.differing
    facts(
        {
            "dataset": f"{verdict.dataset} v{verdict.version}",
            "replayed": f"{len(answer.replayed):,} of {plural(answer.total, answer.unit)}, seed {verdict.seed}",
            "ok": f"{len(answer.replayed) - len(differing):,}",
            "differ": f"{len(differing):,}",
            "made by": verdict.sentence,
        }
    )
    for heading, lines in (
        ("changed since", [cause.text for cause in answer.causes]),
        ("altered", [cause.text for cause in answer.altered]),
        ("note", answer.notes),
    ):
        for line in lines:
            print(f"{heading}: {line}")
    if not differing:
        return
    print()
    show(
        [answer.unit.upper(), "COLUMN", "STORED", "MADE AGAIN", "MORE"],
        [_row_of(one) for one in differing[:SHOWN]],
    )
    if len(differing) > SHOWN:
        print(f"and {len(differing) - SHOWN:,} more; --json has all of them")
    print()
    counts = Counter(cause.text for one in differing for cause in verdict.reasons(one))
    show(["REASON", answer.unit.upper() + "S"], counts.most_common(), right=(answer.unit.upper() + "S",))


def _row_of(one: Replayed) -> tuple[object, ...]:
    """The first difference, and how many there are besides."""
    first, *others = one.differences
    name = first.row or one.name
    return name, first.column, first.stored, first.rebuilt, f"{len(others)} more" if others else ""
