"""ResNet against NumPy convolutions written as loops; batch norm in training and evaluation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import FAST, difference, random_batch, random_params, run, shapes_of

from jaxtune import tree
from jaxtune.errors import ConfigError
from jaxtune.models import registry, resnet

CONFIG = resnet.Config(num_outputs=5, depth=8, momentum=0.8)

train = jax.jit(resnet.apply_train, static_argnums=0, compiler_options=FAST)


def oracle_conv(x, kernel, stride):
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            window = x[:, top : top + size, left : left + size]
            out[:, row, column] = np.einsum("nhwc,hwcd->nd", window, kernel)
    return out


class Oracle:
    """The network in float64; with `is_training`, `statistics` collects what each norm saw."""

    def __init__(self, config, params, is_training):
        self.config, self.params, self.is_training, self.statistics = config, params, is_training, {}

    def norm(self, path, x):
        leaves = self.params
        for word in path.split("/"):
            leaves = leaves[word]
        mean, var = leaves["mean"], leaves["var"]
        if self.is_training:
            rows = x.reshape(-1, x.shape[-1])
            mean, var = rows.mean(0), rows.var(0)
            self.statistics |= {f"{path}/mean": mean, f"{path}/var": var}
        return (x - mean) / np.sqrt(var + self.config.norm_eps) * leaves["scale"] + leaves["bias"]

    def __call__(self, image):
        params = self.params
        x = np.maximum(
            self.norm("stem_norm", oracle_conv(image.astype(np.float64), params["stem_conv"]["kernel"], 1)), 0
        )
        for stage in range(3):
            for block in range(self.config.num_blocks):
                path = f"stage_{stage}_block_{block}"
                leaves, stride = params[path], 2 if stage > 0 and block == 0 else 1
                y = np.maximum(self.norm(f"{path}/norm1", oracle_conv(x, leaves["conv1"]["kernel"], stride)), 0)
                y = self.norm(f"{path}/norm2", oracle_conv(y, leaves["conv2"]["kernel"], 1))
                if "shortcut_conv" in leaves:
                    x = self.norm(f"{path}/shortcut_norm", oracle_conv(x, leaves["shortcut_conv"]["kernel"], stride))
                x = np.maximum(x + y, 0)
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def test_evaluation_is_its_formulas():
    params, batch = random_params(CONFIG), random_batch(CONFIG)
    with jax.enable_x64(True):
        got = run(CONFIG, params, batch)
    assert got.dtype == np.float64
    assert difference(Oracle(CONFIG, params, False)(batch["image"]), np.asarray(got)) < 1e-12


def test_training_normalises_by_the_batch_and_moves_the_running_statistics():
    params, batch = random_params(CONFIG), random_batch(CONFIG)
    with jax.enable_x64(True):
        got, updated = train(CONFIG, params, batch)
    oracle = Oracle(CONFIG, params, True)
    assert difference(oracle(batch["image"]), np.asarray(got)) < 1e-12
    before, after = tree.flatten(params), tree.flatten(updated)
    assert before.keys() == after.keys()
    for path, leaf in after.items():
        if path in oracle.statistics:
            want = 0.8 * before[path] + 0.2 * oracle.statistics[path]
            np.testing.assert_allclose(leaf, want, rtol=1e-12, atol=1e-13, err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert oracle.statistics.keys() == {path for path in after if not resnet.is_trainable(CONFIG, path)}


def test_evaluation_meets_training_once_the_statistics_have_settled():
    params, batch = random_params(CONFIG), random_batch(CONFIG)
    config = replace(CONFIG, momentum=0.01)
    with jax.enable_x64(True):
        gap = difference(*(np.asarray(f(config, params, batch)) for f in (lambda *a: train(*a)[0], run)))
        for _ in range(6):  # 0.01**6 of the start is left
            outputs, params = train(config, params, batch)
        settled = run(config, params, batch)
    assert gap > 0.1
    assert difference(np.asarray(outputs), np.asarray(settled)) < 1e-9


def test_statistics_keep_their_dtype_and_take_no_gradient():
    params = random_params(CONFIG, dtype=np.float32)
    params = tree.map_leaves(lambda p, x: x if p.endswith(("mean", "var")) else jnp.asarray(x, jnp.bfloat16), params)
    _, updated = train(CONFIG, params, random_batch(CONFIG))
    tree.check_same({"before": params, "after": updated}, dtypes=True)

    def sum_of_statistics(params):
        _, updated = resnet.apply_train(CONFIG, params, random_batch(CONFIG))
        moved = tree.select(updated, include=".*/var")
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moved))

    gradient = jax.jit(jax.grad(sum_of_statistics))(random_params(CONFIG, dtype=np.float32))
    assert not np.any(gradient["stem_conv"]["kernel"])


def test_registry_trains_it(key):
    params, batch = random_params(CONFIG, dtype=np.float32), random_batch(CONFIG)
    outputs, updated = jax.jit(registry.apply_train, static_argnums=0)(CONFIG, params, batch, key)
    want, _ = train(CONFIG, params, batch)
    assert difference(np.asarray(want), np.asarray(outputs)) < 1e-5  # compiled apart
    assert not np.array_equal(updated["stem_norm"]["mean"], params["stem_norm"]["mean"])


@pytest.mark.parametrize(("depth", "count"), [(20, 272_474), (56, 855_770)])
def test_real_sizes_have_the_published_number_of_parameters(depth, count):
    # 269,722 and 853,018 (He et al. 2016, shortcuts without weights) and 2,752 for the two projections.
    config = resnet.Config(num_outputs=10, depth=depth)
    shapes = shapes_of(config)
    learnt = [leaf.shape for path, leaf in tree.flatten(shapes).items() if resnet.is_trainable(config, path)]
    assert sum(int(np.prod(shape)) for shape in learnt) == count
    resnet.symmetry(config).check(shapes)


def test_width_multiplier_and_any_image_size():
    config = resnet.Config(num_outputs=4, depth=8, width_multiplier=2, channels=1)
    shapes = shapes_of(config)
    assert shapes["stage_2_block_0"]["conv1"]["kernel"].shape == (3, 3, 64, 128)
    assert shapes["stage_2_block_0"]["shortcut_conv"]["kernel"].shape == (1, 1, 64, 128)
    assert "shortcut_conv" not in shapes["stage_0_block_0"]
    for side in (8, 28, 33):
        batch = {"image": jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32)}
        out = jax.eval_shape(lambda params, batch: resnet.apply(config, params, batch), shapes, batch)
        assert out.shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"depth": 18}, "depth 18 is not 6n . 2; nearest: 20"),
        ({"depth": 2}, "nearest: 8"),
        ({"momentum": 1.0}, "below 1"),
    ],
)
def test_configs_that_make_no_sense(change, reason):
    with pytest.raises(ConfigError, match=reason):
        resnet.Config(num_outputs=10, **change)
