"""The quality gate of a streaming-ready copy. Pure: figures in, verdict out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.delivery.config import DeliveryConfig
from tasks.delivery.keys import SPLITS
from tasks.delivery.shuffle import NOT_READY, CopyFigures
from tasks.io.text import number, plural
from tasks.quality import rules
from tasks.store.manifest import CheckResult, GateResult, Manifest, Verdict

NAMED = 5


def judge_copy(config: DeliveryConfig, copy: CopyFigures, previous: Manifest | None) -> GateResult:
    """Judge a written copy.

    Against the last published version, a change of the source columns of features, of the label or of the shape
    of images fails unless it is allowed: a model can't be trained on both. Other columns of the matrix, as new
    categories bring them, and other classes or block sizes warn.
    """
    bounds = config.thresholds
    columns = copy.profile.columns()
    label = copy.definition["label"]
    label_column = None if label is None else label["column"]
    features = dict.fromkeys(feature["column"] for feature in copy.definition.get("features", ()))
    checks: list[CheckResult] = [_rows(copy, bounds.minimum_samples)]
    checks += _splits(config, copy)
    checks += [rules.check_balance(balance) for balance in copy.balances]
    checks += [
        rules.check_rejected_share(balance, bounds.rejected_warn, bounds.rejected_fail) for balance in copy.balances
    ]
    checks += [rules.check_unique("sample_id", copy.duplicate_ids), _repeats(copy), _leak(copy)]
    checks += [rules.check_nulls(name, columns[name], bounds.missing_warn, bounds.missing_fail) for name in features]
    if features:
        checks.append(_constants(copy.definition["features"]))
    if copy.class_counts:
        checks += _classes(config, copy)
    elif label_column is not None and columns[label_column].std == 0:
        message = f"{label_column} is {number(columns[label_column].mean or 0.0)} in every row: nothing can be learned."
        checks.append(_check("target", label_column, ("fail", 0.0, "> 0"), message))
    if previous is not None:
        checks += _against(previous.version, previous.definition, copy.definition, config.allow_schema_change)
        checks += [
            rules.check_drift(
                name, copy.profile, previous.profile[name], warn_above=bounds.drift_warn, fail_above=bounds.drift_fail
            )
            for name in dict.fromkeys([*features, *([label_column] if label_column else [])])
            if name in previous.profile
        ]
    return rules.gate(checks)


def _rows(copy: CopyFigures, minimum: int) -> CheckResult:
    """Check that there are enough rows to train on; if none is left, report why."""
    check = rules.check_rows(copy.samples["train"], minimum)
    gone = {reason: rows for balance in copy.balances for reason, rows in balance.filtered.items() if rows}
    if sum(copy.samples.values()) or not gone:
        return check
    told = ", ".join(f"{plural(rows, 'row')} {reason}" for reason, rows in gone.items())
    cure = "; take all rows with --no-ready-only" if NOT_READY in gone else ""
    return check.model_copy(update={"message": f"No row is left: {told}{cure}."})


def _splits(config: DeliveryConfig, copy: CopyFigures) -> list[CheckResult]:
    """Check that each required split has samples; images have the splits of their source, whatever its shares."""
    if copy.definition["kind"] == "table":
        shares = (1 - config.validation_share - config.test_share, config.validation_share, config.test_share)
        return rules.check_split_sizes(copy.samples, dict(zip(SPLITS, shares, strict=True)), SPLITS[0])
    checks = []
    needs: dict[str, Verdict] = {"train": "fail", "validation": "warn"}
    for split, absent in needs.items():
        count = copy.samples[split]
        message = f"Split {split} has {plural(count, 'image')}, as in the source."
        checks.append(_check("split", split, ("pass" if count else absent, float(count), "≥ 1"), message))
    return checks


def _repeats(copy: CopyFigures) -> CheckResult:
    """Check that each row has a unique key: rows with the same values count more than once."""
    found, keys = copy.repeated_keys, ", ".join(copy.definition["keys"])
    message = f"Every row has another {keys}."
    if found:
        message = f"{plural(found, 'row')} repeat the {keys} of another; each is a sample of its own."
    return _check("repeated keys", keys, _none(found), message)


def _leak(copy: CopyFigures) -> CheckResult:
    found, entity = copy.leaking_entities, copy.definition["entity"]
    message = f"No {entity} is in several splits ({sum(copy.entities.values()):,} were looked at)."
    if found:
        message = f"{plural(found, 'value')} of {entity} are in several splits: validation would tell of memory."
    return rules.check_leak(found).model_copy(update={"column": entity, "message": message})


def _constants(features: Iterable[Mapping[str, Any]]) -> CheckResult:
    """Check that no column of the matrix is constant."""
    constant = [str(feature["name"]) for feature in features if feature["minimum"] == feature["maximum"]]
    message = f"{_listed(constant)} never differ in the train split: they teach nothing."
    message = message if constant else "Every feature differs between samples."
    return _check("constant", None, _none(len(constant)), message)


def _classes(config: DeliveryConfig, copy: CopyFigures) -> list[CheckResult]:
    """Check that each class is frequent enough to be learned, and is in every split."""
    column, train = copy.definition["label"]["column"], copy.class_counts.get("train", {})
    share = config.thresholds.balance_warn / max(len(train), 1)
    balance = rules.check_class_balance(column, list(train.items()), share)
    if balance.verdict == "fail" and len(train) > 1:
        balance = balance.model_copy(update={"verdict": "warn"})
    checks = [balance]
    for split, counts in copy.class_counts.items():
        absent = [name for name, count in counts.items() if not count]
        message = f"Split {split} has every class."
        if absent:
            message = f"Split {split} has no sample of {column} {_listed(absent)}."
        checks.append(_check("classes", split, _none(len(absent)), message))
    return checks


def _against(
    version: int, before: Mapping[str, Any], now: Mapping[str, Any], change_allowed: bool
) -> list[CheckResult]:
    """Check that readers of the last version can read this one, from both definitions."""
    checks = []
    for what, find in _ESSENTIALS.items():
        old, new = find(before), find(now)
        if old != new:
            verdict: Verdict = "warn" if change_allowed else "fail"
            message = f"{what} differ from v{version}: {_difference(old, new)}. Allow it, or take another name."
            checks.append(_check("schema", what, (verdict, _difference(old, new), f"as in v{version}"), message))
    for what, find in () if checks else _DETAILS.items():
        old, new = find(before), find(now)
        if old != new:
            message = f"{what} differ from v{version}: {_difference(old, new)}."
            checks.append(_check("schema", what, ("warn", _difference(old, new), f"as in v{version}"), message))
    message = f"Features, label and blocks are those of v{version}."
    return checks or [_check("schema", None, ("pass", float(now.get("feature_count", 1)), "as before"), message)]


def _label_part(name: str) -> Any:
    return lambda definition: (definition.get("label") or {}).get(name)


def _feature_part(name: str) -> Any:
    return lambda definition: tuple(dict.fromkeys(feature[name] for feature in definition.get("features", ())))


_ESSENTIALS: dict[str, Any] = {
    "Kinds": lambda definition: definition.get("kind"),
    "Source columns": _feature_part("column"),
    "Images": lambda definition: (definition.get("image") or {}).get("shape"),
    "Label columns": _label_part("column"),
    "Label kinds": _label_part("kind"),
}
_DETAILS: dict[str, Any] = {
    "Features": _feature_part("name"),
    "Classes": lambda definition: tuple((definition.get("label") or {}).get("classes") or ()),
    "Block sizes": lambda definition: definition.get("block_size"),
}


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, tuple) or not isinstance(new, tuple):
        return f"{new} instead of {old}"
    words = [
        f"{_listed([str(name) for name in names])} {what}"
        for what, names in (
            ("came", [name for name in new if name not in old]),
            ("went", [name for name in old if name not in new]),
        )
        if names
    ]
    return " and ".join(words) or "another order"


def _listed(names: list[str]) -> str:
    """Return some names, and the number of the others."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {number(more)} more" if more > 0 else "")


def _none(count: int) -> tuple[Verdict, float, str]:
    """Return the verdict on a count that should be 0, but does no harm if it isn't."""
    return "warn" if count else "pass", float(count), "= 0"


def _check(name: str, column: str | None, found: tuple[Verdict, float | str, str], message: str) -> CheckResult:
    """Return a result; `found` is the verdict, the figure and the requirement."""
    verdict, figure, bound = found
    return CheckResult(name=name, column=column, verdict=verdict, figure=figure, bound=bound, message=message)
