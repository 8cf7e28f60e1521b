"""The diagonal Fisher against loops over examples and classes, and on its way through a file into a merge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxtune as jt
from jaxtune import checkpoint, tree
from jaxtune.cli import main
from jaxtune.data import ArraySource
from jaxtune.errors import ConfigError, DataError, NonFiniteError, UnknownNameError
from jaxtune.evaluate.fisher import estimate_fisher, save_fisher
from jaxtune.models import mlp, registry
from jaxtune.sample import Sample
from jaxtune.sampling import make_sample

CONFIG = mlp.Config(image_shape=(3, 3, 1), widths=(7,), num_outputs=4, activation="tanh")


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, registry.init(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def sample():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (7, 3, 3, 1), dtype=np.uint8)
    labels = draw.integers(0, 4, 7).astype(np.int32)
    return make_sample(CONFIG, ArraySource("dots", "train", images, labels, ("a", "b", "c", "d")))


@partial(jax.jit, static_argnums=0)
def all_scores(forward, params, batch):
    """d log p(label) / d params for one example, every prediction and every label: [predictions, classes, ...]."""

    def log_probabilities(params):
        logits = forward(params, batch)[0]
        return jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))

    return log_probabilities(params), jax.jacrev(log_probabilities)(params)


def scores_of(forward, params, batch):
    inputs = {name: values for name, values in batch.items() if name not in ("label", "valid")}
    logs, scores = all_scores(forward, params, inputs)
    return np.exp(logs), {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(scores).items()}


def next_token(params, batch):
    """A language model of one token's memory."""
    hidden = jnp.tanh(params["embed"][batch["text"][:, :-1]])
    return hidden @ params["head"]


def assert_fisher(found, expected, **how):
    for path, leaf in tree.flatten(found).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-4, atol=1e-9, err_msg=path, **how)


def one_by_one(sample):
    for n in range(len(sample)):
        yield sample.take([n]).batch


@pytest.mark.parametrize(("chunk_size", "num_parts"), [(1, 1), (3, 2), (50, 9)])
def test_exact_is_the_sum_over_classes_weighed_by_their_probability(params, sample, chunk_size, num_parts):
    expected = dict.fromkeys(tree.flatten(params), 0.0)
    for batch in one_by_one(sample):
        probabilities, scores = scores_of(sample.forward, params, batch)
        for label in range(4):
            for path, leaf in scores.items():
                expected[path] += probabilities[0, label] * leaf[0, label] ** 2 / len(sample)
    found = estimate_fisher(params, sample.without_labels(), chunk_size=chunk_size, num_parts=num_parts)
    assert_fisher(found, expected)
    assert list(tree.flatten(found)) == list(tree.flatten(params))


def test_empirical_takes_the_labels_of_the_examples(params, sample):
    expected = dict.fromkeys(tree.flatten(params), 0.0)
    for batch in one_by_one(sample):
        for path, leaf in scores_of(sample.forward, params, batch)[1].items():
            expected[path] += leaf[0, batch["label"][0]] ** 2 / len(sample)
    assert_fisher(estimate_fisher(params, sample, labels="empirical", chunk_size=3), expected)


def test_draws_come_near_the_expectation_and_know_no_chunks(params, sample):
    exact = tree.flatten(estimate_fisher(params, sample))
    few, again = (estimate_fisher(params, sample, labels="sampled", num_draws=5, chunk_size=c) for c in (2, 7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), few, again)
    many = tree.flatten(estimate_fisher(params, sample, labels="sampled", num_draws=300))
    for path, leaf in exact.items():  # 2,100 draws: a fiftieth of what one scatters by
        np.testing.assert_allclose(many[path], leaf, atol=0.15 * leaf.max(), err_msg=path)
    other = estimate_fisher(params, sample, labels="sampled", num_draws=5, seed=1)
    assert not np.allclose(tree.flatten(other)["layer_0/kernel"], tree.flatten(few)["layer_0/kernel"])


