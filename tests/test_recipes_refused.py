"""What cannot be merged is said at once, with names; what merely differs is a note."""

import json
import re
import shutil

import numpy as np
import pytest
from recipe_oracle import model_folder

from jaxtune import checkpoint
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe
from jaxtune.recipes.resolve import resolve
from jaxtune.tree import flatten

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llamas(place):
    return [str(model_folder(place, "llama", seed)) for seed in range(3)]


def recipe_of(base, *models, method="ties", **more):
    return {"models": [{"model": str(m)} for m in models], "merge_method": method, "base_model": str(base), **more}


def refuse(recipe):
    with pytest.raises(RecipeError) as caught:
        resolve(read_recipe(recipe))
    return str(caught.value)


def change_config(folder, target, **fields):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def change_tensors(folder, target, change):
    stored = checkpoint.load(folder)
    checkpoint.save(target, change(dict(flatten(stored.params))), config=stored.config)
    return target


def test_everything_is_said_at_once(place, llamas):
    deep = model_folder(place, "llama", 3, num_hidden_layers=3)
    wide = model_folder(place, "llama", 4, intermediate_size=80, vocab_size=100)
    message = refuse(recipe_of(llamas[0], deep, wide))
    assert "for 4 reasons" in message
    assert f"number of layers: {deep} 3, {wide} 2, {llamas[0]} 2" in message
    assert f"intermediate_size: {llamas[0]} 64, {wide} 80" in message
    assert f"vocabularies differ: {deep} 96 rows, {wide} 100 rows, {llamas[0]} 96 rows. Nothing is cut" in message
    assert "shapes differ in 6 tensors" in message
    assert "model.layers.0.mlp.up_proj.weight: " in message
    assert f"{wide} [80, 48], {llamas[0]} [64, 48]" in message


def test_models_that_are_not_there_are_said_together(llamas):
    message = refuse(recipe_of("/nowhere/base", "org/a", llamas[0], "./b"))
    assert "3 models cannot be opened" in message
    assert all(word in message for word in ("'/nowhere/base'", "hf download org/a", "'./b'"))


def test_shapes_are_said_for_the_first_twelve(llamas, tmp_path):
    cut = change_tensors(llamas[1], tmp_path / "cut", lambda tensors: {k: v[:-1] for k, v in tensors.items()})
    message = refuse(recipe_of(llamas[0], cut))
    assert "shapes differ in 19 tensors" in message
    assert "... and 7 more" in message


def test_missing_and_extra_tensors_are_named(llamas, tmp_path):
    def drop(tensors):
        return {name: tensor for name, tensor in tensors.items() if "self_attn" not in name}

    def add(tensors):
        return tensors | {"model.layers.1.extra.weight": np.zeros(3, np.float32)}

    less = change_tensors(llamas[1], tmp_path / "less", drop)
    more = change_tensors(llamas[2], tmp_path / "more", add)
    message = refuse(recipe_of(llamas[0], less, more))
    assert f"{less} lacks 8 tensors that {more}, {llamas[0]} have: model.layers.0.self_attn.k_proj.weight" in message
    assert f"{llamas[0]} lacks 1 tensor that {more} has: model.layers.1.extra.weight" in message


def test_another_family_is_refused_and_can_be_overridden(place, llamas):
    mistral = model_folder(place, "mistral", 1, sliding_window=None)
    message = refuse(recipe_of(llamas[0], mistral))
    assert "is llama (LlamaForCausalLM)" in message
    assert "is mistral (MistralForCausalLM)" in message
    same = {"model": {"path": str(mistral)}, "override_architecture": "LlamaForCausalLM"}
    recipe = {"models": [{"model": same}], "merge_method": "ties", "base_model": llamas[0]}
    assert len(resolve(read_recipe(recipe)).jobs) == 21


def test_heads_that_differ_in_number_are_refused(llamas, tmp_path):
    other = change_config(llamas[1], tmp_path / "heads", num_attention_heads=2, num_key_value_heads=1, head_dim=24)
    assert f"num_attention_heads: {llamas[0]} 4, {other} 2" in refuse(recipe_of(llamas[0], other))


