"""Times and YAML as a user writes them: nothing lost, no times made of text, nothing executed."""

from __future__ import annotations

import datetime as dt

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tasks.io.notation import Times, expand, load_yaml


def day(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


class Holder(BaseModel):
    at: Times = ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("2024-01-01", ["2024-01-01"]),
        (dt.datetime(2024, 1, 1), ["2024-01-01"]),
        ("2024-01-03,2024-01-01,2024-01-03", ["2024-01-01", "2024-01-03"]),
        (["2024-01-01T02:00:00+02:00"], ["2024-01-01"]),
        ("2024-01-01/2024-01-03/1d", ["2024-01-01", "2024-01-02", "2024-01-03"]),
        ("2024-01-31/2024-04-30/1mo", ["2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30"]),
        ("2024-01-01/2024-01-20/1w", ["2024-01-01", "2024-01-08", "2024-01-15", "2024-01-20"]),
        ("2024-01-01/2024-01-01T12:00/12h", ["2024-01-01", "2024-01-01T12:00"]),
        ("2024-01-01/2024-01-01/1y, 2020-01-01", ["2020-01-01", "2024-01-01"]),
    ],
)
def test_a_list_stands_for_its_times(given: object, expected: list[str]) -> None:
    held = Holder(at=given)  # type: ignore[arg-type]
    assert expand(held.at) == tuple(day(text) for text in expected)
    assert Holder(at=held.at) == held, "the normal form isn't stable"
    assert Holder.model_validate_json(held.model_dump_json()) == held


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2024-03-30", ["2024-03-29T23:00"]),
        ("2024-03-30T00:00Z", ["2024-03-30"]),
        ("2024-03-30/2024-04-01/1d", ["2024-03-29T23:00", "2024-03-30T23:00", "2024-03-31T22:00"]),
        ("2024-03-29T23:00Z/2024-04-01/1d", ["2024-03-29T23:00", "2024-03-30T23:00", "2024-03-31T22:00"]),
        ("2024-02-29/2024-05-01/1mo", ["2024-02-28T23:00", "2024-03-28T23:00", "2024-04-28T22:00", "2024-04-30T22:00"]),
        ("2024-10-27T02:00/2024-10-27T03:00/1h", ["2024-10-27", "2024-10-27T01:00", "2024-10-27T02:00"]),
    ],
)
def test_steps_go_by_the_clock_of_the_zone(given: str, expected: list[str]) -> None:
    held = Holder(at=given)  # type: ignore[arg-type]
    assert expand(held.at, "Europe/Berlin") == tuple(day(text) for text in expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yesterday", "'yesterday' is no time; write ISO 8601"),
        ("2024-01-01/2024-02-01", "no range of times; write START/END/STEP"),
        ("2024-01-01/2024-02-01/0d", "no range of times"),
        ("2024-01-01/2024-02-01/1m", "no range of times"),
        ("2024-02-01/2024-01-01/1d", "ends before it begins"),
        ("1970-01-01/2024-01-01/1h", "over 10,000 times; take a longer step"),
    ],
)
def test_what_is_no_time_is_refused_with_the_cure(given: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Holder(at=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: {b: 1}\nc: [2, x]", {"a": {"b": 1}, "c": [2, "x"]}),
        ("a: 2024-12-01", {"a": "2024-12-01"}),
        ("a: 2024-13-01", {"a": "2024-13-01"}),
        ("a: 2024-12-01 10:00:00", {"a": "2024-12-01 10:00:00"}),
        ("b: &b {x: 1, y: 2}\nc: {<<: *b, x: 3}", {"b": {"x": 1, "y": 2}, "c": {"x": 3, "y": 2}}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("", None),
    ],
)
def test_what_a_document_holds(text: str, expected: object) -> None:
    assert load_yaml(text) == expected
    assert load_yaml(text.encode()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"'a' stands twice .*line 3"),
        ("o: {p: {x: 1, x: 1}}", "'x' stands twice"),
        ("- {a: 1, 'a': 2}", "'a' stands twice"),
        ("a: {", "expected"),
        ("a: &a {x: *a}", "recursive"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("[" * 10_000, "nested too deeply"),
        (b"\xff\xfe\xff", ""),
    ],
)
def test_what_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_yaml(text)


def test_the_loader_of_others_is_as_it_was() -> None:
    assert str(yaml.safe_load("2024-12-01")) == "2024-12-01"
    assert not isinstance(yaml.safe_load("2024-12-01"), str)
