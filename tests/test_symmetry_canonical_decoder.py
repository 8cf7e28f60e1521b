"""Folded decoders: the same function, the whole group, and the way back; RMS and layer norms, ties, entry norms."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from hub_decoders import draw_texts, run
from small_models import FAST, shapes_of

from jaxtune import symmetry, tree
from jaxtune.errors import SpecError
from jaxtune.models import decoder, registry
from jaxtune.models.decoder import network
from jaxtune.models.experts import Experts
from jaxtune.symmetry import canonical

ROTARY = decoder.Rotary(theta=50.0)
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
LLAMA = decoder.Config(
    vocab_size=31, width=18, depth=1, num_heads=6, num_kv_heads=2, head_width=8, mlp_width=13, rotary=ROTARY
)
OLD = replace(LLAMA, norm="layer", gated=False, activation="gelu", num_kv_heads=6, **BIASES)
CONFIGS = {
    "llama": LLAMA,
    "llama with biases": replace(LLAMA, **BIASES),
    "llama, tied": replace(LLAMA, tied=True, rotary=None),
    "qwen 2": replace(LLAMA, qkv_bias=True),
    "qwen 3": replace(LLAMA, qk_norm="head"),
    "gpt-2": replace(OLD, rotary=None, num_positions=20, tied=True),
    "gpt-2, tied with a bias": replace(OLD, rotary=None, num_positions=20, tied=True, head_bias=True),
    "neox": replace(OLD, placement="parallel", rotary=replace(ROTARY, fraction=0.5)),
    "opt, one norm for both": replace(
        OLD, rotary=None, num_positions=20, activation="relu", placement="parallel_shared"
    ),
    "gains from one": replace(LLAMA, norm="rms_plus_one", embed_scale=18**0.5),
    "experts": replace(
        LLAMA, experts=Experts(num_experts=4, num_chosen=2, hidden=9, shared_hidden=5), depth=2, sparse=(False, True)
    ),
    "last token": replace(LLAMA, head="last", num_outputs=3),
    "gemma 2": replace(
        LLAMA, norm="rms_plus_one", placement="sandwich", attention_softcap=3.0, logit_softcap=5.0, tied=True
    ),
    "olmo 2": replace(LLAMA, placement="output", qk_norm="whole"),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
REALISED = pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gemma 2", "olmo 2")])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def matrices_for_gains(monkeypatch):
    """Norms whose gain is a matrix multiply by it: what a folded norm of outputs computes."""
    own = network.apply_norm

    def apply_norm(config, params, x, **options):
        if params["scale"].ndim < 2:
            return own(config, params, x, **options)
        plain = np.zeros(x.shape[-1]) if config.norm == "rms_plus_one" else np.ones(x.shape[-1])
        return own(config, {"scale": plain}, x, **options) @ params["scale"]

    monkeypatch.setattr(network, "apply_norm", apply_norm)


def draw_params(config, seed, scale=0.2):
    """float64: kernels by fan-in, gains off their start, offsets and biases off zero."""
    draw = np.random.default_rng(seed)

    def fill(path, leaf):
        noise, name = draw.normal(size=leaf.shape), path.rsplit("/", 1)[1]
        if name == "scale":
            return (config.norm != "rms_plus_one") + scale * noise
        return scale * noise if name == "bias" else noise / np.sqrt(leaf.shape[0] if name == "kernel" else 1)

    return tree.map_leaves(fill, shapes_of(config))


def untied(config):
    return replace(config, tied=False)


def outputs(config, params):
    """Of real tokens: padding that sees no token has no function."""
    text, mask = draw_texts(config.vocab_size)
    found = np.asarray(run(config, params, {"text": text, "mask": mask}))
    return found[mask] if found.ndim == 3 else found


def as_network(config, folded):
    """Folded weights as the weights of an untied network, gains 1 and hidden biases 0; matrices stay matrices."""
    config = untied(config)
    like = tree.flatten(shapes_of(config))
    plain = 0.0 if config.norm == "rms_plus_one" else 1.0
    leaves = tree.flatten(folded)
    return tree.unflatten(
        {
            path: leaves.get(path, np.full(leaf.shape, plain if path.endswith("scale") else 0.0))
            for path, leaf in like.items()
        }
    )


@functools.partial(jax.jit, static_argnames="config", compiler_options=FAST)
def run_folded(config, params, text, mask):
    """`registry.apply` where gains may be matrices, which that would refuse."""
    stream = network.embed(config, params, text, mask)
    for index in range(config.depth):
        stream = network.apply_block(config, index, params[f"block_{index}"], stream, mask)
    return network.read_out(config, params, stream, mask)


def folded_outputs(config, folded):
    """`outputs` of folded weights."""
    text, mask = draw_texts(config.vocab_size)
    found = np.asarray(run_folded(untied(config), as_network(config, folded), text, mask))
    return found[mask] if found.ndim == 3 else found


@EVERY
@pytest.mark.usefixtures("matrices_for_gains")
def test_folding_and_every_element_of_the_whole_group_keep_the_function(name):
    config = CONFIGS[name]
    spec, params = registry.symmetry_of(config), draw_params(config, 0)
    whole, folded = canonical.canonical_spec(spec), canonical.fold(spec, params)
    whole.check(folded)
    assert whole.groups["stream"].kind == ("centred_orthogonal" if config.norm == "layer" else "orthogonal")
    before = outputs(config, params)
    tolerance = 1e-9 * np.abs(before).max()
    np.testing.assert_allclose(folded_outputs(config, folded), before, rtol=0, atol=tolerance)
    for seed in range(2):
        element = symmetry.random(jax.random.key(seed), whole)
        moved = symmetry.apply(whole, element, folded)
        np.testing.assert_allclose(folded_outputs(config, moved), before, rtol=0, atol=tolerance)


@REALISED
def test_realised_weights_are_a_network_of_the_family(name):
    config = untied(CONFIGS[name])
    spec, params = registry.symmetry_of(config), draw_params(config, 0)
    before = outputs(config, params)
    whole = canonical.canonical_spec(spec)
    moved = symmetry.apply(whole, symmetry.random(jax.random.key(3), whole), canonical.fold(spec, params))
    again = outputs(config, canonical.realise(spec, moved, params))
    np.testing.assert_allclose(again, before, rtol=0, atol=1e-9 * np.abs(before).max())


@EVERY
def test_a_rotation_of_weights_that_were_not_folded_breaks_the_function(name):
    config = CONFIGS[name]
    spec, params = registry.symmetry_of(config), draw_params(config, 0)
    whole = canonical.canonical_spec(spec)
    element = {**symmetry.identity(whole), "stream": symmetry.random(jax.random.key(1), whole)["stream"]}
    turned = tree.map_leaves(
        lambda path, leaf: (
            symmetry.element.apply_to_leaf(whole, element, path, leaf)
            if path in whole.axes and leaf.ndim == len(whole.axes[path])
            else leaf
        ),
        params,
    )
    before = outputs(config, params)
    assert np.abs(outputs(config, turned) - before).max() > 0.05 * before.std()


@EVERY
def test_unfolding_undoes_folding_for_any_base(name):
    """fold(B + unfold(v)) = fold(B) + v for every change v that the gains of B can hold."""
    config = CONFIGS[name]
    spec = registry.symmetry_of(config)
    source, base = draw_params(config, 0), draw_params(config, 2)
    tuned = tree.map_leaves(lambda _, a, b: a + 0.1 * b, source, draw_params(config, 1))
    if spec.form.tie is not None:
        # The change of one and the same network: what a tied table can hold.
        base = tree.map_leaves(lambda _, leaf: leaf.copy(), source)
    change = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    unfolded = canonical.unfold(spec, change, base)
    assert max(unfolded.lost.values(), default=0.0) < 1e-9
    result = canonical.fold(spec, tree.apply_task_vector(base, unfolded.task_vector))
    wanted = tree.apply_task_vector(canonical.fold(spec, base), change)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), result, wanted)
    narrow = canonical.unfold(spec, change, base, dtype=np.float32)
    for path, leaf in tree.flatten(narrow.task_vector).items():
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, tree.flatten(unfolded.task_vector)[path], atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["llama, tied", "gpt-2", "gemma 2"])
def test_a_tied_table_takes_the_least_squares_of_both_wishes_and_says_what_is_lost(name):
    config = CONFIGS[name]
    spec = registry.symmetry_of(config)
    base, draw = draw_params(config, 0), np.random.default_rng(0)
    change = tree.map_leaves(lambda _, leaf: 0.1 * draw.normal(size=leaf.shape), canonical.fold(spec, base))
    leaves = tree.flatten(change)
    if config.norm == "layer":  # what a folded table can be
        leaves["embed/token"] = leaves["embed/token"] - leaves["embed/token"].mean(axis=1, keepdims=True)
    unfolded = canonical.unfold(spec, tree.unflatten(leaves), base)
    found = canonical.fold(spec, tree.apply_task_vector(base, unfolded.task_vector))
    missing = {
        path: np.linalg.norm(tree.flatten(found)[path] - tree.flatten(canonical.fold(spec, base))[path] - leaves[path])
        for path in ("embed/token", "head/kernel")
    }
    for path, norm in missing.items():
        assert unfolded.lost[path] == pytest.approx(norm / np.linalg.norm(leaves[path]))
        assert 0.1 < unfolded.lost[path] < 1
    start = tree.flatten(canonical.fold(spec, base))
    weights = {path: 1 / np.sum((start[path] + leaves[path]) ** 2) for path in missing}
    best = sum(weights[path] * norm**2 for path, norm in missing.items())
    own, moved = tree.flatten(base), tree.flatten(unfolded.task_vector)
    for _ in range(20):  # no step away from it is better
        rival = tree.map_leaves(lambda _, leaf: leaf.copy(), unfolded.task_vector)
        rival["embed"]["token"] += 1e-3 * draw.normal(size=own["embed/token"].shape)
        rival["final_norm"]["scale"] += 1e-3 * draw.normal(size=moved["final_norm/scale"].shape)
        got = tree.flatten(canonical.fold(spec, tree.apply_task_vector(base, rival)))
        assert sum(weights[p] * np.sum((got[p] - start[p] - leaves[p]) ** 2) for p in missing) > best


def test_where_all_final_gains_are_equal_a_tied_table_loses_nothing_to_a_rotation():
    config = CONFIGS["llama, tied"]
    spec = registry.symmetry_of(config)
    whole = canonical.canonical_spec(spec)
    source, tuned, base = (draw_params(config, seed) for seed in range(3))
    for params in (source, tuned, base):
        params["final_norm"]["scale"] = np.full(18, 1.5)
    change = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    turned = symmetry.apply(whole, symmetry.random(jax.random.key(0), whole), change)
    assert max(canonical.unfold(spec, turned, base).lost.values()) < 1e-9
    base["final_norm"]["scale"] = draw_params(config, 3)["final_norm"]["scale"]
    assert canonical.unfold(spec, turned, base).lost["head/kernel"] > 0.01


def test_norms_of_outputs_lose_what_no_diagonal_holds():
    config = CONFIGS["gemma 2"]
    spec = registry.symmetry_of(config)
    whole = canonical.canonical_spec(spec)
    assert whole.axes["block_0/post_norm1/scale"][0].group == "block_0/post_norm1/stream_before_norm"
    source, tuned, base = (draw_params(config, seed) for seed in range(3))
    change = tree.task_vector(canonical.fold(spec, source), canonical.fold(spec, tuned))
    turned = symmetry.apply(whole, symmetry.random(jax.random.key(3), whole), change)
    assert canonical.unfold(spec, turned, base).lost["block_0/post_norm2/scale"] > 0.5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(LLAMA, head="none"), "without a head the stream itself comes out"),
        (replace(OLD, placement="post", final_norm=False), "a norm stands behind each sum"),
        (replace(OLD, placement="sandwich"), "sees its mean"),
        (replace(OLD, final_norm=False), "sees its mean"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(config, reason):
    with pytest.raises(SpecError, match=f"declares no canonical form: .*{reason}"):
        canonical.canonical_spec(registry.symmetry_of(config))


@pytest.mark.parametrize(("name", "complaint"), [("gpt-2", "two leaves"), ("olmo 2", "is a matrix")])
def test_what_no_network_of_the_family_can_hold_is_not_realised(name, complaint):
    config = CONFIGS[name]
    spec, params = registry.symmetry_of(config), draw_params(config, 0)
    assert not canonical.can_realise(spec.form)
    with pytest.raises(SpecError, match=complaint):
        canonical.realise(spec, canonical.fold(spec, params), params)
