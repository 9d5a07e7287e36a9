"""YAML as a user writes it, read so that nothing in it is executed or silently lost."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice in a mapping, of which YAML would take the last; leaves times as text.

    A date becomes an object only where somebody knows that it is meant as one, and 2024-13-01 would be an error of
    YAML's own, without a place.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (str(key.tag), str(key.value))
            if isinstance(key, yaml.ScalarNode) and name in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ARG002
        return super().construct_object(node, deep=True)  # refuses what holds itself


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str | bytes) -> Any:
    """What a YAML document holds.

    Raises:
        ValueError: it is no valid YAML, or a name stands twice in a mapping; says where.

    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as fault:
        raise ValueError(" ".join(str(fault).split())) from fault
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault
