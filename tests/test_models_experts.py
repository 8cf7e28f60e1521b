"""Mixtures of experts: transformers' own blocks as the oracle, every declared group exact, its neighbours not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_models import assert_close
from small_models import FAST

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError
from jaxtune.models.config import from_fields, to_fields
from jaxtune.models.experts import Experts, apply_experts, declare_experts, init_experts, route

WIDTH = 20
CONFIGS = {
    "normalised": Experts(num_experts=5, num_chosen=2, hidden=12),
    "plain": Experts(num_experts=5, num_chosen=2, hidden=12, is_normalised=False),
    "chosen": Experts(num_experts=5, num_chosen=3, hidden=12, softmax="chosen"),
    "all": Experts(num_experts=3, num_chosen=3, hidden=12, is_normalised=False),
    "shared": Experts(num_experts=4, num_chosen=1, hidden=12, is_normalised=False, shared_hidden=7),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def params_of(config, dtype=np.float32):
    params = init_experts(jax.random.key(3), config, WIDTH)
    return tree.map_leaves(lambda _, leaf: np.asarray(leaf, dtype), params)


def tokens_of(dtype=np.float32, num_tokens=14):
    return np.random.default_rng(0).normal(size=(2, num_tokens // 2, WIDTH)).astype(dtype)


run = jax.jit(apply_experts, static_argnums=0, compiler_options=FAST)


def run_loop(config, params, x):
    """One token at a time and only the experts that it chose: NumPy."""

    def silu(v):
        return v / (1 + np.exp(-v))

    def gated(kernels, v):
        return (silu(v @ kernels["gate"]) * (v @ kernels["up"])) @ kernels["down"]

    def kernels_of(node, *index):
        return {part: node[part]["kernel"][index] for part in ("gate", "up", "down")}

    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        v = x[place]
        logits = v @ params["router"]["kernel"]
        best = np.argsort(-logits, kind="stable")[: config.num_chosen]
        among = logits if config.softmax == "all" else logits[best]
        weights = np.exp(logits[best] - among.max()) / np.exp(among - among.max()).sum()
        if config.is_normalised:
            weights /= weights.sum()
        out[place] = sum(
            w * gated(kernels_of(params["experts"], index), v) for w, index in zip(weights, best, strict=True)
        )
        if config.shared_hidden:
            gate = 1 / (1 + np.exp(-v @ params["shared_gate"]["kernel"]))
            out[place] += gate * gated(kernels_of(params["shared"], ...), v)
    return out


@EVERY
def test_only_the_chosen_experts_count(name, float64):
    config = CONFIGS[name]
    params, x = params_of(config, np.float64), tokens_of(np.float64)
    assert_close(run(config, params, x), run_loop(config, params, x), 1e-12)


def test_transformers_mixtral_block_computes_the_same():
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = CONFIGS["normalised"]
    oracle = module.MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=WIDTH, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2)
    )
    assert_same_block(torch, config, oracle)


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_qwen_blocks_compute_the_same(family, is_normalised):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prefix = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[family]
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    sizes = dict(hidden_size=WIDTH, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2)
    shared = {"qwen2_moe": dict(shared_expert_intermediate_size=7), "qwen3_moe": {}}[family]
    oracle = getattr(module, f"{prefix}SparseMoeBlock")(
        getattr(transformers, f"{prefix}Config")(**sizes, **shared, norm_topk_prob=is_normalised)
    )
    config = Experts(
        num_experts=5, num_chosen=2, hidden=12, is_normalised=is_normalised, shared_hidden=7 if shared else None
    )
    assert_same_block(torch, config, oracle)


def assert_same_block(torch, config, oracle):
    """Same choice of experts, same weights, same outputs, our parameters in the oracle's names."""
    torch.set_num_threads(1)
    params, x = params_of(config), tokens_of(num_tokens=200)
    ours = {part: params["experts"][part]["kernel"] for part in ("gate", "up", "down")}
    state = {
        "gate.weight": params["router"]["kernel"].T,
        "experts.gate_up_proj": np.concatenate([ours["gate"], ours["up"]], axis=2).swapaxes(1, 2),
        "experts.down_proj": ours["down"].swapaxes(1, 2),
    }
    if config.shared_hidden:
        state |= {f"shared_expert.{part}_proj.weight": params["shared"][part]["kernel"].T for part in ours}
        state["shared_expert_gate.weight"] = params["shared_gate"]["kernel"].T
    oracle.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in state.items()})
    with torch.no_grad():
        _, scores, index = oracle.gate(torch.from_numpy(x).reshape(-1, WIDTH))
        outputs = oracle(torch.from_numpy(x))
    weights = np.asarray(route(config, params, x.reshape(-1, WIDTH)))
    np.testing.assert_array_equal(np.sort(index, axis=-1), [np.flatnonzero(row) for row in weights])
    np.testing.assert_allclose(np.take_along_axis(weights, index.numpy(), axis=-1), scores, rtol=1e-5)
    assert_close(run(config, params, x), outputs.numpy(), 1e-5)


