"""Post-LN encoders: the declared symmetry is one of the function, with every head, and nothing larger is claimed."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from group_laws import check_group_laws
from small_models import difference, outputs_of, random_params, run, shapes_of

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError, SpecError, UnknownNameError
from jaxtune.models import encoder, registry

SIZES = {"vocab_size": 31, "num_positions": 16, "width": 24, "depth": 2, "num_heads": 4, "mlp_width": 40}
CONFIGS = {
    "tied": encoder.Config(
        **SIZES, head="vocabulary", head_dense="gelu", num_segments=2, pooler=True, next_sentence=True
    ),
    "untied": encoder.Config(**SIZES, head="vocabulary", head_dense="gelu_tanh", tied=False, counted_from=2),
    "pooled": encoder.Config(**SIZES, head="sequence", num_outputs=5, pooler=True, num_segments=1),
    "tanh": encoder.Config(**SIZES, head="sequence", num_outputs=5, head_dense="tanh", counted_from=2),
    "relu": encoder.Config(**SIZES, head="sequence", num_outputs=5, head_dense="relu", activation="relu"),
    "tokens": encoder.Config(**SIZES, head="tokens", num_outputs=5, pooler=True, activation="quick_gelu"),
    "bare": encoder.Config(**SIZES, pooler=True, activation="silu", num_segments=2),
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


def moved_by(config, params, element, spec=None):
    return symmetry.apply(spec or registry.symmetry_of(config), element, params)


@EVERY
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_random_element_leaves_the_function_alone(name, dtype, key):
    config, spec = CONFIGS[name], registry.symmetry_of(CONFIGS[name])
    with jax.enable_x64(dtype == np.float64):
        params = random_params(config, dtype=dtype)
        moved = moved_by(config, params, symmetry.random(key, spec))
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
    assert registry.config_from_dict(registry.config_to_dict(config)) == config
    assert {path for path in spec.unmatched if "dense" not in path} == {f"block_{i}/attn/k/bias" for i in range(2)}


def test_group_laws_hold_where_the_stream_owns_both_axes_of_a_leaf(float64):
    config = CONFIGS["tied"]
    check_group_laws(registry.symmetry_of(config), random_params(config), rtol=1e-9, atol=1e-9)


class TestHeads:
    """The dense layers behind the stream: which freedom is theirs, and which is not."""

    def test_before_a_tied_table_the_units_are_the_streams(self, key, float64):
        config = CONFIGS["tied"]
        spec = registry.symmetry_of(config)
        assert [axis.group for axis in spec.axes["head/dense/kernel"]] == ["stream", "stream"]
        assert "head/dense/kernel" in spec.unmatched
        assert [axis.group for axis in spec.axes["head/norm/scale"]] == ["stream"]
        assert "head/hidden" not in spec.groups
        # An order of their own, which an untied decoder would follow, the table of tokens does not follow.
        order = np.random.default_rng(0).permutation(config.width)
        paths = ("head/dense/bias", "head/norm/scale", "head/norm/bias")
        assert (
            change_by(
                "tied",
                lambda p: (
                    {path: p[path][order] for path in paths} | {"head/dense/kernel": p["head/dense/kernel"][:, order]}
                ),
            )
            > WRONG
        )

    @pytest.mark.parametrize("still", [0, 1])
    def test_one_side_of_that_layer_alone_is_no_symmetry(self, still, key, float64):
        config, batch = CONFIGS["tied"], batch_of(CONFIGS["tied"])
        spec, params = registry.symmetry_of(config), random_params(config)
        element = symmetry.random(key, spec)
        moved = tree.flatten(moved_by(config, params, element))
        path = "head/dense/kernel"
        moved[path] = symmetry.element.apply_to_leaf(
            spec, element, path, tree.flatten(params)[path], skip_axes=(still,)
        )
        assert difference(*(outputs_of(config, p, batch) for p in (params, tree.unflatten(moved)))) > WRONG

    def test_before_an_untied_one_they_have_an_order_of_their_own(self, float64):
        order = np.random.default_rng(0).permutation(24)
        changed = change_by(
            "untied",
            lambda p: (
                {f"head/{path}": p[f"head/{path}"][order] for path in ("dense/bias", "norm/scale", "norm/bias")}
                | {"head/dense/kernel": p["head/dense/kernel"][:, order], "head/kernel": p["head/kernel"][order]}
            ),
        )
        assert changed < EXACT64

    def test_a_matched_leaf_cannot_belong_twice_to_one_group(self):
        spec = registry.symmetry_of(CONFIGS["tied"])
        axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
        with pytest.raises(SpecError, match="head/dense/kernel: a group owns two axes"):
            symmetry.make_spec(spec.groups.values(), axes)

    @pytest.mark.parametrize(
        ("name", "layer", "reader"), [("pooled", "pooler", "head"), ("tanh", "head/dense", "head")]
    )
    @pytest.mark.parametrize(("factor", "is_symmetry"), [(-1.0, True), (2.0, False)])
    def test_behind_tanh_a_unit_has_a_sign_and_no_scale(self, name, layer, reader, factor, is_symmetry, float64):
        factors = np.where(np.arange(24) == 5, factor, 1.0)
        changed = change_by(
            name,
            lambda p: {
                f"{layer}/kernel": p[f"{layer}/kernel"] * factors,
                f"{layer}/bias": p[f"{layer}/bias"] * factors,
                f"{reader}/kernel": p[f"{reader}/kernel"] / factors[:, None],
            },
        )
        assert changed < EXACT64 if is_symmetry else changed > WRONG

    def test_behind_relu_and_gelu_a_unit_has_no_sign(self, float64):
        signs = np.where(np.arange(24) % 2, -1.0, 1.0)
        for name, outgoing in (("relu", ()), ("untied", ("head/norm/scale", "head/norm/bias"))):
            changed = change_by(
                name,
                lambda p, outgoing=outgoing: {
                    "head/dense/kernel": p["head/dense/kernel"] * signs,
                    "head/dense/bias": p["head/dense/bias"] * signs,
                    "head/kernel": p["head/kernel"] * signs[:, None],
                    **{path: p[path] * signs for path in outgoing},
                },
            )
            assert changed > WRONG

    def test_what_comes_out_stays(self, float64):
        """A bare encoder puts out its stream, and the pooler's units beside it."""
        config = CONFIGS["bare"]
        spec = registry.symmetry_of(config)
        assert {"stream", "pooler"}.isdisjoint(spec.groups)
        assert spec.junctions == ()
        assert [group.role for group in spec.groups.values()] == ["head", "qk", "vo", "hidden"] * 2
        wider = registry.symmetry_of(replace(config, head="tokens", num_outputs=3))
        order = np.random.default_rng(0).permutation(config.width)
        element = symmetry.identity(wider) | {"stream": order.astype(np.int32)}

        def move(params):
            moved = {path: symmetry.element.apply_to_leaf(wider, element, path, leaf) for path, leaf in params.items()}
            return {path: leaf for path, leaf in moved.items() if path != "pooler/kernel"}

        assert change_by("bare", move) > WRONG


