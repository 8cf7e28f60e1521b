"""Transports by what two networks do on the same inputs: planted elements, oracles in plain NumPy, other widths."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import FAST, SIZES, random_params

from jaxtune import symmetry, tree
from jaxtune.data import ArraySource
from jaxtune.errors import ConfigError, DataError, NonFiniteError
from jaxtune.models import mlp, registry, vit
from jaxtune.models.tap import record_gradients_of, record_matrices
from jaxtune.moments import gather_grams, gather_pairs
from jaxtune.sample import Sample
from jaxtune.sampling import for_sizes, make_sample
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import prepare_transport

KEY = jax.random.key(0)
MLP = mlp.Config(image_shape=(8, 8, 3), widths=(17, 13), num_outputs=5, activation="tanh")
VIT = vit.Config(**SIZES | {"depth": 1})
record = jax.jit(record_matrices, static_argnums=0, compiler_options=FAST)


def source_of(num):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    labels = (np.arange(num) % 5).astype(np.int32)
    return ArraySource("dots", "train", images, labels, tuple("abcde"))


def sample_of(config, num=64):
    return make_sample(config, source_of(num))


def networks(config, seed=0):
    """(base, its fine-tune)."""
    base, noise = (random_params(config, seed=seed + n, dtype=np.float32) for n in (0, 100))
    return base, tree.map_leaves(lambda _, x, y: x + np.float32(0.1) * y, base, noise)


def planted(config, seed=3):
    """(source, its fine-tune, target, the target's fine-tune): the second pair is the first, moved."""
    pair, spec = networks(config), registry.symmetry_of(config)
    element = symmetry.random(jax.random.key(seed), spec)
    return *pair, *(symmetry.apply(spec, element, params) for params in pair)


def prepare(method, config, source, finetuned, target, **options):
    return prepare_transport(
        KEY, partial(registry.symmetry_of, config), source, finetuned, target, method=method, **options
    )


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)


def matrices_of(vector, sites):
    """{path: the leaf as [n_in, n_out]}."""
    leaves = tree.flatten(vector)
    return {
        path: np.transpose(
            leaves[path], (*site.in_axes, *(a for a in range(leaves[path].ndim) if a not in site.in_axes))
        ).reshape(site.inputs.shape[1], -1)
        for path, site in sites.items()
    }


@pytest.mark.parametrize("method", ["theseus", "bico"])
def test_a_planted_element_of_a_perceptron_is_found(method):
    source, finetuned, target, truth = planted(MLP)
    prepared = prepare(method, MLP, source, finetuned, target, sample=sample_of(MLP, 256))
    expected = tree.task_vector(target, truth)
    for path, leaf in tree.flatten(prepared.task_vector).items():
        assert relative(leaf, tree.flatten(expected)[path]) < 1e-3, path  # float32 activations
    assert prepared.info["left_out"] == []


@pytest.mark.parametrize("options", [{}, {"centred": True}, {"whitening": 0.5}, {"whitening": 0.25}])
def test_a_planted_element_of_a_transformer_acts_right_on_what_matrices_read(options):
    """Norms leave one direction of the stream empty, in which no example says how to move."""
    source, finetuned, target, truth = planted(VIT)
    sample = sample_of(VIT)
    prepared = prepare("theseus", VIT, source, finetuned, target, sample=sample, **options)
    sites = record(VIT, target, {"image": sample.batch["image"]})
    moved, expected = (matrices_of(v, sites) for v in (prepared.task_vector, tree.task_vector(target, truth)))
    for path, site in sites.items():
        inputs, outputs = (np.asarray(x, np.float64) for x in (site.inputs, site.outputs))
        if options.get("centred"):
            inputs, outputs = inputs - inputs.mean(axis=0), outputs - outputs.mean(axis=0)  # only what varies is known
        _, values, directions = np.linalg.svd(outputs, full_matrices=False)
        seen = directions[values > 1e-3 * values[0]].T if "head" not in path else np.eye(outputs.shape[1])
        # float32 activations; whitening lifts the weak directions, and with them the rounding
        atol = 0.05 if options.get("whitening") else 0.01
        assert relative(inputs @ moved[path] @ seen, inputs @ expected[path] @ seen) < atol, path
    assert set(prepared.info["left_out"]) == {
        path for path in tree.flatten(target) if path in ("class_token", "position") or "norm" in path
    }


