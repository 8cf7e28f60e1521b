"""Values of parameters: scalars, gradients over depth, filters by tensor name, and which level decides.

Levels from the strongest: model (or source of a slice), slice, module, whole recipe. A level that says nothing of a
tensor, because no filter matches it, leaves it to the next.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.recipes.nodes import Node

Scalar = bool | int | float | str
KINDS = ("float", "int", "bool", "str", "switch")  # a switch is on, off, or on in a way that text names
TRUE, FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names contain `filter`; None and "*" are all of them.

    Attributes:
        value: One scalar, or several: a gradient from the first layer of a slice to its last.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None
    node: Node

    def matches(self, name: str) -> bool:
        """Whether a tensor is meant; the filter is a part of its name, no pattern."""
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True)
class Setting:
    """What one level says of one parameter; the first condition that matches decides."""

    conditions: tuple[Condition, ...]
    node: Node

    @property
    def has_filters(self) -> bool:
        """Whether the value depends on the tensor's name."""
        return any(condition.filter not in (None, "*") for condition in self.conditions)


Parameters = Mapping[str, Setting]


def parse_parameters(node: Node | None) -> dict[str, Setting]:
    """Parameters of one level.

    Raises:
        RecipeError: a value that is no scalar, no list of scalars, and no list of {filter, value}.
    """
    if node is None:
        return {}
    return {name: _parse_setting(value) for name, value in node.items("parameters: {name: value}")}


class Resolver:
    """One parameter at one place of a recipe: value of it for any tensor and depth.

    Args:
        levels: What each level says of it, the strongest first.
        kind: One of `KINDS`.
        default: Where no level says anything.
        convert: Applied to a value that a level gives, and to nothing else.
    """

    def __init__(self, levels: Sequence[Setting], kind: str, default: Any, convert: Callable[[Any], Any] | None = None):
        self._levels, self._kind, self._default, self._convert = tuple(levels), kind, default, convert
        self._by_depth: dict[float, Any] | None = None if any(level.has_filters for level in levels) else {}
        self._by_name: dict[tuple, Any] = {}

    @property
    def has_filters(self) -> bool:
        """Whether the value depends on the tensor's name."""
        return self._by_depth is None

    def __call__(self, name: str, t: float) -> Any:
        """The value for the tensor `name` at depth `t`, 0 the first layer of its slice and 1 the last."""
        if self._by_depth is not None:
            if t not in self._by_depth:
                self._by_depth[t] = self._find(name, t)
            return self._by_depth[t]
        return self._find(name, t)

    def _find(self, name, t):
        for level in self._levels:
            condition = next((one for one in level.conditions if one.matches(name)), None)
            key = (id(condition), t)
            if condition is None or condition.value == ():
                continue
            if key not in self._by_name:
                value = evaluate(condition, t, self._kind)
                self._by_name[key] = self._convert(value) if self._convert else value
            return self._by_name[key]
        return self._default


def evaluate(condition: Condition, t: float, kind: str) -> Any:
    """The value of a condition at depth `t`.

    Numbers of a gradient lie at equal distances, and between two of them the line is taken; of text and of true and
    false, the one at or before `t`. Whole numbers are rounded.

    Raises:
        RecipeError: a value of another kind.
    """
    if not isinstance(condition.value, tuple):
        return convert(kind, condition.value, condition.node)
    values = [convert(kind, value, condition.node) for value in condition.value]
    place = t * (len(values) - 1)
    low = int(place)
    if kind in ("bool", "str", "switch"):
        return values[low]
    high, share = min(len(values) - 1, low + 1), place - low
    between = (1 - share) * values[low] + share * values[high]
    return round(between) if kind == "int" else between


def evaluate_once(setting: Setting, kind: str, method: str) -> Any:
    """The value of a parameter that is one for the whole model.

    Args:
        kind: As `convert`, or "numbers": a list of them.
        method: What errors call the method.

    Raises:
        RecipeError: a value of another kind; a gradient or filters, which would mean nothing.
    """
    value, node = setting.conditions[0].value, setting.conditions[0].node
    if len(setting.conditions) > 1 or setting.has_filters:
        raise setting.node.error(f"{method} has one value for the whole model here, and no filters.")
    if kind == "numbers":
        if not isinstance(value, tuple):
            raise node.error(f"expected a list of numbers, found {value!r}.")
        return tuple(convert("float", one, node) for one in value)
    if isinstance(value, tuple):
        raise node.error(f"{method} has one value for the whole model here, and no gradient.")
    return convert(kind, value, node)


def convert(kind: str, value: Scalar, node: Node) -> Any:
    """A scalar as a kind; text that spells it counts, as YAML reads 1e-5 as text.

    Raises:
        RecipeError: it is none.
    """
    if kind in ("bool", "switch"):
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in TRUE + FALSE:
            return value.lower() in TRUE
    if kind in ("str", "switch"):
        if isinstance(value, str):
            return value
    elif kind == "bool":
        pass
    else:
        try:
            number = float(value)
            if math.isfinite(number) and (kind == "float" or number == int(number)):
                return number if kind == "float" else int(number)
        except ValueError:
            pass
    words = {"float": "a finite number", "int": "a whole number", "bool": "true or false", "str": "text"}
    words = words.get(kind, "true, false or text")
    raise node.error(f"expected {words}, found {value!r}.")


def _parse_setting(node: Node) -> Setting:
    items = node.value
    if isinstance(items, dict):
        return Setting((_parse_condition(node),), node)
    if isinstance(items, tuple) and items and all(isinstance(item.value, dict) for item in items):
        return Setting(tuple(_parse_condition(item) for item in items), node)
    return Setting((Condition(_parse_value(node), None, node),), node)


def _parse_condition(node: Node) -> Condition:
    node.check_keys(("filter", "value"))
    value, name = node.get("value"), node.get("filter")
    if value is None:
        raise node.error("'value' is missing beside 'filter'.")
    return Condition(_parse_value(value), None if name is None else str(name.expect(str, "part of a name")), value)


def _parse_value(node: Node) -> Scalar | tuple[Scalar, ...]:
    if isinstance(node.value, tuple):
        return tuple(_parse_scalar(item) for item in node.value)
    return _parse_scalar(node)


def _parse_scalar(node: Node) -> Scalar:
    if isinstance(node.value, bool | int | float | str):
        return node.value
    raise node.error("expected a value, a list of values (a gradient), or a list of {filter: PART, value: V}.")
