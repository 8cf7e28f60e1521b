"""What comes in through a model's door: the tree, checked and of one dtype, and the batch.

A network computes in the dtype of its parameters (the widest, if they differ), so that float64 weights
give float64 outputs and bfloat16 weights cost what bfloat16 costs; statistics and softmax are taken in
float32 or wider whatever that dtype is.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import tree
from jaxtune.errors import DataError
from jaxtune.lazy import is_lazy, read
from jaxtune.types import Params


def open_params(init: Callable[[jax.Array, Any], Params], config: Any, params: Params) -> dict[str, Any]:
    """The parameters, checked against what `init(key, config)` makes and cast to one dtype.

    Raises:
        TreeMismatchError: a leaf too many, a leaf too few, or a shape that is not the config's.
    """
    return _Parts(init, config, params).whole()


def open_parts(init: Callable[[jax.Array, Any], Params], config: Any, params: Params) -> Mapping[str, Any]:
    """The same; where leaves are lazy, each part ("embed", "block_3") is opened when it is looked up and not kept.

    A family whose `apply` looks a part up once, and runs outside `jit`, then needs the memory of its largest part.
    """
    parts = _Parts(init, config, params)
    return parts if any(map(is_lazy, tree.flatten(params).values())) else parts.whole()


class _Parts(Mapping):
    """The children of a tree, checked as a whole and cast to one dtype as they are looked up."""

    def __init__(self, init, config, params):
        tree.check_same({"config": _expected(init, config), "params": params})
        self._params, self._dtype = params, widest_dtype(params)

    def __getitem__(self, name):
        child = self._params[name]
        if not isinstance(child, Mapping):
            return jnp.asarray(read(child)).astype(self._dtype)
        return tree.unflatten(
            {path: jnp.asarray(read(x)).astype(self._dtype) for path, x in tree.flatten(child).items()}
        )

    def __iter__(self):
        return iter(self._params)

    def __len__(self):
        return len(self._params)

    def whole(self):
        return {name: self[name] for name in self}


def widest_dtype(params: Params) -> np.dtype:
    """The dtype that holds every leaf; float32 for bfloat16 beside float16."""
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in tree.flatten(params).values()]
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def at_least_float32(dtype: Any) -> np.dtype:
    """The dtype of norm statistics, softmax and outputs in a network that computes in `dtype`."""
    return np.dtype(np.float32) if np.dtype(dtype).itemsize < 4 else np.dtype(dtype)


def image_of(batch: Mapping[str, Any], shape: tuple[int | None, int | None, int]) -> jax.Array | np.ndarray:
    """The images of a batch, float[N, height, width, channels].

    Args:
        batch: Holds them under "image".
        shape: Height, width and channels that the model takes; None where any will do.

    Raises:
        DataError: no images, another shape, or integers.
    """
    if "image" not in batch:
        raise DataError(f'the batch has no "image"; it has: {", ".join(batch) or "nothing"}.')
    image = batch["image"]
    fits = image.ndim == 4 and all(want in (None, got) for want, got in zip(shape, image.shape[1:], strict=True))
    if not fits or not tree.is_float(image):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(
            f'batch["image"] is {tree.describe_leaf(image)}, the model takes float[N, {wanted}]. '
            "Resize the images, scale bytes to [0, 1], or use the config that the checkpoint was made with."
        )
    return image


@functools.lru_cache(maxsize=64)
def _expected(init, config):
    return jax.eval_shape(lambda key: init(key, config), jax.random.key(0))


def draw_images(key: jax.Array, size: int, height: int, width: int, channels: int) -> jax.Array:
    """Images for comparing two networks: noise at a quarter of the resolution, enlarged, so that neighbours agree.

    Shapes:
        result: float32[size, height, width, channels], within [0, 1].
    """
    coarse = jax.random.uniform(key, (size, -(-height // 4), -(-width // 4), channels), jnp.float32)
    return jax.image.resize(coarse, (size, height, width, channels), "linear")
