"""The commands `explain`, `replay` and `self-test` on published versions.

The origin of a row, its treatment and its present holders: neither Ray nor Prefect is started, and no version is read
as a whole: a row is found by the partition of its version and the smallest and largest keys in the footers of its
files.

Some rows of a version made again and compared with the stored ones:

    manifest ─ inputs by fingerprint, configuration, seed, declaration ─ the rows again ─ compare ─ ok, or why not

Faults in a sample of a version, judged by its gate.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.audit.explanation import Explanation
from tasks.audit.inputs import Cause
from tasks.audit.replay_rows import Again, Replayed, choose
from tasks.io import storage
from tasks.io.errors import ConfigError
from tasks.io.text import as_json, facts, plural, show
from tasks.kinds import kind_of
from tasks.quality.faults import ORDER, blind, summary, unproven
from tasks.store import layout
from tasks.store.catalogue import find_dataset
from tasks.store.lineage import package_versions
from tasks.store.manifest import Manifest
from tasks.store.reading import data_files, first_live, read_manifest, resolve
from tasks.store.reservation import version_numbers

PICTURES = (".png", ".webp")
STEP_OPTIONS = (
    *("state", "epoch", "step", "rank", "world_size", "seed", "batch_size", "transform", "mixup", "cutmix"),
)


def explain(arguments: argparse.Namespace) -> int:
    """Run the command `explain`.

    Args:
        arguments: name, version, key, at, picture, json, root; and, for what a step saw, those of `Asked`.

    Raises:
        ConfigError: the arguments contradict each other, or the key is invalid.
        InputError: the version neither has nor rejected such a row, or there is no such step.
        VersionNotFound: there is no such version.
    """
    root, picture = storage.normalise(arguments.root), arguments.picture
    manifest = read_manifest(root, find_dataset(root, arguments.name), arguments.version)
    if picture is not None and not picture.lower().endswith(PICTURES):
        raise ConfigError(f"--picture {picture}: give a name that ends with {' or '.join(PICTURES)}")
    if arguments.key is None:
        return _shown(_step(root, manifest, arguments), arguments)
    for name in STEP_OPTIONS:
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for what a step saw, not for the row of a key; leave it out"
            )
    kind = kind_of(manifest.dataset)
    if picture is not None and kind.option != "picture":
        rows = layout.kind(manifest.dataset).replace("-", " ")
        raise ConfigError(
            f"--picture shows images, and {manifest.dataset} holds {rows} rows; leave it out, or name a dataset of "
            "images"
        )
    if arguments.at is not None and kind.option != "at":
        raise ConfigError("--at names a time, and images have none; leave it out")
    return _shown(kind.explain(root, manifest, arguments.key, getattr(arguments, kind.option)), arguments)


def _step(root: str, manifest: Manifest, arguments: argparse.Namespace) -> Explanation:
    """Explain what a step of a training saw."""
    asked = {name: value for name in STEP_OPTIONS if (value := getattr(arguments, name)) is not None}
    if layout.kind(manifest.dataset) != "streaming-copy":
        rows = layout.kind(manifest.dataset).replace("-", " ")
        if asked:
            raise ConfigError(f"{manifest.dataset} holds {rows} rows, and trainings take steps of streaming copies")
        raise ConfigError(f"name the KEY of a row of {manifest.dataset}, such as the entity's")
    if not asked.keys() & {"state", "epoch", "step"}:
        raise ConfigError("name the KEY of a row, or the place of a step with --state FILE, or with --epoch and --step")
    if arguments.at is not None:
        raise ConfigError("--at names a time of a row, and a step has none; leave it out")
    from tasks.audit.steps import Asked, explain_step

    data_files(root, manifest)  # raises if the gate rejected the version
    return explain_step(root, manifest, Asked(picture=arguments.picture, **asked))


def _shown(found: Explanation, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(found.to_json())
    else:
        found.show()
    return 0


SHOWN = 20
"""Number of differing rows that the text shows; the JSON has all of them."""
ALARM = Cause("nondeterminism", "nothing explains it: nondeterminism")
OWN_PACKAGE = "training-data-pipelines"
"""This project: its code is compared by digest, which is more precise than its version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer about one version.

    Attributes:
        again: The version, and the causes and notes of its replay.
        seed: Seed of the sample.
        replayed: Rows, images or samples that were made again.
        code: Digests of the code, then and now.
        libraries: Name → versions then and now, of those that differ.
    """

    again: Again
    seed: int
    replayed: Sequence[Replayed]
    code: tuple[str, str]
    libraries: Mapping[str, tuple[str, str]]

    @property
    def other_code(self) -> str:
        """Digests of the code in words; empty if they are the same."""
        then, now = self.code
        return "" if then == now else f"{then[:12]} then, {now[:12]} now"

    @property
    def other_libraries(self) -> str:
        """Versions of the libraries that differ in words; empty if none does."""
        return ", ".join(f"{name} {then} → {now}" for name, (then, now) in self.libraries.items())

    def reasons(self, one: Replayed) -> tuple[Cause, ...]:
        """Return the causes of some differences; the alarm, if one of them is unexplained."""
        known = [*one.causes, *self.again.causes]
        if self.other_code:
            known.append(Cause("code", f"the code isn't the same ({self.other_code})"))
        if self.other_libraries:
            known.append(Cause("library", f"libraries aren't the same ({self.other_libraries})"))
        explained = {
            column: [cause for cause in known if not cause.columns or column in cause.columns]
            for column in (difference.column for difference in one.differences)
        }
        reasons = [cause for cause in known if any(cause in own for own in explained.values())]
        return (*reasons, *([] if all(explained.values()) else [ALARM]))

    @property
    def differing(self) -> tuple[Replayed, ...]:
        """Rows, images or samples that differ from the stored ones."""
        return tuple(one for one in self.replayed if one.differences)

    @property
    def ok(self) -> bool:
        """True if everything equals what is stored, and every stored file that was read matches the manifest."""
        return not self.differing and not self.again.stored.altered

    @property
    def sentence(self) -> str:
        """Code and libraries that made them again, and the outcome."""
        outcome = "the same" if not self.differing else "not the same"
        parts = []
        if self.other_code:
            parts.append(f"made again by other code ({self.other_code}): {outcome}")
        if self.other_libraries:
            parts.append(f"made again with other libraries ({self.other_libraries}): {outcome}")
        return "; ".join(parts) or "code and libraries are the same"

    def as_values(self) -> dict[str, Any]:
        """Return everything, for programs."""
        rows = [
            {
                "name": one.name,
                "file": one.file,
                "outcome": "differs" if one.differences else "ok",
                "differences": [asdict(difference) for difference in one.differences],
                "reasons": [_said(cause) for cause in self.reasons(one)],
            }
            for one in self.replayed
        ]
        return {
            "dataset": self.again.manifest.dataset,
            "version": self.again.manifest.version,
            "outcome": "ok" if self.ok else "differs",
            "seed": self.seed,
            "unit": self.again.unit,
            "total": self.again.total,
            "replayed": len(rows),
            "differing": len(self.differing),
            "made_by": self.sentence,
            "code": {"then": self.code[0], "now": self.code[1]},
            "libraries": {name: {"then": then, "now": now} for name, (then, now) in self.libraries.items()},
            "changed": [_said(cause) for cause in self.again.causes],
            "altered": [cause.text for cause in self.again.stored.altered],
            "notes": list(self.again.notes),
            "rows": rows,
        }


def replay(arguments: Namespace) -> int:
    """Make some rows of a version again, compare them, and print the outcome.

    Args:
        arguments: name, version, sample, seed, json, root.

    Returns:
        0 if all of them are the same, 1 if not.

    Raises:
        VersionNotFound: there is no such version, or the gate rejected it, so that it has no data.
        InputError: the dataset's kind can't be made again.
        ConfigError: this code can't use the version's configuration.
        CorruptVersion: a stored file has the right digest and can't be read.
    """
    root = storage.normalise(arguments.root)
    manifest = read_manifest(root, find_dataset(root, arguments.name), arguments.version)
    data_files(root, manifest)
    kind = kind_of(manifest.dataset)
    again = kind.again(root, manifest)
    verdict = Verdict(
        again=again,
        seed=arguments.seed,
        replayed=again.replay(choose(again.total, arguments.sample, arguments.seed)),
        code=(manifest.code_digest, kind.digest(manifest.definition)),
        libraries=other_libraries(manifest),
    )
    if arguments.json:
        print(as_json(verdict.as_values()))
    else:
        _print(verdict)
    return 0 if verdict.ok else 1


def other_libraries(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Compare the libraries with the manifest: return name → (then, now) of those that differ."""
    now = package_versions()
    then = {name: version for name, version in manifest.packages.items() if name != OWN_PACKAGE}
    return {
        name: (version, now.get(name, "not recorded")) for name, version in then.items() if now.get(name) != version
    }


