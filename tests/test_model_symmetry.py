"""The declared symmetry of every family is a symmetry of its function, and nothing larger is claimed."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_models import CONFIGS, FAST, SIZES, difference, outputs_of, random_batch, random_params, shapes_of

from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError, SpecError, UnknownNameError
from jaxtune.models import registry, resnet, vit
from jaxtune.rng import named_key

EVERY = pytest.mark.parametrize("name", CONFIGS)
TRANSFORMERS = [name for name, config in CONFIGS.items() if not name.startswith(("mlp", "resnet"))]
EXACT64, EXACT32 = 1e-10, 1e-4  # share of the outputs' scale that rounding stays below


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def moved_outputs(key, config, params, batch, **options):
    """Outputs before and after a random element of the config's symmetry."""
    spec = registry.symmetry_of(config, **options)
    moved = symmetry.apply(spec, symmetry.random(key, spec), params)
    changed = [
        path
        for path, leaf in tree.flatten(params).items()
        if any(spec.axes[path]) and np.array_equal(leaf, tree.flatten(moved)[path])
    ]
    assert not changed, "a random element must move every leaf that a group owns"
    return outputs_of(config, params, batch), outputs_of(config, moved, batch)


@EVERY
def test_a_random_element_leaves_the_function_alone_in_float64(name, key, float64):
    config = CONFIGS[name]
    before, after = moved_outputs(key, config, random_params(config), random_batch(config))
    assert before.dtype == np.float64
    assert difference(before, after) < EXACT64


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "clip"])
def test_a_random_element_leaves_the_function_alone_in_float32(name, key):
    config = CONFIGS[name]
    before, after = moved_outputs(key, config, random_params(config, dtype=np.float32), random_batch(config))
    assert before.dtype == np.float32
    assert difference(before, after) < EXACT32


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_one_order_for_all_units_of_a_head_is_a_symmetry_too(name, key, float64):
    config = CONFIGS[name]
    before, after = moved_outputs(key, config, random_params(config), random_batch(config), inside="joint")
    assert difference(before, after) < EXACT64


def test_training_statistics_move_with_their_channels(key, float64):
    config = CONFIGS["resnet"]
    params, batch = random_params(config), random_batch(config)
    spec = registry.symmetry_of(config)
    element = symmetry.random(key, spec)
    train = jax.jit(resnet.apply_train, static_argnums=0, compiler_options=FAST)
    before, updated = train(config, params, batch)
    after, moved_updated = train(config, symmetry.apply(spec, element, params), batch)
    assert difference(np.asarray(before), np.asarray(after)) < EXACT64
    tree.map_leaves(
        lambda path, a, b: np.testing.assert_allclose(a, b, rtol=0, atol=EXACT64, err_msg=path),
        symmetry.apply(spec, element, updated),
        moved_updated,
    )


@pytest.mark.parametrize("name", ["mlp", "mlp_relu_residual", "resnet"])
def test_scales_behind_relu_leave_the_function_alone(name, key, float64):
    config = {**CONFIGS, "mlp_relu_residual": replace(CONFIGS["mlp_residual"], activation="relu")}[name]
    before, after = moved_outputs(key, config, random_params(config), random_batch(config), scales="free")
    assert difference(before, after) < EXACT64


def test_scales_of_channels_pass_through_training_too(key, float64):
    """A batch's own statistics lie before the gain, so no scale reaches them."""
    config = CONFIGS["resnet"]
    params, batch = random_params(config), random_batch(config)
    spec = registry.symmetry_of(config, scales="free")
    element = symmetry.random(key, spec)
    train = jax.jit(resnet.apply_train, static_argnums=0, compiler_options=FAST)
    before, updated = train(config, params, batch)
    after, moved_updated = train(config, symmetry.apply(spec, element, params), batch)
    assert difference(np.asarray(before), np.asarray(after)) < EXACT64
    for path, leaf in tree.flatten(symmetry.apply(spec, element, updated)).items():
        np.testing.assert_allclose(tree.flatten(moved_updated)[path], leaf, rtol=1e-9, atol=EXACT64, err_msg=path)


