"""What goes into and comes out of every matrix of every family, against the matrices and against `jax.grad`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, FAST, SIZES, random_params
from test_models_decoder import CONFIGS as DECODERS
from test_models_encoder import CONFIGS as ENCODERS
from test_models_t5 import CONFIGS as T5S

from jaxtune import tree
from jaxtune.models import registry, resnet, vit
from jaxtune.models.experts import Experts
from jaxtune.models.tap import record_gradients, record_matrices
from jaxtune.models.views import follow, in_order_of_leaf, view_of_leaf
from jaxtune.sampling import make_text_sample

MIXTURE = Experts(num_experts=3, num_chosen=2, hidden=7, shared_hidden=9)
NETWORKS = {
    "mlp": CONFIGS["mlp_residual"],
    "resnet": resnet.Config(num_outputs=5, depth=8),
    "vit": CONFIGS["vit"],
    "vit_pooled": vit.Config(**SIZES, pooling="attention", is_gated=True, qkv_bias=False, layer_scale=True),
    "clip": CONFIGS["clip"],
    "decoder": DECODERS["llama with biases"],
    "decoder_tied": DECODERS["one norm for both, a part of a head turns"],
    "decoder_mixture": replace(DECODERS["llama"], experts=MIXTURE),
    "encoder": ENCODERS["tied"],
    "encoder_pooled": ENCODERS["pooled"],
    "t5": T5S["v1.0"],
    "t5_gated": T5S["v1.1"],
}
SIZE = 3
record = jax.jit(record_matrices, static_argnums=0, compiler_options=FAST)


def total(outputs):
    """A scalar that depends on every output, and not evenly."""
    return sum(jnp.sum(jnp.sin(x) * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in outputs)


def loss_of(outputs):
    return total(jax.tree.leaves(outputs))


def example_of(config):
    return jax.tree.map(np.array, registry.example(jax.random.key(3), config, SIZE))


def is_read_as_a_matrix(path, leaf):
    """By name: kernels, and the tables that a family reads as its head; not by what the tap does."""
    return path.endswith("kernel") and "/experts/" not in path and leaf.ndim >= 2


def as_matrix(site, leaf):
    """The leaf with its inputs first."""
    kept = [axis for axis in range(leaf.ndim) if axis not in site.in_axes]
    return np.transpose(leaf, (*site.in_axes, *kept)).reshape(site.inputs.shape[1], -1)


@pytest.fixture(scope="module", params=NETWORKS)
def recorded(request):
    config = NETWORKS[request.param]
    params, batch = random_params(config, dtype=np.float32), example_of(config)
    return config, params, batch, record(config, params, batch)


def test_outputs_are_inputs_times_the_matrix(recorded):
    _, params, _, sites = recorded
    leaves = tree.flatten(params)
    for path, site in sites.items():
        expected = np.asarray(site.inputs, np.float64) @ as_matrix(site, leaves[path]).astype(np.float64)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(site.outputs, expected, atol=1e-5 * scale, rtol=0, err_msg=path)  # float32 sums


def test_every_kernel_is_found_and_nothing_else(recorded):
    config, params, _, sites = recorded
    expected = {path for path, leaf in tree.flatten(params).items() if is_read_as_a_matrix(path, leaf)}
    if getattr(config, "tied", False) and config.head != "sequence":
        expected.add("embed/token")
    assert sites.keys() == expected


@pytest.mark.parametrize("name", ["resnet", "vit", "decoder_tied", "t5"])
def test_gradients_give_those_of_the_matrices(name):
    config = NETWORKS[name]
    params, batch = random_params(config, dtype=np.float32), example_of(config)
    sites = jax.jit(partial(record_gradients, loss=loss_of), static_argnums=0, compiler_options=FAST)(
        config, params, batch
    )
    compute = jax.jit(jax.grad(lambda p: loss_of(registry.apply(config, p, batch))), compiler_options=FAST)
    expected = tree.flatten(compute(params))
    for path, site in sites.items():
        if path == "embed/token":
            continue  # it is looked up too, which is not of the product
        product = np.asarray(site.inputs.T @ site.gradients)
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(product, as_matrix(site, expected[path]), atol=2e-4 * scale, err_msg=path)


@pytest.mark.parametrize("name", ["vit_pooled", "clip", "decoder", "t5", "resnet"])
def test_rows_are_sorted_by_example(name):
    config = NETWORKS[name]
    params, batch = random_params(config, dtype=np.float32), example_of(config)
    other = {key: values[[0, 2, 1]] for key, values in batch.items()}
    first, second = record(config, params, batch), record(config, params, other)
    for path, site in first.items():
        rows = np.asarray(site.inputs).reshape(SIZE, -1, site.inputs.shape[1])[[0, 2, 1]]
        theirs = np.asarray(second[path].inputs).reshape(rows.shape)
        np.testing.assert_allclose(theirs, rows, atol=1e-4 * np.abs(rows).max(), err_msg=path)


def test_recording_one_example_finds_the_same_matrices():
    """A learned query of one example has the shape of a parameter, which it still is."""
    config = NETWORKS["vit_pooled"]
    params, batch = random_params(config, dtype=np.float32), example_of(config)
    one = jax.eval_shape(partial(record_matrices, config), params, {name: x[:1] for name, x in batch.items()})
    assert one.keys() == jax.eval_shape(partial(record_matrices, config), params, batch).keys()


def test_masks_say_which_rows_are_tokens():
    config = NETWORKS["t5"]
    batch = example_of(config)
    sites = record(config, random_params(config, dtype=np.float32), batch)
    encoder, decoder = batch["mask"].reshape(-1), batch["decoder_mask"].reshape(-1)
    np.testing.assert_array_equal(sites["encoder/block_0/attn/q/kernel"].mask, encoder)
    np.testing.assert_array_equal(sites["decoder/block_0/cross/q/kernel"].mask, decoder)
    np.testing.assert_array_equal(sites["decoder/block_0/cross/k/kernel"].mask, encoder)
    assert (
        record(NETWORKS["vit"], random_params(NETWORKS["vit"]), example_of(NETWORKS["vit"]))["head/kernel"].mask is None
    )


def test_the_first_layer_reads_what_was_given(recorded):
    config, params, batch, sites = recorded
    if "image" not in batch or "patch" not in params:
        return
    size = config.patch_size
    image = batch["image"]
    places = range(0, image.shape[1], size), range(0, image.shape[2], size)
    patches = [
        image[n, i : i + size, j : j + size].reshape(-1) for n in range(SIZE) for i in places[0] for j in places[1]
    ]
    np.testing.assert_allclose(sites["patch/kernel"].inputs, np.stack(patches), atol=1e-6)


def test_a_low_precision_network_records_in_float32():
    config = NETWORKS["mlp"]
    params = tree.map_leaves(lambda _, x: jnp.asarray(x, jnp.bfloat16), random_params(config, dtype=np.float32))
    site = record(config, params, example_of(config))["head/kernel"]
    assert (site.inputs.dtype, site.outputs.dtype) == (jnp.float32, jnp.float32)


def test_a_sample_records_its_networks():
    config = NETWORKS["decoder"]
    sample = make_text_sample(config, np.arange(12).reshape(2, 6))
    sites = jax.jit(sample.record)(random_params(config, dtype=np.float32), sample.batch)
    assert sites["head/kernel"].inputs.shape == (12, config.width)


def test_views_follow_what_numpy_does():
    """A leaf of running numbers, put through random chains of reshapes and transposes."""
    draw, shape = np.random.RandomState(0), (4, 6, 2, 3)
    leaf = np.arange(np.prod(shape)).reshape(shape)
    steps = strides = 0
    for _ in range(400):
        view, array = view_of_leaf("leaf", shape), leaf
        for _ in range(4):
            if draw.rand() < 0.5:
                order = tuple(draw.permutation(array.ndim))
                view, array = follow(view, "transpose", {"permutation": order}), array.transpose(order)
            else:
                sizes = [(144,), (12, 12), (2, 2, 36), (8, 18), (4, 1, 36), (9, 16), (3, 48)][draw.randint(7)]
                view = follow(view, "reshape", {"new_sizes": sizes, "dimensions": None})
                array = array.reshape(sizes)
            if view is None:
                break
            steps += 1
        if view is None:
            continue
        sizes, order = in_order_of_leaf(view, range(array.ndim))
        np.testing.assert_array_equal(array.reshape(sizes).transpose(order).reshape(-1), leaf.reshape(-1))
        # The entry at the origin of every axis but one, read off the strides that the view claims.
        weights = np.array([np.prod(shape[axis + 1 :], dtype=int) for axis in range(len(shape))])
        for axis, factors in enumerate(view.axes):
            claimed = np.zeros(1, int)
            for of, size, stride in factors:
                claimed = (claimed[:, None] + np.arange(size)[None] * stride * weights[of]).reshape(-1)
            index = [0] * array.ndim
            index[axis] = slice(None)
            np.testing.assert_array_equal(array[tuple(index)], claimed)
            strides += 1
    assert steps > 300
    assert strides > 200
