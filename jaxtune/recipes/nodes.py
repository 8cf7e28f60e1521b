"""Recipes as trees of values that know where they stand: line and column in YAML, the path of keys in Python."""

import difflib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from jaxtune.errors import ConfigError

MAX_NODES = 100_000  # aliases of aliases can stand for more than any recipe has
MAX_DEPTH = 64


class RecipeError(ConfigError):
    """A recipe says something that cannot be done; the message names file, line, key and what to write."""


@dataclass(frozen=True)
class Node:
    """One value of a recipe.

    Attributes:
        value: A scalar, a tuple of nodes, or a dict of nodes.
        path: Keys from the top: "models[1].parameters.weight"; "" at the top.
        place: Where it stands: "merge.yml, line 3, column 5"; of values made in Python, "the recipe".
        key_place: The same of its key, for keys that should not be there.
    """

    value: Any
    path: str
    place: str
    key_place: str = ""

    @property
    def plain(self) -> Any:
        """The value without places: scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        return [node.plain for node in self.value] if isinstance(self.value, tuple) else self.value

    def get(self, key: str) -> "Node | None":
        """The node under a key; None where it is absent or null."""
        node = self.value.get(key)
        return None if node is None or node.value is None else node

    def error(self, words: str, *, at_key: bool = False) -> RecipeError:
        """What to raise about this node."""
        place = self.key_place if at_key and self.key_place else self.place
        return RecipeError(f"{place}: {self.path + ': ' if self.path else ''}{words}")

    def expect(self, kind: type | tuple[type, ...], words: str) -> Any:
        """The value, which must be of a kind (a bool is no number here)."""
        is_bool = isinstance(self.value, bool)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(self.value, kind) or (is_bool and bool not in kinds):
            raise self.error(f"expected {words}, found {describe(self.value)}.")
        return self.value

    def items(self, words: str = "keys and values") -> Iterator[tuple[str, "Node"]]:
        """Of a mapping: key, node; nulls are left out."""
        for key, node in self.expect(dict, words).items():
            if node.value is not None:
                yield key, node

    def check_keys(self, known: Iterable[str], refused: Mapping[str, str] | None = None) -> None:
        """Checks the keys of a mapping.

        Args:
            known: Keys that are read.
            refused: Keys of other programs -> why they are not read.

        Raises:
            RecipeError: names the key, and the nearest known one.
        """
        known = list(known)
        for key, node in self.expect(dict, "keys and values").items():
            if key in known:
                continue
            if refused and key in refused:
                raise node.error(f"not read here: {refused[key]}", at_key=True)
            raise node.error(f"unknown key {key!r}.{did_you_mean(key, known)}", at_key=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name and all of them, as the end of a message."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(known)}."


def describe(value: Any) -> str:
    """A found value in words."""
    if isinstance(value, dict):
        return "keys and values (" + ", ".join(map(str, list(value)[:4])) + ")"
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    return repr(value)


def read_nodes(text: str, name: str) -> list[Node]:
    """Every document of a YAML text.

    Args:
        text: What the file holds.
        name: Of the file, for messages.

    Raises:
        RecipeError: no YAML, a key that stands twice, a tag, or aliases that stand for more than a recipe can hold.
    """
    stream = io.StringIO(text)
    stream.name = name  # PyYAML's own messages take it
    try:
        loader = yaml.SafeLoader(stream)
        roots = []
        while loader.check_node():
            roots.append(loader.get_node())
        budget = _Budget(name)
        return [_of_yaml(loader, root, "", name, "", 0, budget) for root in roots if not _is_empty(root)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{_place(name, mark)}: not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{name}: not YAML: {error}.") from error


def nodes_of(value: Any, path: str = "", name: str = "the recipe") -> Node:
    """The same of plain Python values: mappings, sequences and scalars."""
    if hasattr(value, "to_dict") and not isinstance(value, Mapping):  # ml_collections.ConfigDict
        value = value.to_dict()
    if len(path) > 1000:
        raise RecipeError(f"{name}: nested too deep at {path[:60]}...")
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise RecipeError(f"{name}: {path}: expected keys that are text, found {odd[0]!r}.")
        made = {key: nodes_of(value[key], f"{path}.{key}" if path else key, name) for key in value}
    elif isinstance(value, list | tuple):
        made = tuple(nodes_of(item, f"{path}[{index}]", name) for index, item in enumerate(value))
    elif value is None or isinstance(value, str | bool | int | float):
        made = value
    elif hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a number of NumPy
        made = value.item()
    elif hasattr(value, "__fspath__"):
        made = str(value)
    else:
        raise RecipeError(f"{name}: {path}: expected text, a number, a list or keys and values, found {value!r}.")
    return Node(made, path, name, name)


class _Budget:
    """Counts nodes, so that aliases of aliases end."""

    def __init__(self, name):
        self.name, self.left = name, MAX_NODES

    def take(self, depth):
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            raise RecipeError(f"{self.name}: aliases or nesting make more than {MAX_NODES} values. Write them out.")


def _of_yaml(loader, node, path, name, key_place, depth, budget):
    budget.take(depth)
    place = _place(name, node.start_mark)
    if isinstance(node, yaml.MappingNode):
        made = {}
        for key_node, value_node in _pairs(loader, node, name, budget):
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            own_place = _place(name, key_node.start_mark)
            if key is None:
                raise RecipeError(f"{own_place}: {path + ': ' if path else ''}expected a key that is text.")
            below = f"{path}.{key}" if path else key
            made[key] = _of_yaml(loader, value_node, below, name, own_place, depth + 1, budget)
    elif isinstance(node, yaml.SequenceNode):
        made = tuple(
            _of_yaml(loader, item, f"{path}[{index}]", name, "", depth + 1, budget)
            for index, item in enumerate(node.value)
        )
    else:
        made = _scalar(loader, node, path, place)
    return Node(made, path, place, key_place or place)


def _pairs(loader, node, name, budget):
    """Pairs of a mapping, with what a merge key "<<" brings behind its own keys; a key twice is an error."""
    own, brought, seen = [], [], {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            several = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for one in several:
                budget.take(0)
                if not isinstance(one, yaml.MappingNode) or one is node:
                    raise RecipeError(f"{_place(name, one.start_mark)}: <<: expected an alias of keys and values.")
                brought += _pairs(loader, one, name, budget)
            continue
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
        if key in seen:
            raise RecipeError(
                f"{_place(name, key_node.start_mark)}: key {key!r} stands twice; the first is on line "
                f"{seen[key].line + 1}. Keep one: YAML would take the last and drop the other."
            )
        seen[key] = key_node.start_mark
        own.append((key_node, value_node))
    known = set(seen)
    for key_node, value_node in brought:
        key = getattr(key_node, "value", None)
        if isinstance(key, str) and key not in known:
            known.add(key)
            own.append((key_node, value_node))
    return own


def _scalar(loader, node, path, place):
    """A scalar by YAML's own rules for plain ones; other tags are refused."""
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if tag in ("null", "bool", "int", "float"):
        try:
            return loader.construct_object(node, deep=True)
        except (ValueError, OverflowError) as error:
            raise RecipeError(f"{place}: {path}: {node.value!r} is no {tag}.") from error
    if tag in ("str", "timestamp", "value"):
        return node.value
    raise RecipeError(f"{place}: {path}: the tag {node.tag!r} is not read. Recipes hold text, numbers, lists and keys.")


def _is_empty(node):
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _place(name, mark):
    return name if mark is None else f"{name}, line {mark.line + 1}, column {mark.column + 1}"
