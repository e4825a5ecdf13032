"""YAML that people write: recipes, values on a command line, front matter. Read here, and nowhere else.

It is plain data: mappings, lists, texts, numbers, truth values. What a small file can blow up to is bounded, for YAML's
aliases let a kilobyte stand for gigabytes, and every program that looks at all of it would stop there.
"""

from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import LenVMError

MOST_BYTES = 2**20  # of a file
MOST_NODES = 20_000  # keys, values, lists and mappings, after aliases; the largest shipped recipe has some hundreds
MOST_LEVELS = 50  # of lists and mappings in each other; no setting is deeper than ten
KeyLines = list[tuple[tuple[str, ...], int]]
"""Path of each key, and its line, counted from 1; in the order of the file. A key that is there twice is twice."""

_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_PREFIX = "tag:yaml.org,2002:"
_SHOWN = 40  # letters of a value in a message


class _Loader(yaml.SafeLoader):
    """Plain data only, and no more of it than is allowed, counted as if every alias were written out."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_PREFIX) in _PLAIN
    }
    # Dates stay texts: no setting is one, and JSON has none. A plain `=` is a text, too.
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # type: ignore[misc]
        letter: [(tag, form) for tag, form in forms if tag.removeprefix(_PREFIX) in (*_PLAIN, "merge")]
        for letter, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, most_nodes: int) -> None:
        super().__init__(text)
        self._most_nodes = most_nodes
        self._nodes = self._level = self._deepest = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # nodes in a finished node, and levels below it, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, unless it is too much."""
        event = self.peek_event()
        nodes_before, deepest_before = self._nodes, self._deepest
        self._level += 1
        self._deepest = self._level
        self._refuse_too_much(event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _problem(f"the alias *{event.anchor} is part of what it stands for", event)
            size, levels = self._sizes[id(node)]
            self._nodes += size
            self._deepest += levels
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - nodes_before, self._deepest - self._level
        self._refuse_too_much(event)
        self._level -= 1
        self._deepest = max(self._deepest, deepest_before)
        return node

    def _refuse_too_much(self, event: Any) -> None:
        if self._nodes > self._most_nodes:
            raise _problem(f"more than {self._most_nodes:,} keys and values, aliases written out", event)
        if self._deepest > MOST_LEVELS:
            raise _problem(f"lists and mappings are more than {MOST_LEVELS} levels deep", event)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Make the value of a node; one that cannot be made is told with its place."""
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            OverflowError,
        ) as error:  # such as a number of 5,000 digits
            kind = node.tag.removeprefix(_PREFIX)
            raise _problem(f"{str(node.value)[:_SHOWN]!r} cannot be read as {kind}", node) from error


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)


def parse_yaml(text: str, most_nodes: int = MOST_NODES) -> Any:
    """What a text says.

    Args:
        text: one YAML document.
        most_nodes: keys, values, lists and mappings that it may hold.

    Returns:
        Dictionaries, lists, texts, numbers, truth values, None. No part is shared with another one, so that one place
        can be changed alone, whatever aliases the text has.

    Raises:
        ValueError: it is not valid, or too much; the text says where.
    """
    return parse_yaml_with_lines(text, most_nodes)[0]


def parse_yaml_with_lines(text: str, most_nodes: int = MOST_NODES) -> tuple[Any, KeyLines]:
    """What a text says, and in which line each key is; see `parse_yaml`."""
    try:
        loader = _Loader(text, most_nodes)
        node = loader.get_single_node()
        if node is None:
            return None, []
        lines: KeyLines = []
        _collect_lines(node, (), lines)  # before aliases of whole mappings are merged in
        return _unshared(loader.construct_document(node)), lines
    except yaml.YAMLError as error:
        raise ValueError(_in_words(error)) from error


def read_yaml_file(path: Path, error_class: type[LenVMError], most_nodes: int = MOST_NODES) -> tuple[Any, KeyLines]:
    """What a file says, and in which line each key is; see `parse_yaml`.

    Raises:
        LenVMError: of the class given; it cannot be read, is not valid, or too much. The file is named.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise error_class(f"{path} is larger than {MOST_BYTES / 2**20:.0f} MiB, which no file of settings is")
        return parse_yaml_with_lines(content.decode("utf-8-sig"), most_nodes)
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the decoder, too
        raise error_class(f"{path} is not valid YAML: {error}") from error


def _collect_lines(node: yaml.Node, prefix: tuple[str, ...], lines: KeyLines) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            lines.append((path, key.start_mark.line + 1))
            _collect_lines(value, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            _collect_lines(entry, (*prefix, str(number)), lines)


def _unshared(value: Any) -> Any:
    """A copy in which what an alias stands for is there once for each alias."""
    if isinstance(value, dict):
        return {key: _unshared(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unshared(entry) for entry in value]
    return value


def _in_words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    text = ", ".join(said) or str(error).partition("\n")[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark is not None else text
