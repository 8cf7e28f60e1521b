"""What every transport method takes and gives: expensive once (`prepare`), cheap per scale (`apply`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.symmetry.spec import Spec
from jaxtune.tree import apply_task_vector, is_float, map_leaves
from jaxtune.types import Leaf, Params

# Returns the spec of the two bases; keyword arguments choose among a family's specs, for instance
# `junctions="each"`. A model's own function behind a face that knows no model.
Symmetry = Callable[..., Spec]


@dataclass(frozen=True)
class Prepared:
    """A task vector in the target's coordinates, and how it got there.

    Attributes:
        task_vector: Tree as the target, float32 or wider; zeros where nothing moves.
        spec: Symmetry that `element` belongs to; also says which leaves must stay >= 0.
        element: What moved the task vector; None where nothing was aligned.
        fold: Brings a network's weights into the coordinates that `spec` and `element` act on.
        realise: Brings such weights back into a network that computes the same, given one for its layout; None
            where no network of the family can hold them.
        info: Plain values for the report: what the method chose and measured on its way.
        move: The task vector of another fine-tune of the same source, moved the same way without aligning again.
    """

    task_vector: dict[str, Any]
    spec: Spec
    element: Mapping[str, Any] | None = None
    fold: Callable[[Params], Params] = lambda params: params
    realise: Callable[[Params, Params], Params] | None = lambda params, like: params
    info: dict[str, Any] = field(default_factory=dict)
    move: Callable[[Params], dict[str, Any]] | None = None


def apply_transport(prepared: Prepared, target: Params, scale: float | Leaf = 1.0) -> dict[str, Any]:
    """The target with the fine-tune: `target + scale * task_vector`.

    Computed in float32 or wider and rounded once to the target's dtypes. Running variances, which a sum
    could make negative, are held at zero or above. Jittable; a sweep of scales is one `vmap` over `scale`.

    Raises:
        TreeMismatchError: `target` and the task vector differ in a path or a shape.
    """
    moved = apply_task_vector(target, prepared.task_vector, scale)
    if not prepared.spec.nonnegative:
        return moved

    def hold(path, leaf):
        if path not in prepared.spec.nonnegative or not is_float(leaf):
            return leaf
        return np.maximum(leaf, 0) if isinstance(leaf, np.ndarray) else leaf.clip(0)

    return map_leaves(hold, moved)
