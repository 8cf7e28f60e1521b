"""Transport between decoders: planted bases take a fine-tune whole, noisy ones nearly, kin as they are."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_models import FAST
from toys import add_noise

from jaxtune import symmetry, tree
from jaxtune.align.weights import match_weights
from jaxtune.errors import ConfigError, SpecError
from jaxtune.models import decoder, registry
from jaxtune.models.experts import Experts
from jaxtune.symmetry import canonical
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import prepare_transport

KEY = jax.random.key(0)
ROTARY = decoder.Rotary(theta=50.0)
LLAMA = decoder.Config(
    vocab_size=64, width=48, depth=2, num_heads=6, num_kv_heads=3, head_width=8, mlp_width=64, rotary=ROTARY
)
OLD = replace(
    LLAMA,
    norm="layer",
    gated=False,
    activation="gelu",
    num_kv_heads=6,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen 2": replace(LLAMA, qkv_bias=True, tied=True),
    "qwen 3": replace(LLAMA, qk_norm="head"),
    "gpt-2": replace(OLD, rotary=None, num_positions=32, tied=True),
    "neox": replace(OLD, placement="parallel", rotary=replace(ROTARY, fraction=0.5)),
    "gemma 2": replace(
        LLAMA,
        norm="rms_plus_one",
        placement="sandwich",
        attention_softcap=3.0,
        logit_softcap=5.0,
        tied=True,
        embed_scale=48**0.5,
    ),
    "olmo 2": replace(LLAMA, placement="output", qk_norm="whole"),
    "mixtral": replace(LLAMA, experts=Experts(num_experts=4, num_chosen=2, hidden=40)),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
# Noise -> least share of every order found, largest relative error of the moved task vector.
CURVE = {0.1: (1.0, 0.04), 0.3: (1.0, 0.1), 1.0: (1.0, 0.35)}

run = jax.jit(registry.apply, static_argnums=0, compiler_options=FAST)


def draw_params(config, seed):
    """float32: kernels and tables by fan-in, gains off their start, offsets and biases off zero."""
    draw = np.random.default_rng(seed)

    def fill(path, leaf):
        noise, name = draw.normal(size=leaf.shape), path.rsplit("/", 1)[1]
        if name in ("scale", "bias"):
            is_gain = name == "scale" and config.norm != "rms_plus_one"
            return (is_gain + 0.2 * noise).astype(np.float32)
        is_output = path.endswith("out/kernel")
        axis = 1 if "/experts/" in path else 0
        fan_in = np.prod(leaf.shape[:-1]) if is_output else leaf.shape[axis] if name == "kernel" else config.width
        return (noise / np.sqrt(fan_in)).astype(np.float32)

    return tree.map_leaves(fill, jax.eval_shape(lambda key: registry.init(key, config), KEY))


def outputs(config, params):
    text = np.random.default_rng(9).integers(0, config.vocab_size, size=(4, 12)).astype(np.int32)
    return np.asarray(run(config, params, {"text": text}))


def symmetry_of(config):
    return functools.partial(registry.symmetry_of, config)


def relative(wanted, got):
    return np.abs(wanted - got).max() / np.abs(wanted).max()


@functools.cache
def planted(name):
    """(old base, its fine-tune, element, new base, what its fine-tune must be)."""
    config = CONFIGS[name]
    spec, source = registry.symmetry_of(config), draw_params(config, 0)
    tuned = add_noise(source, 0.1, 1)
    element = symmetry.random(jax.random.key(4), spec)
    return source, tuned, element, *(symmetry.apply(spec, element, params) for params in (source, tuned))


def error_of(wanted, got):
    """Norm of the difference of two trees over that of the first."""
    wanted, got = (tree.flatten(some) for some in (wanted, got))
    apart = sum(np.sum((wanted[path] - got[path]) ** 2) for path in wanted)
    return np.sqrt(apart / sum(np.sum(leaf**2) for leaf in wanted.values()))


def least_share(spec, found, planted):
    """Of units whose place was found, over the groups that have orders."""
    orders = {name: symmetry.KINDS[group.kind].order for name, group in spec.groups.items()}
    return min(
        np.mean(order(np.asarray(found[name])) == order(np.asarray(planted[name])))
        for name, order in orders.items()
        if order is not None
    )


@pytest.mark.parametrize("method", ["permutation", "full", "auto"])
@EVERY
def test_a_planted_base_takes_the_fine_tune_whole(name, method):
    config = CONFIGS[name]
    source, tuned, _, target, wanted = planted(name)
    prepared = prepare_transport(KEY, symmetry_of(config), source, tuned, target, method=method)
    assert prepared.info.get("chosen") != "identity"
    carried = outputs(config, apply_transport(prepared, target))
    assert relative(outputs(config, tuned), carried) < 1e-5
    assert relative(outputs(config, tuned), outputs(config, source)) > 0.1  # the fine-tune does something
    if method == "permutation":
        vector = tree.task_vector(target, wanted)
        assert error_of(vector, prepared.task_vector) < 1e-5


@pytest.mark.parametrize("noise", CURVE)
@EVERY
def test_noise_moves_no_unit_and_bends_the_task_vector_by_less_than_itself(name, noise):
    config, (share, error) = CONFIGS[name], CURVE[noise]
    source, tuned, element, target, wanted = planted(name)
    noisy = add_noise(target, noise, 3)
    prepared = prepare_transport(KEY, symmetry_of(config), source, tuned, noisy, method="permutation")
    assert least_share(prepared.spec, prepared.element, element) >= share
    assert error_of(tree.task_vector(target, wanted), prepared.task_vector) < error


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt-2", "neox"])
def test_the_whole_group_finds_rotations_of_folded_weights(name, noise):
    """B = g(A) in the coordinates of folded weights, which no element of the network's own symmetry reaches."""
    config = replace(CONFIGS[name], tied=False)
    spec = registry.symmetry_of(config)
    whole, source = canonical.canonical_spec(spec), draw_params(config, 0)
    tuned = add_noise(source, 0.1, 1)
    element = symmetry.random(jax.random.key(2), whole)
    target = canonical.realise(spec, symmetry.apply(whole, element, canonical.fold(spec, source)), source)
    noisy = add_noise(target, noise, 3) if noise else target
    prepared = prepare_transport(KEY, symmetry_of(config), source, tuned, noisy, method="full")
    assert least_share(whole, prepared.element, element) == 1
    wanted = outputs(config, tuned)
    carried = outputs(config, apply_transport(prepared, target))  # on the clean base: the moved update alone
    error = relative(wanted, carried) / relative(wanted, outputs(config, source))
    assert error < {0.0: 2e-5, 0.1: 0.1, 0.3: 0.3}[noise]
    if not noise:
        assert max(prepared.info["lost"].values(), default=0.0) < 1e-5
        chosen = prepare_transport(KEY, symmetry_of(config), source, tuned, target, method="auto")
        assert chosen.info["chosen"] == "full"
        stuck = prepare_transport(KEY, symmetry_of(config), source, tuned, target, method="permutation")
        assert relative(wanted, outputs(config, apply_transport(stuck, target))) > 0.05


