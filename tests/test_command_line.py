"""The command line: what it says of settings, of wrong ones, and of a run that fails."""

from __future__ import annotations

import datetime as dt
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel

from tasks.command_line import FAILED, WRONG_ARGUMENTS, one_sentence, parse_arguments, run_by_hand, summary
from tasks.core import versions
from tasks.core.errors import ConfigError, GateFailed, SourceError
from tasks.core.manifest import RowBalance
from tasks.features.config import FeatureStoreConfig
from tasks.publication import PublishedVersion
from tests.processes import own_home, shell_environment

ENTRY = "flows.feature_store:feature_store"
Finished = subprocess.CompletedProcess[str]
ANSI = "\x1b["


def parsed(*argv: str) -> FeatureStoreConfig:
    return parse_arguments(FeatureStoreConfig, argv)[0]


@pytest.fixture
def shell(prefect_home: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Run the flow's command as somebody does in a shell, in an empty directory."""

    def run(*argv: str) -> Finished:
        home = tmp_path / "home"
        return subprocess.run(
            [sys.executable, "-m", "flows.feature_store", *argv],
            env=shell_environment(home if home.exists() else own_home(prefect_home, home)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    return run


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


def test_the_command_shows_its_help(shell: Callable[..., Finished]) -> None:
    done = shell("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m flows.feature_store ")
    assert_explains_everything(done.stdout)


# Right values


def test_options_become_settings() -> None:
    config = parsed(
        *("--root", "s3://bucket/prefix", "--rows-per-bucket", "5000", "--groups", "a,b", "--as-of", "2025-01-01"),
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


def test_dates_of_a_file_are_times(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("as_of: 2024-12-01\nearliest: 2020-01-01")
    config = parsed("--config", str(file))
    assert config.as_of == ("2024-12-01T00:00:00+00:00",)
    assert config.earliest == dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    assert FeatureStoreConfig(as_of=dt.date(2024, 12, 1)).as_of == config.as_of  # type: ignore[arg-type]


def test_the_environment_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ROOT", "SEED", "TRANSACTIONS", "JOIN", "THRESHOLDS", "THRESHOLDS__NULL_FAIL", "CONFIG", "TIMEZONE"):
        monkeypatch.setenv(name, "7")
        monkeypatch.setenv(name.lower(), "7")
    assert parsed() == FeatureStoreConfig()


# Wrong values: the option, the value and the cure

WRONG = [
    (["--seed", "x"], "--seed = 'x': input should be a valid integer"),
    (["--seed", "-1"], "--seed = '-1': input should be greater than or equal to 0"),
    (["--rows-per-bucket", "10"], "--rows-per-bucket = '10': input should be greater than or equal to 1000"),
    (["--join", "outer"], "--join = 'outer': input should be 'inner' or 'left'"),
    (["--epoch-unit", "h"], "--epoch-unit = 'h': input should be 's', 'ms', 'us' or 'ns'"),
    (["--as-of", "yesterday"], "'yesterday' is no time; write ISO 8601 such as 2024-12-31"),
    (["--timezone", "Mars/Olympus"], "'Mars/Olympus' is no IANA time zone; give one such as UTC or Europe/Berlin"),
    (["--transaction-columns", "{bad"], "--transaction-columns = '{bad': give a JSON mapping such as"),
    (["--product-columns", "7"], "--product-columns = '7': give a JSON mapping such as"),
    (["--transaction-columns", '{"amount": 3}'], "--transaction-columns.amount = 3: input should be a valid string"),
    (["--thresholds", "{bad"], "--thresholds = '{bad': give a JSON mapping such as"),
    (["--thresholds.null-warn", "3"], "--thresholds.null-warn = '3': input should be less than or equal to 1"),
    (
        ["--thresholds.null-warn", "0.9"],
        "--thresholds: null_warn = 0.9 is above null_fail = 0.5; a warning must come first",
    ),
    (["--customers", "x.csv"], "customers or products are given without transactions; give transactions too"),
    (["--root", ""], "--root = '': string should have at least 1 character"),
    (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_a_wrong_value_is_explained(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_by_hand(ENTRY, FeatureStoreConfig, argv) == WRONG_ARGUMENTS
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert message in told.err
    assert told.err.count("\n") == 1, "more than one line"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tresholds.null-warn", "0.1"], "--tresholds.null-warn 0.1; did you mean --thresholds.null-warn?"),
        (["--whatever"], "--whatever; see --help"),
        (["--see", "1"], "did you mean --seed?"),  # no abbreviations: they would change with every new setting
        (["--seed"], "argument --seed: expected one argument"),
    ],
)
def test_an_unknown_option_is_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_by_hand(ENTRY, FeatureStoreConfig, argv)
    assert ended.value.code == WRONG_ARGUMENTS
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1, "the usage pushes the message out of sight"


def test_a_word_is_a_command_about_the_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_by_hand(ENTRY, FeatureStoreConfig, ["extra"]) == WRONG_ARGUMENTS
    assert "no command is named 'extra'" in capsys.readouterr().err
    assert run_by_hand(ENTRY, FeatureStoreConfig, ["list", "--root", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "no valid YAML"),
        ("seed: 1\nroot: a\nseed: 2", "no valid YAML: 'seed' stands twice"),
        ("as_of: 2024-13-01", "--as-of = '2024-13-01': '2024-13-01' is no time; write ISO 8601"),
        ("as_of: [2024-12-01, 2024-02-30]", "'2024-02-30' is no time; write ISO 8601"),
        ("earliest: 2024-13-01", "--earliest = '2024-13-01': give a time in ISO 8601"),
        ("- seed", "it must hold settings as 'name: value' lines"),
        ("seeed: 3", "--seeed is no setting; see --help for those there are"),
        ("seed: x", "--seed = 'x': input should be a valid integer"),
        ("thresholds: {null_warm: 0.1}", "--thresholds.null-warm is no setting"),
        ("", "it must hold settings"),
    ],
)
def test_a_wrong_file_is_explained(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parsed("--config", str(file))
    assert str(file) in str(caught.value), "the message doesn't name the file"
    assert "\n" not in str(caught.value), "more than one line"


# The end of a run


def test_a_failure_is_one_sentence_with_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = SourceError("x.parquet has no column\n 'amount'")
    fault.add_note("in groups.yaml")
    wrapped = RuntimeError("a worker failed")
    wrapped.__cause__ = fault
    assert one_sentence(wrapped) == "x.parquet has no column 'amount' (in groups.yaml)"
    assert one_sentence(ValueError("first\nlast")) == "ValueError: last"
    assert one_sentence(ValueError()) == "ValueError: ValueError"
    lost = RuntimeError("no slots")
    lost.__cause__ = httpx.ConnectError("refused")
    monkeypatch.setenv("PREFECT_API_URL", "http://away/api")
    assert one_sentence(lost).startswith("the Prefect API at http://away/api can't be reached (ConnectError); start it")
    circle = RuntimeError("round")
    circle.__cause__ = circle
    assert one_sentence(circle) == "RuntimeError: round"
    assert one_sentence(GateFailed("The gate failed.")) == "The gate failed."


def test_the_summary_says_where_how_many_and_why_not_more() -> None:
    balance = RowBalance(
        name="transactions",
        rows_in=1_234,
        rows_out=1_200,
        rejected={"null_amount": 30},
        filtered={"after_as_of": 3},
        deduplicated=1,
    )
    version = PublishedVersion("feature-store/x", 3, "/data/x/v3", "/data/x/v3/_report.html", "warn", 1_200, (balance,))
    assert summary([version]).splitlines() == [
        "feature-store/x v3: 1,200 rows, verdict warn",
        "  data     /data/x/v3",
        "  report   /data/x/v3/_report.html",
        "  balance  transactions: 1,234 in, 1,200 out, 30 rejected (30 null_amount), 3 filtered (3 after_as_of), "
        "1 deduplicated",
    ]


def assert_tidy(done: Finished) -> None:
    for name, text in (("stdout", done.stdout), ("stderr", done.stderr)):
        assert ANSI not in text, f"colour codes in {name}, which is no terminal"
        assert "pid=" not in text, f"Ray's prefixes in {name}"
        assert "Traceback" not in text, f"a traceback in {name}"
        assert "Warning: " not in text, f"a warning of a library in {name}:\n{text}"
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)), f"a line is there twice:\n{done.stderr}"


QUICK = ["--sample-transactions", "1000", "--groups", "product-features"]


@pytest.mark.slow
def test_what_a_person_sees_of_a_good_run_and_of_one_that_fails(shell: Callable[..., Finished], tmp_path: Path) -> None:
    good = shell(*QUICK)
    assert good.returncode == 0, good.stderr
    assert_tidy(good)
    assert good.stdout.startswith("feature-store/product-features v1: 10 rows, verdict ")
    assert "  balance  transactions: 1,000 in, " in good.stdout
    assert re.search(r"\nfinished in \d+ s\n$", good.stdout)
    assert "http" not in good.stderr, "the address of a server that is gone"
    assert versions.published_versions(str(tmp_path / "data"), "feature-store/product-features") == [1]

    refused = shell(*QUICK, "--thresholds.rejected-warn", "0", "--thresholds.rejected-fail", "0")
    assert (refused.returncode, refused.stdout) == (FAILED, "")
    assert_tidy(refused)
    told = [line for line in refused.stderr.splitlines() if "The quality gate failed" in line]
    assert told == refused.stderr.splitlines()[-1:], "the sentence is there more than once, or isn't the last line"
    assert re.match(r"failed: The quality gate failed, nothing was published\. .*_report\.html$", told[0])
    assert refused.stderr.count("Finished in state Failed\n") == 2, "of the task and of the flow"


def test_a_run_that_fails_ends_with_one_sentence(stack: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "--root", str(tmp_path), "--transactions", str(tmp_path / "nowhere.parquet")]
    assert run_by_hand(ENTRY, FeatureStoreConfig, argv) == FAILED
    told = capfd.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    sentences = re.findall(r"^failed: (.*)$", told.err, re.MULTILINE)
    assert len(sentences) == 1, told.err
    assert re.match(r"transactions '\S+nowhere\.parquet': no \.parquet or \.csv file found .*; give a", sentences[0])
    with pytest.raises(SourceError, match="file found"):
        run_by_hand(ENTRY, FeatureStoreConfig, [*argv, "--debug"])
    assert "failed: " not in capfd.readouterr().err, "the traceback tells it"


def test_an_interrupted_run_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.local_api.local_stack", interrupted)
    assert run_by_hand(ENTRY, FeatureStoreConfig, []) == 130
    assert capsys.readouterr().err == "interrupted: nothing more was published\n"


def test_every_cure_of_a_failed_gate_names_an_option_that_exists() -> None:
    from tasks.feature_store import _CURES
    from tasks.features.config import Thresholds

    options = {f"--thresholds.{name.replace('_', '-')}" for name in Thresholds.model_fields} | {"--allow-schema-change"}
    named = {option for cure in _CURES.values() for option in re.findall(r"--[a-z.-]+[a-z]", cure)}
    assert named
    assert named <= options
