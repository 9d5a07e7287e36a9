"""The report's three faces: they agree, escape what comes from the data, and keep to their bounds."""

import base64
import datetime as dt
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from tasks.quality.profile import TableProfile, profile_table
from tasks.quality.rules import (
    check_balance,
    check_drift,
    check_finite,
    check_freshness,
    check_nulls,
    check_range,
    check_ready_share,
    check_rows,
    gate,
)
from tasks.report.plots import distribution, distributions, histogram_grid
from tasks.report.report import MARKDOWN_ROWS, DataTable, Picture, Report, to_html
from tasks.store.manifest import CheckResult, GateResult, InputFile, InputRecord, RowBalance, RunRecord, Verdict

NASTY = "<script>alert('x')</script>"
SIGNS = {"fail": "✖ FAIL", "warn": "▲ WARN", "pass": "✔ PASS"}


def customers(rows: int, shift: float = 0.0, seed: int = 0, odd: str = "loyalty") -> TableProfile:
    """Profile of a table of customer features, of the kinds and shapes that come up."""
    rng = np.random.default_rng(seed)
    spend = rng.lognormal(3 + shift, 1, rows).round(2)
    table = {
        "customer_id": [f"C{i:06d}" for i in range(rows)],
        "total_spend": spend,
        "basket_size_mean": rng.gamma(4 + shift * 4, 3, rows),
        "days_since_last_purchase": np.where(rng.random(rows) < 0.3, 0, rng.integers(1, 365, rows)),
        "household_size": pa.array(rng.integers(1, 6, rows), mask=rng.random(rows) < 0.12),
        "churned": rng.random(rows) < 0.2 + shift / 2,
        "age_band": rng.choice(["19-24", "25-34", "35-44", "45-54", "55-64", "65+"], rows),
        odd: rng.choice(["gold", "silver", "a rather long name of a tier", NASTY], rows, p=[0.2, 0.5, 0.2, 0.1]),
        "discount_share": np.clip(rng.normal(0.1, 0.2, rows), 0, 1),
        "first_purchase": pa.array(rng.integers(16_000, 19_000, rows).astype(np.int32)).cast(pa.date32()),
        "constant": np.full(rows, 7.0),
        "never": pa.nulls(rows, pa.float64()),
    }
    return profile_table(pa.table(table))


def report(failing: bool = False, odd: str = "loyalty", **changes: Any) -> Report:
    """A report as a flow makes it, passing or failing."""
    now, before = customers(2469, 0.5 * failing, 1, odd), customers(2400, 0, 2, odd).columns()
    columns = now.columns()
    source = RowBalance(
        name="transactions",
        rows_in=1_469_307,
        rows_out=1_401_212 - 5 * failing,
        rejected={"no such product": 21_044, "negative quantity": 851},
        filtered={"after the cut-off": 46_000},
        deduplicated=200,
    )
    entities = RowBalance(name="customer-features", rows_in=2469, rows_out=2469)
    as_of = dt.datetime(2021, 12, 31, tzinfo=dt.UTC)
    checks = [
        check_rows(2469, 100),
        check_balance(source),
        check_balance(entities),
        check_nulls("household_size", columns["household_size"], 0.05 if failing else 0.2, 0.3),
        check_range("discount_share", columns["discount_share"], 0, 1),
        check_range("total_spend", columns["total_spend"], 0, 500 if failing else None, warn_only=True),
        check_finite("basket_size_mean", columns["basket_size_mean"]),
        check_ready_share(2400, 2469, 0.9, 0.5),
        check_freshness("2021-12-24", as_of, 14, 60),
        *(check_drift(name, now, column) for name, column in before.items()),
    ]
    verdict = gate(checks)
    raw = InputFile(
        uri="s3://lake/raw/transactions/2021/part-000.parquet", bytes=52_428_800, fingerprint="etag:" + "9f" * 16
    )
    fields: dict[str, Any] = {
        "dataset": "feature-store/customer-features",
        "version": 3,
        "status": "rejected" if verdict.verdict == "fail" else "published",
        "verdict": verdict.verdict,
        "created_at": dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.UTC),
        "title": "Customer features",
        "rows": 2469,
        "balances": (source, entities),
        "gate": verdict,
        "profile": columns,
        "previous_version": 2,
        "previous_profile": before,
        "inputs": (
            InputRecord(name="transactions", uri="s3://lake/raw/transactions/", rows=1_469_307, files=(raw, raw)),
            InputRecord(name="products", uri="s3://lake/raw/products.parquet", rows=92_331, files=(raw,)),
            InputRecord(name="product-features", uri="feature-store/product-features", version=4, rows=92_331),
        ),
        "run": RunRecord(flow_run_id="0c5b6c9e-7a44-4a3e-8f41-2a4f1a0f9f11", flow_run_name="vivid-otter"),
        "config": {"root": "data/", "as_of": "2021-12-31", "drift": {"warn_above": 0.1, "fail_above": 0.25}},
        "timings": {"read sources": 4.21, "aggregate": 93.4, "write": 2.0, "validate": 0.31},
        "definition": {"entity": "household", "features": {"total_spend": {"aggregate": "sum"}}},
        "notes": ("Campaigns were not available for 2021.",),
    }
    return Report(**(fields | changes))


