"""Multi-SLERP: several models on a sphere, interpolated in the plane that touches it at their mean."""

import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.merge.affine import combine_linearly, take
from jaxtune.merge.angles import root
from jaxtune.merge.method import Method
from jaxtune.merge.sums import gram
from jaxtune.merge.view import Combine, View


def merge_multislerp(
    view: View, *, weight: tuple[float, ...] = 1.0, normalize_weights: bool = True, eps: float = 1e-8
) -> Combine:
    """Weighted mean of directions on the unit sphere, times the weighted mean of lengths; with a base, of task vectors.

    Directions are projected into the tangent plane at their weighted mean, summed there with the weights, and brought
    back by the exponential map.

    Args:
        view: Of the leaf.
        weight: Of each model.
        normalize_weights: Divides them by their sum.
        eps: Added to lengths that are divided by.

    Raises:
        ConfigError: directions balance out, so that they have no mean (of two models: the straight line is taken).

    Reference:
        C. O. Goddard, "Multi-SLERP"; mergekit 0.1.5. Differs: models that are all equal to the base give the base,
        where three and more raise there.
    """
    if view.num_models == 1:
        return take(0)
    xp = view.xp
    total = sum(weight) if normalize_weights else 1.0
    share = xp.stack([xp.asarray(one / total) for one in weight])
    products = view.reduce(gram, of="deltas" if view.has_base else "models")
    lengths = root(xp, xp.diagonal(products))
    units = products / (lengths + eps)[:, None] / (lengths + eps)[None, :]  # inner products of the directions

    def length_of(coefficients):
        return root(xp, coefficients @ units @ coefficients)

    distance = length_of(share)
    is_balanced = distance < eps
    if xp is np and view.num_models > 2 and bool(is_balanced) and bool((lengths > 0).any()):
        raise ConfigError(
            f"{view.name}: the weighted directions of these models balance out, so that multislerp has no mean: "
            "give other weights."
        )
    mean = share / xp.where(is_balanced, 1.0, distance)
    tangent = share - (share * (units @ mean)).sum() * mean
    angle = length_of(tangent) + eps
    turned = mean * xp.cos(angle) + tangent * (xp.sin(angle) / angle)
    turned = turned * (lengths * share).sum() / (lengths + eps)
    found = xp.where(is_balanced, share, turned)
    coefficients = tuple(found[k] for k in range(view.num_models))
    return combine_linearly(coefficients, 1 - sum(coefficients) if view.has_base else 0.0)


MULTISLERP = Method(
    merge_multislerp,
    "weighted mean of models or task vectors on a sphere, by its tangent plane",
    "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    base="may",
    per_model=("weight",),
)
