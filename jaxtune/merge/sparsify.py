"""Task vectors of which only some elements are kept: the largest, a band of them, or a random choice; and rescaled.

A cut is a rule, which is compiled in, and the numbers that the rule needs of a leaf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.merge.masks import keep_scaled, pack, sizes_of, weigh
from jaxtune.merge.options import check_between, check_choice
from jaxtune.merge.sums import dot_wide, stack_numbers, sum_wide
from jaxtune.merge.view import Elements, Rank, View
from jaxtune.types import Leaf

Rule = Literal["all", "none", "top", "at_least", "band", "random", "ranked"]
SMALL = 1e-7  # norms below it are not rescaled, as mergekit has it


@dataclass(frozen=True)
class Cut:
    """Which elements of one task vector are kept.

    Attributes:
        rule: All; none; the `top` ones up to a rank; `at_least` a value; a `band` between two ranks; a `random` choice;
            a random choice whose odds go by the rank within the row (`ranked`).
        numbers: What the rule needs.
    """

    rule: Rule
    numbers: tuple[Any, ...] = ()


def cut_top(view: View, model: int, count: int) -> Cut:
    """The `count` largest by magnitude; equal ones by place."""
    if count >= view.size:
        return Cut("all")
    if count <= 0:
        return Cut("none")
    rank = view.rank_from_top(magnitude, count, model=model)
    return Cut("top", (rank.value, rank.last))


def cut_random(density: Any) -> Cut:
    """Every element with probability `density`."""
    if isinstance(density, (int, float)) and not 0 < density < 1:
        return Cut("all" if density >= 1 else "none")
    return Cut("random", (density,))


def magnitude(elements: Elements, *, model: int) -> Leaf:
    """Of one task vector."""
    delta = elements.own_delta(model)
    return np.abs(delta, out=delta) if elements.xp is np else elements.xp.abs(delta)


def sparse_delta(elements: Elements, model: int, rule: Rule, numbers: tuple, factor: Any = 1.0) -> Leaf:
    """A task vector times a factor, zero where it is cut; the caller may write into it."""
    if rule == "none":
        return elements.xp.zeros_like(elements.base)
    delta = elements.own_delta(model)
    if rule != "all":
        return keep_scaled(elements.xp, _mask(elements, model, rule, numbers, delta), delta, factor)
    delta *= factor
    return delta


def _mask(elements, model, rule, numbers, delta):
    """What of a task vector (or of its magnitudes) is kept, as `Elements.remember` has it."""
    if rule == "random":
        return elements.remember((rule, model), lambda: elements.below(model, numbers[0]))
    sizes = sizes_of(elements.xp, delta)
    if rule == "ranked":
        return elements.remember((rule, model), lambda: _mask_by_rank(elements, model, sizes, *numbers))
    if rule == "at_least":
        kept = sizes >= numbers[0]
    elif rule == "top":
        kept = within(elements, sizes, *numbers)
    elif rule == "band":
        kept = within(elements, sizes, *numbers[:2]) & ~within(elements, sizes, *numbers[2:])
    else:
        raise AssertionError(rule)
    return pack(kept) if elements.xp is np else kept


def within(elements: Elements, sizes: Leaf, value: Any, last: Any, *, is_exact: bool = True) -> Leaf:
    """`Rank.keeps` of a run, in one pass where all its equal ones are on the same side of the last that is kept.

    Args:
        elements: The run.
        sizes: What is ranked.
        value, last: The rank.
        is_exact: Whether every compiler finds the same sizes, as it does a difference. It may join products and sums,
            and the rank may have been found elsewhere; sizes then count as equal within a few roundings.
    """
    if elements.xp is not np and not is_exact:
        slack = 8 * float(np.finfo(sizes.dtype).eps)
        is_about = (sizes >= value * (1 - slack)) & (elements.index <= last)
        return (sizes > value * (1 + slack)) | is_about
    if elements.xp is not np:
        return Rank(value, last).keeps(sizes, elements.index)
    equal = int(last) + 1 - int(elements.start)  # so many of the run's first elements are kept if equal
    if equal >= sizes.size:
        return sizes >= value
    kept = sizes > value
    if equal > 0:
        kept.reshape(-1)[:equal] |= sizes.reshape(-1)[:equal] == value
    return kept


def _mask_by_rank(elements, model, sizes, density, epsilon):
    """Odds from `density - epsilon` for the smallest of a row, in equal steps, to `density + epsilon` for the largest.

    A uniform number says which rank an element must exceed; the value that has that rank in the sorted row decides.
    Sorting values is several times faster than ranking them, and equal values share the odds of their middle rank.
    """
    xp, length = elements.xp, sizes.shape[1]
    if length == 1:
        return elements.uniform(model) < density
    place = elements.uniform(model)
    place -= density - epsilon
    place *= (length - 1) / (2 * epsilon)
    rank = xp.clip(xp.rint(place), 0, length - 1)
    value = _take_in_rows(xp, xp.sort(sizes, axis=1), rank)
    return (sizes > value) | ((sizes == value) & (place < rank))


def _take_in_rows(xp, values, place):
    """`take_along_axis`, by places in the flattened array: NumPy has that several times as fast."""
    if xp is not np:
        return xp.take_along_axis(values, place.astype(np.int32), axis=1)
    place = place.astype(np.intp)
    place += np.arange(0, values.size, values.shape[1])[:, None]
    return values.reshape(-1).take(place, mode="clip")


def find_gains(view: View, cuts: Sequence[Cut], density: Sequence[Any], rescale: bool | str) -> tuple[Any, ...]:
    """What each cut task vector is multiplied with to make good what is gone.

    Args:
        view: Of the leaf.
        cuts: One a model.
        density: Share that each cut keeps.
        rescale: False; True or "l1", "l2", "linf": until that norm of the leaf's task vector is what it was; "keep":
            by 1/density, which leaves the mean over draws.
    """
    gains: list[Any] = [1.0] * len(cuts)
    partial = [k for k, cut in enumerate(cuts) if cut.rule not in ("all", "none")]
    if not rescale or not partial or view.size == 0:
        return tuple(gains)
    if rescale == "keep":
        return tuple(1.0 / density[k] if k in partial else 1.0 for k in range(len(cuts)))
    rules, numbers = tuple(cuts[k].rule for k in partial), tuple(cuts[k].numbers for k in partial)
    if rescale == "linf":
        pairs = [(_largest(view, k, Cut("all")), _largest(view, k, cuts[k])) for k in partial]
    else:
        sums = view.reduce(sum_norms, numbers, rules=rules, models=tuple(partial), power=2 if rescale == "l2" else 1)
        pairs = [(sums[n, 0], sums[n, 1]) for n in range(len(partial))]
        pairs = [(view.xp.sqrt(a), view.xp.sqrt(b)) for a, b in pairs] if rescale == "l2" else pairs
    for k, (before, after) in zip(partial, pairs, strict=True):
        is_small = (before < SMALL) | (after < SMALL)
        gain = view.xp.where(is_small, 1.0, before / view.xp.where(is_small, 1.0, after))
        gains[k] = float(gain) if view.xp is np else gain
    return tuple(gains)


def sum_norms(elements: Elements, numbers: tuple, *, rules: tuple, models: tuple, power: int) -> Leaf:
    """Sums of the magnitudes (`power` 1) or squares (2) of task vectors, before and after the cut.

    Shapes:
        result: [num_models, 2].
    """
    xp, rows = elements.xp, []
    for model, rule, cut in zip(models, rules, numbers, strict=True):
        delta = elements.own_delta(model)
        weights = weigh(xp, _mask(elements, model, rule, cut, delta), delta)
        if xp is np:
            sizes = np.abs(delta, out=delta) if power == 1 else np.multiply(delta, delta, out=delta)
        else:
            sizes = xp.abs(delta) if power == 1 else delta**2
        rows.append((sum_wide(elements, sizes), dot_wide(elements, sizes, weights)))
    return stack_numbers(xp, rows)


def _largest(view, model, cut):
    return view.rank_from_top(_kept_magnitude, 1, cut.numbers, model=model, rule=cut.rule).value


def _kept_magnitude(elements, numbers, *, model, rule):
    return sizes_of(elements.xp, sparse_delta(elements, model, rule, numbers))


def check_sparse(options: Mapping[str, Any]) -> None:
    """Checks density, gamma, epsilon and rescale, where a method has them.

    Raises:
        ConfigError: out of range; `density ± epsilon` not between 0 and 1 for a density that is.
        UnknownNameError: no such way to rescale.
    """
    for option in ("density", "gamma"):
        if option in options:
            check_between(options, option, 0.0, 1.0)
    if "rescale" in options:
        check_choice(options, "rescale", (True, False, "l1", "l2", "linf", "keep"))
    for density, epsilon in zip(options.get("density", ()), options.get("epsilon", ()), strict=False):
        if not all(isinstance(number, (int, float)) for number in (density, epsilon)) or not 0 < density < 1:
            continue
        if epsilon < 0 or density - epsilon <= 0 or density + epsilon >= 1:
            raise ConfigError(
                f"option 'epsilon': density ± epsilon must lie between 0 and 1, got {density!r} ± {epsilon!r}."
            )
