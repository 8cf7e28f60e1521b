"""Closed forms from Grams: the matrices whose answers stay nearest to every model's on what they read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.compose.composition import Composition, check_models, check_samples
from jaxtune.errors import ConfigError
from jaxtune.moments import Gram, gather_grams
from jaxtune.sample import Sample
from jaxtune.tree import flatten, is_float, unflatten
from jaxtune.types import Leaf, Params


def regmean(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    off_diagonal: float = 0.95,
    ridge: float = 1e-6,
    chunk_size: int = 32,
    seed: int = 0,
) -> Composition:
    """`W = (Σ G_t + ρ I)⁻¹ (Σ G_t W_t + ρ W̄)` for every matrix, `G_t = X_tᵀ X_t` of what model t's reads on its task.

    Merge method "regmean" on Grams that are gathered here; all other leaves are averaged.

    Args:
        base: Gives the dtypes of the result.
        finetuned: The models.
        samples: Inputs of each model's task; labels are not looked at.
        off_diagonal: Factor of the Grams' other entries; 1 is the least-squares solution.
        ridge: ρ, relative to the mean diagonal entry.
        chunk_size: Examples at a time.
        seed: Not used; nothing is random.

    Raises:
        ConfigError: an option out of its range; the family cannot be recorded; as `check_samples`.
        DataError, TreeMismatchError, NonFiniteError: unusable models or examples.

    Reference:
        Jin et al. 2023, arXiv:2212.09849. Differs: the ridge.
    """
    del seed
    _check(base, finetuned, samples, off_diagonal, ridge)
    grams = [gather_grams(params, one, chunk_size=chunk_size) for params, one in zip(finetuned, samples, strict=True)]
    models = [flatten(params) for params in finetuned]
    merged = {path: _merge_leaf(path, models, grams, off_diagonal, ridge) for path in models[0]}
    return _finish(base, merged, grams)


def regmean_plus(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    off_diagonal: float = 0.95,
    ridge: float = 1e-6,
    chunk_size: int = 32,
    seed: int = 0,
) -> Composition:
    """`regmean`, one layer after the other: G_t is of what a layer reads behind layers that are merged already.

    Before a layer is merged every model is run once more, with the merged layers in the place of its own; from the
    layer on it is itself. So errors of earlier layers are seen, at the price of one pass over the samples for each.

    Args, Raises: as `regmean`.

    Reference:
        RegMean++ 2025, arXiv:2508.03121. Differs: the ridge; patches and the head are layers too.
    """
    del seed
    _check(base, finetuned, samples, off_diagonal, ridge)
    models = [flatten(params) for params in finetuned]
    blocks: list[str] | None = None
    done: dict[str, Leaf] = {}
    while blocks is None or blocks:
        hybrids = [unflatten({path: done.get(path, leaf) for path, leaf in model.items()}) for model in models]
        grams = [gather_grams(one, sample, chunk_size=chunk_size) for one, sample in zip(hybrids, samples, strict=True)]
        if blocks is None:
            blocks = list(dict.fromkeys(_layer_of(path) for path in grams[0]))  # as they are used
            first = [path for path in models[0] if _layer_of(path) not in blocks]
            done |= {path: _merge_leaf(path, models, grams, off_diagonal, ridge) for path in first}
            if first:
                continue  # tables and tokens are merged: the first layer reads the means
        block = blocks.pop(0)
        own = [path for path in models[0] if _layer_of(path) == block]
        done |= {path: _merge_leaf(path, models, grams, off_diagonal, ridge) for path in own}
    return _finish(base, done, grams)


def lot(
    base: Params,
    finetuned: Sequence[Params],
    samples: Sequence[Sample],
    *,
    scale: float = 1.0,
    ridge: float = 1e-6,
    chunk_size: int = 32,
    seed: int = 0,
) -> Composition:
    """`τ = (Σ G_t + ρ I)⁻¹ Σ G_t τ_t` for the task vectors of every matrix: least drift of what it makes on every task.

    Inputs that no task has keep the base, where `regmean` keeps the mean of the models. The task vectors of other
    leaves are averaged.

    Args:
        base: What all were fine-tuned from.
        finetuned, samples, ridge, chunk_size, seed: As `regmean`.
        scale: Factor of the merged task vector.

    Raises: as `regmean`.

    Reference:
        LOT Merging 2025, arXiv:2505.23859. Differs: a ridge in the place of the pseudo-inverse; gains of norms are
        averaged like offsets, as their inputs are not recorded.
    """
    del seed
    _check(base, finetuned, samples, 1.0, ridge)
    if not np.isfinite(scale):
        raise ConfigError(f"scale={scale!r}: expected a finite number.")
    grams = [gather_grams(params, one, chunk_size=chunk_size) for params, one in zip(finetuned, samples, strict=True)]
    start = flatten(base)
    deltas = [
        {path: _wide(leaf) - _wide(start[path]) if is_float(leaf) else leaf for path, leaf in flatten(params).items()}
        for params in finetuned
    ]
    merged = {}
    for path, leaf in start.items():
        if not is_float(leaf):
            merged[path] = leaf
            continue
        change = _merge_leaf(path, deltas, grams, 1.0, ridge, keep_mean=False)
        merged[path] = _wide(leaf) + scale * change
    return _finish(base, merged, grams)


def _layer_of(path):
    """The layer that a leaf is merged with: "block_3", "vision/block_0", "patch"."""
    words = path.split("/")
    inside = next((n for n, word in enumerate(words) if re.fullmatch(r"\w*(block|layer)_\d+", word)), len(words) - 2)
    return "/".join(words[: inside + 1])


def _merge_leaf(path, models, grams, off_diagonal, ridge, *, keep_mean=True):
    """One leaf of all models, in float64; integers are the first model's."""
    leaves = [model[path] for model in models]
    if not is_float(leaves[0]):
        return leaves[0]
    leaves = [_wide(leaf) for leaf in leaves]
    mean = sum(leaves) / len(leaves)
    if any(path not in one for one in grams):
        return mean
    own = [one[path] for one in grams]
    axes = own[0].in_axes
    order = (*axes, *(axis for axis in range(mean.ndim) if axis not in axes))
    matrices = [_as_matrix(leaf, order, gram) for leaf, gram in zip(leaves, own, strict=True)]
    merged = solve_matrices(matrices, own, off_diagonal=off_diagonal, ridge=ridge, keep_mean=keep_mean)
    return merged.reshape([mean.shape[axis] for axis in order]).transpose(np.argsort(order))