ILLEGAL = {
    "a sign behind relu": (CONFIGS["mlp"], "layer_1/hidden", -1.0),
    "a scale behind tanh": (CONFIGS["mlp_tanh"], "layer_1/hidden", 2.0),
    "a sign behind gelu": (CONFIGS["mlp_residual"], "block_0/hidden", -1.0),
    "a scale behind gelu": (CONFIGS["mlp_residual"], "block_0/hidden", 2.0),
    "a sign on a channel": (CONFIGS["resnet"], "stage_1_block_0/channel", -1.0),
    "a sign on a stage": (CONFIGS["resnet"], "stage_1/channel", -1.0),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_factor_that_the_activation_sees_changes_the_function(name, float64):
    """Of the kinds that allow the factor, on networks that do not."""
    config, group, factor = ILLEGAL[name]
    params, batch, own = random_params(config), random_batch(config), registry.symmetry_of(config)
    kind = "signed_permutation" if factor < 0 else "scaled_permutation"
    groups = [replace(g, kind=kind if g.name == group else "permutation") for g in own.groups.values()]
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in own.axes.items()}
    spec = symmetry.make_spec(groups, axes)
    element = symmetry.identity(spec)
    element[group][1] = factor
    moved = symmetry.apply(spec, element, params)
    assert difference(*(outputs_of(config, p, batch) for p in (params, moved))) > 1e-3
    with pytest.raises(SpecError, match=f"{group}: expected"):
        symmetry.check(own, element)


def test_scales_of_a_kernel_in_front_of_a_batch_norm_would_be_seen(key, float64):
    """Why those axes follow the order alone: the running statistics are not scaled."""
    config = CONFIGS["resnet"]
    own = registry.symmetry_of(config, scales="free")
    axes = {path: [axis and axis.mark for axis in row] for path, row in own.axes.items()}
    axes["stem_conv/kernel"][3] = "stage_0/channel"
    spec = symmetry.make_spec(own.groups.values(), axes)
    params, batch = random_params(config), random_batch(config)
    moved = symmetry.apply(spec, symmetry.random(key, spec), params)
    assert difference(*(outputs_of(config, p, batch) for p in (params, moved))) > 1e-3


class TestJunctions:
    """One order per junction, as TransFusion has it."""

    config = CONFIGS["vit_relu"]

    @pytest.fixture
    def moved(self, key, float64):
        """(config with shortcuts, its weights, the same moved by a random element)."""
        config, params = vit.with_shortcuts(self.config, random_params(self.config))
        spec = vit.symmetry(config, junctions="each", inside="joint")
        return config, params, symmetry.apply(spec, symmetry.random(key, spec), params)

    def test_explicit_shortcuts_change_nothing(self, float64):
        params, batch = random_params(self.config), random_batch(self.config)
        config, with_shortcuts = vit.with_shortcuts(self.config, params)
        assert len(tree.flatten(with_shortcuts)) == len(tree.flatten(params)) + 2 * config.depth
        plain, explicit = outputs_of(self.config, params, batch), outputs_of(config, with_shortcuts, batch)
        assert difference(plain, explicit) < EXACT64
        again = vit.with_shortcuts(config, with_shortcuts)
        assert again[0] == config
        tree.check_same({"once": with_shortcuts, "twice": again[1]})

    def test_moved_shortcuts_keep_the_function(self, moved):
        config, params, moved_params = moved
        batch = random_batch(config)
        assert difference(outputs_of(config, params, batch), outputs_of(config, moved_params, batch)) < EXACT64

    def test_the_stock_network_does_not_keep_it(self, moved):
        _, params, moved_params = moved
        stock, moved_stock = (tree.select(p, exclude=".*/shortcut_.*") for p in (params, moved_params))
        batch = random_batch(self.config)
        before, after = outputs_of(self.config, stock, batch), outputs_of(self.config, moved_stock, batch)
        assert difference(before, after) > 0.1

    def test_one_order_at_all_junctions_keeps_every_shortcut_the_identity(self, key):
        config, params = vit.with_shortcuts(self.config, random_params(self.config))
        spec = vit.symmetry(config, junctions="each")
        element = symmetry.random(key, spec)
        element |= dict.fromkeys(spec.junctions, element["stream_0"])
        moved = tree.flatten(symmetry.apply(spec, element, params))
        for index in range(config.depth):
            for name in ("shortcut_attn", "shortcut_mlp"):
                np.testing.assert_array_equal(moved[f"block_{index}/{name}/kernel"], np.eye(config.width))

    def test_names_and_order(self):
        spec = vit.symmetry(self.config, junctions="each")
        assert spec.junctions == tuple(f"stream_{n}" for n in range(2 * self.config.depth + 1))
        assert not spec.is_exact
        owned = {name: {path for path, _ in spec.leaves_of(name)} for name in spec.junctions}
        assert owned["stream_0"] >= {"patch/kernel", "class_token", "position", "stream_norm/bias"}
        assert owned["stream_1"] == {
            *("block_0/attn/out/kernel", "block_0/attn/out/bias", "block_0/norm2/scale", "block_0/norm2/bias"),
            "block_0/mlp/up/kernel",
        }
        assert owned["stream_2"] >= {"block_0/mlp/down/kernel", "block_1/norm1/scale", "block_1/attn/v/kernel"}
        assert owned["stream_4"] >= {"block_1/mlp/down/bias", "final_norm/scale", "head/kernel"}

    def test_shared_junctions_are_refused_with_shortcuts(self):
        config, _ = vit.with_shortcuts(self.config, random_params(self.config))
        with pytest.raises(ConfigError, match='junctions="each"'):
            vit.symmetry(config)

    def test_clip_has_them_in_both_towers_and_lists_the_image_towers(self):
        config = CONFIGS["clip"]
        spec = registry.symmetry_of(config, junctions="each")
        assert spec.junctions == tuple(f"vision/stream_{n}" for n in range(2 * config.vision.depth + 1))
        assert {"text/stream_0", "text/stream_2"} <= spec.groups.keys()
        assert registry.symmetry_of(config).is_exact
        spec.check(shapes_of(config))

    @pytest.mark.parametrize("option", ["junctions", "inside"])
    def test_unknown_options_name_the_known(self, option):
        with pytest.raises(UnknownNameError, match=r"Known: (each, shared|joint, separate)"):
            vit.symmetry(self.config, **{option: "some"})