@pytest.fixture(scope="module", params=[False, True], ids=["passing", "failing"])
def either(request: pytest.FixtureRequest) -> Report:
    return report(request.param)


def small(**changes: Any) -> Report:
    """The least that a report can hold."""
    verdict: Verdict = changes.get("verdict", "pass")
    check = CheckResult(name="rows", verdict=verdict, figure=0.0, bound="≥ 0", message="0 rows.")
    fields: dict[str, Any] = {
        "dataset": "d",
        "version": 1,
        "status": "published",
        "verdict": "pass",
        "created_at": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
        "title": "Small",
        "rows": 0,
        "gate": GateResult(verdict=verdict, checks=(check,)),
        "run": RunRecord(flow_run_id="x"),
    }
    return Report(**(fields | changes))


def test_json_round_trips_and_is_canonical(either: Report) -> None:
    encoded = either.to_json()
    again = Report.model_validate_json(encoded)
    assert again == either
    assert again.to_json() == encoded
    keys = list(json.loads(encoded))
    assert keys == sorted(keys)


def test_json_keeps_a_figure_of_nan() -> None:
    odd = CheckResult(name="ready", verdict="fail", figure=math.nan, bound="≥ 1", message="None.")
    one = small(gate=GateResult(verdict="fail", checks=(odd,)))
    assert Report.model_validate_json(one.to_json()).to_json() == one.to_json()