class TestStream:
    """One order for the whole stack; the norms that stand on it allow nothing else."""

    @staticmethod
    def rotate(params, spec, matrix):
        """Writers and readers of the stream in another basis, norms as they are."""
        moved = {}
        for path, axis in spec.leaves_of("stream"):
            if "norm" not in path:
                leaf = moved.get(path, params[path])
                moved[path] = np.moveaxis(np.tensordot(leaf, matrix, axes=(axis, 0)), -1, axis)
        return moved

    @pytest.mark.parametrize("name", ["tied", "tokens", "tanh"])
    def test_gains_go_with_their_channels(self, name, float64):
        spec = registry.symmetry_of(CONFIGS[name])
        matrix = np.eye(24)[np.random.default_rng(0).permutation(24)]
        assert change_by(name, lambda p: self.rotate(p, spec, matrix)) > WRONG
        for skipped in ("embed/norm/scale", "block_0/norm1/bias", "block_1/norm2/scale"):
            whole = {
                path: np.tensordot(matrix.T, leaf, axes=1)
                for path, leaf in tree.flatten(random_params(CONFIGS[name])).items()
                if "norm" in path and len(spec.axes[path]) == 1 and spec.axes[path][0].group == "stream"
            }
            whole.pop(skipped)
            assert change_by(name, lambda p, whole=whole: self.rotate(p, spec, matrix) | whole) > WRONG

    def test_rotations_pass_norms_without_gains_alone(self, float64):
        """Why no form is declared: the gain of a norm on the stream has no reader that it could be folded into."""
        config = CONFIGS["tokens"]
        spec = registry.symmetry_of(config)
        assert spec.form is None
        # Orthogonal, and the vector of ones stays.
        turn = symmetry.KINDS["centred_orthogonal"].draw(jax.random.key(0), 24, None)
        plain = tree.map_leaves(
            lambda path, leaf: np.full_like(leaf, path.endswith("scale")) if "norm" in path else leaf,
            random_params(config),
        )
        flat = tree.flatten(plain)
        turned = tree.unflatten({**flat, **self.rotate(flat, spec, turn)})
        assert difference(*(outputs_of(config, p, batch_of(config)) for p in (plain, turned))) < EXACT64
        assert change_by("tokens", lambda p: self.rotate(p, spec, turn)) > WRONG

    def test_one_channels_sign_is_seen(self, float64):
        spec = registry.symmetry_of(CONFIGS["tokens"])
        signs = np.where(np.arange(24) == 3, -1.0, 1.0)
        offsets = {path for path in spec.axes if path.endswith(("norm/bias", "norm1/bias", "norm2/bias"))}

        def flip(params):
            return self.rotate(params, spec, np.diag(signs)) | {path: params[path] * signs for path in offsets}

        assert change_by("tokens", flip) > WRONG

    @pytest.mark.parametrize("where", ["embed/", "block_0/norm1", "block_1/", "head/"])
    def test_one_junction_alone_is_no_symmetry(self, where, key, float64):
        config, batch = CONFIGS["tokens"], batch_of(CONFIGS["tokens"])
        spec, params = registry.symmetry_of(config), random_params(config)
        element = symmetry.identity(spec) | {"stream": symmetry.random(key, spec)["stream"]}
        moved, plain = tree.flatten(moved_by(config, params, element)), tree.flatten(params)
        partly = {path: (moved if path.startswith(where) else plain)[path] for path in plain}
        assert difference(*(outputs_of(config, p, batch) for p in (params, tree.unflatten(partly)))) > WRONG


