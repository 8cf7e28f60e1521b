"""Linear combinations of models and base, whatever found the coefficients."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.merge.view import Combine, Elements
from jaxtune.types import Leaf

BASE = -1  # the term that is the base


def combine_linearly(coefficients: Sequence[Any], base: Any = 0.0) -> Combine:
    """`base · θ_0 + Σ coefficients_k θ_k`.

    Terms whose coefficient is known to be zero are left out, and a single term of coefficient one is that model, bit
    for bit, the sign of its zeros included.
    """
    terms = [(k, c) for k, c in enumerate((*coefficients, base)) if not is_known(c, 0.0)] or [(0, 0.0)]
    places = tuple(k if k < len(coefficients) else BASE for k, _ in terms)
    if len(terms) == 1 and is_known(terms[0][1], 1.0):
        return take(places[0])
    return Combine(sum_terms, (tuple(c for _, c in terms),), (("places", places),))


def only_whole(coefficients: Sequence[Any]) -> int | None:
    """The model that has the only coefficient beside zeros, if that is one: a sum of task vectors then is that model.

    The sum itself, `θ_0 + (θ_1 - θ_0)`, would lose digits wherever the model is much smaller than the base.
    """
    left = [k for k, c in enumerate(coefficients) if not is_known(c, 0.0)]
    return left[0] if len(left) == 1 and is_known(coefficients[left[0]], 1.0) else None


def take(place: int) -> Combine:
    """One model (or `BASE`) as it is."""
    return Combine(_take, (), (("place", place),))


def is_known(number: Any, value: float) -> bool:
    """Whether a coefficient is this very number; of one that is traced by JAX, nothing is known."""
    return isinstance(number, (int, float, np.generic, np.ndarray)) and bool(number == value)


def sum_terms(elements: Elements, coefficients: tuple, *, places: tuple[int, ...]) -> Leaf:
    """`Σ coefficients_n · (model or base at places_n)`."""
    merged = _take(elements, place=places[0]) * coefficients[0]
    for place, factor in zip(places[1:], coefficients[1:], strict=True):
        merged = merged + _take(elements, place=place) * factor
    return merged


def _take(elements, *, place):
    return elements.base if place == BASE else elements.models[place]
