"""Linear combinations of models and base, whatever found the coefficients."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.merge.view import Combine, Elements
from jaxtune.types import Leaf

BASE = -1  # the term that is the base


def combine_linearly(coefficients: Sequence[Any], base: Any = 0.0, total: Any = 1.0) -> Combine:
    """`(base · θ_0 + Σ coefficients_k θ_k) / total`.

    Terms whose coefficient is known to be zero are left out, and a single term of the coefficient `total` is that
    model, bit for bit, the sign of its zeros included. Where coefficients are options, terms are added in their order,
    and those that have the same are added first and multiplied once: so the order of models is without meaning, and
    the exact halves that a mean of few numbers often is are rounded as halves.
    """
    terms = [(c, k) for k, c in enumerate((*coefficients, base)) if not is_known(c, 0.0)] or [(0.0, 0)]
    terms = [(c, k if k < len(coefficients) else BASE) for c, k in terms]
    if len(terms) == 1 and _are_options([terms[0][0], total]) and terms[0][0] == total:
        return take(terms[0][1])
    if not _are_options([c for c, _ in terms]):
        same: dict[int, tuple[Any, list[int]]] = {}  # numbers that were found are alike where they are one object
        for c, k in terms:
            same.setdefault(id(c), (c, []))[1].append(k)
        groups = [(c, tuple(places)) for c, places in same.values()]
    else:
        groups = [(c, tuple(k for one, k in terms if one == c)) for c in sorted({c for c, _ in terms})]
    constants = {
        "groups": tuple(places for _, places in groups),
        "plain": tuple(is_known(c, 1.0) for c, _ in groups),
        "divides": not is_known(total, 1.0),
    }
    return Combine(sum_groups, (tuple(c for c, _ in groups), total), tuple(constants.items()))


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


def sum_exactly(weight: Sequence[Any]) -> Any:
    """A sum that is the same in any order, unless JAX traces it."""
    return math.fsum(weight) if all(isinstance(one, (int, float)) for one in weight) else sum(weight)


def _are_options(numbers: Sequence[Any]) -> bool:
    """Whether these are numbers that somebody wrote, and not what was found of a leaf or is traced."""
    return all(type(number) in (int, float) for number in numbers)


def sum_groups(elements: Elements, factors: tuple, total: Any, *, groups: tuple, plain: tuple, divides: bool) -> Leaf:
    """`Σ factors_n · (sum of the models, or base, at groups_n) / total`; `plain` where a factor is one."""
    merged = None
    for places, factor, is_plain in zip(groups, factors, plain, strict=True):
        part = elements.own_base() if places[0] == BASE else elements.own_model(places[0])
        for place in places[1:]:
            part += _take(elements, place=place)
        if not is_plain:
            part *= factor
        if merged is None:
            merged = part
        else:
            merged += part
    if divides:
        merged /= total
    return merged


def _take(elements, *, place):
    return elements.base if place == BASE else elements.models[place]
