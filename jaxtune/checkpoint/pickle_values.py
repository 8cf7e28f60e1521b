"""What a restricted pickle is made of, beside Python's own containers and scalars."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A global of the whitelist.

    Attributes:
        name: As messages show it.
        call: Arguments -> what the call stands for, or `CheckpointError`; None where it is never called.
        is_class: Whether NEWOBJ may stand for the call.
        payload: What it stands for where it is named and not called (a dtype).
    """

    name: str
    call: Callable[..., Any] | None = None
    is_class: bool = False
    payload: Any = None


class Inert:
    """An object that is none of our business (arguments of a training run): takes whatever is put
    into it, keeps nothing.
    """

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class Record(dict):
    """An ordered dict; unlike a plain one it may carry attributes (`_metadata` of a state dict), which are dropped."""


def kind_of(value: Any) -> str:
    """What a value is, for messages; never its content, which may be hostile or endless."""
    if isinstance(value, Global):
        return value.name
    if isinstance(value, Inert):
        return value.kind
    return type(value).__name__