def test_rotary_bases_norms_and_dtypes_that_differ_are_notes(llamas, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    other = change_config(llamas[1], tmp_path / "other", rope_parameters=rope, rms_norm_eps=1e-5, sliding_window=8)
    half = change_tensors(other, tmp_path / "half", lambda ts: {k: v.astype(np.float16) for k, v in ts.items()})
    jobs = resolve(read_recipe(recipe_of(llamas[0], half)))
    notes = "\n".join(jobs.notes)
    assert (
        f"rotary positions differ in rope_theta: {llamas[0]} 10000.0, {half} 1000000.0; the result has 10000.0" in notes
    )
    assert f"norms differ in rms_norm_eps: {llamas[0]} 1e-06, {half} 1e-05" in notes
    assert f"stored dtypes differ: {llamas[0]} float32; {half} float16" in notes
    assert {str(job.out_dtype) for job in jobs.jobs} == {"float32"}
    older = {key: value for key, value in jobs.config.items() if key != "rope_parameters"} | {"rope_theta": 10000.0}
    old = change_config(llamas[1], tmp_path / "old", rope_parameters=None)
    (old / "config.json").write_text(json.dumps(older))
    assert not [note for note in resolve(read_recipe(recipe_of(llamas[0], old))).notes if "rotary" in note]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("float16", "float16"), "float16"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float16"), "float32"),
        (("float64", "float32"), "float64"),
    ],
)
def test_the_result_holds_every_stored_dtype(dtypes, expected, llamas, tmp_path):
    import ml_dtypes

    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
    folders = []
    for at, name in enumerate(dtypes):

        def cast(tensors, kind=kinds[name]):
            return {key: value.astype(kind) for key, value in tensors.items()}

        folders.append(change_tensors(llamas[at], tmp_path / f"{at}", cast))
    jobs = resolve(read_recipe({"models": [{"model": str(f)} for f in folders], "merge_method": "linear"}))
    assert {str(job.out_dtype) for job in jobs.jobs} == {expected}
    assert {job.dtype for job in jobs.jobs} == {None}


def test_integers_are_copied_and_must_be_of_one_dtype(llamas, tmp_path):
    def count(tensors, kind):
        return tensors | {"model.steps": np.zeros((), kind)}

    first = change_tensors(llamas[0], tmp_path / "a", lambda tensors: count(tensors, np.int64))
    second = change_tensors(llamas[1], tmp_path / "b", lambda tensors: count(tensors, np.int64))
    third = change_tensors(llamas[1], tmp_path / "c", lambda tensors: count(tensors, np.int32))
    jobs = resolve(read_recipe(recipe_of(first, second, dtype="bfloat16")))
    (steps,) = [job for job in jobs.jobs if job.name == "model.steps"]
    assert (steps.method, str(steps.out_dtype), steps.dtype, len(steps.sources)) == ("copy", "int64", None, 2)
    assert "integers are copied" in refuse(recipe_of(first, third))


