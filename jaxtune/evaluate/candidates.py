"""Many models of one architecture, told by what differs between them; none is made before it is needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.tree import check_same, flatten, is_float, unflatten
from jaxtune.types import Params

MAX_UNROLLED = 4  # terms that are added one by one, in one pass over memory; more are a matrix product


@dataclass(frozen=True)
class Candidates:
    """K models.

    Attributes:
        shared: Arrays that all have in common.
        own: Arrays of each, K first: whole parameters, or a few coefficients.
        build: (shared, one's own) -> its parameters. Pure and hashable, so that a program is compiled for it once.
    """

    shared: Any
    own: Any
    build: Callable[[Any, Any], Params]

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.own)[0])

    def take(self, index: int) -> dict[str, Any]:
        """The parameters of one of them.

        Raises:
            IndexError: there is no such candidate.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"candidate {index} of {len(self)}.")
        return _build(self.build, self.shared, jax.tree.map(lambda leaf: leaf[index], self.own))

    def select(self, indices: Sequence[int] | np.ndarray) -> "Candidates":
        """Some of them, in the order asked for."""
        indices = np.asarray(indices, np.int64)
        return Candidates(self.shared, jax.tree.map(lambda leaf: np.asarray(leaf)[indices], self.own), self.build)


def stack_candidates(models: Sequence[Params]) -> Candidates:
    """Models that exist already, side by side on the host; a device holds those alone that it evaluates just then.

    Raises:
        ConfigError: no model.
        TreeMismatchError: they differ in a path, a shape or a dtype.
    """
    _check_models(models, dtypes=True)
    return Candidates(None, jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *models), _as_is)


def one_candidate(params: Params) -> Candidates:
    """A single model, which is not copied."""
    check_same({"params": params})
    return Candidates(params, np.zeros(1, np.float32), _shared)


def mix_candidates(models: Sequence[Params], weights: Any, *, nonnegative: Sequence[str] = ()) -> Candidates:
    """Weighted sums of models: soups, points on a line (`line_candidates`), merges.

    Sums are taken in float32 or wider and rounded once; a sum with one weight at 1 and the others at 0 is that model.

    Args:
        models: M of one architecture.
        weights: float[K, M], or float[K, M, L] with a weight for each of the L float leaves, in the order of
            `tree.flatten`. Nothing makes them sum to 1.
        nonnegative: Paths of leaves that are held at zero or above, such as running variances.

    Returns:
        K candidates in the dtypes of the first model. Leaves that are no floats are the first's.

    Raises:
        ConfigError: no model, or weights of another shape or not finite.
        TreeMismatchError: the models differ in a path or a shape.
    """
    _check_models(models)
    first = flatten(models[0])
    stacked = _stack_floats(models)
    weights = _check_coefficients("weights", weights, len(models), len(stacked))
    fixed = {path: leaf for path, leaf in first.items() if path not in stacked}
    like = {path: first[path].dtype.name for path in stacked}
    build = Sums(tuple(like.items()), _own_blocks(weights, stacked), tuple(nonnegative))
    return Candidates({"base": None, "fixed": fixed, "vectors": stacked}, weights, build)


