"""One small network of every family and kind, with no leaf at a special value, and how tests run them."""

import jax
import numpy as np

from jaxtune import tree
from jaxtune.models import clip, mlp, registry, resnet, vit

SIZES = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 4, "mlp_width": 40, "num_outputs": 5}
TEXT = {"vocab_size": 31, "context_length": 9, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 20}

CONFIGS = {
    "mlp": mlp.Config(image_shape=(4, 4, 3), widths=(17, 13), num_outputs=5),
    "mlp_residual": mlp.Config(
        image_shape=(4, 4, 3), widths=(11, 13, 7), num_outputs=5, activation="gelu", residual=True
    ),
    "mlp_tanh": mlp.Config(image_shape=(4, 4, 3), widths=(17, 13), num_outputs=5, activation="tanh"),
    "resnet": resnet.Config(num_outputs=5, depth=14),
    "vit": vit.Config(**SIZES),
    "vit_relu": vit.Config(**SIZES, activation="relu", stream_norm=True, norm_eps=1e-5),
    "vit_mean": vit.Config(**SIZES, pooling="mean", activation="gelu_tanh", head_bias=False, patch_bias=False),
    "clip": clip.Config(
        vision=vit.Config(
            **SIZES,
            stream_norm=True,
            activation="quick_gelu",
            norm_eps=1e-5,
            head_bias=False,
            patch_bias=False,
        ),
        text=clip.TextConfig(**TEXT, activation="quick_gelu"),
        embed_dim=SIZES["num_outputs"],
    ),
}

# Half the compile time; what the compiler would gain is nothing at these sizes.
FAST = {"xla_backend_optimization_level": 0}

run = jax.jit(registry.apply, static_argnums=0, compiler_options=FAST)


def shapes_of(config):
    """The tree of a config, shapes and dtypes alone."""
    return jax.eval_shape(lambda key: registry.init(key, config), jax.random.key(0))


def random_params(config, *, seed=0, dtype=np.float64):
    """Random weights: kernels scaled by fan-in, gains around 1, variances in [0.5, 2], the rest around 0."""
    draw = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path.split("/")[-1]
        if name == "kernel":
            split = 1 if path.split("/")[-2] in ("q", "k", "v") else leaf.ndim - 1
            values = draw.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:split]))
        elif name == "var":
            values = draw.uniform(0.5, 2.0, size=leaf.shape)
        elif name == "scale":
            values = 1 + 0.3 * draw.normal(size=leaf.shape)
        else:
            values = 0.3 * draw.normal(size=leaf.shape)
        return np.asarray(values, dtype)

    return tree.map_leaves(fill, shapes_of(config))


def random_batch(config, *, seed=0, size=4):
    """Images in [0, 1] and, for CLIP, texts whose greatest id stands somewhere before the end."""
    draw = np.random.default_rng(seed)
    shape = (8, 8, 3)
    if isinstance(config, mlp.Config):
        shape = config.image_shape
    batch = {"image": draw.uniform(size=(size, *shape)).astype(np.float32)}
    if isinstance(config, clip.Config):
        end = config.text.vocab_size - 1
        text = draw.integers(0, end, size=(size, config.text.context_length)).astype(np.int32)
        text[np.arange(size), draw.integers(2, config.text.context_length, size=size)] = end
        batch["text"] = text
    return batch


def outputs_of(config, params, batch):
    """Outputs as one flat NumPy vector, in the dtype they came in."""
    outputs = jax.tree.map(np.asarray, run(config, params, batch))
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(outputs)])


def difference(first, second):
    """Largest difference over the root mean square of `first`."""
    return np.abs(first - second).max() / np.sqrt(np.mean(np.square(first)))
