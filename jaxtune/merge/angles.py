"""Lengths and angles whose derivatives stay finite where vectors vanish or are parallel."""

from typing import Any

from jaxtune.types import Leaf


def root(xp: Any, squares: Leaf) -> Leaf:
    """The square root, zero below zero; its derivative at zero is zero."""
    is_positive = squares > 0
    return xp.where(is_positive, xp.sqrt(xp.where(is_positive, squares, 1.0)), 0.0)


def angle_of(xp: Any, cosines: Leaf) -> Leaf:
    """The angle of a cosine that may exceed one by rounding; its derivative at the ends is zero."""
    is_inside = xp.abs(cosines) < 1
    return xp.where(is_inside, xp.arccos(xp.where(is_inside, cosines, 0.0)), xp.where(cosines > 0, 0.0, xp.pi))