class TestCoverage:
    """Spec against tree, both ways."""

    @EVERY
    def test_every_leaf_is_declared_and_every_declared_leaf_is_there(self, name):
        config = CONFIGS[name]
        spec, shapes = registry.symmetry_of(config), shapes_of(config)
        spec.check(shapes)
        flat = tree.flatten(shapes)
        path = next(iter(flat))
        with pytest.raises(SpecError, match="odd: not in the spec"):
            spec.check({**shapes, "odd": flat[path]})
        with pytest.raises(SpecError, match=f"{path}: in the spec, missing"):
            spec.check(tree.unflatten({p: leaf for p, leaf in flat.items() if p != path}))

    def test_vit_b16_has_the_papers_groups(self):
        config = vit.Config(
            image_size=224, patch_size=16, width=768, depth=12, num_heads=12, mlp_width=3072, num_outputs=512
        )
        spec = vit.symmetry(config, junctions="each", inside="joint")
        sizes = {}
        for group in spec.groups.values():
            sizes.setdefault(group.role, []).append(group.size)
        # 25 junctions, 12 hidden layers, 12 attentions of 12 heads of 64 units
        assert sizes == {"stream": [768] * 25, "head": [12] * 12, "inside": [64] * 12, "hidden": [3072] * 12}
        spec.check(shapes_of(config))

    def test_roles_and_duals(self):
        spec = vit.symmetry(CONFIGS["vit"])
        assert {name: group.role for name, group in spec.groups.items() if "block_1" not in name} == {
            "stream": "stream",
            "block_0/attn/head": "head",
            "block_0/attn/qk": "qk",
            "block_0/attn/vo": "vo",
            "block_0/mlp/hidden": "hidden",
        }
        dual = {path for path, axes in spec.axes.items() if any(axis and axis.dual for axis in axes)}
        assert {path for path in dual if path.startswith("block_0")} == {
            *("block_0/attn/k/kernel", "block_0/attn/k/bias", "block_0/attn/out/kernel")
        }
        assert spec.unmatched == {"block_0/attn/k/bias", "block_1/attn/k/bias"}

    def test_resnet_marks_its_statistics(self):
        config = CONFIGS["resnet"]
        spec = registry.symmetry_of(config)
        still = {path for path in tree.flatten(shapes_of(config)) if not registry.is_trainable(config, path)}
        assert spec.unmatched == still
        assert spec.nonnegative == {path for path in still if path.endswith("var")}
        assert [group.size for group in spec.groups.values()] == [16] * 3 + [32] * 3 + [64] * 3


