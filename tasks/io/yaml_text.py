"""YAML from a user, read so that nothing in it is executed or silently lost."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a duplicate name in a mapping (YAML would take the last) and leaves times as text.

    Only the code that expects a date converts it; 2024-13-01 would otherwise be an error of YAML, without a place.
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
        return super().construct_object(node, deep=True)  # refuses a node that contains itself


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str | bytes) -> Any:
    """Return the contents of a YAML document.

    Raises:
        ValueError: it is no valid YAML, or a name occurs twice in a mapping; the message gives the place.

    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as fault:
        raise ValueError(" ".join(str(fault).split())) from fault
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault
