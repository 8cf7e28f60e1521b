"""The decoder by itself: laws of padding, windows and blocks, its choices, and what its symmetry is and is not."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_decoders import LENGTH, check_invariance, difference_made, draw_texts, run, with_kind
from small_models import FAST, difference, shapes_of

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError, DataError, TreeMismatchError, UnknownNameError
from jaxtune.evaluate.equivalence import compare_outputs
from jaxtune.models import decoder, registry
from jaxtune.models.decoder.leaves import list_leaves
from jaxtune.models.experts import Experts
from jaxtune.models.keys import rearrange
from jaxtune.models.text import text_of

ROTARY = decoder.Rotary(theta=50.0)
SIZES = {
    "vocab_size": 31,
    "width": 18,
    "depth": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_width": 8,
    "mlp_width": 13,
}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
LLAMA = decoder.Config(**SIZES, rotary=ROTARY)
CONFIGS = {
    "llama": LLAMA,
    "llama with biases": replace(LLAMA, **BIASES, window=4, windowed=(True, False)),
    "norms of outputs and of all heads": replace(LLAMA, placement="output", qk_norm="whole"),
    "norms on both sides and of each head": replace(
        LLAMA, placement="sandwich", qk_norm="head", norm="rms_plus_one", tied=True, embed_scale=18**0.5
    ),
    "one norm for both, a part of a head turns": replace(
        LLAMA,
        norm="layer",
        placement="parallel_shared",
        rotary=decoder.Rotary(theta=50.0, fraction=0.5),
        gated=False,
        activation="gelu",
        head_bias=True,
        tied=True,
        **BIASES,
    ),
    "learned positions, caps, multipliers": replace(
        LLAMA,
        rotary=None,
        num_positions=20,
        attention_softcap=2.0,
        logit_softcap=3.0,
        residual_scale=0.3,
        logit_divisor=2.0,
        attention_scale=0.2,
        **BIASES,
    ),
    "norms behind sums, a narrow table": replace(
        LLAMA,
        norm="layer",
        placement="post",
        final_norm=False,
        rotary=None,
        num_positions=20,
        position_offset=2,
        positions_skip_padding=True,
        embed_width=7,
        gated=False,
        activation="relu",
        **BIASES,
    ),
    "experts in one block": replace(
        LLAMA, experts=Experts(num_experts=4, num_chosen=2, hidden=9, shared_hidden=5), sparse=(False, True)
    ),
    "no head": replace(LLAMA, head="none"),
    "the last token": replace(LLAMA, head="last", num_outputs=3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def random_params(config, dtype=np.float32):
    """Of the sizes that `init` gives them, drawn by NumPy: nothing to compile."""
    draw, leaves = np.random.default_rng(0), {leaf.path: leaf for leaf in list_leaves(config)}

    def fill(path, leaf):
        noise = draw.normal(size=leaf.shape)
        own = leaves.get(path)
        return np.asarray(own.centre + own.spread * noise if own else noise * leaf.shape[-2] ** -0.5, dtype)

    return tree.map_leaves(fill, shapes_of(config))


def outputs_of(config, params, text, mask=None):
    batch = {"text": text} if mask is None else {"text": text, "mask": mask}
    return np.asarray(run(config, params, batch))


class TestFunction:
    """What comes out, whatever the choices."""

    @EVERY
    def test_shapes_signal_and_no_nan(self, name):
        config = CONFIGS[name]
        text, mask = draw_texts(config.vocab_size)
        mask[3] = False  # nothing real at all
        outputs = outputs_of(config, random_params(config), text, mask)
        shape = {"tokens": (4, LENGTH, 31), "none": (4, LENGTH, 18), "last": (4, 3)}[config.head]
        assert outputs.shape == shape
        assert outputs.dtype == np.float32
        assert np.isfinite(outputs).all()
        assert outputs[:3].std() > 0.1

    def test_fresh_parameters_have_signal_everywhere(self):
        config = CONFIGS["llama with biases"]
        draw = jax.jit(decoder.init, static_argnums=1, compiler_options=FAST)
        params = tree.flatten(draw(jax.random.key(0), config))
        assert all(leaf.std() > 0.01 for leaf in params.values())
        assert len({float(leaf.ravel()[0]) for leaf in params.values()}) == len(params), "a stream for every leaf"

    @pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("llama with biases", "no head")])
    def test_block_by_block_is_the_whole(self, name):
        config = CONFIGS[name]
        params = jax.tree.map(jnp.asarray, random_params(config))
        text, mask = (jnp.asarray(part) for part in draw_texts(config.vocab_size))
        stream = decoder.embed(config, params, text, mask)
        for index in range(config.depth):
            stream = decoder.apply_block(config, index, params[f"block_{index}"], stream, mask)
        outputs = decoder.read_out(config, params, stream, mask)
        assert difference(outputs_of(config, params, text, mask), np.asarray(outputs)) < 1e-5

    @EVERY
    def test_a_config_goes_through_json_and_back(self, name):
        config = CONFIGS[name]
        assert registry.config_from_dict(json.loads(json.dumps(registry.config_to_dict(config)))) == config

    @pytest.mark.parametrize("name", ["llama", "norms behind sums, a narrow table", "experts in one block"])
    def test_padding_on_either_side_changes_nothing(self, name):
        config = CONFIGS[name]
        params, (text, _) = random_params(config), draw_texts(config.vocab_size)
        alone = outputs_of(config, params, text[:1])[0]
        for side in ((3, 0), (0, 3)):
            wide = np.pad(text[:1], ((0, 0), side), constant_values=7)
            mask = np.pad(np.ones((1, LENGTH), bool), ((0, 0), side))
            padded = outputs_of(config, params, wide, mask)[0, side[0] : side[0] + LENGTH]
            assert difference(alone, padded) < 1e-5

    def test_what_stands_behind_a_token_changes_nothing_and_before_it_does(self):
        params, (text, _) = random_params(LLAMA), draw_texts(31)
        other = text.copy()
        other[:, 6] = (text[:, 6] + 1) % 31
        first, second = outputs_of(LLAMA, params, text), outputs_of(LLAMA, params, other)
        np.testing.assert_array_equal(first[:, :6], second[:, :6])
        assert (np.abs(first[:, 7:] - second[:, 7:]).max(axis=(0, 2)) > 1e-3).all()

    def test_a_window_ends(self):
        """Two blocks with a window of 3: a token reads itself and two before it, twice."""
        config = replace(LLAMA, window=3)
        params, (text, _) = random_params(config), draw_texts(31)
        other = text.copy()
        other[:, 2] = (text[:, 2] + 1) % 31
        changed = np.abs(outputs_of(config, params, text) - outputs_of(config, params, other)).max(axis=(0, 2)) > 1e-6
        assert changed.tolist() == [2 <= token <= 6 for token in range(LENGTH)]

    def test_a_classifier_reads_the_last_real_token(self):
        config = CONFIGS["the last token"]
        params, (text, mask) = random_params(config), draw_texts(31)
        whole = outputs_of(config, params, text, mask)
        assert difference(whole[1:2], outputs_of(config, params, text[1:2, :7])) < 1e-5
        assert difference(whole[2:3], outputs_of(config, params, text[2:3, 4:])) < 1e-5

    def test_half_precision_accumulates_wide(self):
        text, mask = draw_texts(31)
        params = random_params(LLAMA)
        half = tree.map_leaves(lambda _, leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        outputs = outputs_of(LLAMA, half, text, mask)
        assert outputs.dtype == np.float32
        rounded = tree.map_leaves(lambda _, leaf: np.asarray(leaf, np.float32), half)
        assert difference(outputs_of(LLAMA, rounded, text, mask), outputs) < 0.1

    def test_float64_stays(self, float64):
        text, _ = draw_texts(31)
        assert outputs_of(LLAMA, random_params(LLAMA, np.float64), text).dtype == np.float64

    @EVERY
    def test_example_inputs_fit(self, name):
        config = CONFIGS[name]
        batch = registry.example(jax.random.key(0), config, 3)
        assert batch["text"].shape == batch["mask"].shape
        assert len(set(batch["mask"].sum(axis=1).tolist())) > 1, "several lengths"
        assert config.window is None or batch["text"].shape[1] > config.window
        outputs = jax.eval_shape(lambda p, b: registry.apply(config, p, b), shapes_of(config), batch)
        assert jax.eval_shape(lambda leaf: registry.as_matrix(config, leaf), outputs).ndim == 2


def test_interleaved_planes_are_brought_to_halves_by_a_pattern():
    """As `docs/add_a_family.md` says: plane i of a head is stored as its rows 2i and 2i + 1."""
    stored = np.arange(2 * 6 * 1).reshape(12, 1)
    ours = rearrange(stored, "(kv pair two) in -> in kv (two pair)", {"kv": 2, "two": 2})
    assert ours[0].tolist() == [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]


class TestDoor:
    """What is refused before anything runs."""

    @pytest.mark.parametrize(
        ("batch", "reason"),
        [
            ({"image": np.zeros((1, 2))}, 'no "text"; it has: image'),
            ({"text": np.zeros((1, 2), np.float32)}, r"float32\[1, 2\], the model takes int"),
            ({"text": np.zeros((1, 0), np.int32)}, "the model takes int"),
            ({"text": np.asarray([[3, 31]])}, "ids 3 to 31, the vocabulary 0 to 30"),
            ({"text": np.asarray([[-100, 3]])}, "ids -100 to 3"),
            ({"text": np.zeros((1, 2), int), "mask": np.zeros((2, 1), bool)}, r'"mask".*bool\[1, 2\]'),
        ],
    )
    def test_batches(self, batch, reason):
        with pytest.raises(DataError, match=reason):
            decoder.apply(LLAMA, random_params(LLAMA), batch)

    def test_ids_that_cannot_be_looked_at_give_nan(self):
        params = jax.tree.map(jnp.asarray, random_params(LLAMA))
        for odd in (31, -1):
            outputs = outputs_of(LLAMA, params, np.asarray([[2, 1, 3], [2, odd, 3]], np.int32))
            assert np.isfinite(outputs[0]).all()
            assert np.isnan(outputs[1, 1:]).all()

    def test_a_mask_of_numbers_is_one(self):
        _, mask = text_of({"text": np.ones((1, 2), int), "mask": np.asarray([[1, 0]])}, vocab_size=2)
        assert mask.tolist() == [[True, False]]

    def test_another_tree(self):
        with pytest.raises(TreeMismatchError, match="block_1/mlp/gate/kernel"):
            decoder.apply(replace(LLAMA, gated=False), random_params(LLAMA), {"text": np.ones((1, 2), np.int32)})

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"num_kv_heads": 4}, "num_heads 6 cannot be shared equally by num_kv_heads 4"),
            ({"head_width": 7}, "rotary turns 7 units"),
            ({"rotary": replace(ROTARY, fraction=0.4)}, "rotary turns 3 units"),
            ({"windowed": (True, False)}, "window is None"),
            ({"window": 3, "windowed": (True,)}, "windowed has 1 answers for 2 blocks"),
            ({"qk_norm": "head", "norm": "layer"}, "qk_norm 'head' is known with an RMS norm"),
            ({"qk_norm": "head", "rotary": None}, "qk_norm 'head'"),
            ({"head": "last"}, "num_outputs None"),
            ({"head": "none", "head_bias": True}, "head_bias"),
            ({"position_offset": 2}, "num_positions is None"),
            ({"activation": "swish"}, "activation: must be one of"),
            ({"sparse": (1, 0)}, "sparse: must be a tuple of answers, each True or False"),
        ],
    )
    def test_configs(self, change, reason):
        with pytest.raises(ConfigError, match=reason):
            replace(LLAMA, **change)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [({"fraction": 1.5}, "more than the head"), ({"scaling": "llama3", "high_frequency": 1.0}, "ramps")],
    )
    def test_rotaries(self, change, reason):
        with pytest.raises(ConfigError, match=reason):
            replace(ROTARY, **change)


class TestSymmetry:
    """What the weights may do, and nothing more."""

    @EVERY
    def test_a_random_element_leaves_the_function_alone(self, name, float64):
        config = CONFIGS[name]
        check_invariance(config, random_params(config), dtype=np.float64, tolerance=1e-9)

    def test_scales_behind_relu(self, float64):
        config = CONFIGS["norms behind sums, a narrow table"]
        spec, params = decoder.symmetry(config, scales="free"), random_params(config, np.float64)
        assert spec.groups["block_1/mlp/hidden"].kind == "scaled_permutation"
        assert difference_made(config, params, spec, symmetry.random(jax.random.key(1), spec)) < 1e-9
        for other in (LLAMA, replace(LLAMA, gated=False)):
            with pytest.raises(ConfigError, match='scales="free" needs activation relu and no gate'):
                registry.symmetry_of(other, scales="free")
        with pytest.raises(UnknownNameError, match="scales"):
            decoder.symmetry(LLAMA, scales="loose")

    def test_kinds_follow_norms_and_rotary(self):
        kinds = {name: {g.name: g.kind for g in decoder.symmetry(c).groups.values()} for name, c in CONFIGS.items()}
        assert kinds["llama"]["stream"] == "signed_permutation"
        assert kinds["llama"]["block_0/attn/qk"] == "rotary"
        assert kinds["llama"]["block_0/mlp/hidden"] == "signed_permutation"
        assert kinds["norms behind sums, a narrow table"]["stream"] == "permutation"
        assert kinds["norms behind sums, a narrow table"]["block_0/attn/qk"] == "general_linear"
        assert kinds["norms on both sides and of each head"]["block_0/attn/qk"] == "rotary_signs"
        assert kinds["one norm for both, a part of a head turns"]["block_0/attn/qk_rotary"] == "rotary"
        assert kinds["one norm for both, a part of a head turns"]["block_0/attn/qk"] == "general_linear"
        assert "stream" not in kinds["no head"], "it is what comes out"
        assert "block_1/mlp/expert" in kinds["experts in one block"]

    def test_key_biases_that_softmax_cannot_see(self):
        """Not where the scores are capped, which is no shift, nor where a rotary turns them."""
        unmatched = {name: sorted(decoder.symmetry(config).unmatched) for name, config in CONFIGS.items()}
        assert unmatched["learned positions, caps, multipliers"] == []
        assert unmatched["llama with biases"] == []
        for index, path in enumerate(unmatched["norms behind sums, a narrow table"]):
            assert path == f"block_{index}/attn/k/bias"
            config = CONFIGS["norms behind sums, a narrow table"]
            params, (text, mask) = random_params(config), draw_texts(31)
            other = tree.flatten(params)
            other[path] = other[path] + 1
            before = outputs_of(config, params, text, mask)[mask]
            assert difference(before, outputs_of(config, tree.unflatten(other), text, mask)[mask]) < 1e-5

    @pytest.mark.parametrize(
        ("name", "group", "kind"),
        [
            ("one norm for both, a part of a head turns", "stream", "signed_permutation"),
            ("one norm for both, a part of a head turns", "block_0/attn/qk_rotary", "general_linear"),
            ("one norm for both, a part of a head turns", "block_0/mlp/hidden", "signed_permutation"),
            ("norms on both sides and of each head", "block_0/attn/qk", "rotary"),
            ("norms of outputs and of all heads", "block_0/attn/qk", "rotary"),
            ("llama", "block_0/attn/qk", "general_linear"),
            ("llama", "block_0/attn/qk", "permutation"),  # swaps planes
            ("learned positions, caps, multipliers", "block_0/mlp/hidden", "scaled_permutation"),
        ],
    )
    def test_a_larger_kind_would_change_the_function(self, name, group, kind, float64):
        config = CONFIGS[name]
        params, spec = random_params(config, np.float64), with_kind(decoder.symmetry(config), group, kind)
        element = symmetry.identity(spec)
        element[group] = symmetry.random(jax.random.key(5), spec)[group]
        made = difference_made(config, params, spec, element)
        if (name, kind) == ("learned positions, caps, multipliers", "scaled_permutation"):
            assert made < 1e-9, "a scale passes the product with the gate too: kept out for the sake of norms alone"
        else:
            assert made > 1e-3

    @pytest.mark.parametrize("act", ["across groups", "skip a gain", "mix heads", "a sign on the gate", "one junction"])
    def test_what_is_no_symmetry_is_caught(self, act):
        params, (text, mask) = random_params(LLAMA), draw_texts(31)
        moved = tree.unflatten(ILLEGAL[act](tree.flatten(params)))
        outputs = (registry.as_matrix(LLAMA, run(LLAMA, p, {"text": text, "mask": mask})) for p in (params, moved))
        report = compare_outputs(*outputs)
        assert not report.is_exact
        assert report.max_relative > 1e-2


def _across_groups(leaves):
    """A query head changes places with one of another group of keys."""
    q, out = (leaves[f"block_0/attn/{name}/kernel"].copy() for name in ("q", "out"))
    q[:, [0, 1], [0, 2]] = q[:, [1, 0], [2, 0]]
    out[[0, 1], [0, 2]] = out[[1, 0], [2, 0]]
    return {**leaves, "block_0/attn/q/kernel": q, "block_0/attn/out/kernel": out}


def _move_stream(leaves):
    spec = decoder.symmetry(LLAMA)
    order, signs = np.roll(np.arange(18.0), 5), np.where(np.arange(18) % 3, 1.0, -1.0)
    element = {**symmetry.identity(spec), "stream": np.stack([order, signs])}
    return tree.flatten(symmetry.apply(spec, element, tree.unflatten(leaves)))


def _skip_a_gain(leaves):
    """The stream changes its order, and one norm does not follow."""
    moved = _move_stream(leaves)
    return {**moved, "block_1/norm1/scale": leaves["block_1/norm1/scale"]}


def _mix_heads(leaves):
    """Values of two heads are turned into each other, and turned back behind attention."""
    v, out = (leaves[f"block_0/attn/{name}/kernel"] for name in ("v", "out"))
    turn = np.asarray([[0.6, 0.8], [-0.8, 0.6]], v.dtype)
    v, out = np.einsum("wgu,gh->whu", v, turn), np.einsum("gquw,gh->hquw", out, turn)
    return {**leaves, "block_0/attn/v/kernel": v, "block_0/attn/out/kernel": out}


def _sign_of_the_gate(leaves):
    """A hidden unit's sign goes into its gate as well."""
    changed = {}
    for name, axis in (("gate", 1), ("down", 0)):
        path = f"block_0/mlp/{name}/kernel"
        kernel = np.moveaxis(leaves[path].copy(), axis, 0)
        kernel[3] *= -1
        changed[path] = np.moveaxis(kernel, 0, axis)
    return {**leaves, **changed}


def _one_junction(leaves):
    """The stream changes its order up to the second block and not behind."""
    moved = _move_stream(leaves)
    return {**moved, **{path: leaf for path, leaf in leaves.items() if path.startswith(("block_1", "final", "head"))}}


ILLEGAL = {
    "across groups": _across_groups,
    "skip a gain": _skip_a_gain,
    "mix heads": _mix_heads,
    "a sign on the gate": _sign_of_the_gate,
    "one junction": _one_junction,
}
