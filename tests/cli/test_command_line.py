"""A flow's arguments: what becomes of options and of a file, and what is said of wrong ones."""

from __future__ import annotations

import datetime as dt
import math
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from tasks.by_hand import run_by_hand
from tasks.cli.command_line import parse_arguments
from tasks.delivery.config import DeliveryConfig
from tasks.features.config import FeatureStoreConfig
from tasks.images.config import ImageAugmentationConfig
from tasks.io.errors import WRONG_ARGUMENTS, ConfigError
from tasks.store.settings import Settings

FEATURES = ("flows.feature_store:feature_store", "tasks.features.config:FeatureStoreConfig")
CONFIGS: tuple[type[BaseModel], ...] = (FeatureStoreConfig, ImageAugmentationConfig, DeliveryConfig)


def parsed(*argv: str) -> FeatureStoreConfig:
    return parse_arguments(FeatureStoreConfig, argv)[0]


# Help


def options() -> dict[str, str]:
    """Every option with its description, as the configuration declares it."""

    def walk(model: type[BaseModel], prefix: str) -> dict[str, str]:
        found = {}
        for name, field in model.model_fields.items():
            option = prefix + name.replace("_", "-")
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= walk(kind, f"{option}.")
            else:
                found[f"--{option}"] = field.description or ""
        return found

    return walk(FeatureStoreConfig, "")


def one_line(text: str) -> str:
    return " ".join(text.split())


def assert_explains_everything(text: str) -> None:
    flat = one_line(text)
    declared = options()
    assert len(declared) > 30
    for option, description in declared.items():
        assert re.search(rf"(?<!\S){re.escape(option)}(?![^\s,])", flat), f"{option} isn't in the help"
        assert one_line(description) in flat, f"the description of {option} isn't in the help"
    for option, default in (
        ("--root", "data"),
        ("--rows-per-bucket", "2000000"),
        ("--thresholds.null-fail", "0.5"),
        ("--join", "inner"),
        ("--earliest", "1970-01-01 00:00:00+00:00"),
        ("--transactions", "none"),
        ("--transaction-columns", "none"),
    ):
        described = one_line(declared[option])
        assert f"{described} (default: {default})" in flat, f"{option} doesn't say its default"
    assert "default factory" not in flat
    assert "--config FILE" in flat
    assert "--debug" in flat


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(FeatureStoreConfig, ["--help"], prog="python -m flows.feature_store")
    assert ended.value.code == 0
    assert_explains_everything(capsys.readouterr().out)


# Right values


def test_options_become_settings() -> None:
    config = parsed(
        *("--root", "s3://bucket/prefix", "--rows-per-bucket", "5000", "--groups", "a,b"),
        *("--as-of", "2025-01-01T00:00Z"),
        *("--thresholds.null-fail", "0.75", "--transaction-columns", '{"amount": "sales_value"}', "--join", "left"),
        *("--customer-columns", "age=years,gender=sex", "--allow-schema-change", "--epoch-unit", "ms"),
        *("--transactions", "t.parquet", "--customers", "c.csv"),
    )
    assert config == FeatureStoreConfig(
        root="s3://bucket/prefix",
        transactions="t.parquet",
        customers="c.csv",
        rows_per_bucket=5000,
        groups=("a", "b"),
        as_of=dt.datetime(2025, 1, 1, tzinfo=dt.UTC),
        thresholds={"null_fail": 0.75},
        transaction_columns={"amount": "sales_value"},
        customer_columns={"age": "years", "gender": "sex"},
        join="left",
        allow_schema_change=True,
        epoch_unit="ms",
    )
    assert parsed() == FeatureStoreConfig()
    assert parse_arguments(FeatureStoreConfig, ["--debug"])[1] is True


def test_options_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "root: $PLACE/data\ntransactions: t.parquet\nseed: 3\nthresholds: {null_fail: 0.75, ready_warn: 0.25}\n"
        "transaction_columns: {amount: value, timestamp: at}\n"
    )
    monkeypatch.setenv("PLACE", "/somewhere")
    config = parsed(
        *("--config", str(file), "--seed", "4", "--thresholds.null-fail", "0.5"),
        *("--transaction-columns", '{"amount": "price"}'),
    )
    assert (config.root, config.seed) == ("/somewhere/data", 4)
    assert (config.thresholds.null_fail, config.thresholds.ready_warn) == (0.5, 0.25)
    assert config.transaction_columns == {"amount": "price"}, "a mapping is replaced as a whole"