def _said(cause: Cause) -> dict[str, str]:
    return {"kind": cause.kind, "text": cause.text}


def _print(verdict: Verdict) -> None:
    again, differing, count = verdict.again, verdict.differing, len(verdict.replayed)
    facts(
        {
            "dataset": str(again.manifest),
            "replayed": f"{count:,} of {plural(again.total, again.unit)}, seed {verdict.seed}",
            "ok": f"{count - len(differing):,}",
            "differ": f"{len(differing):,}",
            "made by": verdict.sentence,
        }
    )
    for heading, lines in (
        ("changed since", [cause.text for cause in again.causes]),
        ("altered", [cause.text for cause in again.stored.altered]),
        ("note", again.notes),
    ):
        for line in lines:
            print(f"{heading}: {line}")
    if not differing:
        return
    print()
    show(
        [again.unit.upper(), "COLUMN", "STORED", "MADE AGAIN", "MORE"],
        [_row_of(one) for one in differing[:SHOWN]],
    )
    if len(differing) > SHOWN:
        print(f"and {len(differing) - SHOWN:,} more; --json has all of them")
    print()
    counts = Counter(cause.text for one in differing for cause in verdict.reasons(one))
    show(["REASON", again.unit.upper() + "S"], counts.most_common(), right=(again.unit.upper() + "S",))


