"""T5: one stream for both stacks, one order of heads a stack, and nothing larger."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from group_laws import check_group_laws
from small_models import FAST, difference, outputs_of, random_params, run, shapes_of

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError, SpecError, UnknownNameError
from jaxtune.models import registry, t5
from jaxtune.symmetry import canonical
from jaxtune.symmetry.element import apply_to_leaf
from jaxtune.transport.full import prepare_full
from jaxtune.transport.prepared import apply_transport

SIZES = {"vocab_size": 31, "width": 24, "depth": 2, "num_heads": 4, "head_width": 5, "mlp_width": 28}
SIZES |= {"num_buckets": 8, "max_distance": 12}
CONFIGS = {
    "v1.0": t5.Config(**SIZES, decoder_depth=2, activation="relu", gated=False, tied=True, scaled=True),
    "v1.1": t5.Config(**SIZES, decoder_depth=3),
    "encoder": t5.Config(**SIZES, head="none"),
    "pair": t5.Config(**SIZES, decoder_depth=2, head="none"),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
EXACT64, EXACT32, WRONG = 1e-9, 1e-4, 1e-3


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def batch_of(config):
    return jax.tree.map(np.array, registry.example(jax.random.key(3), config, 4))


def change_by(name, changes):
    """How far leaves changed by `changes(flat params)` move the outputs."""
    config = CONFIGS[name]
    params, batch = tree.flatten(random_params(config)), batch_of(config)
    changed = tree.unflatten({**params, **changes(params)})
    return difference(*(outputs_of(config, p, batch) for p in (tree.unflatten(params), changed)))


def partly_moved(name, key, groups, is_moved):
    """How far an element of `groups` moves the outputs where leaves that are not `is_moved(path)` stay behind."""
    spec = registry.symmetry_of(CONFIGS[name])
    drawn = symmetry.random(key, spec)
    element = symmetry.identity(spec) | {group: drawn[group] for group in groups}
    return change_by(
        name, lambda p: {path: apply_to_leaf(spec, element, path, p[path]) for path in p if is_moved(path)}
    )


@EVERY
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_random_element_leaves_the_function_alone(name, dtype, key):
    config, spec = CONFIGS[name], registry.symmetry_of(CONFIGS[name])
    with jax.enable_x64(dtype == np.float64):
        params = random_params(config, dtype=dtype)
        moved = symmetry.apply(spec, symmetry.random(key, spec), params)
        flat, flat_moved = tree.flatten(params), tree.flatten(moved)
        for path, axes in spec.axes.items():
            assert np.array_equal(flat[path], flat_moved[path]) != any(axes), path
        before, after = (outputs_of(config, p, batch_of(config)) for p in (params, moved))
        assert before.dtype == dtype
        assert difference(before, after) < (EXACT64 if dtype == np.float64 else EXACT32)


@EVERY
def test_every_leaf_is_declared_and_the_config_comes_back(name):
    config = CONFIGS[name]
    spec = registry.symmetry_of(config)
    spec.check(shapes_of(config))
    assert spec.is_exact
    assert not spec.unmatched
    assert registry.config_from_dict(registry.config_to_dict(config)) == config


def test_group_laws_hold_with_one_order_of_heads_for_many_blocks(float64):
    config = CONFIGS["v1.1"]
    check_group_laws(registry.symmetry_of(config), random_params(config), rtol=1e-9, atol=1e-9)


class TestHeads:
    """All self-attentions of a stack read one table of distances; cross-attentions read none."""

    def test_names_of_the_groups(self):
        spec = registry.symmetry_of(CONFIGS["v1.1"])
        heads = [name for name, group in spec.groups.items() if group.role == "head"]
        crosses = [f"decoder/block_{index}/cross/head" for index in range(3)]
        assert heads == ["encoder/attn/head", "decoder/attn/head", *crosses]
        assert set(spec.children_of("decoder/attn/head")) == {
            f"decoder/block_{index}/attn/{part}" for index in range(3) for part in ("qk", "vo")
        }
        assert ("encoder/distance", 1) in spec.leaves_of("encoder/attn/head")

    @pytest.mark.parametrize("stack", ["encoder", "decoder"])
    @pytest.mark.parametrize("still", ["distance", "block_0/attn/", "block_1/attn/", "block_0/attn/q/"])
    def test_one_block_or_the_table_with_another_order_is_no_symmetry(self, stack, still, key, float64):
        assert partly_moved("v1.1", key, [f"{stack}/attn/head"], lambda path: True) < EXACT64
        assert partly_moved("v1.1", key, [f"{stack}/attn/head"], lambda path: f"{stack}/{still}" not in path) > WRONG

    def test_cross_attentions_have_orders_of_their_own(self, key, float64):
        group = "decoder/block_1/cross/head"
        assert partly_moved("v1.1", key, [group], lambda path: "block_1/cross" in path) < EXACT64
        assert partly_moved("v1.1", key, [group], lambda path: "block_1/cross/v" in path) > WRONG

    def test_mixing_units_across_heads_is_no_symmetry(self, float64):
        order = np.random.default_rng(0).permutation(20)

        def mix(params):
            paths = {
                f"decoder/block_1/cross/{name}/kernel": at for name, at in (("q", 1), ("k", 1), ("v", 1), ("out", 0))
            }
            return {
                path: params[path]
                .reshape(*params[path].shape[:at], 20, *params[path].shape[at + 2 :])
                .take(order, axis=at)
                .reshape(params[path].shape)
                for path, at in paths.items()
            }

        assert change_by("v1.1", mix) > WRONG

    def test_softmax_does_not_see_what_a_head_adds_to_every_distance(self, float64):
        more = np.random.default_rng(0).normal(size=(1, 4))
        assert change_by("v1.1", lambda p: {"encoder/distance": p["encoder/distance"] + more}) < EXACT64
        assert change_by("v1.1", lambda p: {"encoder/distance": p["encoder/distance"] * 2}) > WRONG


class TestStream:
    """Order and signs, one for both stacks."""

    @pytest.mark.parametrize("still", ["embed/", "encoder/", "decoder/", "head/", "encoder/block_0/norm2"])
    def test_one_stack_alone_is_no_symmetry(self, still, key, float64):
        assert partly_moved("v1.1", key, ["stream"], lambda path: True) < EXACT64
        assert partly_moved("v1.1", key, ["stream"], lambda path: not path.startswith(still)) > WRONG

    def test_the_shared_table_alone_makes_the_streams_one(self, key, float64):
        """Could each stack read a table of its own, each might have an order and signs of its own."""
        config = CONFIGS["v1.1"]
        spec, params, batch = registry.symmetry_of(config), random_params(config), batch_of(config)
        elements = [
            symmetry.identity(spec) | {"stream": symmetry.random(k, spec)["stream"]} for k in jax.random.split(key)
        ]
        of_encoder, of_decoder = (tree.flatten(symmetry.apply(spec, element, params)) for element in elements)
        # Keys and values of cross-attention read the encoder's stream and write units of heads.
        for index in range(3):
            for name in "kv":
                path = f"decoder/block_{index}/cross/{name}/kernel"
                of_decoder[path] = of_encoder[path]

        def run_both(first, second, batch):
            source = t5.encode(config, first, batch["text"], batch["mask"])
            texts = batch["decoder_text"], batch["decoder_mask"]
            return t5.read_out(config, second, t5.decode(config, second, *texts, source, batch["mask"]))

        trees = (tree.unflatten(leaves) for leaves in (of_encoder, of_decoder))
        outputs = np.asarray(jax.jit(run_both, compiler_options=FAST)(*trees, batch))
        assert difference(outputs_of(config, params, batch), outputs.ravel()) < EXACT64

    def test_a_sign_that_the_gain_takes_too_is_no_symmetry(self, float64):
        spec = registry.symmetry_of(CONFIGS["v1.1"])
        signs = np.where(np.arange(24) % 3 == 0, -1.0, 1.0)
        element = symmetry.identity(spec)
        element["stream"][1] = signs

        def move(params):
            return {path: apply_to_leaf(spec, element, path, leaf) for path, leaf in params.items()}

        assert change_by("v1.1", move) < EXACT64
        gain = "decoder/block_0/cross_norm/scale"
        assert change_by("v1.1", lambda p: move(p) | {gain: p[gain] * signs}) > WRONG

    def test_gains_stand_in_the_way_of_rotations(self, float64):
        config = CONFIGS["v1.1"]
        spec = registry.symmetry_of(config)
        turn = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0]

        def rotate(params):
            return {
                path: np.moveaxis(np.tensordot(params[path], turn, axes=(axis, 0)), -1, axis)
                for path, axis in spec.leaves_of("stream")
                if not path.endswith("scale")
            }

        plain = tree.map_leaves(
            lambda path, leaf: np.ones_like(leaf) if path.endswith("scale") else leaf, random_params(config)
        )
        flat = tree.flatten(plain)
        turned = tree.unflatten(flat | rotate(flat))
        assert difference(*(outputs_of(config, p, batch_of(config)) for p in (plain, turned))) < EXACT64
        assert change_by("v1.1", rotate) > WRONG

    def test_what_comes_out_stays(self, key, float64):
        for name in ("encoder", "pair"):
            spec = registry.symmetry_of(CONFIGS[name])
            assert "stream" not in spec.groups
            assert spec.junctions == ()
            order = np.random.default_rng(0).permutation(24)
            last = f"{'encoder' if name == 'encoder' else 'decoder'}/final_norm/scale"
            assert change_by(name, lambda p, last=last, order=order: {last: p[last][order]}) > WRONG


class TestHidden:
    def test_the_product_with_the_gate_passes_a_sign_and_the_gate_does_not(self, float64):
        signs = np.where(np.arange(28) % 3 == 0, -1.0, 1.0)
        path = "decoder/block_0/mlp"

        def flip(part):
            return lambda p: {
                f"{path}/{part}/kernel": p[f"{path}/{part}/kernel"] * signs,
                f"{path}/down/kernel": p[f"{path}/down/kernel"] * signs[:, None],
            }

        assert change_by("v1.1", flip("up")) < EXACT64
        assert change_by("v1.1", flip("gate")) > WRONG
        assert change_by("v1.0", flip("up")) > WRONG

    def test_free_scales_behind_relu_leave_the_function_alone(self, key, float64):
        config = CONFIGS["v1.0"]
        spec, params = registry.symmetry_of(config, scales="free"), random_params(config)
        moved = symmetry.apply(spec, symmetry.random(key, spec), params)
        assert difference(*(outputs_of(config, p, batch_of(config)) for p in (params, moved))) < EXACT64

    def test_they_are_refused_where_nothing_passes_them(self):
        with pytest.raises(ConfigError, match="needs activation relu and no gate"):
            t5.symmetry(CONFIGS["v1.1"], scales="free")
        with pytest.raises(UnknownNameError, match="Known: fixed, free"):
            t5.symmetry(CONFIGS["v1.0"], scales="some")


class TestNetwork:
    def test_examples_have_padding_in_both_texts(self):
        batch = batch_of(CONFIGS["v1.1"])
        for name, length in (("mask", 24), ("decoder_mask", 14)):
            assert batch[name][0].sum() == length
            assert len(set(batch[name].sum(axis=1))) > 1
        assert set(batch_of(CONFIGS["encoder"])) == {"text", "mask"}

    def test_neither_padding_nor_what_comes_later_is_seen(self):
        config = CONFIGS["v1.1"]
        params, batch = random_params(config, dtype=np.float32), batch_of(config)
        seen = batch["decoder_mask"].copy()
        seen[:, 5:] = False
        other = {name: values.copy() for name, values in batch.items()}
        other["text"][~batch["mask"]] = 7
        other["decoder_text"][~seen] = 7
        outputs = [np.asarray(run(config, params, b))[seen] for b in (batch, other)]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)

    def test_without_a_real_token_nothing_is_nan(self):
        config = CONFIGS["v1.1"]
        batch = batch_of(config)
        batch |= {name: np.zeros_like(batch[name]) for name in ("mask", "decoder_mask")}
        assert np.isfinite(outputs_of(config, random_params(config, dtype=np.float32), batch)).all()

    def test_half_precision_weights_give_float32_near_the_whole_ones(self):
        config = CONFIGS["v1.1"]
        params, batch = random_params(config, dtype=np.float32), batch_of(config)
        half = tree.map_leaves(lambda _, leaf: jnp.asarray(leaf).astype(jnp.bfloat16), params)
        whole, rounded = (outputs_of(config, p, batch) for p in (params, half))
        assert rounded.dtype == np.float32
        assert difference(whole, rounded) < 0.3

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "head 'tokens' without a decoder"),
            ({"decoder_depth": 1, "num_buckets": 3}, "num_buckets 3 are fewer than 4"),
            ({"decoder_depth": 1, "max_distance": 4}, "max_distance 4 lies among"),
            ({"decoder_depth": 0}, "decoder_depth: must be an int, at least 1"),
        ],
    )
    def test_configs_that_make_no_sense_are_refused(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            t5.Config(**{**SIZES, **fields})


class TestFolded:
    """Gains folded into their readers: the stream turns by any rotation."""

    @pytest.fixture(autouse=True)
    def in_float64(self, float64):
        pass

    def fold(self, name, key):
        """(config that holds folded weights, folded spec, folded weights, outputs before)."""
        config, spec = CONFIGS[name], registry.symmetry_of(CONFIGS[name])
        params = random_params(config)
        folded = canonical.fold(spec, params)
        return replace(config, tied=False), canonical.canonical_spec(spec), folded, params

    def as_network(self, config, folded):
        """Gains of one in the place of those that are folded away."""
        leaves = tree.flatten(folded)
        return tree.map_leaves(lambda path, leaf: leaves.get(path, np.ones(leaf.shape)), shapes_of(config))

    @pytest.mark.parametrize("name", ["v1.0", "v1.1"])
    def test_folding_and_any_rotation_leave_the_function_alone(self, name, key):
        config, spec, folded, params = self.fold(name, key)
        batch = batch_of(config)
        before = outputs_of(CONFIGS[name], params, batch)
        assert difference(outputs_of(config, self.as_network(config, folded), batch), before) < EXACT64
        assert spec.groups["stream"].kind == "orthogonal"
        moved = symmetry.apply(spec, symmetry.random(key, spec), folded)
        assert difference(outputs_of(config, self.as_network(config, moved), batch), before) < EXACT64

    def test_one_stack_alone_does_not_turn(self, key):
        config, spec, folded, params = self.fold("v1.1", key)
        batch = batch_of(config)
        element = symmetry.identity(spec) | {"stream": symmetry.random(key, spec)["stream"]}
        moved = tree.map_leaves(
            lambda path, leaf: leaf if path.startswith("decoder") else apply_to_leaf(spec, element, path, leaf), folded
        )
        changed = outputs_of(config, self.as_network(config, moved), batch)
        assert difference(changed, outputs_of(CONFIGS["v1.1"], params, batch)) > WRONG

    def test_a_planted_rotation_is_found_and_carries_a_fine_tune_whole(self, key):
        config, spec, folded, source = self.fold("v1.1", key)
        own = registry.symmetry_of(config)
        target = canonical.realise(own, symmetry.apply(spec, symmetry.random(key, spec), folded), source)
        tuned = tree.map_leaves(lambda _, a, b: a + 0.1 * b, source, random_params(config, seed=5))
        result = prepare_full(key, lambda: own, source, tuned, target)
        batch, params = batch_of(config), apply_transport(result, target)
        expected = outputs_of(config, tuned, batch)
        assert difference(outputs_of(config, params, batch), expected) < 1e-5

    def test_without_a_head_it_is_refused(self):
        with pytest.raises(SpecError, match="no canonical form"):
            canonical.canonical_spec(registry.symmetry_of(CONFIGS["pair"]))
