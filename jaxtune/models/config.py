"""What every model config does: refuse a value that makes no sense, become a plain dict and come back.

A config is a frozen dataclass whose annotations are the rules: an int is a size and at least 1, a float is
positive, `Literal` names the choices, another config nests, `| None` allows none. So a config hashes, compares,
and can be a static argument of `jax.jit`.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxtune.errors import ConfigError

C = TypeVar("C")


def check_fields(config: Any) -> None:
    """Checks every field of a config against its annotation; called from `__post_init__`.

    Raises:
        ConfigError: lists each field with what it must be and what came.
    """
    hints = get_type_hints(type(config))
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        complaint = _complaint_of(hints[field.name], value)
        if complaint:
            lines.append(f"  {field.name}: must be {complaint}, got {value!r}")
    if lines:
        raise ConfigError(f"{_name_of(type(config))} does not make sense:\n" + "\n".join(lines))


def to_fields(config: Any) -> dict[str, Any]:
    """Field -> value, nested configs as dicts and tuples as lists: ready for JSON."""
    plain = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            value = to_fields(value)
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def from_fields(config_class: type[C], values: Mapping[str, Any]) -> C:
    """The config that `to_fields` wrote; a field with a default may be left out.

    Raises:
        ConfigError: a key that is no field, a field without a value, or a value that makes no sense.
    """
    name, known = _name_of(config_class), fields(config_class)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a dict of its fields, got {values!r}.")
    unknown = sorted(values.keys() - {field.name for field in known})
    missing = [field.name for field in known if field.default is MISSING and field.name not in values]
    if unknown or missing:
        lines = [f"  {key}: no such field" for key in unknown] + [f"  {key}: missing" for key in missing]
        raise ConfigError(
            f"{name} cannot be made from these keys:\n"
            + "\n".join(lines)
            + f"\nIts fields: {', '.join(field.name for field in known)}."
        )
    hints = get_type_hints(config_class)
    return config_class(**{key: _from_plain(hints[key], value) for key, value in values.items()})


def _complaint_of(hint, value):
    """What a value annotated with `hint` must be, or None if it is."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) in (types.UnionType, Union):
        complaint = None if value is None else _complaint_of(_without_none(hint), value)
        return complaint and f"{complaint}, or None"
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        length = None if Ellipsis in parts else len(parts)
        is_right = isinstance(value, tuple) and length in (None, len(value))
        if is_right and all(_complaint_of(parts[0], part) is None for part in value):
            return None
        kind = "answers, each True or False" if parts[0] is bool else "ints, each at least 1"
        return f"a tuple of {'' if length is None else f'{length} '}{kind}"
    if hint is int:
        return None if is_int and value >= 1 else "an int, at least 1"
    if hint is float:
        is_number = is_int or isinstance(value, float)
        return None if is_number and value > 0 and math.isfinite(value) else "a positive number"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    return None if isinstance(value, hint) else f"a {_name_of(hint)}"


def _from_plain(hint, value):
    if get_origin(hint) in (types.UnionType, Union):
        return None if value is None else _from_plain(_without_none(hint), value)
    if is_dataclass(hint):
        return value if isinstance(value, hint) else from_fields(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _without_none(hint):
    """The type that `type | None` allows besides None."""
    (allowed,) = (part for part in get_args(hint) if part is not type(None))
    return allowed


def _name_of(config_class: type | types.GenericAlias) -> str:
    return f"{config_class.__module__.removeprefix('jaxtune.models.')}.{config_class.__name__}"