def _row_of(one: Replayed) -> tuple[object, ...]:
    """Return the first difference, and the number of the others."""
    first, *others = one.differences
    name = first.row or one.name
    return name, first.column, first.stored, first.rebuilt, f"{len(others)} more" if others else ""


def self_test(arguments: Namespace) -> int:
    """Test the gate of one version.

    Returns:
        0 if no fault is blind, 1 otherwise.

    Raises:
        VersionNotFound: there is no such version.
        InputError: it can't be tested: it is of no known kind, or this code can't use its configuration.
    """
    root = storage.normalise(arguments.root)
    manifest = resolve(root, find_dataset(root, arguments.name), arguments.version or "latest")
    earlier = [number for number in version_numbers(root, manifest.dataset) if number < manifest.version]
    previous = first_live(root, manifest.dataset, earlier[::-1])
    results = kind_of(manifest.dataset).self_test(root, manifest, previous)
    unseen, checks = blind(results), unproven(manifest.gate, results)
    if arguments.json:
        faults = [result.model_dump(mode="json") for result in results]
        answer = {"faults": faults, "blind": unseen, "unproven": checks}
        print(as_json({"dataset": manifest.dataset, "version": manifest.version, **answer}))
        return 1 if unseen else 0
    rows = [
        (one.outcome, one.fault, one.injected, ", ".join(one.caught_by[:2]), one.message)
        for one in sorted(results, key=lambda result: ORDER[result.outcome])
    ]
    show(["OUTCOME", "FAULT", "INJECTED", "NOTICED BY", "IN WORDS"], rows)
    print(f"\n{manifest}: {summary(results)}")
    if checks:
        print(f"checks that no fault made worse: {', '.join(checks)}")
    return 1 if unseen else 0
