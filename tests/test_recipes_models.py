"""Models of recipes that are more than a folder: with an adapter, or carried over from another base."""

import numpy as np
import peft_models
import pytest
from recipe_oracle import model_folder

import jaxtune as jt
from jaxtune import checkpoint
from jaxtune.lazy import is_lazy
from jaxtune.recipes.carry import carry_models
from jaxtune.recipes.jobs import Transported
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe
from jaxtune.recipes.resolve import resolve
from jaxtune.tree import flatten

pytest.importorskip("peft")


@pytest.mark.parametrize("name", ["llama, every linear", "llama, table, regex", "llama, biases, saved modules", "gpt2"])
def test_an_adapted_model_is_the_one_that_peft_merges(name, tmp_path):
    base, adapter, _ = peft_models.write_case(tmp_path, name)
    merged = peft_models.load_with_peft(base, adapter).merge_and_unload()
    recipe = {"models": [{"model": f"{base}+{adapter}"}], "merge_method": "task_arithmetic", "base_model": str(base)}
    jobs = resolve(read_recipe(recipe))
    ours = flatten(jobs.models[1].params)
    theirs = merged.state_dict()
    assert {job.sources[0].name for job in jobs.jobs} == set(ours)
    assert any(map(is_lazy, ours.values()))
    assert not all(map(is_lazy, ours.values()))
    for tensor, leaf in ours.items():
        np.testing.assert_allclose(np.asarray(leaf), theirs[tensor].numpy(), rtol=2e-6, atol=2e-6, err_msg=tensor)


def test_an_adapter_alone_or_of_another_base_is_refused(tmp_path):
    base, adapter, _ = peft_models.write_case(tmp_path, "llama")
    with pytest.raises(RecipeError, match=r"is an adapter\. Name its base too: BASE"):
        resolve(read_recipe({"models": [{"model": str(adapter)}], "merge_method": "linear"}))
    with pytest.raises(RecipeError, match="is no adapter"):
        resolve(read_recipe({"models": [{"model": f"{base}+{base}"}], "merge_method": "linear"}))
    other = model_folder(tmp_path, "bert")
    with pytest.raises(RecipeError, match=r"does not fit|does not have"):
        resolve(read_recipe({"models": [{"model": f"{other}+{adapter}"}], "merge_method": "linear"}))


@pytest.mark.parametrize("method", ["identity", "permutation"])
def test_a_model_of_another_base_is_carried_over_first(method, tmp_path):
    old, tuned, new, other = (str(model_folder(tmp_path, "llama", seed)) for seed in range(4))
    recipe = {
        "models": [
            {"model": tuned, "transport": {"base": old, "method": method, "scale": 0.5}},
            {"model": other},
        ],
        "merge_method": "ties",
        "base_model": new,
    }
    jobs = resolve(read_recipe(recipe))
    at = next(index for index, model in enumerate(jobs.models) if isinstance(model, Transported))
    assert {source.model for job in jobs.jobs for source in job.sources if source.model == at} == {at}
    carried = carry_models(jobs).models[at]
    expected = jt.transport(old, tuned, new, method=method, scale=0.5, verify=False).params
    jt.save(tmp_path / "expected", expected, like=jt.load(new))
    stored = flatten(checkpoint.load(tmp_path / "expected").params)
    ours = flatten(carried.params)
    assert ours.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_allclose(np.asarray(ours[name]), tensor, rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_transport_says_what_it_lacks(tmp_path):
    old, tuned, new = (str(model_folder(tmp_path, "llama", seed)) for seed in range(3))
    entry = {"model": tuned, "transport": {"base": old, "method": "fulll"}}
    recipe = {"models": [entry], "merge_method": "ties", "base_model": new}
    with pytest.raises(
        RecipeError, match=r"models\[0\].transport: unknown transport method 'fulll'. Did you mean 'full'"
    ):
        resolve(read_recipe(recipe))
    entry["transport"] = {"base": old, "sclae": 1}
    with pytest.raises(RecipeError, match="Did you mean 'scale'"):
        resolve(read_recipe(recipe))
    wide = str(model_folder(tmp_path, "llama", 5, intermediate_size=80))
    entry["transport"] = {"base": wide}
    with pytest.raises(RecipeError, match=r"mlp_width: its former base 80, base_model 64"):
        resolve(read_recipe(recipe))
    entry["transport"] = {"base": old}
    with pytest.raises(RecipeError, match="a transport needs base_model"):
        resolve(read_recipe({"models": [entry], "merge_method": "linear"}))
