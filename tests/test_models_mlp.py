"""Perceptrons against NumPy."""

import math

import jax
import numpy as np
import pytest
from small_models import CONFIGS, difference, random_batch, random_params, run, shapes_of

from jaxtune import tree
from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.models import mlp

erf = np.vectorize(math.erf)


def oracle_plain(params, x):
    for index in range(2):
        layer = params[f"layer_{index}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def oracle_tanh(params, x):
    for index in range(2):
        layer = params[f"layer_{index}"]
        x = np.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def oracle_residual(params, x):
    x = x @ params["stem"]["kernel"] + params["stem"]["bias"]
    for index in range(2):
        up, down = params[f"block_{index}"]["up"], params[f"block_{index}"]["down"]
        hidden = x @ up["kernel"] + up["bias"]
        x = x + hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ down["kernel"] + down["bias"]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(
    ("name", "oracle"), [("mlp", oracle_plain), ("mlp_residual", oracle_residual), ("mlp_tanh", oracle_tanh)]
)
def test_it_is_its_formulas(name, oracle):
    config = CONFIGS[name]
    params, batch = random_params(config), random_batch(config)
    with jax.enable_x64(True):
        got = run(config, params, batch)
    want = oracle(params, batch["image"].reshape(len(batch["image"]), -1).astype(np.float64))
    assert got.dtype == np.float64
    assert difference(want, np.asarray(got)) < 1e-12


def test_paths_and_groups():
    plain, residual = (tree.flatten(shapes_of(CONFIGS[name])) for name in ("mlp", "mlp_residual"))
    assert {path: leaf.shape for path, leaf in plain.items() if path.endswith("kernel")} == {
        "layer_0/kernel": (48, 17), "layer_1/kernel": (17, 13), "head/kernel": (13, 5),
    }  # fmt: skip
    assert {path: leaf.shape for path, leaf in residual.items() if path.endswith("kernel")} == {
        "stem/kernel": (48, 11), "head/kernel": (11, 5),
        "block_0/up/kernel": (11, 13), "block_0/down/kernel": (13, 11),
        "block_1/up/kernel": (11, 7), "block_1/down/kernel": (7, 11),
    }  # fmt: skip
    sizes = {name: group.size for name, group in mlp.symmetry(CONFIGS["mlp_residual"]).groups.items()}
    assert sizes == {"stream": 11, "block_0/hidden": 13, "block_1/hidden": 7}
    assert mlp.symmetry(CONFIGS["mlp_residual"]).junctions == ("stream",)


def test_without_hidden_layers_it_is_linear_and_has_no_symmetry():
    config = mlp.Config(image_shape=(2, 2, 1), widths=(), num_outputs=3)
    params, batch = random_params(config, dtype=np.float32), {"image": np.ones((2, 2, 2, 1), np.float32)}
    assert not mlp.symmetry(config).groups
    want = params["head"]["kernel"].sum(0) + params["head"]["bias"]
    np.testing.assert_allclose(mlp.apply(config, params, batch), [want, want], rtol=1e-5)


def test_a_stream_needs_a_width():
    with pytest.raises(ConfigError, match="widths is empty"):
        mlp.Config(image_shape=(2, 2, 1), widths=(), num_outputs=3, residual=True)


def test_the_activation_decides_what_a_hidden_unit_may_do():
    def kinds(name, **options):
        return {group.kind for group in mlp.symmetry(CONFIGS[name], **options).groups.values()}

    assert kinds("mlp") == kinds("mlp_residual") == {"permutation"}
    assert kinds("mlp_tanh") == {"signed_permutation"}
    assert kinds("mlp", scales="free") == {"scaled_permutation"}
    for name in ("mlp_tanh", "mlp_residual"):
        with pytest.raises(ConfigError, match=r"needs activation relu.*this config has (tanh|gelu)"):
            mlp.symmetry(CONFIGS[name], scales="free")
    with pytest.raises(UnknownNameError, match="Known: fixed, free"):
        mlp.symmetry(CONFIGS["mlp"], scales="loose")
