"""Matrices of a task vector as sums of singular directions, which examples can vote on one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.gradients import sum_signs
from jaxtune.symmetry.spec import Spec


@dataclass(frozen=True)
class Directions:
    """`Σ_r values_r left_r right_rᵀ`: a leaf as a matrix from what it reads to what it writes.

    Shapes:
        left: float32[in, R]; values: float32[R], descending; right: float32[R, out].
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray

    def join(self, values: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The leaf with other values, in the shape and dtype of `like`."""
        return ((self.left * values) @ self.right).reshape(like.shape).astype(like.dtype)

    def project(self, leaf: np.ndarray) -> np.ndarray:
        """`left_rᵀ leaf right_r` of every direction."""
        matrix = leaf.reshape(self.left.shape[0], self.right.shape[1])
        return np.einsum("ir,ij,rj->r", self.left, matrix, self.right, optimize=True)


def split_directions(spec: Spec, leaves: Mapping[str, np.ndarray]) -> dict[str, Directions]:
    """Directions of every leaf that is a matrix and not zero; biases, gains and stacks of experts have none."""
    found = {}
    for path, leaf in leaves.items():
        if any(axis and spec.groups[axis.group].role == "expert" for axis in spec.axes[path]):
            continue
        matrix = leaf.reshape(*matrix_shape(spec, path, leaf.shape)) if leaf.ndim > 1 else leaf
        if matrix.ndim == 2 and min(matrix.shape) > 1 and np.any(matrix):
            left, values, right = np.linalg.svd(matrix.astype(np.float32), full_matrices=False)
            found[path] = Directions(left, values, right)
    return found


def matrix_shape(spec: Spec, path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(inputs, outputs) of a leaf with two axes or more: the last axis is written, with the heads it lies in.

    An axis of units inside heads belongs with the axis of its heads; in [heads, units, stream] both are read.
    """
    axes, cut = spec.axes[path], len(shape) - 1
    last = axes[-1]
    if last is not None and spec.groups[last.group].parent is not None:
        parent = spec.groups[last.group].parent
        while cut > 0 and not (axes[cut] and axes[cut].group == parent):
            cut -= 1
    return int(np.prod(shape[:cut])), int(np.prod(shape[cut:]))


def sum_direction_signs(gradients: dict[str, Any], weight: jax.Array, aux: Any) -> dict[str, jax.Array]:
    """`gradients.sum_signs` of what every example's gradient says of each direction; by entry where there are none.

    Args:
        aux: {path: (left, right)}.
    """
    projected = {}
    for path, leaf in gradients.items():
        if path in aux:
            left, right = aux[path]
            matrices = leaf.reshape(len(leaf), left.shape[0], right.shape[1])
            leaf = jnp.einsum("ir,nij,rj->nr", left, matrices, right)
        projected[path] = leaf
    return sum_signs(projected, weight, None)
