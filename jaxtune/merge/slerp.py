"""Interpolation along the great circle between two models."""

from jaxtune.merge.method import Method
from jaxtune.merge.view import Combine, Elements, View, gram
from jaxtune.types import Leaf

PARALLEL = 0.9995  # cosine from which the circle is taken for its chord: beyond it sin(angle) loses its digits


def merge_slerp(view: View, *, t: float) -> Combine:
    """From the base (t = 0) to the model (1): the angle between the two leaves in equal steps, lengths as they come.

    `sin((1-t)Ω)/sin(Ω) θ_0 + sin(tΩ)/sin(Ω) θ_1` with Ω the angle between the flattened leaves; where they are almost
    parallel or opposite, or one is zero, the straight line.

    Reference:
        Shoemake 1985, "Animating rotation with quaternion curves"; coefficients on the vectors as they are, not on unit
        vectors, and the threshold, as mergekit has them.
    """
    xp, products = view.xp, view.reduce(gram, of="all")
    squares = products[0, 0] * products[1, 1]
    cosine = products[0, 1] / xp.where(squares > 0, xp.sqrt(squares), 1.0)
    is_straight = (squares == 0) | (xp.abs(cosine) > PARALLEL)
    angle = xp.arccos(xp.where(is_straight, 0.0, cosine))
    first = xp.where(is_straight, 1 - t, xp.sin((1 - t) * angle) / xp.sin(angle))
    second = xp.where(is_straight, t, xp.sin(t * angle) / xp.sin(angle))
    return Combine(_sum_two, (first, second))


def _sum_two(elements: Elements, first: float, second: float) -> Leaf:
    return elements.base * first + elements.models[0] * second


SLERP = Method(merge_slerp, "along the great circle from base to model", "Shoemake 1985", num_models=(1, 1))