def test_maps_are_those_of_plain_numpy():
    (source, finetuned), target = networks(MLP), random_params(MLP, seed=9, dtype=np.float32)
    sample = sample_of(MLP, 20)
    moved = tree.flatten(prepare("theseus", MLP, source, finetuned, target, sample=sample, centred=True).task_vector)
    images = sample.batch["image"].reshape(20, -1).astype(np.float64)
    ours, theirs = images, images
    for index in range(2):
        name = f"layer_{index}"
        before = [np.asarray(x, np.float64) for x in (ours, theirs)]
        after = [x @ p[name]["kernel"].astype(np.float64) for x, p in zip(before, (source, target), strict=True)]
        change = (finetuned[name]["kernel"] - source[name]["kernel"]).astype(np.float64)

        def rotation(x, y):
            left, values, right = np.linalg.svd((x - x.mean(axis=0)).T @ (y - y.mean(axis=0)), full_matrices=False)
            keep = values > 1e-6 * values[0]
            return left[:, keep] @ right[keep]

        to_inputs = np.eye(192) if index == 0 else rotation(*before)
        expected = to_inputs.T @ change @ rotation(*after)
        assert relative(moved[f"{name}/kernel"], expected) < 1e-3
        ours, theirs = (np.tanh(x + p[name]["bias"]) for x, p in zip(after, (source, target), strict=True))


def test_moments_do_not_depend_on_chunks_and_are_those_of_all_rows():
    source, target = networks(VIT)
    sample = sample_of(VIT, 11)
    grams = gather_grams(source, sample, chunk_size=4)
    pairs = gather_pairs(source, target, sample, chunk_size=4)
    sites = [record(VIT, params, {"image": sample.batch["image"]}) for params in (source, target)]
    for path, gram in grams.items():
        x, y = (np.asarray(site[path].inputs, np.float64) for site in sites)
        np.testing.assert_allclose(gram.gram, x.T @ x, atol=1e-5 * np.trace(x.T @ x))
        np.testing.assert_allclose(gram.covariance, np.cov(x.T, bias=True), atol=1e-5 * np.trace(x.T @ x) / len(x))
        assert gram.count == len(x)
        pair = pairs[path].inputs.centred()
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        np.testing.assert_allclose(pair.cross, x.T @ y, atol=1e-5 * np.sqrt(np.trace(x.T @ x) * np.trace(y.T @ y)))