class TestAttention:
    """Heads stay whole; inside one, what queries do keys undo."""

    def test_mixing_units_across_heads_is_no_symmetry(self, float64):
        order = np.random.default_rng(0).permutation(24)

        def mix(params):
            changed = {}
            for name, first in (("q", 1), ("k", 1), ("v", 1), ("out", 0)):
                for leaf, at in (("kernel", first), ("bias", 0)):
                    path = f"block_0/attn/{name}/{leaf}"
                    if path != "block_0/attn/out/bias":
                        shape = params[path].shape
                        flat = params[path].reshape(*shape[:at], 24, *shape[at + 2 :])
                        changed[path] = flat.take(order, axis=at).reshape(shape)
            return changed

        assert change_by("tokens", mix) > WRONG

    def test_queries_alone_are_seen_and_the_key_bias_is_not(self, float64):
        maps = np.eye(6) + 0.3 * np.random.default_rng(2).normal(size=(4, 6, 6))
        path = "block_0/attn/q/kernel"
        assert change_by("tokens", lambda p: {path: np.einsum("dhu,huw->dhw", p[path], maps)}) > WRONG
        path = "block_1/attn/k/bias"
        assert change_by("tokens", lambda p: {path: p[path] + 3.0}) < EXACT64
        path = "block_1/attn/q/bias"
        assert change_by("tokens", lambda p: {path: p[path] + 3.0}) > WRONG


