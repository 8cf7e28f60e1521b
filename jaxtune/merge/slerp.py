"""Interpolation along the great circle between two models."""

from jaxtune.merge.affine import combine_linearly
from jaxtune.merge.angles import root
from jaxtune.merge.method import Method
from jaxtune.merge.sums import gram
from jaxtune.merge.view import Combine, View

PARALLEL = 0.9995  # cosine from which the circle is taken for its chord: beyond it sin(angle) loses its digits
SHORT = 1e-8


def merge_slerp(view: View, *, t: float) -> Combine:
    """From the base (t = 0) to the model (1): the angle between the two leaves in equal steps, lengths as they come.

    `sin((1-t)Ω)/sin(Ω) θ_0 + sin(tΩ)/sin(Ω) θ_1` with Ω the angle between the flattened leaves; where they are almost
    parallel or opposite, the straight line. A leaf shorter than 1e-8 is at a right angle to every other.

    Reference:
        Shoemake 1985, "Animating rotation with quaternion curves"; coefficients on the vectors as they are, not on unit
        vectors, and the threshold, as mergekit has them.
    """
    xp, products = view.xp, view.reduce(gram, of="all")
    lengths = [root(xp, products[n, n]) for n in range(2)]
    first, second = (xp.where(length > SHORT, length, 1.0) for length in lengths)
    cosine = xp.clip(products[0, 1] / (first * second), -1.0, 1.0)
    is_straight = xp.abs(cosine) > PARALLEL
    angle = xp.arccos(xp.where(is_straight, 0.0, cosine))
    first = xp.where(is_straight, 1 - t, xp.sin((1 - t) * angle) / xp.sin(angle))
    second = xp.where(is_straight, t, xp.sin(t * angle) / xp.sin(angle))
    return combine_linearly((second,), first)


SLERP = Method(merge_slerp, "along the great circle from base to model", "Shoemake 1985", num_models=(1, 1))