def line_candidates(first: Params, second: Params, weights: Any, *, nonnegative: Sequence[str] = ()) -> Candidates:
    """`(1 - w) first + w second` at every weight w; outside [0, 1] the line goes on.

    Raises:
        ConfigError: `weights` is empty or not finite.
        TreeMismatchError: the trees differ in a path or a shape.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1:
        raise ConfigError(f"weights on a line are a list of numbers, got shape {weights.shape}.")
    return mix_candidates([first, second], np.stack([1 - weights, weights], axis=-1), nonnegative=nonnegative)


def combine_candidates(
    base: Params,
    vectors: Sequence[Params],
    coefficients: Any,
    *,
    blocks: Mapping[str, int] | None = None,
    nonnegative: Sequence[str] = (),
) -> Candidates:
    """`base + Σ_t c_t τ_t`: scales of a task vector, members of a population over T of them.

    Args:
        base: The model that all start from; its dtypes are the result's.
        vectors: T task vectors, trees as `base`. Leaves that are no floats are not looked at.
        coefficients: float[K, T], or float[K, T, B] with one for each of B blocks of leaves.
        blocks: Path of every float leaf -> its block, 0 ... B - 1. None: every float leaf is one, in the order of
            `tree.flatten`.
        nonnegative: As in `mix_candidates`.

    Raises:
        ConfigError: no vector, coefficients of another shape or not finite, `blocks` that lack a leaf.
        TreeMismatchError: a vector differs from `base` in a path or a shape.
    """
    if not vectors:
        raise ConfigError("there is no task vector to combine.")
    check_same({"base": base, **{f"vector {n}": vector for n, vector in enumerate(vectors)}})
    flat = flatten(base)
    flats = [flatten(vector) for vector in vectors]
    paths = [path for path, leaf in flat.items() if is_float(leaf)]
    stacked = {path: np.stack([np.asarray(one[path]) for one in flats]) for path in paths}
    count = len(paths) if blocks is None else 1 + max(blocks.values(), default=0)
    coefficients = _check_coefficients("coefficients", coefficients, len(vectors), count)
    if blocks is None:
        numbered = _own_blocks(coefficients, stacked)
    else:
        missing = [path for path in paths if path not in blocks]
        if missing or coefficients.ndim != 3:
            raise ConfigError(
                f"blocks= goes with coefficients[K, T, B] and names every float leaf; coefficients have shape "
                f"{list(coefficients.shape)}, missing: {', '.join(missing[:5]) or 'none'}."
            )
        numbered = tuple((path, int(blocks[path])) for path in paths)
    like = {path: flat[path].dtype.name for path in stacked}
    fixed = {path: leaf for path, leaf in flat.items() if path not in stacked}
    shared = {"base": {path: flat[path] for path in paths}, "fixed": fixed, "vectors": stacked}
    return Candidates(shared, coefficients, Sums(tuple(like.items()), numbered, tuple(nonnegative)))


@dataclass(frozen=True)
class Sums:
    """Parameters as sums of shared arrays, weighted by one's own coefficients: float[T] or float[T, B].

    Attributes:
        dtypes: (path, dtype) of every leaf that is summed.
        blocks: (path, column of the coefficients); None where all leaves have the same.
        nonnegative: Paths held at zero or above.
    """

    dtypes: tuple[tuple[str, str], ...]
    blocks: tuple[tuple[str, int], ...] | None = None
    nonnegative: tuple[str, ...] = ()

    def __call__(self, shared: Any, own: jax.Array) -> dict[str, Any]:
        columns = None if self.blocks is None else dict(self.blocks)
        leaves = dict(shared["fixed"])
        for path, dtype in self.dtypes:
            vectors = shared["vectors"][path]
            base = None if shared["base"] is None else shared["base"][path]
            dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 is float32 where jax has no float64
            wide = np.float64 if np.float64 in (vectors.dtype, dtype) else np.float32
            total = _weigh(own if columns is None else own[:, columns[path]], vectors, wide)
            total = total if base is None else base.astype(wide) + total
            leaf = total.astype(dtype)
            leaves[path] = jnp.maximum(leaf, jnp.zeros((), leaf.dtype)) if path in self.nonnegative else leaf
        return unflatten(leaves)


def _weigh(coefficients, vectors, wide):
    """Σ_t c_t v_t."""
    coefficients = coefficients.astype(wide)
    if len(vectors) > MAX_UNROLLED:
        return jnp.tensordot(coefficients, vectors.astype(wide), axes=1, precision=jax.lax.Precision.HIGHEST)
    total = coefficients[0] * vectors[0].astype(wide)
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        total = total + coefficient * vector.astype(wide)
    return total


def _as_is(shared, own):
    del shared
    return own


def _shared(shared, own):
    del own
    return shared


def _stack_floats(models):
    flats = [flatten(model) for model in models]
    return {
        path: np.stack([np.asarray(one[path]) for one in flats]) for path, leaf in flats[0].items() if is_float(leaf)
    }


def _own_blocks(coefficients, stacked):
    """Of coefficients that differ from leaf to leaf, which column is whose."""
    return None if coefficients.ndim == 2 else tuple((path, n) for n, path in enumerate(stacked))


def _check_models(models, dtypes=False):
    if not models:
        raise ConfigError("there is no model.")
    check_same({f"model {n}": model for n, model in enumerate(models)}, dtypes=dtypes)


def _check_coefficients(name, values, count, num_blocks):
    """float64[K, T] or float64[K, T, B], seen to be so."""
    values = np.asarray(values, np.float64)
    fits = values.ndim in (2, 3) and len(values) and values.shape[1] == count
    if not fits or (values.ndim == 3 and values.shape[2] != num_blocks):
        raise ConfigError(
            f"{name} have shape {list(values.shape)}; expected [K, {count}] or [K, {count}, {num_blocks}] with K at "
            "least 1."
        )
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(axis=1)))
        raise ConfigError(f"{name} must be finite; those of candidate {row} are not.")
    return values


@partial(jax.jit, static_argnums=0)
def _build(build, shared, own):
    return build(shared, own)