def test_what_stands_for_a_value() -> None:
    def images(*argv: str) -> ImageAugmentationConfig:
        return parse_arguments(ImageAugmentationConfig, argv)[0]

    assert images("--near-duplicates", "none").near_duplicates is None
    assert images("--labels", "None").labels is None
    assert images("--classes", "none").classes == ("none",), "only where there may be none"
    assert images("--classes", "a, b", "--classes", "c").classes == ("a", "b", "c")
    assert images("--classes", '["a, b"]').classes == ("a, b",)
    assert images("--augmentation.mean", "0,0.5,1").augmentation.mean == (0, 0.5, 1)
    merged = images("--augmentation", '{"size": 64, "variants": 2}', "--augmentation.variants", "5").augmentation
    assert (merged.size, merged.variants) == (64, 5)
    for text, number in (("v3", 3), ("3", 3), ("latest", "latest")):
        assert parse_arguments(DeliveryConfig, ["--version", text])[0].version == number


def test_times_of_a_file_are_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("as_of: [2024-12-01, 2024-12-31 12:00:00+02:00]\nearliest: 2020-01-01\n")
    config = parsed("--config", str(file))
    assert config.as_of == ("2024-12-01T00:00:00", "2024-12-31T10:00:00+00:00")
    assert config.earliest == dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    assert FeatureStoreConfig(as_of=dt.date(2024, 12, 1)).as_of == config.as_of[:1]


def test_the_environment_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROOT", "SEED", "TRANSACTIONS", "JOIN", "THRESHOLDS", "THRESHOLDS__NULL_FAIL", "CONFIG", "TIMEZONE"):
        monkeypatch.setenv(name, "7")
        monkeypatch.setenv(name.lower(), "7")
    assert parsed() == FeatureStoreConfig()


# Wrong values: the option, the value and the cure

WRONG: dict[type[BaseModel], dict[str, str]] = {
    FeatureStoreConfig: {
        "--seed x": "--seed = 'x': give a whole number",
        "--seed -1": "--seed = '-1': give 0 or more",
        "--seed 1 --seed 2": "--seed is given 2 times ('1', '2'); give it once",
        "--compute --no-compute": "--compute is given 2 times",
        "--rows-per-bucket 10": "--rows-per-bucket = '10': give 1000 or more",
        "--rows-per-bucket 5,000": "--rows-per-bucket = '5,000': give a whole number",
        "--join outer": "--join = 'outer': give 'inner' or 'left'",
        "--epoch-unit h": "--epoch-unit = 'h': give 's', 'ms', 'us' or 'ns'",
        "--as-of yesterday": "--as-of: 'yesterday' is no time; write ISO 8601 such as 2024-12-31",
        "--earliest 2024-13-01": "--earliest = '2024-13-01': give a time in ISO 8601",
        "--timezone Mars/Olympus": "'Mars/Olympus' is no IANA time zone; give one such as UTC",
        "--transaction-columns {bad": "--transaction-columns = '{bad': give a JSON mapping such as",
        "--product-columns 7": "--product-columns = '7': give a JSON mapping such as",
        "--transaction-columns '{\"amount\": 3}'": "--transaction-columns.amount = 3: give a text",
        "--thresholds {bad": "--thresholds = '{bad': give a JSON mapping such as",
        "--thresholds.null-warn 3": "--thresholds.null-warn = '3': give 1 or less",
        "--thresholds.drift-warn -1": "--thresholds.drift-warn = '-1': give 0 or more",
        "--thresholds.drift-warn inf": "--thresholds.drift-warn = 'inf': give a finite number",
        "--thresholds.null-warn 0.9": "--thresholds: null_warn = 0.9 is above null_fail = 0.5; a warning must come",
        "--customers x.csv": "customers or products are given without transactions; give",
        "--root ''": "--root = '': give a text that isn't empty",
        "--root gs://b/x": "--root: can't open 'gs://b/x': scheme 'gs' is not supported; use",
        "--transactions htp://x": "--transactions: can't open 'htp://x': scheme 'htp'",
        "--root s3://key:secret@b": "--root: an S3 location contains what looks like credentials",
        "--config /nowhere.yaml": "--config /nowhere.yaml: no such file; correct the path",
        "--config /": "--config /: that is a directory; name a YAML file in it",
    },
    ImageAugmentationConfig: {
        "--near-duplicates few": "--near-duplicates = 'few': give a whole number",
        "--augmentation.mean nan,0,0": "--augmentation.mean = 'nan': give a finite number",
        "--augmentation.mean 0,0": "--augmentation.mean = ['0', '0']: give 3 values, sep",
        "--augmentation.scale 0,1,2": "--augmentation.scale = ['0', '1', '2']: give 2 val",
        "--background white": "--background = ['white']: give 3 values, separated by com",
        "--background [1,": "--background = '[1,': give values separated by commas",
        "--augmentation sise=3": "'augmentation.sise' is no setting; did you mean 'size'?",
        "--name v1": "--name: 'v1' can't name a dataset; use lower case letters",
    },
    DeliveryConfig: {
        "--version newest": "--version: 'newest' is no version; write it as v3 or 3, or 'latest'",
        "--version 0": "--version: '0' is no version; write it as v3 or 3, or 'latest'",
        "--training.hidden 128,many": "--training.hidden = 'many': give a whole number",
        "--training.function x": "--training.function: 'x' is no import path; write it like",
    },
}


