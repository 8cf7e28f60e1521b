"""What may follow any merge method: a merged leaf, the base's, and its place among the layers make a new leaf.

A post-step is a method over one model, the merged one, with a base. An option `place`, where it has one, is filled in
by whoever runs it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.boosting import SUBSPACE_BOOSTING
from jaxtune.merge.method import Method
from jaxtune.merge.options import check_between
from jaxtune.merge.view import Combine, Elements, View
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Leaf, Params


@dataclass(frozen=True)
class Place:
    """Where a leaf stands in a stack of layers.

    Attributes:
        layer: From 0; None outside the stack.
        num_layers: Of the stack.
    """

    layer: int | None
    num_layers: int


def scale_layers(
    view: View, *, place: Place, alpha: float, beta: float | None = None, outside: float | None = None
) -> Combine:
    """LiNeS: `θ_0 + s_l (θ_merged - θ_0)` with `s_l = α + β l / (L - 1)`: early layers stay nearer to the base.

    Args:
        view: Of the merged model and the base.
        place: Of the leaf; a stack of one layer has s = α + β.
        alpha: Scale of the first layer. For several tasks: `balance_norms`.
        beta: What the last layer has more; None: 1 - `alpha`, as for a single task.
        outside: Scale of leaves outside the stack (embeddings, the last norm, heads); None: `alpha`.

    Reference:
        Wang et al. 2024, arXiv:2410.17146. Differs: the layer is a number that the caller knows, and
        not a substring of a name, which takes layer 11 for layer 1.
    """
    if beta is None:
        beta = 1 - alpha
    if place.layer is None:
        scale = alpha if outside is None else outside
    else:
        scale = alpha + beta * (place.layer / (place.num_layers - 1) if place.num_layers > 1 else 1.0)
    return Combine(_scale, (scale,))


def _scale(elements: Elements, scale: float) -> Leaf:
    return elements.base + elements.deltas[0] * scale


LINES = Method(
    scale_layers,
    "scales that grow with depth",
    "arXiv:2410.17146",
    num_models=(1, 1),
    check=lambda options: check_between(options, "alpha", 0, float("inf")),
)

POST_STEPS: dict[str, Method] = {"lines": LINES, "subspace_boosting": SUBSPACE_BOOSTING}


def balance_norms(models: Sequence[Params], merged: Params, base: Params) -> float:
    """LiNeS's α for several tasks: `‖Σ τ_t‖₁ / (T ‖τ_merged‖₁)`, over all leaves.

    Args:
        models: That were merged.
        merged: Of them, at scale 1: their summed task vectors give 1 / T.
        base: Of all.

    Reference:
        Wang et al. 2024, arXiv:2410.17146.
    """
    flats, ours, theirs = [flatten(model) for model in models], flatten(merged), flatten(base)
    above = below = 0.0
    for path, leaf in theirs.items():
        start = np.asarray(leaf, np.float64)
        above += np.abs(sum(np.asarray(flat[path], np.float64) - start for flat in flats)).sum()
        below += np.abs(np.asarray(ours[path], np.float64) - start).sum()
    return 1.0 if below == 0 else float(above / below / len(models))


def find_places(paths: Iterable[str]) -> dict[str, Place]:
    """Places of leaves by their paths' first number that counts a stack: 0 to L - 1 without a gap, L at least 2.

    Two towers are two stacks. A caller who knows the architecture knows better.
    """
    stacks: dict[str, dict[int, None]] = {}
    options: dict[str, list[tuple[str, int]]] = {}
    for path in paths:
        components = re.split(r"([./])", path)
        for n, component in enumerate(components):
            found = re.fullmatch(r"(.*?_)?(\d+)", component)
            if found:
                stack, number = "".join(components[:n]) + (found[1] or ""), int(found[2])
                options.setdefault(path, []).append((stack, number))
                stacks.setdefault(stack, {})[number] = None
        options.setdefault(path, [])
    lengths = {stack: len(n) for stack, n in stacks.items() if len(n) > 1 and sorted(n) == list(range(len(n)))}
    places = {}
    for path, candidates in options.items():
        within = [Place(number, lengths[stack]) for stack, number in candidates if stack in lengths]
        places[path] = within[0] if within else Place(None, 0)
    return places


def apply_post_steps(
    merged: Params,
    base: Params,
    steps: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    places: Mapping[str, Place] | None = None,
    input_axis: int = 0,
) -> dict[str, Any]:
    """Post-steps one after another, on trees in memory.

    Args:
        merged: What a method made.
        base: Whose dtypes the result has.
        steps: Name and options of each.
        places: Path -> place in its stack; None: as `find_places` reads them.
        input_axis: As in `merge_trees`.

    Raises:
        UnknownNameError: no such step or option.
        ConfigError: an option is missing or makes no sense, or a leaf has no place.
    """
    places = find_places(flatten(base)) if places is None else places
    for name, options in steps:
        if name not in POST_STEPS:
            raise unknown_name("post-step", name, POST_STEPS)
        step = POST_STEPS[name]
        if "place" not in step.options:
            merged = merge_trees(step, [merged], base, input_axis=input_axis, **options)
            continue
        done = {}
        for path, leaf in flatten(merged).items():
            if path not in places:
                raise ConfigError(f"post-step {name!r}: leaf {path} has no place; name it in `places`.")
            one = merge_trees(
                step, [{"leaf": leaf}], {"leaf": flatten(base)[path]}, input_axis=input_axis, place=places[path],
                **options,
            )  # fmt: skip
            done[path] = one["leaf"]
        merged = unflatten(done)
    return merged
