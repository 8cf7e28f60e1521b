"""Low-rank adapters: a fine-tune held in two thin factors per kernel, added to a base that stays as it is."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtune import tree
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.rng import named_key
from jaxtune.types import Params

# Projections of attention and of the MLP in every transformer block.
DEFAULT_PATTERNS = ("*/attn/*/kernel", "*/mlp/*/kernel")


def lora_scale(rank: int, *, alpha: float, is_rank_stabilised: bool = False) -> float:
    """What the product of the factors is multiplied by: `alpha / rank`, or `alpha / sqrt(rank)`.

    Raises:
        ConfigError: `rank` is below 1.

    Reference:
        Hu et al. 2021, arXiv:2106.09685, section 4.1; the square root: Kalajdzievski 2023, arXiv:2312.03732.
    """
    if rank < 1:
        raise ConfigError(f"lora rank is {rank}; it must be at least 1.")
    return alpha / math.sqrt(rank) if is_rank_stabilised else alpha / rank


def init_lora(key: jax.Array, params: Params, *, rank: int, patterns: Sequence[str] = DEFAULT_PATTERNS) -> Params:
    """Fresh factors for the kernels that match a pattern; their product is zero.

    Args:
        key: Each kernel draws from the stream of its own path, so adding one never moves another.
        params: The base; only paths and shapes are read.
        rank: Inner size r of the factors.
        patterns: Shell-style, over whole paths ("*" crosses "/").

    Shapes:
        result[path]["a"]: float32[fan_in, r], gaussian of variance 1 / fan_in.
        result[path]["b"]: float32[r, fan_out], zero. Head axes count into the fan that they belong to.

    Raises:
        ConfigError: a pattern matches nothing, or a leaf that is not a matrix; `rank` is not below both fans.

    Reference:
        Hu et al. 2021, arXiv:2106.09685. Differs: A's variance keeps A's output as large as its input.
    """
    flat = tree.flatten(params)
    factors = {}
    for path in _matching(params, patterns):
        fan_in, fan_out = _matrix_shape(path, flat[path].shape)
        if not 0 < rank <= min(fan_in, fan_out):
            raise ConfigError(
                f"lora rank is {rank}; {path}, a {fan_in} x {fan_out} matrix, takes 1 to {min(fan_in, fan_out)}."
            )
        noise = jax.random.normal(named_key(key, path), (fan_in, rank), jnp.float32)
        factors[f"{path}/a"] = noise / math.sqrt(fan_in)
        factors[f"{path}/b"] = jnp.zeros((rank, fan_out), jnp.float32)
    return tree.unflatten(factors)


def merge_lora(base: Params, factors: Params, *, scale: float) -> Params:
    """`base + scale * A @ B`, leaf by leaf; leaves without factors are the base's own.

    Jittable and differentiable in the factors: training runs the model on the merged tree.

    Args:
        base: Any floating dtype; the sum is formed in float32 and rounded once.
        factors: As `init_lora` makes them.
        scale: Of `lora_scale`.

    Raises:
        TreeMismatchError: factors for a leaf that the base does not have, or of another size.
    """
    flat = dict(tree.flatten(base))
    for path, (a, b) in _pairs(flat, factors).items():
        leaf = flat[path]
        flat[path] = (leaf.astype(jnp.float32) + _product(a, b, leaf.shape, scale)).astype(leaf.dtype)
    return tree.unflatten(flat)


def lora_task_vector(base: Params, factors: Params, *, scale: float) -> Params:
    """What the factors add, as a dense tree: float32, the shapes of `base`, zero where there are no factors.

    Raises:
        TreeMismatchError: factors for a leaf that the base does not have, or of another size.
    """
    flat = tree.flatten(base)
    vector = {
        path: jnp.zeros(leaf.shape, jnp.float32 if tree.is_float(leaf) else leaf.dtype) for path, leaf in flat.items()
    }
    for path, (a, b) in _pairs(flat, factors).items():
        vector[path] = _product(a, b, flat[path].shape, scale)
    return tree.unflatten(vector)


def _product(a, b, shape, scale):
    # Full precision whatever the device: the merged model that is trained is the one that is written.
    return (scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)).reshape(shape)


def _matching(params, patterns):
    """Paths that some pattern matches, in the order of the tree."""
    found = {}
    for pattern in patterns:
        paths = tree.match_paths(pattern, params)
        if not paths:
            raise ConfigError(
                f"lora pattern {pattern!r} matches no leaf of the base. Its kernels: "
                + ", ".join(path for path in tree.flatten(params) if path.endswith("kernel"))
            )
        found.update(dict.fromkeys(paths))
    return [path for path in tree.flatten(params) if path in found]


def _matrix_shape(path, shape):
    """(fan_in, fan_out) of a kernel: [in, out], [d, H, dh] of q, k, v, or [H, dh, d] of the attention output."""
    if len(shape) == 2 and path.endswith("/kernel"):
        return shape
    if len(shape) == 3 and path.endswith("/out/kernel"):
        return shape[0] * shape[1], shape[2]
    if len(shape) == 3 and path.endswith(("/q/kernel", "/k/kernel", "/v/kernel")):
        return shape[0], shape[1] * shape[2]
    raise ConfigError(
        f"lora: {path} has shape {list(shape)}; only kernels of dense and attention layers have factors. "
        "Narrow config.lora.patterns."
    )


def _pairs(flat, factors):
    """{path of a base leaf: (A, B)}, every factor accounted for."""
    pairs = {}
    for name, factor in tree.flatten(factors).items():
        path, _, which = name.rpartition("/")
        if path not in flat or which not in ("a", "b"):
            raise TreeMismatchError(f"lora factor {name}: the base has no leaf {path!r}. Is it this adapter's base?")
        pairs.setdefault(path, {})[which] = factor
    for path, pair in pairs.items():
        fan_in, fan_out = _matrix_shape(path, flat[path].shape)
        shapes = {which: list(factor.shape) for which, factor in pair.items()}
        rank = shapes.get("a", [0, 0])[-1]
        if shapes != {"a": [fan_in, rank], "b": [rank, fan_out]}:
            raise TreeMismatchError(
                f"lora factors of {path} have shapes {shapes}; its {fan_in} x {fan_out} matrix takes "
                f"a [{fan_in}, r] and b [r, {fan_out}]."
            )
    return {path: (pair["a"], pair["b"]) for path, pair in pairs.items()}
