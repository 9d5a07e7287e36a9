"""What becomes of a fault: which checks noticed it, what is blind, and how the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.io import storage
from tasks.io.errors import ConfigError, LeakFound
from tasks.quality import faults
from tasks.quality.faults import Fault, blind, failed, inject, sample_rows, summary, unproven
from tasks.quality.rules import gate
from tasks.report.report import Report, to_html
from tasks.store.manifest import CheckResult, FaultResult, GateResult, Verdict
from tests.report.test_report import NASTY, report


def check(name: str, verdict: Verdict = "pass", column: str | None = None, message: str = "It is.") -> CheckResult:
    return CheckResult(name=name, column=column, verdict=verdict, bound="= 0", message=message)


def judged(*checks: CheckResult, aims: tuple[str, ...] = ("nulls",), before: Any = None, **more: Any) -> FaultResult:
    fault = Fault(name="nulls", injected="Nulls.", aims=aims, judge=lambda: gate(checks), **more)
    (result,) = inject(
        before or gate([check("nulls", column="a"), check("nulls", column="b"), check("drift")]), [fault]
    )
    return result


def test_a_fault_is_noticed_if_a_check_that_it_is_aimed_at_gets_worse() -> None:
    refused = judged(check("nulls", "fail", "a", "Many."), check("drift", "warn"))
    assert (refused.outcome, refused.caught_by, refused.message) == ("refused", ("nulls of a", "drift"), "Many.")
    assert judged(check("nulls", "warn", "a")).outcome == "warned"
    assert judged(check("rows", "fail"), aims=("rows",)).outcome == "refused", "a check that is new counts as passed"


def test_what_others_notice_doesn_t_hide_that_the_check_is_blind() -> None:
    result = judged(check("nulls", "pass", "a", "60 % are null."), check("drift", "fail"))
    assert (result.outcome, result.caught_by) == ("blind", ("drift",))
    assert result.message == "'nulls of a' still passes: 60 % are null. It was noticed elsewhere, by drift."
    assert judged(check("nulls", "fail", "b"), aims=("nulls of a",)).outcome == "blind"
    assert judged(check("drift")).message == "No check looks at it."


def test_a_check_that_complains_already_can_t_be_made_worse() -> None:
    result = judged(check("nulls", "warn", "a"), before=gate([check("nulls", "warn", "a")]))
    assert result.outcome == "not applicable"
    assert result.message == "'nulls of a' warns on the sample as it is, so that the fault can't make it worse."


def test_a_refusal_of_the_pipeline_itself_counts_where_it_is_expected() -> None:
    def refuse() -> GateResult:
        raise LeakFound("a row got features from its future")

    fault = Fault(name="future", injected="x", aims=("canary",), judge=refuse, raises=(LeakFound,))
    (result,) = inject(gate([check("canary")]), [fault])
    assert (result.outcome, result.caught_by, result.message) == (
        "refused",
        ("canary",),
        "a row got features from its future",
    )
    with pytest.raises(LeakFound):
        inject(gate([check("canary")]), [Fault(name="x", injected="x", aims=(), judge=refuse, raises=(ConfigError,))])


def test_a_fault_without_a_place_says_why() -> None:
    fault = Fault(name="range", injected="x", aims=("range",), judge=None, why_not="There are no bounds.")
    (result,) = inject(gate([check("rows")]), [fault])
    assert (result.outcome, result.message) == ("not applicable", "There are no bounds.")


def results() -> tuple[FaultResult, ...]:
    return (
        FaultResult(fault="a", injected="A.", outcome="refused", caught_by=("rows",), message="None."),
        FaultResult(fault="b", injected="B.", outcome="warned", caught_by=("drift over time of x",), message="Far."),
        FaultResult(fault="c", injected=f"C {NASTY}.", outcome="blind", message=f"'nulls of {NASTY}' still passes."),
        FaultResult(fault="d", injected="D.", outcome="not applicable", message="No place."),
    )


def test_the_summary_counts_what_was_tried() -> None:
    assert summary(results()) == "1 of 3 faults refused, 1 warned, blind to 1 (c)"
    assert summary(results()[:1]) == "1 of 1 fault refused"
    assert blind(results()) == ("c",)


def test_checks_that_no_fault_made_worse_are_unproven_by_their_own_name() -> None:
    checks = gate([check("rows"), check("drift", column="x"), check("drift over time", column="x"), check("nulls")])
    assert unproven(checks, results()) == ("drift", "nulls")


def test_a_self_test_that_failed_is_blind_and_says_so() -> None:
    result = failed(KeyError("size"))
    assert result.outcome == "blind"
    assert summary((result,)) == "The self-test failed: KeyError: 'size'"


def test_the_report_shows_the_blind_first_and_escapes_everything() -> None:
    made = report(self_test=results())
    html = to_html(made).decode()
    start = html.index("<h2>Self-test</h2>")
    section = html[start : html.index("<h2>", start + 4)]
    assert [section.index(f">{name}<") for name in "cbad"] == sorted(section.index(f">{name}<") for name in "cbad")
    assert '<span class="badge warn">blind</span>' in section
    assert "1 of 3 faults refused, 1 warned, blind to 1 (c)" in section
    assert "<script>" not in section
    assert "&lt;script&gt;" in section
    text = made.to_markdown()
    assert "## Self-test" in text
    assert "| ▲ BLIND | c |" in text
    assert "<script>" not in text
    assert Report.model_validate_json(made.to_json()).self_test == results()


def test_a_version_without_a_self_test_has_no_section() -> None:
    assert "Self-test" not in to_html(report()).decode()
    assert "Self-test" not in report().to_markdown()


def test_a_failed_self_test_stands_in_the_report_without_unproven_checks() -> None:
    html = to_html(report(self_test=(failed(RuntimeError("no disk")),))).decode()
    assert "The self-test failed: RuntimeError: no disk" in html
    assert "unproven" not in html


def write(root: Path, rows: int, files: int, group: int) -> list[str]:
    table = pa.table({"key": pa.array(np.arange(rows) // 2), "row": pa.array(np.arange(rows))})
    uris = []
    for number in range(files):
        step = -(-rows // files)
        uris.append(str(root / f"part-{number:05d}.parquet"))
        pq.write_table(table.slice(number * step, step), uris[-1], row_group_size=group)
    return uris


def test_a_sample_has_whole_keys_and_is_the_same_wherever_the_store_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "v1").mkdir(parents=True)
    one, other = (sample_rows(write(tmp_path / name / "v1", 20_000, 3, 1000), ["row", "key"], "key") for name in "ab")
    assert one.equals(other)
    assert one.column_names == ["row", "key"]
    assert 4_900 < one.num_rows <= 5_000
    assert set(np.unique(one["key"].to_numpy(), return_counts=True)[1].tolist()) == {2}
    assert one["row"].to_pylist() == sorted(one["row"].to_pylist())


def test_a_large_version_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = write(tmp_path, 400_000, 40, 2000)
    opened: list[str] = []
    open_input = storage.open_input

    def noted(uri: str) -> pa.NativeFile:
        opened.append(uri)
        return open_input(uri)

    monkeypatch.setattr(storage, "open_input", noted)
    assert sum(group.rows for group in faults.chosen_groups(uris)) == faults.MOST_READ
    assert len(set(opened)) == faults.MOST_FILES
    assert 4_000 < sample_rows(uris, ["key"], "key").num_rows <= 5_000


def test_one_key_with_nearly_all_rows_still_gives_a_sample(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": [1] * 9_000 + [2]}), tmp_path / "x.parquet")
    assert sample_rows([str(tmp_path / "x.parquet")], ["key"], "key").num_rows == 5_000


def test_a_version_without_rows_gives_a_sample_with_its_columns(tmp_path: Path) -> None:
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.schema([("key", pa.int64()), ("text", pa.string())])):
        pass
    sample = sample_rows([str(tmp_path / "x.parquet")], ["text", "key"], "key")
    assert (sample.num_rows, sample.schema.types) == (0, [pa.string(), pa.int64()])


@given(rows=st.integers(0, 50), share=st.floats(0.001, 1))
@settings(max_examples=50)
def test_a_fault_hits_as_many_rows_as_it_says(rows: int, share: float) -> None:
    hit = faults.some(rows, share)
    assert hit.sum() == min(rows, max(1, int(np.ceil(round(share * rows, 6)))))
    assert not faults.some(rows, 0.0).any()


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64()])
def test_a_shift_keeps_type_and_nulls(kind: pa.DataType) -> None:
    table = pa.table({"x": pa.array([1, None, 100], kind)})
    moved = faults.shifted(table, "x", 50)
    assert moved.schema.field("x").type == kind
    assert moved["x"].to_pylist() == [51, None, 127 if kind == pa.int8() else 150]
