"""Leaves declared once: shape, who owns the axes, how it is drawn; a family's `init` and `symmetry` read one table."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.rng import named_key
from jaxtune.tree import unflatten

Owners = tuple[str | None, ...]


@dataclass(frozen=True)
class Declared:
    """One leaf.

    Attributes:
        path: Where it lies.
        shape: Its shape.
        owners: As `make_spec` takes them, one an axis.
        centre, spread: Mean and standard deviation that `draw` gives it.
        is_unmatched: Whether it moves and says nothing about which unit is which (see `Spec.unmatched`).
    """

    path: str
    shape: tuple[int, ...]
    owners: Owners
    centre: float
    spread: float
    is_unmatched: bool = False


def kernel(
    path: str, shape: tuple[int, ...], owners: Owners, *, num_out: int = 1, is_unmatched: bool = False
) -> Declared:
    """A kernel whose last `num_out` axes are its outputs: variance 1 / fan_in."""
    fan_in = math.prod(shape[: len(shape) - num_out])
    return Declared(path, shape, owners, 0.0, fan_in**-0.5, is_unmatched)


def table(path: str, shape: tuple[int, int], owner: str | None) -> Declared:
    """Rows to look up, each of variance 1."""
    return Declared(path, shape, (None, owner), 0.0, 1.0)


def bias(path: str, shape: tuple[int, ...], owners: Owners, *, is_unmatched: bool = False) -> Declared:
    """Offsets, small and not zero."""
    return Declared(path, shape, owners, 0.0, 0.1, is_unmatched)


def gain(path: str, shape: tuple[int, ...], owners: Owners) -> Declared:
    """Gains of a norm, near 1."""
    return Declared(path, shape, owners, 1.0, 0.1)


def layer_norm(path: str, width: int, owner: str | None) -> list[Declared]:
    """Gain and offset."""
    return [gain(f"{path}/scale", (width,), (owner,)), bias(f"{path}/bias", (width,), (owner,))]


def dense(path: str, shape: tuple[int, int], owners: Owners) -> list[Declared]:
    """Kernel and bias."""
    return [kernel(f"{path}/kernel", shape, owners), bias(f"{path}/bias", shape[1:], owners[1:])]


def draw(key: jax.Array, leaves: Iterable[Declared]) -> dict[str, Any]:
    """Fresh float32 parameters; every leaf draws from the stream of its own path."""
    return unflatten(
        {
            leaf.path: leaf.centre + leaf.spread * jax.random.normal(named_key(key, leaf.path), leaf.shape, jnp.float32)
            for leaf in leaves
        }
    )