def test_what_a_network_computes_itself_is_the_bases(llamas, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = change_tensors(llamas[0], tmp_path / "a", lambda tensors: tensors | {name: np.ones(6, np.float32)})
    for recipe in (recipe_of(base, llamas[1]), recipe_of(llamas[1], base)):
        jobs = resolve(read_recipe(recipe))
        assert [job.method for job in jobs.jobs if job.name == name] == (
            ["copy"] if jobs.models[0].path == base else []
        )


def test_quantised_weights_are_refused(llamas, tmp_path):
    codes = change_config(llamas[1], tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are quantised" in refuse(recipe_of(llamas[0], codes))


@pytest.mark.parametrize(
    ("method", "count", "with_base", "words"),
    [
        ("ties", 1, False, "works on task vectors and needs a base"),
        ("slerp", 2, True, "takes 1 models beside the base, got 2"),
        ("nuslerp", 1, True, "takes 2 models, got 1"),
        ("model_stock", 1, True, "takes 2 or more models beside the base, got 1"),
        ("passthrough", 1, True, "takes 1 models, got 2"),
    ],
)
def test_numbers_of_models(method, count, with_base, words, llamas):
    recipe = recipe_of(llamas[0], *llamas[1 : 1 + count], method=method, parameters={"t": 0.5})
    if not with_base:
        del recipe["base_model"]
    assert words in refuse(recipe)


def test_a_model_twice_is_refused(llamas):
    assert "goes in twice" in refuse(recipe_of(llamas[0], llamas[1], llamas[1]))


def test_layers_that_a_model_has_not_are_refused(llamas):
    recipe = {"slices": [{"sources": [{"model": llamas[0], "layer_range": [1, 3]}]}], "merge_method": "passthrough"}
    assert "slices[0].sources[0]: layer_range [1, 3], and the model has 2 layers" in refuse(recipe)


def test_parameters_are_known_by_name(llamas):
    recipe = recipe_of(llamas[0], llamas[1], parameters={"wieght": 1})
    assert "parameters.wieght: unknown parameter 'wieght' of ties. Did you mean 'weight'?" in refuse(recipe)
    assert "slerp needs the parameter 't'" in refuse(recipe_of(llamas[0], llamas[1], method="slerp"))
    assert "density" in refuse(recipe_of(llamas[0], llamas[1], parameters={"density": 1.5}))
    assert "weight: expected a finite number, found 'much'" in refuse(
        recipe_of(llamas[0], llamas[1], parameters={"weight": "much"})
    )
    recipe = recipe_of(llamas[0], llamas[1], method="slerp", parameters={"t": 0.5, "density": 0.5})
    assert "parameters.density: slerp has no parameter density; it has no effect" in resolve(read_recipe(recipe)).notes
    recipe = recipe_of(llamas[0], llamas[1])
    recipe["models"][0]["parameters"] = {"normalize": False}
    (note,) = [note for note in resolve(read_recipe(recipe)).notes if "normalize" in note]
    assert "of a single model it has no effect" in note


def test_a_weight_for_some_models_alone_is_an_oversight(llamas):
    recipe = recipe_of(llamas[0], llamas[1], llamas[2], method="linear")
    for model in recipe["models"]:
        model["parameters"] = {"weight": 0.5}
    assert f"some models have a weight, and {llamas[0]} has none" in refuse(recipe)
    text = f"merge_method: linear\nmodels:\n- {{model: {llamas[1]}, parameters: {{weight: 1}}}}\n- model: {llamas[2]}\n"
    assert "line 4, column 3: models[1]: linear: some models have a weight" in refuse(text)


def test_a_value_out_of_range_is_named_where_it_stands(llamas):
    text = f"""merge_method: ties
base_model: {llamas[0]}
models:
  - model: {llamas[1]}
    parameters:
      weight: 0.5
      density: 1.4
"""
    assert "line 7, column 16: models[0].parameters.density: " in refuse(text)
    assert "expected a number from 0 to 1, got 1.4" in refuse(text)
    shared = text.replace("      density: 1.4\n", "parameters: {density: [0.5, 2]}\n")
    assert "line 7, column 23: parameters.density: " in refuse(shared)


def test_presets_are_the_peers_conventions(llamas):
    ours = resolve(read_recipe(recipe_of(llamas[0], llamas[1])))
    peft = resolve(read_recipe(recipe_of(llamas[0], llamas[1], preset="peft", parameters={"density": 0.5})))
    assert ours.jobs[0].options["weigh_votes"] is True
    assert peft.jobs[0].options["weigh_votes"] is False
    assert peft.jobs[0].options["density"] == (0.5,)
    assert "has no preset 'pfet'. Did you mean 'peft'" in refuse(recipe_of(llamas[0], llamas[1], preset="pfet"))


def test_post_steps_are_known_by_name(llamas):
    jobs = resolve(read_recipe(recipe_of(llamas[0], llamas[1], post=[{"lines": {"alpha": 0.5}}])))
    assert jobs.jobs[0].post == (("lines", {"alpha": 0.5}),)
    assert "unknown post-step 'lnes'. Did you mean 'lines'" in refuse(recipe_of(llamas[0], llamas[1], post=["lnes"]))
    assert "unknown option 'aplha' of lines" in refuse(recipe_of(llamas[0], llamas[1], post=[{"lines": {"aplha": 1}}]))


@pytest.mark.parametrize(
    ("post", "words"),
    [
        ({"lines": {}}, "post[0]: lines needs the option 'alpha', a number or 'balanced'"),
        ("lines", "lines needs the option 'alpha'"),
        ({"lines": {"alpha": "balance"}}, "post[0].lines.alpha: expected a finite number, found 'balance'"),
        ({"lines": {"alpha": [0.1, 0.5]}}, "post[0].lines.alpha: expected one value"),
        ({"lines": {"alpha": -1}}, "post[0]: option 'alpha': expected a number from 0"),
        ({"lines": {"alpha": 1, "place": 2}}, "unknown option 'place' of lines"),
        ({"subspace_boosting": {"beta": "much"}}, "post[0].subspace_boosting.beta: expected a finite number"),
        ({"subspace_boosting": {"beta": 2}}, "option 'beta': expected a number from 0 to 1"),
    ],
)
def test_values_of_post_steps_are_checked_before_anything_is_read(post, words, llamas):
    recipe = {
        "merge_method": "task_arithmetic",
        "models": [{"model": llamas[1]}],
        "base_model": llamas[0],
        "post": [post],
    }
    with pytest.raises(RecipeError, match=re.escape(words)):
        resolve(read_recipe(recipe))


def test_a_slice_of_the_base_alone_is_the_base(llamas):
    recipe = {
        "slices": [
            {"sources": [{"model": llamas[0], "layer_range": [0, 1]}]},
            {"sources": [{"model": name, "layer_range": [1, 2]} for name in llamas[:2]]},
        ],
        "merge_method": "ties",
        "base_model": llamas[0],
    }
    jobs = {job.name: job for job in resolve(read_recipe(recipe)).jobs}
    assert jobs["model.layers.0.mlp.up_proj.weight"].method == "copy"
    assert jobs["model.layers.1.mlp.up_proj.weight"].method == "ties"
    jobs = {job.name: job for job in resolve(read_recipe({**recipe, "dtype": "bfloat16"})).jobs}
    alone = jobs["model.layers.0.mlp.up_proj.weight"]
    assert (alone.method, alone.options, str(alone.dtype)) == ("passthrough", {"scale": (None,)}, "bfloat16")
    recipe["merge_method"] = "slerp"
    assert "takes 1 models beside the base, got 0" in refuse({**recipe, "parameters": {"t": 0.5}})


def test_a_base_that_a_slice_leaves_out_is_named(llamas):
    recipe = {
        "slices": [{"sources": [{"model": name, "layer_range": [0, 2]} for name in llamas[1:]]}],
        "merge_method": "nuslerp",
        "base_model": llamas[0],
    }
    assert "slices[0]: nuslerp takes base_model for the base of a slice: name it among the sources" in refuse(recipe)