class TestScales:
    def test_free_scales_behind_relu_leave_the_function_alone(self, key, float64):
        config = CONFIGS["relu"]
        spec = registry.symmetry_of(config, scales="free")
        assert {spec.groups[name].kind for name in ("block_0/mlp/hidden", "head/hidden")} == {"scaled_permutation"}
        params = random_params(config)
        moved = moved_by(config, params, symmetry.random(key, spec), spec)
        assert difference(*(outputs_of(config, p, batch_of(config)) for p in (params, moved))) < EXACT64

    def test_they_are_refused_where_nothing_passes_them(self):
        with pytest.raises(ConfigError, match="needs an activation relu"):
            encoder.symmetry(CONFIGS["tied"], scales="free")
        with pytest.raises(UnknownNameError, match="Known: fixed, free"):
            encoder.symmetry(CONFIGS["relu"], scales="some")
        with pytest.raises(ConfigError, match="junctions"):
            registry.symmetry_of(CONFIGS["tied"], junctions="each")


class TestNetwork:
    def test_examples_have_padding_and_segments(self):
        batch = batch_of(CONFIGS["tied"])
        lengths = batch["mask"].sum(axis=1)
        assert lengths[0] == 16
        assert len(set(lengths)) > 1
        assert set(np.unique(batch["segments"])) == {0, 1}
        counted = batch_of(CONFIGS["untied"])
        assert counted["text"].shape[1] == 14
        assert (counted["text"][~counted["mask"]] == 1).all()

    def test_texts_do_not_see_their_padding(self):
        config = CONFIGS["tokens"]
        params, batch = random_params(config, dtype=np.float32), batch_of(config)
        other = {**batch, "text": np.where(batch["mask"], batch["text"], 7)}
        outputs = [np.asarray(run(config, params, b))[batch["mask"]] for b in (batch, other)]
        np.testing.assert_array_equal(*outputs)

    def test_half_precision_weights_give_float32_near_the_whole_ones(self):
        config = CONFIGS["pooled"]
        params, batch = random_params(config, dtype=np.float32), batch_of(config)
        half = tree.map_leaves(lambda _, leaf: jax.numpy.asarray(leaf).astype(jax.numpy.bfloat16), params)
        whole, rounded = (outputs_of(config, p, batch) for p in (params, half))
        assert rounded.dtype == np.float32
        assert difference(whole, rounded) < 0.2

    def test_an_id_outside_the_vocabulary_reads_nan_under_jit(self):
        config = CONFIGS["pooled"]
        batch = batch_of(config)
        batch["text"][0, 1], batch["text"][1, 1] = 31, -1
        outputs = np.asarray(run(config, random_params(config), batch))
        assert np.isnan(outputs[:2]).all()
        assert np.isfinite(outputs[2:]).all()

    def test_outputs_as_a_matrix(self):
        for name, columns in (("tied", 31 + 2), ("bare", 48), ("tokens", 5)):
            config = CONFIGS[name]
            outputs = run(config, random_params(config, dtype=np.float32), batch_of(config))
            assert registry.as_matrix(config, outputs).shape == (4 * 16, columns)

    def test_block_by_block_is_the_whole(self):
        config = CONFIGS["tokens"]
        params, batch = jax.tree.map(jax.numpy.asarray, random_params(config, dtype=np.float32)), batch_of(config)
        stream = encoder.embed(config, params, batch["text"], np.zeros_like(batch["text"]))
        for index in range(config.depth):
            stream = encoder.apply_block(config, params[f"block_{index}"], stream, batch["mask"])
        np.testing.assert_allclose(
            encoder.read_out(config, params, stream), run(config, params, batch), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"head": "sequence", "num_outputs": 2}, "neither a dense layer"),
            ({"head": "sequence", "pooler": True}, "num_outputs None"),
            ({"head": "vocabulary"}, "head_dense 'none'"),
            ({"head": "tokens", "num_outputs": 2, "head_dense": "relu"}, "head_dense 'relu'"),
            ({"next_sentence": True, "pooler": True}, "next_sentence needs"),
            ({"counted_from": 16}, "positions counted from 16"),
            ({"num_heads": 5}, "shared equally"),
            ({"activation": "mish"}, "activation: must be one of"),
        ],
    )
    def test_configs_that_make_no_sense_are_refused(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            encoder.Config(**{**SIZES, **fields})
