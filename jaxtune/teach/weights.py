"""What is learned of a network: its weights, low-rank factors beside them, or how a moved task vector is weighed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.align.evidence import block_of
from jaxtune.errors import ConfigError
from jaxtune.gradients import widen
from jaxtune.rng import named_key
from jaxtune.symmetry.spec import Spec
from jaxtune.train.lora import DEFAULT_PATTERNS, init_lora, lora_scale, merge_lora
from jaxtune.tree import check_same, flatten, is_float, task_vector, unflatten
from jaxtune.types import Params

# Learning rates to choose from. Of weights and factors they are multiples of the root mean square of the weights, so
# that they hold at every width.
WHOLE_RATES, LOW_RANK_RATES, SCALE_RATES, TURN_RATES = (
    (0.003, 0.01, 0.03),
    (0.03, 0.1, 0.3),
    (0.01, 0.05),
    (0.003, 0.01),
)

STATISTICS = ("mean", "var")  # last word of the paths of running statistics, which no gradient moves


@dataclass(frozen=True)
class Learnable:
    """Numbers to learn, and the network that they stand for.

    Attributes:
        build: (fixed, numbers) -> params; hashable.
        fixed: Arrays that stay.
        numbers: At the start.
        rates: Learning rates to choose from, in ascending order.
    """

    build: Callable[[Any, Any], Params]
    fixed: Any
    numbers: Any
    rates: tuple[float, ...]


def is_weight(path: str) -> bool:
    """Whether gradients move a leaf: all but running statistics and shortcuts."""
    words = path.split("/")
    return words[-1] not in STATISTICS and not any(word.startswith("shortcut_") for word in words)


def whole_weights(start: Params) -> Learnable:
    """Every weight."""
    flat = {path: widen(leaf) for path, leaf in flatten(start).items()}
    moving = {path: leaf for path, leaf in flat.items() if is_float(leaf) and is_weight(path)}
    still = {path: leaf for path, leaf in flat.items() if path not in moving}
    return Learnable(_join, still, moving, _relative(WHOLE_RATES, start))


def low_rank(key: jax.Array, start: Params, *, rank: int = 8, patterns: Sequence[str] = DEFAULT_PATTERNS) -> Learnable:
    """LoRA factors of the kernels that match a pattern, see `train.lora`; alpha equals the rank.

    Raises:
        ConfigError: as `init_lora`.
    """
    factors = init_lora(named_key(key, "lora"), start, rank=rank, patterns=patterns)
    fixed = unflatten({path: widen(leaf) for path, leaf in flatten(start).items()})
    return Learnable(LowRank(lora_scale(rank, alpha=rank)), fixed, factors, _relative(LOW_RANK_RATES, start))


def block_scales(base: Params, start: Params) -> Learnable:
    """One factor for each block of what `start` has beyond `base`, at the start 1.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.
        ConfigError: both are the same.
    """
    fixed, groups = _split(base, start)
    return Learnable(Scales(groups), fixed, _ones(groups), SCALE_RATES)


def turned_scales(base: Params, start: Params, spec: Spec) -> Learnable:
    """`block_scales`, and a rotation of the axes of what is added that lie on a residual stream.

    A rotation is Cayley's transform of a skew-symmetric matrix, at the start 0. It turns what an alignment put there
    further, in the target's own coordinates; where the target has gains that are not folded it is near a symmetry and
    none.

    Raises:
        TreeMismatchError, ConfigError: as `block_scales`; or nothing that is added lies on a stream.
    """
    fixed, groups = _split(base, start)
    axes = {
        path: tuple((position, axis.group) for position, axis in enumerate(spec.axes[path])
                    if axis and spec.groups[axis.group].role == "stream" and spec.groups[axis.group].parent is None)
        for path in fixed["vector"]
    }  # fmt: skip
    streams = sorted({group for row in axes.values() for _, group in row})
    if not streams:
        raise ConfigError("no leaf that is added lies on a residual stream: learn scales alone.")
    turns = {group: jnp.zeros((spec.groups[group].size,) * 2, jnp.float32) for group in streams}
    build = TurnedScales(groups, tuple(axes.items()))
    return Learnable(build, fixed, {"scale": _ones(groups), "turn": turns}, TURN_RATES)


@dataclass(frozen=True)
class LowRank:
    """Builds a network of a base and factors."""

    scale: float

    def __call__(self, fixed: Params, numbers: Params) -> Params:
        return merge_lora(fixed, numbers, scale=self.scale)


@dataclass(frozen=True)
class Scales:
    """Builds `base + scale of the block * vector`."""

    groups: tuple[tuple[str, str], ...]

    def __call__(self, fixed: Any, numbers: Mapping[str, jax.Array]) -> Params:
        added = {path: numbers[group] * fixed["vector"][path] for path, group in self.groups}
        return unflatten({path: leaf + added[path] if path in added else leaf for path, leaf in fixed["base"].items()})


@dataclass(frozen=True)
class TurnedScales:
    """Builds `Scales` of vectors whose axes on a stream are turned."""

    groups: tuple[tuple[str, str], ...]
    axes: tuple[tuple[str, tuple[tuple[int, str], ...]], ...]

    def __call__(self, fixed: Any, numbers: Mapping[str, Any]) -> Params:
        turns = {group: rotation_of(matrix) for group, matrix in numbers["turn"].items()}
        turned = dict(fixed["vector"])
        for path, axes in self.axes:
            for position, group in axes:
                moved = jnp.tensordot(turns[group], turned[path], axes=((1,), (position,)))
                turned[path] = jnp.moveaxis(moved, 0, position)
        return Scales(self.groups)({"base": fixed["base"], "vector": turned}, numbers["scale"])


def rotation_of(matrix: jax.Array) -> jax.Array:
    """Cayley's transform `(I - S)⁻¹ (I + S)` of the skew part S of a matrix: a rotation, I at zero.

    Shapes:
        matrix: float32[n, n], any; result: float32[n, n], orthogonal.
    """
    skew, eye = (matrix - matrix.T) / 2, jnp.eye(len(matrix), dtype=matrix.dtype)
    return jnp.linalg.solve(eye - skew, eye + skew)


def _join(fixed, numbers):
    return unflatten({**fixed, **numbers})


def _split(base, start):
    """(fixed arrays, ((path, block), ...) of the leaves that `start` changes)."""
    check_same({"base": base, "start": start})
    vector = {path: jnp.asarray(leaf) for path, leaf in flatten(task_vector(base, start)).items() if is_float(leaf)}
    vector = {path: leaf for path, leaf in vector.items() if np.any(leaf)}
    if not vector:
        raise ConfigError("start is the base: there is nothing to weigh. Start from a transport, or learn the weights.")
    fixed = {"base": {path: widen(leaf) for path, leaf in flatten(base).items()}, "vector": vector}
    return fixed, tuple((path, block_of(path)) for path in vector)


def _ones(groups):
    return {group: jnp.ones((), jnp.float32) for _, group in groups}


def _relative(rates, params):
    """Multiples of the root mean square of all matrices."""
    matrices = [np.asarray(leaf, np.float32) for leaf in flatten(params).values() if is_float(leaf) and leaf.ndim > 1]
    squares = sum(float(np.sum(np.square(leaf), dtype=np.float64)) for leaf in matrices)
    size = (squares / max(sum(leaf.size for leaf in matrices), 1)) ** 0.5
    return tuple(float(f"{rate * size:.2g}") for rate in rates)
