"""Is this element the symmetry that the family declares? Run both networks, and where they differ say which block."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.errors import InexactElementError
from jaxtune.evaluate.equivalence import Equivalence, check_equivalence
from jaxtune.symmetry import Element, Spec
from jaxtune.symmetry import element as elements
from jaxtune.tree import is_float, map_leaves
from jaxtune.types import Params

# In float64, far above rounding through maps of a condition of a thousand, far below what an illegal element does.
EXACT = 1e-8
NUM_NAMED = 3


def verify_element(
    apply: Callable[[Params, Mapping[str, Any]], jax.Array],
    spec: Spec,
    element: Element,
    move: Callable[[Element, Params], Params],
    source: Params,
    batch: Mapping[str, Any],
) -> Equivalence:
    """Compares the source's outputs with the moved source's, in float32 and, where that is not conclusive, float64.

    Args:
        apply: (params, batch) -> float[N, K].
        spec: Symmetry that the element belongs to.
        element: What moves the source.
        move: (element, params) -> the moved network, as `apply` takes it.
        source: Weights of any float dtype.
        batch: Inputs for `apply`.

    Returns:
        The comparison in float32; `is_exact` as float64 decides it where float32 is too coarse. With a spec that
        declares no exact symmetry (one order of the stream per junction) it says how far off the element is.

    Raises:
        InexactElementError: the spec declares the element exact and it is not; names the groups at fault.
    """
    wide = _in(np.float32, source)
    found = check_equivalence(apply, wide, move(element, wide), batch)
    if found.is_exact or not spec.is_exact:
        return found
    with jax.enable_x64(True):
        wide, batch = _in(np.float64, source), {name: _widen(values) for name, values in batch.items()}
        outputs = np.asarray(apply(wide, batch))
        scale = float(np.sqrt(np.mean(outputs**2)))

        def difference(some):
            return float(np.abs(np.asarray(apply(move(some, wide), batch)) - outputs).max())

        if difference(element) <= EXACT * scale:
            return dataclasses.replace(found, is_exact=True)
        still = elements.identity(spec)
        alone = {}
        for name, group in spec.groups.items():
            if group.parent is None:
                own = {name, *spec.children_of(name)}
                alone[name] = difference({other: (element if other in own else still)[other] for other in spec.groups})
    worst = sorted(alone, key=alone.get, reverse=True)[:NUM_NAMED]
    lines = [f"  {name}: {alone[name] / scale:.1e} of the outputs' size when it moves alone" for name in worst]
    raise InexactElementError(
        f"the moved source is not the same function: outputs differ by {found.max_relative:.1e} of their size, "
        "although the family declares this symmetry exact. Groups that change most:\n"
        + "\n".join(lines)
        + "\nNothing was written. Either config.json does not describe these weights, or the family's declaration is "
        "at fault. verify=False (--no-verify) goes on without this check."
    )


def _in(dtype, params):
    return map_leaves(
        lambda _, leaf: np.asarray(leaf, dtype) if is_float(leaf) else leaf,
        params,
        dtype=lambda _, leaf: dtype if is_float(leaf) else leaf.dtype,
    )


def _widen(values):
    values = np.asarray(values)
    return values.astype(np.float64) if values.dtype == np.float32 else values
