"""Parses YAML that anybody may have written. What is wrong with it is a `yaml.YAMLError`, within seconds."""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 1 << 20

_DEEPEST = 64
_MOST_VALUES = 100_000
"""With those that aliases repeat, which a few lines can do billions of times. So many take seconds."""

_LONGEST_NUMBER = 128
"""Letters. One with colons (base 60) takes minutes if it is long."""

_WHOLE = range(-(1 << 63), 1 << 63)
"""What fits into 64 bits, as every number that is stored has to."""


class _Loader(yaml.SafeLoader):
    """Refuses what would run forever or break later, and a key that is given twice."""

    yaml_constructors = yaml.SafeLoader.yaml_constructors | {
        "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp
    }
    """A table of its own: a library that comes with vLLM makes timestamps text in the one that all share."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._depth = self._num_nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        before = self._num_nodes
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refused(f"nested deeper than {_DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _refused(
                    f"the alias *{event.anchor} refers to a value that contains it", event.start_mark
                )
            self._num_nodes += self._sizes[id(node)]
        else:
            self._num_nodes += 1
            self._sizes[id(node)] = self._num_nodes - before
        if self._num_nodes > _MOST_VALUES:
            what = f"more than {_MOST_VALUES:,} values, with those that aliases repeat; give globs or folders"
            raise _refused(what, event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """YAML would take the last of a key's values without a word."""
        node = super().compose_mapping_node(anchor)
        given: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if (key.tag, key.value) in given:
                raise _refused(f"`{key.value}` is given twice; keep one", key.start_mark)
            given.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.endswith(":int") and len(node.value) > _LONGEST_NUMBER:
            raise _refused(f"a number with {len(node.value):,} digits", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _refused(
                f"{str(node.value)[:40]!r} is not a value of type {kind}", node.start_mark
            ) from error
        if isinstance(value, int) and value not in _WHOLE:
            raise _refused("a number that does not fit into 64 bits", node.start_mark)
        return value


def _refused(what: str, mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def parse(text: str | bytes) -> Any:
    """The values of one YAML document.

    Raises:
        yaml.YAMLError: it is no YAML, or longer than `MAX_BYTES`; it gives a key twice, is nested too deep,
            has too many values, or a number that does not fit into 64 bits. Names the line.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"longer than {MAX_BYTES:,} bytes; give long lists as a glob or a folder")
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error