@pytest.mark.parametrize("name", ["llama", "gpt-2"])
def test_a_copy_takes_the_fine_tune_as_it_is(name):
    """Maps inside heads fit even the rounding of a copy a little; auto does not."""
    config = CONFIGS[name]
    source, tuned, *_ = planted(name)
    for noise in (0.0, 2e-3):
        target = add_noise(source, noise, 5) if noise else source
        prepared = prepare_transport(KEY, symmetry_of(config), source, tuned, target, method="auto")
        assert prepared.info["chosen"] == "identity"
        assert prepared.info["because"]["verdict"] == "same"
    drifted = add_noise(source, 0.1, 6)
    prepared = prepare_transport(KEY, symmetry_of(config), source, tuned, drifted, method="auto")
    assert prepared.info["because"]["is_in_place"]
    # Whatever is chosen, the task vector arrives nearly as it was.
    gained = relative(outputs(config, tuned), outputs(config, apply_transport(prepared, source)))
    assert gained < 0.15 * relative(outputs(config, tuned), outputs(config, source))


def test_matches_compose_and_invert_along_a_chain():
    """match(A, C) = match(B, C) after match(A, B), as what they do to A; each match is undone by the way back."""
    config = CONFIGS["qwen 3"]
    spec, first = registry.symmetry_of(config), draw_params(config, 0)
    second, third = (symmetry.apply(spec, symmetry.random(jax.random.key(n), spec), first) for n in (1, 2))

    def match(target, source):
        return match_weights(KEY, spec, target, source).element

    direct = symmetry.apply(spec, match(third, first), first)
    chained = symmetry.apply(spec, symmetry.compose(spec, match(third, second), match(second, first)), first)
    assert error_of(direct, chained) < 1e-5
    there_and_back = symmetry.compose(spec, match(first, second), match(second, first))
    assert error_of(first, symmetry.apply(spec, there_and_back, first)) < 1e-5


def test_methods_for_other_symmetries_are_refused_by_name():
    source, tuned, _, target, _ = planted("llama")
    headless = replace(LLAMA, head="none")
    params = draw_params(headless, 0)
    with pytest.raises(SpecError, match="no canonical form: without a head"):
        prepare_transport(KEY, symmetry_of(headless), params, params, params, method="full")
    with pytest.raises(ConfigError, match="junctions"):
        prepare_transport(KEY, symmetry_of(LLAMA), source, tuned, target, method="transfusion")
