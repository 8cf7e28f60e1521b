"""Which singular components of each task vector stay: a mask that is learned through its own threshold."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compose.ada_merging import OBJECTIVES
from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.compose.running import agree, learn_composition, split_samples
from jaxtune.compose.vectors import stack_vectors
from jaxtune.errors import ConfigError, unknown_name
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import own_states
from jaxtune.tree import flatten, unflatten
from jaxtune.types import Params


@own_states()
def ada_rank(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    objective: str = "entropy",
    scale: float = 0.3,
    start_rank: float = 1.0,
    is_scale_learned: bool = True,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    confidence: float = 0.0,
    validation: float = 0.25,
    is_best_kept: bool = False,
    score_every: int = 50,
    matrices: Mapping[str, tuple[int, int]] | None = None,
    seed: int = 0,
    series: StateSeries | None = None,
) -> Composition:
    """`θ_0 + Σ_t c_t U_t diag(b_t ⊙ σ_t) V_tᵀ` of every matrix, with b in {0, 1} learned on unlabelled inputs.

    Behind every b stands a number: b is 1 where that is at least a half, and it takes the gradient of b as it is.
    Leaves that are no matrices get `c_t τ_t`.

    Args:
        base, finetuned, samples: As `registry.compose`. Labels are used for reporting alone.
        objective: "entropy" or "expert", as `ada_merging`.
        scale: c, the first where it is learned.
        start_rank: Share of the components, the largest first, that the search begins with.
        is_scale_learned: Whether c is learned too, one a task and leaf.
        num_steps, learning_rate, batch_size, confidence, validation, is_best_kept, score_every, seed, series: As
            `ada_merging`.
        matrices: Path -> (rows, columns) that a leaf is read as; None: every leaf of two axes or more, its last axis,
            or as many of the last ones as come nearest to a square, being the columns.

    Returns:
        `coefficients`: {"scale": {path: float32[T]}, "mask": {path: bool[T, r]}}; `info` as
        `running.learn_composition`, and "kept", the share of components that stay.

    Raises:
        UnknownNameError: no such objective.
        ConfigError, DataError, TreeMismatchError, NonFiniteError: models, samples or numbers make no sense.

    Reference:
        Lee et al. 2025, arXiv:2503.22178. Differs: the mask moves through a number in [0, 1] by the straight-through
        gradient, from 0.5 ± 0.05; a share of the stream is kept apart and reported on.
    """
    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    if not 0 <= start_rank <= 1:
        raise ConfigError(f"start_rank is {start_rank}; it is a share, between 0 and 1.")
    check_models(base, finetuned)
    check_samples(finetuned, samples)
    learned_on, held = split_samples(
        samples, validation, seed, by_class=False, experts=finetuned, confidence=confidence
    )
    fixed = decompose(stack_vectors(base, finetuned), matrices)
    count = len(finetuned)
    mask = {}
    for path, parts in fixed["factors"].items():
        rank = parts["s"].shape[-1]
        is_on = np.arange(rank) < math.ceil(start_rank * rank - 1e-9)
        mask[path] = np.tile(np.where(is_on, 0.55, 0.45).astype(np.float32), (count, 1))
    scales = {path: np.full(count, scale, np.float32) for path in (*fixed["factors"], *fixed["vectors"])}
    build, first = BuildRanks(), {"mask": mask}
    if is_scale_learned:
        first["scale"] = scales
    else:
        fixed["scale"] = scales
    found = learn_composition(
        base, build, fixed, first, learned_on, held, objective=OBJECTIVES[objective], num_steps=num_steps,
        learning_rate=learning_rate, batch_size=batch_size, seed=seed, series=series,
        score=agree(held) if is_best_kept else None, score_every=score_every,
    )  # fmt: skip
    masks = {path: values >= 0.5 for path, values in found.coefficients["mask"].items()}
    kept = sum(int(one.sum()) for one in masks.values()) / max(sum(one.size for one in masks.values()), 1)
    learned = {"scale": found.coefficients.get("scale", scales), "mask": masks}
    return Composition(found.params, {**found.info, "kept": kept}, learned)


def decompose(fixed: Any, matrices: Mapping[str, tuple[int, int]] | None) -> dict[str, Any]:
    """{"base", "factors": {path: u, s, vt} of matrices, "vectors": {path: [T, ...]} of the rest}.

    Shapes:
        u: float32[T, m, r]; s: float32[T, r], falling; vt: float32[T, r, n]; r the lesser of m and n.
    """
    factors, vectors = {}, {}
    for path, stacked in fixed["vectors"].items():
        shape = matrix_shape(stacked.shape[1:]) if matrices is None else matrices.get(path)
        if shape is None:
            vectors[path] = stacked
            continue
        u, s, vt = np.linalg.svd(stacked.reshape(len(stacked), *shape).astype(np.float64), full_matrices=False)
        factors[path] = {"u": u.astype(np.float32), "s": s.astype(np.float32), "vt": vt.astype(np.float32)}
    return {"base": fixed["base"], "factors": factors, "vectors": vectors}


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """(rows, columns) of a leaf, cut where the two are nearest to each other; None of vectors and of empty leaves."""
    if len(shape) < 2 or 0 in shape:
        return None
    pairs = [(math.prod(shape[:n]), math.prod(shape[n:])) for n in range(1, len(shape))]
    return min(pairs, key=lambda pair: (abs(math.log(pair[0] / pair[1])), -pair[0]))


class BuildRanks:
    """Masked components; numbers: {"mask": {path: float32[T, r]}, perhaps "scale": {path: float32[T]}}."""

    def __call__(self, fixed: Any, numbers: Mapping[str, Any]) -> Params:
        flat = flatten(fixed["base"])
        scale = numbers["scale"] if "scale" in numbers else fixed["scale"]
        moved = {}
        for path, parts in fixed["factors"].items():
            sigma = straight_through(numbers["mask"][path]) * parts["s"] * scale[path][:, None]
            whole = jnp.einsum("tmr,tr,trn->mn", parts["u"], sigma, parts["vt"])
            moved[path] = flat[path] + whole.reshape(flat[path].shape)
        for path, vectors in fixed["vectors"].items():
            moved[path] = flat[path] + jnp.tensordot(scale[path], vectors, axes=1)
        return unflatten({**flat, **moved})

    def __hash__(self):
        return hash(type(self))

    def __eq__(self, other):
        return isinstance(other, BuildRanks)


def straight_through(values: jax.Array) -> jax.Array:
    """1 where a value is at least a half, else 0; with the gradient of the value itself."""
    hard = (values >= 0.5).astype(values.dtype)
    return values + jax.lax.stop_gradient(hard - values)
