"""YAML is read as it is written: nothing lost, no times made of text, nothing executed."""

from __future__ import annotations

import pytest
import yaml

from tasks.io.yaml_text import load_yaml


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
