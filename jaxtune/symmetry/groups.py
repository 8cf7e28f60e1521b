"""A group of a network's symmetry, and what a kind of group must be able to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """One freedom of the network: the order or the basis of one set of units.

    Attributes:
        name: Path-like and unique, for instance "block_0/attn/head".
        size: Number of units that one element rearranges.
        kind: Row of `KINDS`.
        parent: Name of the group whose every unit has an element of its own, as the units inside a
            head have one per head; None for a group that stands alone.
        role: What the units are, for reports and for alignment: "stream", "head" (all heads, or the groups that
            share keys and values), "query" (the queries of one such group), "qk", "vo", "inside" (one order for
            qk and vo), "hidden", "expert" or "channel".
    """

    name: str
    size: int
    kind: str = "permutation"
    parent: str | None = None
    role: str = "hidden"


@dataclass(frozen=True)
class Kind:
    """The arithmetic of one kind of group. `count` is the number of units of the parent, or None.

    Attributes:
        identity: (size, count) -> element.
        draw: (key, size, count) -> element; uniform over the kind where it is compact.
        act: (element, leaf, axis, parent_axis, dual) -> leaf. A parent, if any, acted before.
        compose: (second, first, second_parent) -> the element that acts as `first`, then `second`.
        invert: (element, parent) -> element.
        check: (element, size, count) -> None or the complaint.
        order: element -> which source unit lands where, int32[n] or int32[parent, n]; None where units mix.
    """

    identity: Callable[..., Any]
    draw: Callable[..., Any]
    act: Callable[..., Any]
    compose: Callable[..., Any]
    invert: Callable[..., Any]
    check: Callable[..., str | None]
    order: Callable[[Any], Any] | None = None