@pytest.mark.parametrize(("config", "line"), [(config, line) for config, lines in WRONG.items() for line in lines])
def test_a_wrong_value_is_explained(config: type[BaseModel], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(config, shlex.split(line))
    message = str(caught.value)
    assert WRONG[config][line] in message
    assert "\n" not in message, "more than one line"
    assert "secret" not in message


@pytest.mark.parametrize("argv", [["--seed", "x"], ["--root", "{file}"], ["--root", "{file}/below"]], ids=" ".join)
def test_a_mistake_ends_the_command_before_anything_is_started(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("tasks.by_hand.local_stack", lambda: pytest.fail("started"))
    assert run_by_hand(*FEATURES, [part.format(file=file) for part in argv]) == WRONG_ARGUMENTS
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tresholds.null-warn", "0.1"], "--tresholds.null-warn 0.1; did you mean --thresholds.null-warn?"),
        (["--whatever"], "--whatever; see --help"),
        (["--see", "1"], "did you mean --seed?"),  # no abbreviations: they would change with every new setting
        (["--seed"], "argument --seed: expected one argument"),
        (["--compute", "false"], "false; separate the values of an option by commas, and turn a switch off by --no-…"),
        (["--groups", "a", "b"], "b; separate the values of an option by commas"),
    ],
)
def test_an_unknown_option_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_by_hand(*FEATURES, argv)
    assert ended.value.code == WRONG_ARGUMENTS
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1, "the usage pushes the message out of sight"


def test_a_word_is_a_command_about_the_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_by_hand(*FEATURES, ["extra"]) == WRONG_ARGUMENTS
    assert "no command is named 'extra'" in capsys.readouterr().err
    assert run_by_hand(*FEATURES, ["list", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"seed: [", "no valid YAML: "),
        (b"- seed", "it holds ['seed']; it must hold settings as 'name: value' lines"),
        (b"", "it is empty; it must hold settings as 'name: value' lines"),
        (b"\x8f\x00", "no valid YAML: "),
        (b"seed: 3\nseed: 4", "no valid YAML: 'seed' stands twice"),
        (b"thresholds: &a {x: *a}", "no valid YAML: "),
        (b"seeed: 3", "'seeed' is no setting; did you mean 'seed'? (in "),
        (b"rows-per-bucket: 5000", "'rows-per-bucket' is no setting; did you mean 'rows_per_bucket'?"),
        (b"seed: x", "--seed = 'x': give a whole number (in "),
        (b"thresholds: {null_warm: 0.1}", "'thresholds.null_warm' is no setting; did you mean 'null_warn'?"),
        (b"thresholds: {drift_warn: .nan}", "--thresholds.drift-warn = nan: give a finite number"),
        (b"as_of: 2024-13-01", "--as-of: '2024-13-01' is no time; write ISO 8601 such as"),
        (b"root: $NOWHERE/x", "the variable in '$NOWHERE/x' isn't set; export NOWHERE"),
    ],
)
def test_a_wrong_file_is_explained(text: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parsed("--config", str(file))
    assert str(file) in str(caught.value), "the message doesn't name the file"
    assert "\n" not in str(caught.value)


# Laws of all settings


def settings_of(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, (*prefix, name))
        yield (*prefix, name), model


def refused(config: type[BaseModel], path: tuple[str, ...], value: object) -> str:
    """What is said of a value from a file; '' if it is taken."""
    content = value
    for part in reversed(path):
        content = {part: content}
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(yaml.safe_dump(content).encode())
        file.flush()
        try:
            parse_arguments(config, ["--config", file.name])
        except ConfigError as fault:
            return str(fault).removesuffix(f" (in {file.name})")
    return ""


SETTINGS = [(config, path, holder) for config in CONFIGS for path, holder in settings_of(config)]


@pytest.mark.parametrize(
    ("config", "path", "holder"), SETTINGS, ids=[f"{c.__name__}.{'.'.join(path)}" for c, path, _ in SETTINGS]
)
def test_no_setting_takes_nan_infinity_or_another_type(
    config: type[BaseModel], path: tuple[str, ...], holder: type[BaseModel]
) -> None:
    assert issubclass(holder, Settings)
    option = "--" + ".".join(path).replace("_", "-")
    default = holder.model_fields[path[-1]].get_default(call_default_factory=True)
    places = len(default) if isinstance(default, tuple) and default and isinstance(default[0], int | float) else 0
    for wrong in (math.nan, math.inf, -math.inf, {"a": [{}]}, [{"a": 1}], [[]]):
        value = [wrong] * places if places and isinstance(wrong, float) else wrong
        told = refused(config, path, value)
        assert option in told or path[-1] in told, (
            f"{value!r} is taken, or the message doesn't name the setting: {told}"
        )
        assert "\n" not in told
        assert "nput should be" not in told, "pydantic's words give no cure"
