"""Averages weighted, entry by entry, by how much each model's task depends on the entry."""

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between, check_choice
from jaxtune.merge.sums import dot_wide
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.types import Leaf


def merge_fisher(
    view: View,
    *,
    weight: tuple[float, ...] = 1.0,
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
    scope: str = "model",
) -> Combine:
    """`Σ λ_i F_i θ_i / Σ λ_i F_i`, F_i the diagonal of model i's Fisher information.

    Args:
        view: Of the models, with their Fishers as extras. A leaf without Fishers is averaged, weighted by λ.
        weight: λ.
        normalize: Whether each F_i is divided by its length: that of F_i as given, without the floor.
        floor: Least value of an F_i as given.
        favor_target: Whether only the first model's Fisher has the floor, so that an entry that no other model cares
            about keeps the first one's value.
        scope: Whether the lengths are of the whole "model" or of each "leaf".

    Where all `λ_i F_i` are zero the result is the plain mean.

    Reference:
        Matena and Raffel 2022, arXiv:2111.09832. Differs: the release divides 0 by 0 where λ of the first model is zero
        and no other cares.
    """
    _check_shapes(view, scope)
    xp = view.xp
    if not normalize:
        return Combine(_average, (tuple(weight), tuple(weight), floor), (("favor_target", favor_target),))
    squares = view.reduce(_sum_squares)
    lengths = xp.sqrt(xp.where(squares > 0, squares, 1.0))
    weights = tuple(factor / lengths[k] for k, factor in enumerate(weight))
    return Combine(_average, (weights, tuple(weight), floor), (("favor_target", favor_target),))


def _check_shapes(view, scope):
    if view.extra_shapes is None:
        raise ConfigError("merge method 'fisher' needs Fishers, one tree a model; none were given.")
    shape = view.extra_shapes[0]
    # All leaves of a model are one view, whose shape is that of none of them: elements are compared as they come.
    if scope == "leaf" and shape is not None and shape != view.shape:
        raise TreeMismatchError(f"{view.name}: a Fisher has the shape {shape}, the leaf {view.shape}.")


def _sum_squares(elements: Elements) -> Leaf:
    xp, count = elements.xp, len(elements.models)
    if elements.extras is None:
        return xp.zeros(count, elements.dtype)
    return xp.stack([dot_wide(elements, extra, extra) for extra in elements.extras])


def _average(elements: Elements, scaled: tuple, weight: tuple, floor: float, favor_target: bool) -> Leaf:
    xp, models = elements.xp, elements.models
    above = below = mean = xp.zeros_like(models[0])
    if elements.extras is None:
        return sum(model * factor for model, factor in zip(models, weight, strict=True)) / sum(weight)
    for place, (model, factor) in enumerate(zip(models, scaled, strict=True)):
        fisher = elements.extras[place]
        if fisher.shape != model.shape:
            raise TreeMismatchError(f"a Fisher has {fisher.size} entries, its leaf {model.size}.")
        if place == 0 or not favor_target:
            fisher = xp.maximum(fisher, floor)
        share = fisher * factor
        above, below, mean = above + share * model, below + share, mean + model / len(models)
    return xp.where(below > 0, above / xp.where(below > 0, below, 1.0), mean)


def _check(options):
    check_between(options, "weight", 0, float("inf"))
    check_between(options, "floor", 0, float("inf"))
    check_choice(options, "scope", ("leaf", "model"))


FISHER = Method(
    merge_fisher,
    "average weighted by Fisher information, entry by entry",
    "arXiv:2111.09832",
    base="may",
    per_model=("weight",),
    data="fishers",
    scope_option="scope",
    check=_check,
)
