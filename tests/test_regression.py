"""Grams through their file into a merge, and the closed forms that gather their own."""

import numpy as np
import pytest
from small_models import SIZES, random_params
from test_transport_activations import sample_of

import jaxtune as jt
from jaxtune import checkpoint, tree
from jaxtune.compose.regression import lot, regmean, regmean_plus
from jaxtune.errors import ConfigError, DataError
from jaxtune.evaluate.grams import save_grams, stored_grams
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.models import mlp, registry, vit
from jaxtune.moments import gather_grams
from jaxtune.sampling import make_text_sample

MLP = mlp.Config(image_shape=(8, 8, 3), widths=(17, 13), num_outputs=5, activation="tanh")
VIT = vit.Config(**SIZES | {"depth": 1})


def fine_tunes(config, num=2):
    """(base, fine-tunes)."""
    base = random_params(config, dtype=np.float32)
    noise = [random_params(config, seed=n + 1, dtype=np.float32) for n in range(num)]
    return base, [tree.map_leaves(lambda _, x, y: x + np.float32(0.2) * y, base, one) for one in noise]


@pytest.fixture(scope="module")
def task_samples():
    sample = sample_of(VIT, 24)
    return [sample.take(range(12)), sample.take(range(12, 24))]


def test_grams_go_through_their_files_into_a_merge(task_samples, tmp_path):
    _, models = fine_tunes(VIT)
    entries, grams = [], []
    for n, (params, sample) in enumerate(zip(models, task_samples, strict=True)):
        jt.save(tmp_path / f"m{n}", params, config=registry.config_to_dict(VIT))
        loaded = jt.load(tmp_path / f"m{n}")
        grams.append(gather_grams(loaded.params, sample, chunk_size=5))
        where = save_grams(tmp_path / f"grams_{n}", grams[-1], loaded)
        entries.append({"model": str(tmp_path / f"m{n}"), "data": str(where)})
    recipe = {"merge_method": "regmean", "models": entries, "parameters": {"off_diagonal": 0.9}}
    jt.merge_recipe(recipe, tmp_path / "out")
    merged = tree.flatten(jt.load(tmp_path / "out").params)
    for path in ("block_0/mlp/up/kernel", "block_0/attn/q/kernel", "block_0/attn/out/kernel", "patch/kernel"):
        above = below = 0.0
        for params, own in zip(models, grams, strict=True):
            gram = own[path].gram * np.where(np.eye(len(own[path].gram)), 1.0, 0.9)
            weights = tree.flatten(params)[path].astype(np.float64)
            above, below = above + gram @ weights.reshape(len(gram), -1), below + gram
        expected = np.linalg.solve(below, above).reshape(merged[path].shape)
        # Grams and result are float32; of the weak directions float32 knows little.
        np.testing.assert_allclose(merged[path], expected, atol=2e-3 * np.abs(expected).max(), err_msg=path)
    bias = "block_0/mlp/up/bias"
    np.testing.assert_allclose(merged[bias], np.mean([tree.flatten(p)[bias] for p in models], axis=0), atol=1e-6)


