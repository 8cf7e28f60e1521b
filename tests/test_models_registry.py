"""One door to every family: same signature, same laws; configs go through JSON and back."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, FAST, random_batch, random_params, run, shapes_of

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError, TreeMismatchError
from jaxtune.models import registry

EVERY = pytest.mark.parametrize("name", CONFIGS)
ONE_OF_EACH = pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "clip"])


@EVERY
def test_configs_go_through_json_and_back(name):
    config = CONFIGS[name]
    values = registry.config_to_dict(config)
    assert values["model_type"] == "jaxtune_" + name.split("_")[0]
    again = registry.config_from_dict(json.loads(json.dumps(values)))
    assert again == config
    assert hash(again) == hash(config)


def test_a_default_may_be_left_out_and_a_size_may_not():
    values = registry.config_to_dict(CONFIGS["vit"])
    short = {key: value for key, value in values.items() if key not in ("channels", "norm_eps", "shortcuts")}
    assert registry.config_from_dict(short) == CONFIGS["vit"]
    with pytest.raises(ConfigError, match=r"(?s)depth: missing.*width: missing|width: missing.*depth: missing"):
        registry.config_from_dict({key: value for key, value in values.items() if key not in ("width", "depth")})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "perceiver"}, r"unknown model_type 'perceiver'\. Known: jaxtune_mlp, .*vit"),
        ({"hidden_size": 768}, r"(?s)vit.Config cannot.*hidden_size: no such field.*Its fields: image_size"),
        ({"width": "768"}, "width: must be an int, at least 1, got '768'"),
        ({"width": True}, "width: must be an int"),
    ],
)
def test_dicts_that_make_no_config(change, reason):
    with pytest.raises(ConfigError, match=reason):
        registry.config_from_dict({**registry.config_to_dict(CONFIGS["vit"]), **change})


def test_nested_and_missing_parts_are_named():
    values = registry.config_to_dict(CONFIGS["clip"])
    with pytest.raises(ConfigError, match='no "model_type"'):
        registry.config_from_dict({key: value for key, value in values.items() if key != "model_type"})
    with pytest.raises(ConfigError, match=r"(?s)clip.TextConfig cannot.*merges: no such field"):
        registry.config_from_dict({**values, "text": {**values["text"], "merges": 3}})
    with pytest.raises(ConfigError, match=r"vit.Config must be a dict of its fields, got 7"):
        registry.config_from_dict({**values, "vision": 7})
    with pytest.raises(ConfigError, match=r"image_shape: must be a tuple of 3 ints, each at least 1, got .4, 4."):
        registry.config_from_dict({**registry.config_to_dict(CONFIGS["mlp"]), "image_shape": [4, 4]})
    with pytest.raises(ConfigError, match="is no model config"):
        registry.init(jax.random.key(0), {"model_type": "jaxtune_vit"})


@ONE_OF_EACH
def test_fresh_parameters_are_float32_fit_the_spec_and_follow_the_key(name):
    config = replace(CONFIGS[name], depth=8) if name == "resnet" else CONFIGS[name]
    init = jax.jit(registry.init, static_argnums=1, compiler_options=FAST)
    first, again, other = (init(jax.random.key(seed), config) for seed in (0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(jnp.float32)}
    registry.symmetry_of(config).check(first)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = {path: leaf for path, leaf in tree.flatten(first).items() if path.endswith("kernel")}
    assert not [path for path, leaf in kernels.items() if np.array_equal(leaf, tree.flatten(other)[path])]
    # Leaves of one shape are drawn apart.
    drawn = [np.asarray(leaf).tobytes() for leaf in kernels.values()]
    assert len(set(drawn)) == len(drawn)
    outputs = run(config, first, random_batch(config))
    if name == "clip":
        assert outputs["logit_scale"] == pytest.approx(1 / 0.07)
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == jnp.float32
        assert 1e-3 < np.abs(leaf).max() < 1e2


@pytest.mark.parametrize("name", ["mlp_residual", "vit"])
def test_one_trace_and_the_eager_answer(name):
    config = CONFIGS[name]
    params, batch = random_params(config, dtype=np.float32), random_batch(config)
    traces = []

    @jax.jit
    def once(params, batch):
        traces.append(1)
        return registry.apply(config, params, batch)

    once(params, batch)
    compiled = once(params, random_batch(config))
    assert len(traces) == 1
    eager = registry.apply(config, params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), compiled, eager)


@ONE_OF_EACH
def test_a_tree_of_another_network_is_refused(name):
    config = CONFIGS[name]
    params, batch = random_params(config, dtype=np.float32), random_batch(config)
    flat = tree.flatten(params)
    path = next(path for path, leaf in flat.items() if leaf.ndim)
    changes = {
        f"{path}: only in config": {p: leaf for p, leaf in flat.items() if p != path},
        "odd: only in params": {**flat, "odd": np.zeros(3, np.float32)},
        f"{path}: config ": {**flat, path: np.zeros((*flat[path].shape, 2), np.float32)},
    }
    for reason, leaves in changes.items():
        with pytest.raises(TreeMismatchError, match=reason):
            registry.apply(config, tree.unflatten(leaves), batch)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_images_are_needed(name):
    with pytest.raises(DataError, match='no "image"; it has: label'):
        registry.apply(CONFIGS[name], random_params(CONFIGS[name]), {"label": np.zeros(2, np.int32)})


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_families_without_statistics_give_their_parameters_back(name, key):
    config = CONFIGS[name]
    params, batch = random_params(config, dtype=np.float32), random_batch(config)
    outputs, same = registry.apply_train(config, params, batch, key)
    assert same is params
    np.testing.assert_array_equal(outputs, registry.apply(config, params, batch))
    assert all(registry.is_trainable(config, path) for path in tree.flatten(shapes_of(config)))


def test_only_running_statistics_are_not_learnt_in_a_resnet():
    config = CONFIGS["resnet"]
    still = [path for path in tree.flatten(shapes_of(config)) if not registry.is_trainable(config, path)]
    assert {path.rsplit("/", 1)[1] for path in still} == {"mean", "var"}
    assert len(still) == 2 * 15  # norms of 14 layers less the head, and of two projections


def test_options_that_a_family_does_not_have_fail_by_name():
    with pytest.raises(ConfigError, match="junctions"):
        registry.symmetry_of(CONFIGS["mlp"], junctions="each")