def test_predictions_of_a_text_count_where_they_are_valid():
    draw = np.random.default_rng(0)
    params = {"embed": draw.normal(size=(5, 3)).astype(np.float32), "head": draw.normal(size=(3, 5)).astype(np.float32)}
    text = np.array([[1, 2, 3, 4], [4, 0, 1, 1]], np.int32)
    valid = np.array([[True] * 3, [True, True, False]])
    sample = Sample("texts", {"text": text, "label": text[:, 1:], "valid": valid}, next_token)
    expected = dict.fromkeys(params, 0.0)
    for batch in one_by_one(sample):
        probabilities, scores = scores_of(next_token, params, batch)
        for place in np.flatnonzero(batch["valid"][0]):
            for label in range(5):
                for path, leaf in scores.items():
                    expected[path] += probabilities[place, label] * leaf[place, label] ** 2 / 2
    found = estimate_fisher(params, sample)
    assert_fisher(found, expected)
    # Several labels drawn at once are squared together; their cross terms vanish in the mean.
    drawn = tree.flatten(estimate_fisher(params, sample, labels="sampled", num_draws=600))
    path = max(expected, key=lambda path: expected[path].max())
    np.testing.assert_allclose(drawn[path], expected[path], atol=0.25 * expected[path].max())


def save(folder, params, config):
    return jt.load(jt.save(folder, params, config=registry.config_to_dict(config)))


def test_a_fisher_goes_through_its_file_into_a_merge(params, sample, tmp_path):
    models = [params, tree.map_leaves(lambda _, x: x + np.float32(0.3) * np.sign(x), params)]
    fishers, entries = [], []
    for n, model in enumerate(models):
        loaded = save(tmp_path / f"model_{n}", model, CONFIG)
        fishers.append(estimate_fisher(loaded.params, sample))
        where = save_fisher(tmp_path / f"fisher_{n}", fishers[-1], loaded)
        entries.append({"model": str(loaded.path), "data": str(where), "parameters": {"weight": 1.0}})
    recipe = {"merge_method": "fisher", "models": entries, "parameters": {"normalize": False, "floor": 0.0},
              "dtype": "float32"}  # fmt: skip
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "out")]) == 0
    for path, leaf in tree.flatten(jt.load(tmp_path / "out").params).items():
        first, second = (np.asarray(tree.flatten(one)[path], np.float64) for one in models)
        ours, theirs = (np.asarray(tree.flatten(one)[path], np.float64) for one in fishers)
        both = ours + theirs
        expected = np.where(
            both > 0, (ours * first + theirs * second) / np.where(both > 0, both, 1), (first + second) / 2
        )
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_fisher_is_stored_under_the_names_of_another_library(tmp_path):
    """GPT-2 as transformers stores it: fused projections, kernels the other way round."""
    pytest.importorskip("transformers")
    from hub_decoders import make_model
    from hub_models import write_folder

    sizes = {"vocab_size": 13, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    write_folder(tmp_path / "gpt2", make_model("GPT2LMHeadModel", **sizes))
    loaded = jt.load(tmp_path / "gpt2")
    marks = tree.map_leaves(lambda _, x: np.asarray(x, np.float32) ** 2, loaded.params)
    stored = tree.flatten(checkpoint.load(save_fisher(tmp_path / "fisher", marks, loaded), config={}).params)
    tensors = tree.flatten(checkpoint.load(tmp_path / "gpt2", config={}).params)
    assert stored.keys() == tensors.keys()
    for name, leaf in tensors.items():
        np.testing.assert_array_equal(stored[name], np.asarray(leaf, np.float32) ** 2, err_msg=name)


def test_what_cannot_be_estimated_is_refused(params, sample):
    with pytest.raises(UnknownNameError, match="empirical, exact, sampled"):
        estimate_fisher(params, sample, labels="true")
    with pytest.raises(DataError, match="no labels"):
        estimate_fisher(params, sample.without_labels(), labels="empirical")
    with pytest.raises(DataError, match="no examples"):
        estimate_fisher(params, sample.take([]))
    with pytest.raises(ConfigError, match="num_parts 0"):
        estimate_fisher(params, sample, num_parts=0)
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        estimate_fisher(tree.map_leaves(lambda _, x: x * jnp.nan, params), sample)
