"""Templates of pages and pictures: all inserted values are escaped."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from tasks.io.numerals import duration, number, plural, share, shortened


def template(name: str) -> Any:
    """Return a Jinja template of this package by its file name."""
    return _environment().get_template(name)


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("tasks.report").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, share=share, duration=duration, plural=plural, shortened=shortened)
    return environment
