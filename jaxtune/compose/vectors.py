"""Task vectors side by side, and networks that are weighted sums of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.tree import check_same, flatten, is_float, map_leaves, unflatten
from jaxtune.types import Params

Groups = Mapping[str, str]


def stack_vectors(base: Params, finetuned: Sequence[Params]) -> dict[str, Any]:
    """What `build_blocks` is given: {"base": params, "vectors": {path: [T, ...]}} of all float leaves, in float32.

    Leaves that are no floats stay the base's.
    """
    flat, flats = flatten(base), [flatten(params) for params in finetuned]
    vectors = {
        path: np.stack([np.asarray(one[path], np.float32) - np.asarray(leaf, np.float32) for one in flats])
        for path, leaf in flat.items()
        if is_float(leaf)
    }
    return {"base": widen(base), "vectors": vectors}


def widen(params: Params) -> dict[str, Any]:
    """Float leaves in float32."""
    return map_leaves(lambda _, x: np.asarray(x, np.float32) if is_float(x) else np.asarray(x), params)


def narrow(params: Params, like: Params) -> dict[str, Any]:
    """Float leaves rounded once to the dtypes of `like`; others are its own."""
    check_same({"base": like, "the result": params})
    return map_leaves(lambda _, x, y: np.asarray(y).astype(x.dtype) if is_float(x) else x, like, params)


def groups_of(vectors: Mapping[str, Any], groups: Groups | None) -> dict[str, str]:
    """Path of each leaf -> the name under which its coefficients stand: its own path, or as the caller says.

    Raises:
        ConfigError: `groups` lacks a leaf, or names one that there is not.
    """
    if groups is None:
        return {path: path for path in vectors}
    odd = sorted(groups.keys() ^ vectors.keys())
    if odd:
        raise ConfigError(f"groups= and the models differ in {len(odd)} leaves: {', '.join(odd[:5])}.")
    return dict(groups)


def build_tasks(fixed: Any, numbers: jax.Array) -> Params:
    """`θ_0 + Σ_t c_t τ_t`; numbers: float32[T]."""
    return _add(fixed, dict.fromkeys(fixed["vectors"], numbers))


def build_blocks(fixed: Any, numbers: Mapping[str, jax.Array]) -> Params:
    """`θ_0 + Σ_t c_tb τ_tb`, b a leaf; numbers: {path: float32[T]}."""
    return _add(fixed, numbers)


class BuildGroups:
    """`build_blocks` where several leaves share a coefficient.

    Args:
        groups: Path -> name of the coefficients in `numbers`.
    """

    def __init__(self, groups: Groups):
        self._groups = tuple(sorted(groups.items()))

    def __call__(self, fixed: Any, numbers: Mapping[str, jax.Array]) -> Params:
        return _add(fixed, {path: numbers[group] for path, group in self._groups})

    def __hash__(self):
        return hash(self._groups)

    def __eq__(self, other):
        return isinstance(other, BuildGroups) and self._groups == other._groups


def _add(fixed, coefficients):
    flat = flatten(fixed["base"])
    moved = {
        path: flat[path] + jnp.tensordot(coefficients[path], vectors, axes=1)
        for path, vectors in fixed["vectors"].items()
    }
    return unflatten({**flat, **moved})