def test_grams_are_stored_under_the_names_of_another_library(tmp_path):
    """GPT-NeoX keeps queries, keys and values of every head in one tensor; GPT-2 keeps inputs first."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "bos_token_id": 1, "eos_token_id": 2}
    neox = transformers.GPTNeoXConfig(
        **sizes, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    gpt2 = transformers.GPT2Config(**sizes, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    transformers.GPTNeoXForCausalLM(neox).save_pretrained(tmp_path / "neox")
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    loaded = jt.load(tmp_path / "neox")
    text = np.random.default_rng(0).integers(0, 31, (6, 8))
    grams = gather_grams(loaded.params, make_text_sample(registry.config_from_dict(loaded.config), text))
    found = stored_grams(grams, loaded)
    assert {name.split("layers.0.")[-1]: found[name].shape for name in found} == {
        "attention.query_key_value.weight": (16, 16),
        "attention.dense.weight": (16, 16),
        "mlp.dense_h_to_4h.weight": (16, 16),
        "mlp.dense_4h_to_h.weight": (20, 20),
        "embed_out.weight": (16, 16),
    }
    name = next(name for name in found if name.endswith("attention.dense.weight"))
    np.testing.assert_array_equal(found[name], grams["block_0/attn/out/kernel"].gram)
    written = tree.flatten(checkpoint.load(save_grams(tmp_path / "grams", grams, loaded), config={}).params)
    assert written.keys() == found.keys()
    other = jt.load(tmp_path / "gpt2")
    grams = gather_grams(other.params, make_text_sample(registry.config_from_dict(other.config), text))
    assert not [name for name in stored_grams(grams, other) if "h.0" in name]


def test_regmean_is_the_merge_method_on_gathered_grams(task_samples):
    base, models = fine_tunes(VIT)
    ours = tree.flatten(regmean(base, models, task_samples).params)
    grams = [
        {path: gram.gram for path, gram in gather_grams(params, sample).items()}
        for params, sample in zip(models, task_samples, strict=True)
    ]
    theirs = merge_trees(METHODS["regmean"], models, extras=[tree.unflatten(one) for one in grams], ridge=1e-6)
    for path, leaf in tree.flatten(theirs).items():
        np.testing.assert_allclose(ours[path], leaf, atol=1e-4, err_msg=path)


def test_lot_is_a_least_squares_fit_of_task_vectors():
    base, models = fine_tunes(MLP)
    sample = sample_of(MLP, 60)
    samples = [sample.take(range(30)), sample.take(range(30, 60))]
    found = lot(base, models, samples, ridge=1e-9, scale=0.5).params
    # Second layer: rows of both tasks stacked, each with its own answers.
    rows, answers = [], []
    for params, one in zip(models, samples, strict=True):
        images = one.batch["image"].reshape(30, -1).astype(np.float64)
        hidden = np.tanh(images @ params["layer_0"]["kernel"].astype(np.float64) + params["layer_0"]["bias"])
        rows.append(hidden)
        answers.append(hidden @ (params["layer_1"]["kernel"] - base["layer_1"]["kernel"]).astype(np.float64))
    change = np.linalg.lstsq(np.concatenate(rows), np.concatenate(answers), rcond=None)[0]
    expected = base["layer_1"]["kernel"] + 0.5 * change
    np.testing.assert_allclose(found["layer_1"]["kernel"], expected, atol=1e-3)
    biases = np.mean([params["head"]["bias"] for params in models], axis=0)
    np.testing.assert_allclose(found["head"]["bias"], 0.5 * (base["head"]["bias"] + biases), atol=1e-6)


def test_regmean_plus_sees_what_is_merged_already():
    """Two layers by hand: the second layer's Grams are those behind the merged first one."""
    base, models = fine_tunes(MLP)
    sample = sample_of(MLP, 400)
    samples = [sample.take(range(200)), sample.take(range(200, 400))]
    found = regmean_plus(base, models, samples, off_diagonal=1.0, ridge=1e-9).params
    inputs = [one.batch["image"].reshape(200, -1).astype(np.float64) for one in samples]
    for name in ("layer_0", "layer_1", "head"):
        kernels = [params[name]["kernel"].astype(np.float64) for params in models]
        grams = [x.T @ x for x in inputs]
        kernel = np.linalg.solve(sum(grams), sum(g @ k for g, k in zip(grams, kernels, strict=True)))
        np.testing.assert_allclose(found[name]["kernel"], kernel, atol=2e-3, err_msg=name)
        bias = np.mean([params[name]["bias"] for params in models], axis=0)
        inputs = [np.tanh(x @ kernel + bias) for x in inputs]
    plain = regmean(base, models, samples, off_diagonal=1.0, ridge=1e-9).params
    np.testing.assert_allclose(plain["layer_0"]["kernel"], found["layer_0"]["kernel"], atol=1e-6)
    assert np.abs(plain["head"]["kernel"] - found["head"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("method", [regmean, regmean_plus, lot])
def test_one_model_stays_what_it_is(method):
    base, models = fine_tunes(MLP, 1)
    found = method(base, models, [sample_of(MLP, 400)]).params
    for path, leaf in tree.flatten(found).items():
        # The ridge of 1e-6 pulls the weakest inputs of lot towards the base.
        np.testing.assert_allclose(leaf, tree.flatten(models[0])[path], atol=1e-2 if method is lot else 1e-5)


@pytest.mark.parametrize("method", [regmean, regmean_plus, lot])
def test_what_cannot_be_used_is_refused(method):
    base, models = fine_tunes(MLP)
    sample = sample_of(MLP, 4)
    with pytest.raises(ConfigError, match="2 models and 1 samples"):
        method(base, models, [sample])
    with pytest.raises(DataError, match="no examples"):
        method(base, models, [sample, sample.take([])])
    with pytest.raises(ConfigError, match="ridge"):
        method(base, models, [sample, sample], ridge=0.0)
