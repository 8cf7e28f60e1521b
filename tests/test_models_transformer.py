"""The transformers against a plain NumPy reading of the formulas that shares no code with them."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, SIZES, difference, outputs_of, random_batch, random_params, run, shapes_of

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import clip, vit
from jaxtune.models.transformer import ACTIVATIONS

ORACLE = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def oracle_norm(x, leaves, eps):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * leaves["scale"] + leaves["bias"]


def oracle_attention(x, leaves, is_causal):
    """One image, one head, one query at a time."""
    num_tokens, num_heads = len(x), leaves["q"]["bias"].shape[0]
    out = np.tile(leaves["out"]["bias"], (num_tokens, 1))
    for head in range(num_heads):
        q, k, v = (x @ leaves[n]["kernel"][:, head] + leaves[n]["bias"][head] for n in "qkv")
        for query in range(num_tokens):
            seen = query + 1 if is_causal else num_tokens
            weights = np.exp([q[query] @ k[key] / math.sqrt(len(q[query])) for key in range(seen)])
            out[query] += (weights / weights.sum()) @ v[:seen] @ leaves["out"]["kernel"][head]
    return out


def oracle_blocks(x, params, config, is_causal=False):
    for index in range(config.depth):
        leaves = params[f"block_{index}"]
        x = x + oracle_attention(oracle_norm(x, leaves["norm1"], config.norm_eps), leaves["attn"], is_causal)
        up, down = leaves["mlp"]["up"], leaves["mlp"]["down"]
        hidden = oracle_norm(x, leaves["norm2"], config.norm_eps) @ up["kernel"] + up["bias"]
        x = x + ORACLE[config.activation](hidden) @ down["kernel"] + down["bias"]
    return x


def oracle_vit(config, params, image):
    side = config.patch_size
    rows = []
    for top in range(0, config.image_size, side):
        for left in range(0, config.image_size, side):
            patch = image[top : top + side, left : left + side].astype(np.float64)
            rows.append(np.einsum("hwc,hwcd->d", patch, params["patch"]["kernel"]) + params["patch"].get("bias", 0))
    if config.pooling == "class":
        rows.insert(0, params["class_token"])
    x = np.stack(rows) + params["position"]
    if config.stream_norm:
        x = oracle_norm(x, params["stream_norm"], config.norm_eps)
    x = oracle_norm(oracle_blocks(x, params, config), params["final_norm"], config.norm_eps)
    x = x[0] if config.pooling == "class" else x.mean(0)
    return x @ params["head"]["kernel"] + params["head"].get("bias", 0)


def oracle_text(config, params, text):
    x = params["token_embedding"][text] + params["position"][: len(text)]
    x = oracle_blocks(x, params, config, is_causal=True)[int(np.argmax(text))]
    return oracle_norm(x, params["final_norm"], config.norm_eps) @ params["projection"]["kernel"]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("vit", np.float64, 1e-12),
    ("vit_relu", np.float64, 1e-12),
    ("vit_mean", np.float64, 1e-12),
    ("vit", np.float32, 1e-4),  # rounding through two blocks
])  # fmt: skip
def test_vit_is_its_formulas(name, dtype, tolerance):
    config = CONFIGS[name]
    params, batch = random_params(config), random_batch(config)
    with jax.enable_x64(dtype is np.float64):
        got = run(config, tree.map_leaves(lambda _, leaf: leaf.astype(dtype), params), batch)
    want = np.stack([oracle_vit(config, params, image) for image in batch["image"]])
    assert got.dtype == dtype
    assert difference(want, np.asarray(got)) < tolerance


def test_clip_is_its_formulas():
    config = CONFIGS["clip"]
    params, batch = random_params(config), random_batch(config)
    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, run(config, params, batch))
    want = {
        "image_features": np.stack([oracle_vit(config.vision, params["vision"], image) for image in batch["image"]]),
        "text_features": np.stack([oracle_text(config.text, params["text"], text) for text in batch["text"]]),
    }
    for name, features in want.items():
        want[name] = features / np.linalg.norm(features, axis=1, keepdims=True)
    want["logit_scale"] = np.exp(params["logit_scale"])
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101)
    with jax.enable_x64(True):
        got = ACTIVATIONS[name](jnp.asarray(x))
    np.testing.assert_allclose(got, ORACLE[name](x), rtol=1e-12, atol=1e-14)


def test_bfloat16_weights_run_in_bfloat16_and_answer_in_float32():
    config = CONFIGS["vit"]
    params, batch = random_params(config, dtype=np.float32), random_batch(config)
    rounded = tree.map_leaves(lambda _, leaf: jnp.asarray(leaf).astype(jnp.bfloat16), params)
    got, want = run(config, rounded, batch), outputs_of(config, params, batch)
    assert got.dtype == jnp.float32
    assert 1e-4 < difference(want, np.asarray(got).ravel()) < 0.1  # 8 bits of mantissa, a few dozen roundings


def test_one_float32_leaf_makes_a_mixed_tree_float32():
    config = CONFIGS["vit"]
    params, batch = random_params(config, dtype=np.float32), random_batch(config)
    rounded = tree.map_leaves(lambda _, leaf: jnp.asarray(leaf).astype(jnp.bfloat16), params)
    widened = tree.map_leaves(lambda _, leaf: leaf.astype(jnp.float32), rounded)
    mixed = {**rounded, "final_norm": widened["final_norm"]}
    np.testing.assert_array_equal(run(config, mixed, batch), run(config, widened, batch))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        # torchvision's vit_b_16, vit_b_32, vit_l_16
        ((224, 16, 768, 12, 12, 3072), 86_567_656),
        ((224, 32, 768, 12, 12, 3072), 88_224_232),
        ((224, 16, 1024, 24, 16, 4096), 304_326_632),
    ],
)
def test_real_sizes_have_the_published_number_of_parameters(config, count):
    names = ("image_size", "patch_size", "width", "depth", "num_heads", "mlp_width")
    config = vit.Config(**dict(zip(names, config, strict=True)), num_outputs=1000)
    assert tree.count_parameters(shapes_of(config)) == count


def test_paths_and_shapes():
    shapes = {path: leaf.shape for path, leaf in tree.flatten(shapes_of(CONFIGS["vit_relu"])).items()}
    block = {path.removeprefix("block_1/"): shape for path, shape in shapes.items() if path.startswith("block_1/")}
    assert {path: shape for path, shape in shapes.items() if not path.startswith("block_")} == {
        "patch/kernel": (4, 4, 3, 24), "patch/bias": (24,), "class_token": (24,), "position": (5, 24),
        "stream_norm/scale": (24,), "stream_norm/bias": (24,), "final_norm/scale": (24,), "final_norm/bias": (24,),
        "head/kernel": (24, 5), "head/bias": (5,),
    }  # fmt: skip
    assert block == {
        "norm1/scale": (24,), "norm1/bias": (24,), "norm2/scale": (24,), "norm2/bias": (24,),
        "attn/q/kernel": (24, 4, 6), "attn/q/bias": (4, 6), "attn/k/kernel": (24, 4, 6), "attn/k/bias": (4, 6),
        "attn/v/kernel": (24, 4, 6), "attn/v/bias": (4, 6), "attn/out/kernel": (4, 6, 24), "attn/out/bias": (24,),
        "mlp/up/kernel": (24, 40), "mlp/up/bias": (40,), "mlp/down/kernel": (40, 24), "mlp/down/bias": (24,),
    }  # fmt: skip
    options = tree.flatten(shapes_of(CONFIGS["vit_mean"]))
    assert not {"class_token", "patch/bias", "head/bias", "stream_norm/scale"} & options.keys()
    assert options["position"].shape == (4, 24)


def test_fresh_shortcuts_are_the_identity(key):
    config = replace(CONFIGS["vit"], shortcuts=True)
    params = jax.jit(vit.init, static_argnums=1)(key, config)
    np.testing.assert_array_equal(params["block_1"]["shortcut_mlp"]["kernel"], np.eye(config.width))
    assert not vit.is_trainable(config, "block_1/shortcut_mlp/kernel")
    assert not vit.is_trainable(config, "vision/block_0/shortcut_attn/kernel")
    assert vit.is_trainable(config, "block_1/mlp/up/kernel")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), r"float32\[2, 8, 8, 1\], the model takes float\[N, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.float32), "takes float"),
        (np.zeros((2, 8, 8, 3), np.uint8), "scale bytes"),
    ],
)
def test_images_that_are_not_the_configs(image, reason):
    config = CONFIGS["vit"]
    with pytest.raises(DataError, match=reason):
        vit.apply(config, random_params(config), {"image": image})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 5}, "width 24 cannot be shared equally by num_heads 5"),
        ({"patch_size": 3}, "image_size 8 is no multiple of patch_size 3"),
        ({"depth": 0}, "depth: must be an int, at least 1, got 0"),
        ({"width": 24.0}, "width: must be an int"),
        ({"norm_eps": 0.0}, "norm_eps: must be a positive number"),
        ({"pooling": "max"}, "pooling: must be one of 'class', 'mean', .*'attention', got 'max'"),
        ({"stream_norm": 1}, "stream_norm: must be True or False, got 1"),
    ],
)
def test_configs_that_make_no_sense(change, reason):
    with pytest.raises(ConfigError, match=reason):
        vit.Config(**{**SIZES, **change})


def test_text_heads_must_share_the_width():
    with pytest.raises(ConfigError, match="num_heads 3"):
        clip.TextConfig(vocab_size=9, context_length=4, width=16, depth=1, num_heads=3, mlp_width=8)