def solve_matrices(
    matrices: Sequence[np.ndarray], grams: Sequence[Gram], *, off_diagonal: float, ridge: float, keep_mean: bool
) -> np.ndarray:
    """The matrix nearest to all, each in the metric of its own inputs.

    Args:
        matrices: [n_in, n_out], one a model.
        grams: Of what each reads.
        off_diagonal, ridge: As `regmean`.
        keep_mean: Whether inputs that nobody has keep the mean of the matrices, or get zero.
    """
    size = len(matrices[0])
    factor = np.where(np.eye(size, dtype=bool), 1.0, off_diagonal)
    shrunk = [gram.gram * factor for gram in grams]
    below = sum(shrunk)
    pull = ridge * (np.trace(below) / size or 1.0)
    above = sum(gram @ matrix for gram, matrix in zip(shrunk, matrices, strict=True))
    if keep_mean:
        above = above + pull * sum(matrices) / len(matrices)
    return np.linalg.solve(below + pull * np.eye(size), above)


def _as_matrix(leaf, order, gram):
    return leaf.transpose(order).reshape(len(gram.gram), -1)


def _finish(base: Params, merged: Mapping[str, Leaf], grams: Sequence[Mapping[str, Gram]]) -> Composition:
    leaves = flatten(base)
    params = {path: np.asarray(merged[path]).astype(leaf.dtype) for path, leaf in leaves.items()}
    info: dict[str, Any] = {
        "matrices": [path for path in leaves if path in grams[0]],
        "averaged": [path for path in leaves if path not in grams[0]],
        "num_rows": [max(gram.count for gram in one.values()) for one in grams],
    }
    return Composition(unflatten(params), info)


def _wide(leaf):
    return np.asarray(leaf, np.float64)


def _check(base, finetuned, samples, off_diagonal, ridge):
    check_models(base, finetuned)
    check_samples(finetuned, samples)
    if not 0 <= off_diagonal <= 1:
        raise ConfigError(f"off_diagonal={off_diagonal!r}: expected a number from 0 to 1.")
    if not 0 < ridge < np.inf:
        raise ConfigError(f"ridge={ridge!r}: expected a finite number above 0.")