def test_softmax_over_the_chosen_is_softmax_over_all_normalised(float64):
    first = Experts(num_experts=5, num_chosen=2, hidden=12, softmax="chosen")
    params, x = params_of(first, np.float64), tokens_of(np.float64)
    assert_close(run(first, params, x), run(CONFIGS["normalised"], params, x), 1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_half_precision_and_close(dtype):
    config = CONFIGS["all"]  # no choice that rounding could turn
    params, x = params_of(config), tokens_of()
    half = tree.map_leaves(lambda _, leaf: jnp.asarray(leaf, dtype), params)
    out = run(config, half, jnp.asarray(x, dtype))
    assert out.dtype == dtype
    assert_close(out, run(config, params, x), 0.05)


def spec_of(config, **changes):
    groups, axes = declare_experts(config, "mlp")
    groups.append(symmetry.Group("stream", WIDTH, kind="signed_permutation", role="stream"))
    return symmetry.make_spec(groups, {**axes, **changes})


def move(spec, element, params):
    return symmetry.apply(spec, element, {"mlp": params})["mlp"]


@EVERY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_random_element_leaves_the_function_alone(name, dtype, key):
    config, spec = CONFIGS[name], spec_of(CONFIGS[name])
    with jax.enable_x64(dtype == np.float64):
        params, x = params_of(config, dtype), tokens_of(dtype)
        element = symmetry.random(key, spec)
        moved = move(spec, element, params)
        order, signs = element["stream"][0].astype(int), element["stream"][1].astype(dtype)
        before, after = np.asarray(run(config, params, x)), np.asarray(run(config, moved, x[..., order] * signs))
        assert before.dtype == dtype
        assert_close(after, before[..., order] * signs, 1e-12 if dtype == np.float64 else 1e-5)
        again = move(spec, symmetry.invert(spec, element), moved)
        tree.map_leaves(lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=path), params, again)


def test_every_group_of_a_shared_expert_is_declared():
    assert set(spec_of(CONFIGS["shared"]).groups) == {"mlp/expert", "mlp/experts/hidden", "mlp/shared/hidden", "stream"}
    assert set(spec_of(CONFIGS["plain"]).groups) == {"mlp/expert", "mlp/experts/hidden", "stream"}


ILLEGAL = {
    "experts without their router columns": {"mlp/router/kernel": ("stream", None)},
    "router columns without their experts": {
        f"mlp/experts/{part}/kernel": (None, *row)
        for part, row in {"gate": ("stream", None), "up": ("stream", None), "down": (None, "stream")}.items()
    },
    "signs of hidden units on the gate": {
        "mlp/experts/gate/kernel": ("mlp/expert", "stream", "mlp/experts/hidden"),
    },
    "down not turned with up": {"mlp/experts/down/kernel": ("mlp/expert", None, "stream")},
    "a gate that reads units of another expert's order": {"mlp/experts/gate/kernel": ("mlp/expert", "stream", None)},
    "a shared expert's gate that is not turned": {"mlp/shared_gate/kernel": (None, None)},
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_element_changes_the_function(name, key, float64):
    config = CONFIGS["shared"]
    params, x = params_of(config, np.float64), tokens_of(np.float64)
    groups, axes = declare_experts(config, "mlp")
    axes |= ILLEGAL[name]
    owned = {owner.rstrip("*~") for row in axes.values() for owner in row if owner}
    groups.append(symmetry.Group("stream", WIDTH, kind="signed_permutation", role="stream"))
    spec = symmetry.make_spec([group for group in groups if group.name in owned], axes)
    element = symmetry.random(key, spec)
    order, signs = element["stream"][0].astype(int), element["stream"][1]
    before = np.asarray(run(config, params, x))
    after = run(config, move(spec, element, params), x[..., order] * signs)
    assert np.abs(after - (before[..., order] * signs)).max() > 1e-2


def test_units_do_not_change_places_across_experts(float64):
    """Unit 0 of expert 0 for unit 0 of expert 1, in all three kernels."""
    config = CONFIGS["plain"]
    params, x = params_of(config, np.float64), tokens_of(np.float64)
    moved = params_of(config, np.float64)
    for part in ("gate", "up", "down"):
        kernel = moved["experts"][part]["kernel"] = moved["experts"][part]["kernel"].copy()
        unit = kernel[:, 0] if part == "down" else kernel[:, :, 0]  # a view: [expert, width]
        unit[[0, 1]] = unit[[1, 0]]
    assert np.abs(run(config, params, x) - run(config, moved, x)).max() > 1e-2


def test_a_config_says_what_makes_no_sense_and_comes_back_from_json():
    with pytest.raises(ConfigError, match="num_chosen 3 of only num_experts 2"):
        Experts(num_experts=2, num_chosen=3, hidden=4)
    with pytest.raises(ConfigError, match="shared_hidden: must be an int, at least 1, or None, got 0"):
        Experts(num_experts=2, num_chosen=1, hidden=4, shared_hidden=0)
    with pytest.raises(ConfigError, match="softmax: must be one of 'all', 'chosen'"):
        Experts(num_experts=2, num_chosen=1, hidden=4, softmax="none")
    for config in CONFIGS.values():
        assert from_fields(Experts, to_fields(config)) == config
