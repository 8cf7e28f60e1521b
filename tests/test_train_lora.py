"""LoRA: the merge law against a forward pass through the factors, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tree
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.train.lora import init_lora, lora_scale, lora_task_vector, merge_lora

WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 6, 2, 3, 8


@pytest.fixture
def base():
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    heads = {name: {"kernel": draw(WIDTH, HEADS, HEAD_WIDTH), "bias": draw(HEADS, HEAD_WIDTH)} for name in "qkv"}
    out = {"kernel": draw(HEADS, HEAD_WIDTH, WIDTH), "bias": draw(WIDTH)}
    mlp = {"up": {"kernel": draw(WIDTH, HIDDEN)}, "down": {"kernel": draw(HIDDEN, WIDTH)}}
    return {
        "embed": {"kernel": draw(5, 5, 1, WIDTH)},
        "block_0": {"attn": {**heads, "out": out}, "mlp": mlp, "norm1": {"scale": draw(WIDTH)}},
    }


@pytest.fixture
def factors(key, base):
    """Factors whose product is not zero, as after training."""
    fresh = init_lora(key, base, rank=2)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.arange(leaf.size).reshape(leaf.shape).astype(leaf.dtype), fresh)


def test_fresh_factors_leave_the_base_bit_for_bit(key, base):
    merged = merge_lora(base, init_lora(key, base, rank=2), scale=4.0)
    jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_every_projection_of_a_block_has_factors_and_nothing_else(key, base):
    flat = tree.flatten(init_lora(key, base, rank=2))
    assert {path: leaf.shape for path, leaf in flat.items() if "/attn/" in path} == {
        **{f"block_0/attn/{name}/kernel/a": (WIDTH, 2) for name in "qkv"},
        **{f"block_0/attn/{name}/kernel/b": (2, HEADS * HEAD_WIDTH) for name in "qkv"},
        "block_0/attn/out/kernel/a": (HEADS * HEAD_WIDTH, 2),
        "block_0/attn/out/kernel/b": (2, WIDTH),
    }
    assert {path.rsplit("/", 1)[0] for path in flat if "/attn/" not in path} == {
        "block_0/mlp/up/kernel",
        "block_0/mlp/down/kernel",
    }


def test_the_merged_forward_is_the_forward_through_the_factors(base, factors):
    """float64 NumPy on both sides of the law, head by head, so that no reshape is shared with the code."""
    merged = jax.tree.map(np.asarray, merge_lora(base, factors, scale=0.5))
    x = np.random.default_rng(1).normal(size=(7, WIDTH))
    attn, merged_attn = base["block_0"]["attn"], merged["block_0"]["attn"]
    for name in "qkv":
        a, b = (np.asarray(factors["block_0"]["attn"][name]["kernel"][f], np.float64) for f in "ab")
        for head in range(HEADS):
            units = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
            expected = x @ attn[name]["kernel"][:, head] + 0.5 * (x @ a) @ b[:, units]
            np.testing.assert_allclose(x @ merged_attn[name]["kernel"][:, head], expected, rtol=1e-4, atol=1e-4)
    z = np.random.default_rng(2).normal(size=(7, HEADS, HEAD_WIDTH))
    a, b = (np.asarray(factors["block_0"]["attn"]["out"]["kernel"][f], np.float64) for f in "ab")
    expected = sum(z[:, h] @ attn["out"]["kernel"][h] for h in range(HEADS)) + 0.5 * (
        np.concatenate([z[:, h] for h in range(HEADS)], axis=1) @ a @ b
    )
    found = sum(z[:, h] @ merged_attn["out"]["kernel"][h] for h in range(HEADS))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_task_vector_is_what_merging_adds(base, factors):
    vector = lora_task_vector(base, factors, scale=0.5)
    tree.check_same({"base": base, "vector": vector}, dtypes=True)
    merged = merge_lora(base, factors, scale=0.5)
    jax.tree.map(np.testing.assert_array_equal, tree.apply_task_vector(base, vector), merged)
    assert np.linalg.matrix_rank(np.asarray(vector["block_0"]["mlp"]["up"]["kernel"])) == 2
    assert not np.any(vector["embed"]["kernel"])


def test_a_bfloat16_base_is_rounded_once(base, factors):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base)
    merged = merge_lora(half, factors, scale=0.5)["block_0"]["mlp"]["up"]["kernel"]
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    expected = merge_lora(wide, factors, scale=0.5)["block_0"]["mlp"]["up"]["kernel"].astype(jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, expected)


def test_a_kernel_draws_the_same_whoever_draws_beside_it(key, base):
    all_of_them = init_lora(key, base, rank=2)["block_0"]["mlp"]["up"]["kernel"]["a"]
    alone = init_lora(key, base, rank=2, patterns=["block_0/mlp/up/kernel"])["block_0"]["mlp"]["up"]["kernel"]["a"]
    np.testing.assert_array_equal(all_of_them, alone)
    other = init_lora(key, base, rank=2)["block_0"]["attn"]["q"]["kernel"]["a"]
    assert not np.array_equal(alone, other)


def test_a_keeps_the_size_of_its_input(key):
    params = {"mlp": {"up": {"kernel": np.zeros((400, 300), np.float32)}}}
    a = init_lora(key, params, rank=100, patterns=["mlp/up/kernel"])["mlp"]["up"]["kernel"]["a"]
    # 40 000 draws: the standard deviation of the estimate is 0.4 %.
    np.testing.assert_allclose(np.std(a) * np.sqrt(400), 1.0, atol=0.02)


def test_scales():
    assert lora_scale(4, alpha=8.0) == 2.0
    assert lora_scale(4, alpha=8.0, is_rank_stabilised=True) == 4.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2, "patterns": ["*/mpl/*"]}, "matches no leaf.*block_0/mlp/up/kernel"),
        ({"rank": 2, "patterns": ["embed/kernel"]}, "embed/kernel has shape"),
        ({"rank": 2, "patterns": ["*/norm1/scale"]}, "block_0/norm1/scale has shape"),
        ({"rank": 2, "patterns": ["*/q/bias"]}, "block_0/attn/q/bias has shape"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 7}, "rank is 7.* takes 1 to 6"),
    ],
)
def test_init_refuses(key, base, options, words):
    with pytest.raises(ConfigError, match=words):
        init_lora(key, base, **options)


def test_factors_of_another_base_are_refused(base, factors):
    without = tree.select(base, exclude="block_0/mlp/up/.*")
    with pytest.raises(TreeMismatchError, match="no leaf 'block_0/mlp/up/kernel'"):
        merge_lora(without, factors, scale=1.0)
    base["block_0"]["mlp"]["up"]["kernel"] = np.zeros((WIDTH, HIDDEN + 1), np.float32)
    with pytest.raises(TreeMismatchError, match="its 6 x 9 matrix"):
        merge_lora(base, factors, scale=1.0)
    del factors["block_0"]["mlp"]["down"]["kernel"]["b"]
    with pytest.raises(TreeMismatchError, match="block_0/mlp"):
        lora_task_vector(base, factors, scale=1.0)