class Page(HTMLParser):
    """Tags and attributes of a page."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_complete(either: Report) -> None:
    html = to_html(either)
    page = Page(html)
    assert page.open == []
    text = html.decode()
    for heading in ("Checks", "Where the rows went", "Distributions", "Columns", "Lineage", "Timings", "Configuration"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<figure") == len(distributions(either.profile, either.previous_profile))
    assert text.index(f'class="badge large {either.verdict}"') < text.index("<h2>Checks</h2>")
    assert "vivid-otter" in text
    assert "etag:" in text


def test_html_needs_nothing_from_elsewhere(either: Report) -> None:
    html = to_html(either).decode()
    page = Page(to_html(either))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href", "data"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_html_escapes_everything_from_the_data() -> None:
    evil = f'"><img src=x onerror=alert(1)>{NASTY}'
    one = report(odd=NASTY)
    one = one.model_copy(
        update={
            "title": evil,
            "dataset": evil,
            "notes": (evil,),
            "config": {evil: evil},
            "definition": {evil: evil},
            "timings": {evil: 1.0},
            "run": RunRecord(flow_run_id=evil, flow_run_name=evil, deployment=evil),
            "inputs": (InputRecord(name=evil, uri=evil, files=(InputFile(uri=evil, bytes=1, fingerprint=evil),)),),
            "balances": (RowBalance(name=evil, rows_in=1, rows_out=0, rejected={evil: 1}, filtered={evil: 0}),),
        }
    )
    page = Page(to_html(one))
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert NASTY not in to_html(one).decode()
    assert "&lt;script&gt;" in to_html(one).decode()


def test_html_folds_many_passed_checks_away() -> None:
    passed = CheckResult(name="nulls", verdict="pass", figure=0.0, bound="≤ 1", message="Fine.")
    failed = CheckResult(name="rows", verdict="fail", figure=0.0, bound="≥ 1", message="0 rows.")
    html = to_html(small(verdict="fail", gate=GateResult(verdict="fail", checks=(*[passed] * 60, failed))))
    text = html.decode()
    assert Page(html).open == []
    assert text.index("0 rows.</td>") < text.index("<summary>60 checks passed</summary>")
    assert text.count("Fine.") == 60


def test_html_puts_failed_checks_first() -> None:
    html = to_html(report(failing=True)).decode()
    table = html[html.index("<h2>Checks</h2>") : html.index("<h2>Where the rows went</h2>")]
    verdicts = re.findall(r'class="badge (\w+)"', table)
    assert verdicts == sorted(verdicts, key=["fail", "warn", "pass"].index)
    assert verdicts[0] == "fail"


@pytest.mark.parametrize("face", [to_html, Report.to_markdown])
def test_figures_are_written_for_people(either: Report, face: Callable[[Report], str | bytes]) -> None:
    text = face(either)
    text = text.decode() if isinstance(text, bytes) else re.sub(r"base64,[^)]*", "", text)
    visible = re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    assert not re.findall(r"\d\.\d{9,}", visible)
    assert not re.findall(r"\de[+-]\d\d\b", visible)
    assert "None" not in visible


def test_a_report_of_nothing_has_all_three_faces() -> None:
    one = small()
    assert Page(to_html(one)).open == []
    assert "data:image" not in one.to_markdown()
    assert one.checks_table()[0]["check"] == "rows"


def test_markdown_says_the_verdict_first(either: Report) -> None:
    text = either.to_markdown("s3://lake/v3/_report (1).html")
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == f"# {SIGNS[either.verdict]} · Customer features"
    assert either.status in lines[1].lower()
    assert lines[2] == "[Full report](s3://lake/v3/_report%20%281%29.html)"
    assert text.index("## Checks") < text.index("## Rows") < text.index("## Made from")
    assert len(text.encode()) < 200_000


def test_markdown_holds_a_png(either: Report) -> None:
    (encoded,) = re.findall(r"data:image/png;base64,([^)]+)\)", either.to_markdown())
    assert base64.b64decode(encoded).startswith(b"\x89PNG")
    assert len(encoded) < 150_000


def test_markdown_drops_pictures_then_the_end() -> None:
    one = report(failing=True)
    whole = one.to_markdown()
    no_picture = one.to_markdown(max_bytes=(first := len(whole.encode()) - 1))
    cut = one.to_markdown(max_bytes=1_000)
    assert "data:image" in whole
    assert "data:image" not in no_picture
    assert "pictures are left out" in no_picture
    assert "✖ FAIL |" in no_picture
    assert "## Made from" in no_picture
    assert "The rest is left out" in cut
    assert cut.startswith("# ✖ FAIL")
    for text, size in ((no_picture, first), (cut, 1_000)):
        assert len(text.encode()) <= size


def test_markdown_counts_the_checks_that_passed_and_lists_the_others() -> None:
    one = report(failing=True)
    text = one.to_markdown()
    passed = sum(check.verdict == "pass" for check in one.checks)
    assert f"{passed} checks passed." in text
    assert text.count("✖ FAIL |") + text.count("▲ WARN |") == len(one.checks) - passed
    assert "✔ PASS |" not in text


def test_markdown_escapes_markup_and_tables() -> None:
    evil = f"a|b\n\n# c {NASTY} [x](http://x) ![y](z) `q`"
    check = CheckResult(name="nulls", column=evil, verdict="fail", figure=evil, bound="≤ 1", message=evil)
    text = small(verdict="fail", title=evil, gate=GateResult(verdict="fail", checks=(check,))).to_markdown()
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\[x", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}


def test_checks_table_is_plain_json() -> None:
    odd = [
        CheckResult(name="a", verdict="pass", figure=0.1 + 0.2, bound="≤ 1", message="."),
        CheckResult(name="b", verdict="warn", figure="int32", bound="int64", message="."),
        CheckResult(name="c", verdict="fail", figure=math.inf, bound="≤ 1", message="."),
        CheckResult(name="d", verdict="fail", figure=math.nan, bound="≤ 1", message="."),
    ]
    table = small(gate=GateResult(verdict="fail", checks=tuple(odd))).checks_table()
    assert [(row["check"], row["figure"]) for row in table] == [("c", None), ("d", None), ("b", "int32"), ("a", 0.3)]
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_reason_is_one_line() -> None:
    assert small().reason == "1 check passed."
    assert small(verdict="fail").reason == "1 of 1 check failed: 0 rows."
    assert "\n" not in report(failing=True).reason


def test_distribution_of_a_range_is_comparable() -> None:
    now, before = customers(2000, 0.5, 1).columns(), customers(2000, 0, 2).columns()
    one = distribution("total_spend", now["total_spend"], before["total_spend"])
    assert one is not None
    assert one.before is not None
    assert one.layout == "range"
    assert len(one.now) == len(one.before)
    assert 0.97 < sum(one.now) <= 1
    assert sum(one.now[:4]) < sum(one.before[:4])  # spending moved to the right


def test_distribution_of_few_values_has_a_bar_each() -> None:
    (now,) = profile_table(pa.table({"x": [1, 1, 2, 5]})).columns().values()
    (before,) = profile_table(pa.table({"x": [1, 2, 2, 9]})).columns().values()
    one = distribution("x", now, before)
    assert one is not None
    assert (one.layout, one.labels, one.now) == ("values", ("1", "2", "5"), (0.5, 0.25, 0.25))
    assert one.before == (0.25, 0.5, 0.25)


def test_distribution_over_many_magnitudes_is_drawn_on_a_log_scale() -> None:
    values = np.random.default_rng(0).lognormal(0, 3, 20_000)
    (now,) = profile_table(pa.table({"x": values})).columns().values()
    one = distribution("x", now, now)
    assert one is not None
    assert one.labels[1] == "log scale"
    assert one.now == one.before
    middle = len(one.now) // 2
    assert sum(one.now[:middle]) == pytest.approx(0.5, abs=0.05)


def test_distribution_of_names_gathers_the_rest() -> None:
    (now,) = profile_table(pa.table({"x": list("aaabbcdefgh")})).columns().values()
    one = distribution("x", now)
    assert one is not None
    assert one.labels == ("a", "b", "c", "d", "e", "f", "other")
    assert sum(one.now) == pytest.approx(1)
    assert one.before is None


def test_what_cannot_be_drawn_is_left_out() -> None:
    drawn = {one.column for one in distributions(customers(2000).columns(), {})}
    assert {"customer_id", "first_purchase", "never"}.isdisjoint(drawn)
    assert "constant" in drawn


def test_drifted_columns_are_drawn_first() -> None:
    one = report(failing=True)
    drawn = [d.column for d in distributions(one.profile, one.previous_profile, one.gate.checks)]
    serious = [c.column for c in one.checks if c.name == "drift" and c.verdict != "pass"]
    assert set(drawn[: len(serious)]) == set(serious)


def test_the_picture_is_the_same_every_time() -> None:
    drawn = distributions(report().profile, report().previous_profile)
    assert histogram_grid(drawn) == histogram_grid(drawn)
    assert histogram_grid(distributions({"$x^2$ {": customers(300).columns()["constant"]}, {})).startswith(b"\x89PNG")


PNG, WEBP, JPEG = b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x01\x02\x03WEBPVP8 ", b"\xff\xd8\xff\xe0"


def picture(title: str = "Sheet", size: int = 900) -> Picture:
    return Picture.of(title, f"What {title} shows.", "image/png", PNG + bytes(size))


def test_pictures_and_tables_survive_json() -> None:
    table = DataTable(title="t", columns=("a", "b"), rows=(("x", 1), (None, 0.5), ("", 10**15)), note="n")
    one = small(pictures=(picture(), Picture.of("w", "", "image/webp", WEBP)), tables=(table,))
    again = Report.model_validate_json(one.to_json())
    assert again == one
    assert [[type(cell) for cell in row] for row in again.tables[0].rows] == [
        [str, int],
        [type(None), float],
        [str, int],
    ]
    assert base64.b64decode(again.pictures[0].data) == PNG + bytes(900)


@pytest.mark.parametrize(
    ("kind", "data", "complaint"),
    [
        ("image/svg+xml", base64.b64encode(PNG).decode(), "Input should be"),
        ("image/png", base64.b64encode(JPEG).decode(), "isn't image/png"),
        ("image/webp", base64.b64encode(b"RIFF\x00\x00\x00\x00WAVE").decode(), "isn't image/webp"),
        ("image/jpeg", "", "isn't image/jpeg"),
        ("image/png", base64.b64encode(PNG).decode() + '"><script>', "isn't base64"),
        ("image/png", base64.b64encode(PNG).decode() + "\n", "isn't base64"),
        ("image/png", "a", "isn't base64"),
    ],
)
def test_what_is_no_picture_is_refused(kind: str, data: str, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Picture.model_validate({"title": "Sheet", "caption": "", "media_type": kind, "data": data})


def test_a_table_of_ragged_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="row 1 of table 't' has 1 cells for 2 columns"):
        DataTable(title="t", columns=("a", "b"), rows=((1, 2), (1,)))


def test_html_shows_pictures_and_tables_after_the_checks() -> None:
    table = DataTable(title="Rejected images", columns=("image", "bytes"), rows=(("a", 1_234_567), ("b", None)))
    html = to_html(report().model_copy(update={"pictures": (picture("First"), picture("Second")), "tables": (table,)}))
    text, page = html.decode(), Page(html)
    assert page.open == []
    sources = [value for name, value in page.attributes if name == "src"]
    assert sources == [picture("First").uri, picture("Second").uri]
    assert [value for name, value in page.attributes if name == "alt"] == [
        "First: What First shows.",
        "Second: What Second shows.",
    ]
    order = ["<h2>Checks<", ">First<", ">Second<", "<h2>Where the rows went<", "<h2>Rejected images<", "<h2>Lineage<"]
    assert sorted(order, key=text.index) == order
    assert '<td class="cell">a</td><td class="right">1,234,567</td>' in text
    assert '<th>image</th><th class="right">bytes</th>' in text


def test_a_report_without_pictures_has_no_place_for_them() -> None:
    text = to_html(report()).decode()
    assert "<h2>Pictures</h2>" not in text
    assert "<img" not in text


def test_html_caps_the_rows_of_a_table() -> None:
    table = DataTable(title="t", columns=("n",), rows=tuple((f"row{n}",) for n in range(230)))
    text = to_html(small(tables=(table,))).decode()
    assert text.count('<td class="cell">row') == 200
    assert "and 30 more rows" in text
    assert "more row" not in to_html(small(tables=(table.model_copy(update={"rows": table.rows[:200]}),))).decode()
    assert "No rows." in to_html(small(tables=(table.model_copy(update={"rows": ()}),))).decode()


def test_pictures_and_tables_are_escaped() -> None:
    evil = f'"><img src=x onerror=alert(1)>{NASTY}|](javascript:x) ![y](z)'
    shown = Picture.of(evil, evil, "image/png", PNG)
    table = DataTable(title=evil, columns=(evil, "b"), rows=((evil, 1), ("c", evil)), note=evil)
    one = small(pictures=(shown,), tables=(table,))
    page = Page(to_html(one))
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert [value for name, value in page.attributes if name == "src"] == [shown.uri]
    assert not any(name.startswith("on") for name, _ in page.attributes)
    text = one.to_markdown()
    assert "<" not in text
    assert text.count("](data:image/png;base64,") == 1
    assert not re.search(r"(?<!\\)\]\((?!data:image/png)", text)
    rows = [line for line in text[text.index('## "') :].splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_markdown_tables_are_capped_and_aligned() -> None:
    rows = tuple((f"image {n}", n * 1000, None) for n in range(50))
    text = small(tables=(DataTable(title="Images", columns=("a", "b", "c"), rows=rows, note="So."),)).to_markdown()
    lines = text[text.index("## Images") :].splitlines()
    assert lines[2:5] == ["| a | b | c |", "|---|---:|---|", "| image 0 | 0 | – |"]
    assert sum(line.startswith("| image") for line in lines) == MARKDOWN_ROWS
    assert "and 30 more rows" in text
    assert text.index("more rows") < text.index("So.")


def drawn_and_dropped(text: str) -> tuple[list[str], list[str]]:
    return re.findall(r"!\[(\w+)[^\]]*\]\(data", text), re.findall(r"The picture “(\w+)” is left out", text)


def test_markdown_drops_the_last_pictures_first_and_says_each() -> None:
    pictures = tuple(picture(name, 3_000) for name in ("A", "B", "C"))
    one = report(pictures=pictures)
    whole = one.to_markdown(max_bytes=10**7)
    names = ["A", "B", "C", "Distributions"]
    assert drawn_and_dropped(whole) == (names, [])
    assert whole.index("## Checks") < whole.index("![A]") < whole.index("![Distributions") < whole.index("## Rows")
    room = len(whole.encode())
    for kept in (3, 2, 1, 0):
        dropped = one.to_markdown(max_bytes=room - 1)
        assert drawn_and_dropped(dropped) == (names[:kept], names[kept:])
        room = len(dropped.encode())
        assert one.to_markdown(max_bytes=room) == dropped


def test_a_picture_too_large_takes_no_smaller_one_with_it() -> None:
    text = small(pictures=(picture("Large", 300_000), picture("Little", 300))).to_markdown()
    assert drawn_and_dropped(text) == (["Little"], ["Large"])
    assert text.index("Large") < text.index("![Little]")


def test_names_that_the_font_lacks_make_no_warning() -> None:
    profile = profile_table(pa.table({"名前": ["猫", "犬", "猫"]})).columns()
    assert histogram_grid(distributions(profile, {})).startswith(PNG)