class TestGauges:
    """What a pre-LN block may and may not do beyond permutations; each names the leaves it touches."""

    config = CONFIGS["vit"]

    @pytest.fixture
    def run(self, float64):
        """(weights, difference that a change of them makes to the outputs)."""
        params, batch = tree.flatten(random_params(self.config)), random_batch(self.config)
        before = outputs_of(self.config, tree.unflatten(params), batch)
        return params, lambda changed: difference(
            before, outputs_of(self.config, tree.unflatten({**params, **changed}), batch)
        )

    def draw(self, *shape):
        return np.random.default_rng(7).normal(size=shape)

    def test_mixing_units_across_heads_is_no_symmetry(self, run):
        params, difference_of = run
        order = np.random.default_rng(0).permutation(self.config.width)

        def mix(leaf, first):
            flat = leaf.reshape(*leaf.shape[:first], self.config.width, *leaf.shape[first + 2 :])
            return flat.take(order, axis=first).reshape(leaf.shape)

        names = [f"block_0/attn/{name}" for name in "qkv"]
        changed = {f"{name}/kernel": mix(params[f"{name}/kernel"], 1) for name in names}
        changed |= {f"{name}/bias": mix(params[f"{name}/bias"], 0) for name in names}
        changed["block_0/attn/out/kernel"] = mix(params["block_0/attn/out/kernel"], 0)
        assert difference_of(changed) > 1e-3

    def test_queries_against_keys_take_any_invertible_map_per_head(self, run):
        params, difference_of = run
        units = self.config.width // self.config.num_heads
        maps = np.eye(units) + 0.3 * self.draw(self.config.num_heads, units, units)
        duals = np.linalg.inv(maps).transpose(0, 2, 1)
        changed = {}
        for name, move in (("q", maps), ("k", duals)):
            path = f"block_1/attn/{name}"
            changed[f"{path}/kernel"] = np.einsum("dhu,huw->dhw", params[f"{path}/kernel"], move)
            changed[f"{path}/bias"] = np.einsum("hu,huw->hw", params[f"{path}/bias"], move)
        assert difference_of(changed) < EXACT64
        assert difference_of({path: leaf for path, leaf in changed.items() if "/q/" in path}) > 1e-3

    def test_values_against_outputs_take_any_invertible_map_per_head(self, run):
        params, difference_of = run
        units = self.config.width // self.config.num_heads
        maps = np.eye(units) + 0.3 * self.draw(self.config.num_heads, units, units)
        path = "block_0/attn"
        out = np.einsum("hwu,hud->hwd", np.linalg.inv(maps), params[f"{path}/out/kernel"])
        changed = {
            f"{path}/v/kernel": np.einsum("dhu,huw->dhw", params[f"{path}/v/kernel"], maps),
            f"{path}/v/bias": np.einsum("hu,huw->hw", params[f"{path}/v/bias"], maps),
            f"{path}/out/kernel": out,
        }
        assert difference_of(changed) < EXACT64
        assert difference_of({f"{path}/out/kernel": out}) > 1e-3

    def test_softmax_does_not_see_the_key_bias(self, run):
        params, difference_of = run
        shape = params["block_0/attn/k/bias"].shape
        assert difference_of({"block_0/attn/k/bias": self.draw(*shape)}) < EXACT64
        assert difference_of({"block_0/attn/q/bias": self.draw(*shape)}) > 1e-3

    def test_the_value_bias_moves_into_the_output_bias(self, run):
        params, difference_of = run
        delta = self.draw(*params["block_0/attn/v/bias"].shape)
        shift = np.einsum("hu,hud->d", delta, params["block_0/attn/out/kernel"])
        changed = {
            "block_0/attn/v/bias": params["block_0/attn/v/bias"] + delta,
            "block_0/attn/out/bias": params["block_0/attn/out/bias"] - shift,
        }
        assert difference_of(changed) < EXACT64

    @pytest.mark.parametrize(("name", "is_symmetry"), [("vit_relu", True), ("vit", False)])
    def test_only_relu_lets_a_hidden_unit_change_its_scale(self, name, is_symmetry, float64):
        config = CONFIGS[name]
        params, batch = tree.flatten(random_params(config)), random_batch(config)
        up, bias, down = (f"block_0/mlp/{leaf}" for leaf in ("up/kernel", "up/bias", "down/kernel"))
        factor = np.exp(self.draw(config.mlp_width))
        changed = {up: params[up] * factor, bias: params[bias] * factor, down: params[down] / factor[:, None]}
        moved = {**params, **changed}
        found = difference(*(outputs_of(config, tree.unflatten(p), batch) for p in (params, moved)))
        assert found < EXACT64 if is_symmetry else found > 1e-3

    def test_norms_fold_into_their_readers_and_then_commute_with_rotations(self, run):
        params, difference_of = run
        folded = dict(params)
        readers = {"final_norm": ["head"]}
        for index in range(self.config.depth):
            readers[f"block_{index}/norm1"] = [f"block_{index}/attn/{name}" for name in "qkv"]
            readers[f"block_{index}/norm2"] = [f"block_{index}/mlp/up"]
        for norm, paths in readers.items():
            scale, bias = params[f"{norm}/scale"], params[f"{norm}/bias"]
            for path in paths:
                kernel = params[f"{path}/kernel"]
                folded[f"{path}/kernel"] = scale.reshape(-1, *(1,) * (kernel.ndim - 1)) * kernel
                folded[f"{path}/bias"] = params[f"{path}/bias"] + np.tensordot(bias, kernel, axes=1)
            folded[f"{norm}/scale"], folded[f"{norm}/bias"] = np.ones_like(scale), np.zeros_like(bias)
        assert difference_of(folded) < EXACT64

        # Orthogonal maps that keep the vector of ones: a rotation of its complement.
        width = self.config.width
        basis = np.linalg.qr(np.column_stack([np.ones(width), self.draw(width, width - 1)]))[0]
        inner = np.linalg.qr(self.draw(width - 1, width - 1))[0]
        rotation = (
            basis @ np.block([[np.eye(1), np.zeros((1, width - 1))], [np.zeros((width - 1, 1)), inner]]) @ basis.T
        )
        free = np.linalg.qr(self.draw(width, width))[0]
        assert difference_of(self.rotate(folded, rotation)) < EXACT64
        assert difference_of(self.rotate(folded, free)) > 1e-3
        assert difference_of(self.rotate(params, rotation)) > 1e-3

    def test_one_sign_for_the_whole_stream_but_not_for_one_channel(self, run):
        params, difference_of = run
        one = np.eye(self.config.width)
        one[3, 3] = -1
        biases = {path: -leaf for path, leaf in params.items() if path.endswith(("norm1/bias", "norm2/bias"))}
        biases["final_norm/bias"] = -params["final_norm/bias"]
        assert difference_of({**self.rotate(params, -np.eye(self.config.width)), **biases}) < EXACT64
        assert difference_of(self.rotate(params, one)) > 1e-3

    def rotate(self, params, matrix):
        """Writers and readers of the stream in another basis; norms as they are."""
        moved = dict(params)
        for path, axis in vit.symmetry(self.config).leaves_of("stream"):
            if "norm" not in path:
                moved[path] = np.moveaxis(np.tensordot(params[path], matrix, axes=(axis, 0)), -1, axis)
        return moved


def test_linear_in_the_weights_and_blind_to_a_sum(key):
    config = vit.Config(**SIZES)
    spec = vit.symmetry(config)
    element = symmetry.random(named_key(key, "sum"), spec)
    base, vector = random_params(config, seed=1), random_params(config, seed=2)
    both = tree.map_leaves(lambda _, a, b: a + b, base, vector)
    sum_of_moved = tree.map_leaves(
        lambda _, a, b: a + b, *(symmetry.apply(spec, element, leaves) for leaves in (base, vector))
    )
    tree.map_leaves(
        lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=path),
        symmetry.apply(spec, element, both),
        sum_of_moved,
    )