def test_of_a_matrix_that_is_used_twice_rows_of_padding_do_not_count_in_either_use():
    """Three examples in chunks of two: a last chunk that is half padding."""

    def run(params, batch):
        once = batch["image"] @ params["mix"]["kernel"]
        return jnp.sum(jnp.tanh(once) @ params["mix"]["kernel"])

    def record_twice(params, batch):
        return record_gradients_of(run, params, batch)

    draw = np.random.default_rng(0)
    kernel = draw.normal(size=(4, 4)).astype(np.float32)
    images = draw.normal(size=(3, 5, 4)).astype(np.float32)  # [example, token, unit]
    sample = Sample("twice", {"image": images}, run, record_twice)
    gram = gather_grams({"mix": {"kernel": kernel}}, sample, chunk_size=2)["mix/kernel"]
    first = images.reshape(-1, 4).astype(np.float64)
    rows = np.concatenate([first, np.tanh(first @ kernel)])
    np.testing.assert_allclose(gram.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert gram.count == 30


def test_another_width_carries_what_was_embedded():
    """The target is the source in a wider stream: every matrix between isometries that the test knows."""
    wide = replace(MLP, widths=(23, 19))
    source, finetuned = networks(MLP)
    draw = np.random.default_rng(5)
    into = [np.linalg.qr(draw.normal(size=(w, v)))[0].T for w, v in zip(wide.widths, MLP.widths, strict=True)]
    before, target, truth = [np.eye(192), *into], {}, {}
    # tanh is odd and, where its input is small, linear: then any isometry of the hidden units passes it.
    networks_of = [
        {
            name: {
                "kernel": part["kernel"] * np.float32(1e-3 if name == "layer_0" else 1),
                "bias": part["bias"] * np.float32(name == "head"),
            }
            for name, part in params.items()
        }
        for params in (source, finetuned)
    ]
    for params, out in zip(networks_of, (target, truth), strict=True):
        for n, name in enumerate(("layer_0", "layer_1")):
            kernel = (before[n].T @ params[name]["kernel"] @ into[n]).astype(np.float32)
            out[name] = {"kernel": kernel, "bias": np.zeros(len(into[n].T), np.float32)}
        kernel = (into[1].T @ params["head"]["kernel"]).astype(np.float32)
        out["head"] = {"kernel": kernel, "bias": params["head"]["bias"]}
    sample = for_sizes(sample_of(wide, 256), MLP)
    prepared = prepare("theseus", wide, *networks_of, target, sample=sample)
    expected = tree.flatten(tree.task_vector(target, truth))
    for path, leaf in tree.flatten(prepared.task_vector).items():
        if np.any(expected[path]):
            assert relative(leaf, expected[path]) < 1e-2, path
    assert tree.flatten(apply_transport(prepared, target))["layer_1/kernel"].shape == (23, 19)


def test_a_transformer_of_another_width_takes_a_fine_tune():
    wide = replace(VIT, width=36, mlp_width=56)
    source, finetuned = networks(VIT)
    target = random_params(wide, seed=8, dtype=np.float32)
    sample = for_sizes(sample_of(wide, 32), VIT)
    prepared = prepare("theseus", wide, source, finetuned, target, sample=sample)
    moved = apply_transport(prepared, target)
    changed = {p for p, x in tree.flatten(moved).items() if not np.array_equal(x, tree.flatten(target)[p])}
    assert changed == {p for p in tree.flatten(target) if p.endswith(("kernel", "bias")) and "norm" not in p}
    other = prepared.move(tree.map_leaves(lambda _, x, y: 2 * y - x, source, finetuned))
    for path, leaf in tree.flatten(other).items():
        np.testing.assert_allclose(leaf, 2 * tree.flatten(prepared.task_vector)[path], atol=1e-5)


def test_bico_reads_labels_where_there_are_some():
    (source, finetuned), target = networks(MLP), random_params(MLP, seed=9, dtype=np.float32)
    sample = sample_of(MLP, 20)
    with_labels, without = (
        prepare("bico", MLP, source, finetuned, target, sample=one).task_vector
        for one in (sample, sample.without_labels())
    )
    assert relative(with_labels["layer_1"]["kernel"], without["layer_1"]["kernel"]) > 1e-2
    both = prepare("bico", MLP, source, finetuned, target, sample=sample, outputs="both").task_vector
    assert relative(with_labels["layer_1"]["kernel"], both["layer_1"]["kernel"]) > 1e-2


@pytest.mark.parametrize("method", ["theseus", "bico"])
def test_what_cannot_be_used_is_refused(method):
    (source, finetuned), target = networks(MLP), random_params(MLP, seed=9, dtype=np.float32)
    call = partial(prepare, method, MLP, source, finetuned)
    with pytest.raises(ConfigError, match="needs unlabelled inputs"):
        call(target)
    sample = sample_of(MLP, 4)
    with pytest.raises(DataError, match="no examples"):
        call(target, sample=sample.take([]))
    with pytest.raises(ConfigError, match="whitening"):
        call(target, sample=sample, whitening=0.7)
    with pytest.raises(ConfigError, match="recorded"):
        call(target, sample=replace(sample, record=None))
    with pytest.raises((NonFiniteError, DataError), match="NaN"):
        call(tree.map_leaves(lambda _, x: x * np.nan, target), sample=sample)
    if method == "bico":
        strange = replace(sample, batch={**sample.batch, "label": np.array([0, 1, 2, 9], np.int32)})
        with pytest.raises(DataError, match="labels 0 to 9, the network has 5 classes"):
            call(target, sample=strange)
    other = replace(MLP, num_outputs=7)
    with pytest.raises(ConfigError, match="5 entries in the source and 7"):
        prepare(
            method, other, source, finetuned, random_params(other, dtype=np.float32), sample=for_sizes(sample, other)
        )
