"""Recipes become the jobs that mergekit plans: the same sources, layers and parameters for every tensor."""

import json
import shutil

import numpy as np
import pytest
from recipe_oracle import assert_same_plan, model_folder, plan_with_mergekit

from jaxtune import checkpoint
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe, read_recipes
from jaxtune.recipes.resolve import plan_result, resolve
from jaxtune.tree import flatten

pytest.importorskip("mergekit")

TIES = """
models:
  - model: {a}
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: {b}
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: {c}
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: {base}
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
GRADIENT_SLERP = """
slices:
  - sources:
      - model: {a}
        layer_range: [0, 4]
      - model: {b}
        layer_range: [0, 4]
merge_method: slerp
base_model: {a}
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
FRANKENMERGE = """
slices:
  - sources:
    - model: {a}
      layer_range: [0, 3]
  - sources:
    - model: {b}
      layer_range: [1, 4]
merge_method: passthrough
dtype: float16
"""
RECIPES = {
    "bio-merge": """
models:
  - model: {a}
    parameters: {{density: 0.5, weight: 0.5}}
  - model: {b}
    parameters: {{density: 0.5, weight: 0.5}}
merge_method: ties
base_model: {base}
parameters: {{normalize: false, int8_mask: true}}
dtype: float16
""",
    "gradient-slerp": GRADIENT_SLERP,
    "linear": """
models:
  - model: {a}
    parameters: {{weight: 1.0}}
  - model: {b}
    parameters: {{weight: 0.3}}
  - model: {c}
    parameters: {{weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "frankenmerge": FRANKENMERGE,
    "ties": TIES,
    "arcee_fusion": "models: [{{model: {a}}}]\nmerge_method: arcee_fusion\nbase_model: {base}\ndtype: bfloat16\n",
    "base among the models": """
models:
  - model: {b}
    parameters: {{weight: 0.5}}
  - model: {base}
  - model: {a}
    parameters: {{weight: [1e-5, 1e-3]}}
merge_method: dare_linear
base_model: {base}
parameters: {{density: 0.5, lambda: [0.5, 1.5], rescale: [true, false]}}
out_dtype: bfloat16
""",
    "four levels": """
modules:
  default:
    parameters: {{density: [0.9, 0.1], weight: 3}}
    slices:
      - parameters: {{weight: {{filter: q_proj, value: [4, 8]}}}}
        sources:
          - {{model: {base}, layer_range: [0, 3]}}
          - {{model: {a}, layer_range: [0, 3], parameters: {{density: [{{filter: mlp, value: [0.2, 0.4]}}]}}}}
      - base_model: {c}
        sources:
          - {{model: {b}, layer_range: [1, 2], parameters: {{weight: [5, 7]}}}}
          - {{model: {c}, layer_range: [3, 4]}}
merge_method: ties
base_model: {base}
parameters: {{weight: 2, lambda: [{{filter: norm, value: 0.25}}, {{filter: "*", value: [0.5, 1]}}]}}
""",
    "nuslerp without a base": """
models:
  - {{model: {a}, parameters: {{weight: 0.25}}}}
  - {{model: {b}, parameters: {{weight: 0.75}}}}
merge_method: nuslerp
parameters: {{nuslerp_flatten: false}}
""",
    "linear with a base": """
models: [{{model: {a}}}, {{model: {b}}}]
merge_method: linear
base_model: {base}
parameters: {{weight: [0.25, 0.5]}}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llamas(place):
    names = {"base": 0, "a": 1, "b": 2, "c": 3}
    return {name: model_folder(place, "llama", seed, num_hidden_layers=4) for name, seed in names.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_is_mergekits(name, llamas):
    text = RECIPES[name].format(**llamas)
    planned, config = plan_with_mergekit(text)
    jobs = resolve(read_recipe(text))
    assert_same_plan(jobs, planned, [str(model.path) for model in jobs.models])
    assert jobs.config["num_hidden_layers"] == config.num_hidden_layers
    dtypes = {str(job.out_dtype) for job in jobs.jobs}
    asked = [line.split(": ")[1] for line in text.splitlines() if line.startswith(("dtype", "out_dtype"))]
    assert dtypes == set(asked or ["float32"])
    assert jobs.config["dtype"] == (asked or ["float32"])[0]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "gemma2", "phi3", "mistral", "bert", "roberta"])
def test_the_plan_is_mergekits_in_other_families(family, place):
    count = "n_layer" if family == "gpt2" else "num_hidden_layers"
    base, first, second = (str(model_folder(place, family, seed, **{count: 3})) for seed in range(3))
    weight = "[{filter: attn, value: [0, 1]}, {filter: attention, value: [0, 1]}, {value: 0.5}]"
    text = f"""
models:
  - {{model: {first}, parameters: {{weight: {weight}}}}}
  - {{model: {second}, parameters: {{weight: [0.25, 0.5]}}}}
merge_method: task_arithmetic
base_model: {base}
"""
    planned, _ = plan_with_mergekit(text)
    jobs = resolve(read_recipe(text))
    ours = {job.name for job in jobs.jobs}
    # mergekit's tables leave out a tied head; where its tables lack a tensor, it would not be in the result at all.
    planned = {name: plan for name, plan in planned.items() if name in ours}
    assert len(planned) > 20
    kept = [job for job in jobs.jobs if job.name in planned]
    assert_same_plan(type(jobs)(jobs.models, tuple(kept), {}, {}), planned, [str(model.path) for model in jobs.models])
    assert ours == set(jobs.models[0].layout.tensors)


@pytest.mark.parametrize("family", ["t5", "clip", "vit", "distilbert", "resnet", "mixtral", "opt", "siglip", "dinov2"])
def test_whole_models_of_any_family_resolve(family, place):
    base, other = (model_folder(place, family, seed) for seed in range(2))
    jobs = resolve(read_recipe({"models": [{"model": str(other)}], "merge_method": "ties", "base_model": str(base)}))
    assert [job.name for job in jobs.jobs] == list(jobs.models[0].layout.tensors)
    for job in jobs.jobs:
        info = jobs.models[0].layout.tensors[job.name]
        assert (job.shape, job.out_dtype) == (tuple(info.shape), info.dtype)
        assert {source.name for source in job.sources} == {job.name}
    if family != "resnet":
        assert {job.layer for job in jobs.jobs} == {None, 0, 1}
        assert {job.num_layers for job in jobs.jobs} == {2}


def test_modules_of_two_towers_take_slices_of_their_own(place):
    one, two = (str(model_folder(place, "clip", seed)) for seed in range(2))
    recipe = {
        "modules": {
            "vision": {"slices": [{"sources": [{"model": one, "layer_range": [0, 2]}]}] * 2},
            "text": {"slices": [{"sources": [{"model": two, "layer_range": [1, 2]}]}]},
        },
        "merge_method": "passthrough",
    }
    jobs = resolve(read_recipe(recipe))
    assert jobs.config["vision_config"]["num_hidden_layers"] == 4
    assert jobs.config["text_config"]["num_hidden_layers"] == 1
    source_of = {job.name: job.sources[0] for job in jobs.jobs}
    taken = source_of["vision_model.encoder.layers.3.mlp.fc1.weight"]
    assert (taken.model, taken.name) == (0, "vision_model.encoder.layers.1.mlp.fc1.weight")
    taken = source_of["text_model.encoder.layers.0.mlp.fc1.weight"]
    assert (taken.model, taken.name) == (1, "text_model.encoder.layers.1.mlp.fc1.weight")
    assert source_of["text_projection.weight"].model == 1
    assert source_of["visual_projection.weight"].model == 0
    with pytest.raises(RecipeError, match=r"has 2 stacks of layers .*write modules"):
        resolve(read_recipe({"slices": recipe["modules"]["text"]["slices"], "merge_method": "passthrough"}))
    del recipe["modules"]["text"]
    with pytest.raises(RecipeError, match="also has text"):
        resolve(read_recipe(recipe))


def test_encoder_and_decoder_count_their_layers_apart(place):
    one, two = (str(model_folder(place, "t5", seed, num_layers=3)) for seed in range(2))
    recipe = {
        "models": [{"model": two, "parameters": {"weight": [0, 1]}}],
        "merge_method": "task_arithmetic",
        "base_model": one,
    }
    options = {job.name: job for job in resolve(read_recipe(recipe)).jobs}
    weights = {name: job.options["weight"][0] for name, job in options.items()}
    assert weights["encoder.block.1.layer.0.layer_norm.weight"] == 0.5
    assert weights["decoder.block.1.layer.0.layer_norm.weight"] == 1
    assert weights["shared.weight"] == weights["decoder.final_layer_norm.weight"] == 0
    assert options["encoder.block.1.layer.0.layer_norm.weight"].num_layers == 3
    assert options["decoder.block.1.layer.0.layer_norm.weight"].num_layers == 2


def test_a_passthrough_that_changes_nothing_copies_bytes(llamas):
    jobs = resolve(read_recipe(FRANKENMERGE.format(**llamas).replace("dtype: float16", "")))
    assert {job.method for job in jobs.jobs} == {"copy"}
    assert jobs.config["num_hidden_layers"] == 6
    text = FRANKENMERGE.format(**llamas) + "parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}\n"
    jobs = resolve(read_recipe(text.replace("dtype: float16", "")))
    assert {job.name.split(".")[-2] for job in jobs.jobs if job.method == "passthrough"} == {"o_proj"}


def test_documents_name_each_other_in_any_order(llamas, tmp_path):
    first = GRADIENT_SLERP.format(**llamas) + "name: gradient-slerp\n"
    second = TIES.format(**{**llamas, "a": "gradient-slerp"}) + "name: last\n"
    path = tmp_path / "mega.yml"
    for text in (first + "---" + second, second + "---" + first):
        path.write_text(text)
        slerp, ties = read_recipes(path)
        assert (slerp.name, ties.name) == ("gradient-slerp", "last")
    planned = plan_result(resolve(slerp), tmp_path / "gradient-slerp")
    jobs = resolve(ties, made={"gradient-slerp": planned})
    assert planned in jobs.models
    assert len(jobs.jobs) == len(resolve(slerp).jobs)
    with pytest.raises(RecipeError, match="'gradient-slerp' is no folder here"):
        resolve(ties)
    by_path = second.replace("model: gradient-slerp", "model: ./models/first")
    path.write_text(first.replace("name: gradient-slerp", "out_path: models/first") + "---" + by_path)
    assert [recipe.out_path for recipe in read_recipes(path)] == ["models/first", None]
    assert planned in resolve(read_recipes(path)[1], made={"models/first": planned}).models


def test_the_same_recipe_is_one_config_in_python(llamas):
    import ml_collections
    import yaml

    text = TIES.format(**llamas)
    config = ml_collections.ConfigDict(yaml.safe_load(text))
    ours, theirs = resolve(read_recipe(config)), resolve(read_recipe(text))
    assert [(job.name, job.options) for job in ours.jobs] == [(job.name, job.options) for job in theirs.jobs]


def test_a_trunk_without_a_head_merges_with_a_model_that_has_one(place, tmp_path):
    import transformers

    whole, other = (model_folder(place, "gpt2", seed) for seed in range(2))
    transformers.GPT2Model.from_pretrained(other).save_pretrained(tmp_path / "trunk")
    recipe = {"models": [{"model": str(tmp_path / "trunk")}], "merge_method": "ties", "base_model": str(whole)}
    jobs = {job.name: job for job in resolve(read_recipe(recipe)).jobs}
    assert jobs["transformer.wte.weight"].sources[0].name == "wte.weight"
    assert jobs["transformer.h.1.ln_1.bias"].sources[0].name == "h.1.ln_1.bias"
    recipe = {"models": [{"model": str(whole)}], "merge_method": "ties", "base_model": str(tmp_path / "trunk")}
    jobs = {job.name: job for job in resolve(read_recipe(recipe)).jobs}
    assert jobs["wte.weight"].sources[0].name == "transformer.wte.weight"


def test_a_head_that_is_tied_in_one_and_not_in_the_other_stands_apart(place):
    tied = model_folder(place, "llama", 0, tie_word_embeddings=True)
    apart = model_folder(place, "llama", 1)
    for base, model in ((tied, apart), (apart, tied)):
        recipe = {"models": [{"model": str(model)}], "merge_method": "task_arithmetic", "base_model": str(base)}
        jobs = resolve(read_recipe(recipe))
        head = next(job for job in jobs.jobs if job.name == "lm_head.weight")
        names = {base: head.base.name, model: head.sources[0].name}
        assert names == {tied: "model.embed_tokens.weight", apart: "lm_head.weight"}
        assert jobs.config["tie_word_embeddings"] is False
        assert any("a head of its own" in note for note in jobs.notes)


def test_a_tied_head_that_is_stored_repeats_the_table(place, tmp_path):
    from jaxtune import checkpoint
    from jaxtune.tree import flatten

    folders = []
    for seed in range(2):
        tied = checkpoint.load(model_folder(place, "llama", seed, tie_word_embeddings=True))
        tensors = dict(flatten(tied.params))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        folders.append(tmp_path / str(seed))
        checkpoint.save(folders[-1], tensors, config=tied.config)
    recipe = {
        "models": [{"model": str(folders[1])}],
        "merge_method": "task_arithmetic",
        "base_model": str(folders[0]),
        "parameters": {"weight": [{"filter": "lm_head", "value": 0.5}, {"value": 1}]},
    }
    jobs = {job.name: job for job in resolve(read_recipe(recipe)).jobs}
    head, table = jobs["lm_head.weight"], jobs["model.embed_tokens.weight"]
    assert (head.sources, head.base, head.options) == (table.sources, table.base, table.options)
    assert len(jobs) == len(tensors)
    assert resolve(read_recipe(recipe)).config["tie_word_embeddings"] is True
    recipe["models"] = [{"model": str(model_folder(place, "llama", 2))}]  # has a head of its own
    untied = resolve(read_recipe(recipe))
    head = next(job for job in untied.jobs if job.name == "lm_head.weight")
    assert (head.base.name, head.sources[0].name) == ("model.embed_tokens.weight", "lm_head.weight")
    assert untied.config["tie_word_embeddings"] is False


def test_a_model_in_the_hub_cache_is_found(llamas, tmp_path, monkeypatch):
    home = tmp_path / "hub" / "models--org--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    shutil.copytree(llamas["a"], home / "snapshots" / "abc123")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for name in ("org/tiny", "org/tiny@abc123", {"model": {"path": "org/tiny", "revision": "main"}}):
        jobs = resolve(read_recipe({"models": [{"model": name}], "merge_method": "linear"}))
        assert jobs.models[0].path == home / "snapshots" / "abc123"
    with pytest.raises(RecipeError, match=r"hf download org/tiny --revision v2"):
        resolve(read_recipe({"models": [{"model": "org/tiny@v2"}], "merge_method": "linear"}))


def test_planning_reads_no_weights(llamas, tmp_path):
    for name, folder in llamas.items():
        shutil.copytree(folder, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        size = file.stat().st_size
        header = file.read_bytes()[:8]
        length = int.from_bytes(header, "little")
        with open(file, "r+b") as stream:  # NaN everywhere: whoever computes with it shows
            stream.seek(8 + length)
            stream.write(b"\xff" * (size - 8 - length))
    jobs = resolve(read_recipe(TIES.format(**{name: tmp_path / name for name in llamas})))
    assert all(np.isfinite(job.options["weight"]).all() for job in jobs.jobs)


def test_fifty_thousand_tensors_plan_in_time(tmp_path):
    import time

    config = {"model_type": "of_nobody", "num_hidden_layers": 48, "vocab_size": 8}
    names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
             for layer in range(48) for expert in range(348) for part in ("up", "gate", "down")]  # fmt: skip
    header, offset = {}, 0
    for name in ["model.embed_tokens.weight", *names]:
        header[name] = {"dtype": "BF16", "shape": [8, 1], "data_offsets": [offset, offset + 16]}
        offset += 16
    data = json.dumps(header).encode()
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        blob = len(data).to_bytes(8, "little") + data + bytes(offset)
        (tmp_path / name / "model.safetensors").write_bytes(blob)
    recipe = read_recipe(
        {
            "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": [{"filter": "up", "value": [0, 1]}]}},
                       {"model": str(tmp_path / "b")}],
            "merge_method": "ties",
            "base_model": str(tmp_path / "c"),
            "parameters": {"weight": 1},
        }
    )  # fmt: skip
    start = time.process_time()
    jobs = resolve(recipe)
    seconds = time.process_time() - start
    assert len(jobs.jobs) == 50_113
    assert seconds < 12  # 2.3 s where this was written, half of them for the headers; the rest is for slower machines


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox"])
def test_frankenmerges_of_other_families_load(family, place, tmp_path):
    import torch
    import transformers

    one, two = (str(model_folder(place, family, seed)) for seed in range(2))
    ranges = [(one, 0, 2), (two, 1, 2), (two, 0, 2)]
    text = f"""
slices:
  - sources: [{{model: {one}, layer_range: [0, 2]}}]
  - sources: [{{model: {two}, layer_range: [1, 2]}}]
  - sources: [{{model: {two}, layer_range: [0, 2]}}]
merge_method: passthrough
"""
    jobs = resolve(read_recipe(text))
    if family in ("gpt2", "qwen2", "qwen3", "gemma2", "phi3"):  # families that mergekit has tables of
        planned, _ = plan_with_mergekit(text)
        ours = {job.name for job in jobs.jobs}
        planned = {name: plan for name, plan in planned.items() if name in ours}
        assert_same_plan(jobs, planned, [str(model.path) for model in jobs.models])
    tensors = {job.name: np.asarray(_leaf(jobs, job.sources[0])) for job in jobs.jobs}
    layers = [start + step for _, start, end in ranges for step in range(end - start)]
    assert max(job.layer for job in jobs.jobs if job.layer is not None) == len(layers) - 1
    from jaxtune.checkpoint import safetensors

    (tmp_path / "config.json").write_text(json.dumps(dict(jobs.config)))
    safetensors.make_header(tensors, {"format": "pt"}).write(tmp_path / "model.safetensors", tensors.__getitem__)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(model(torch.tensor([[1, 5, 7]])).logits).all()


def test_stacks_of_t5_are_cut_and_keep_their_table_of_distances(place, tmp_path):
    import torch
    import transformers

    from jaxtune.merging import merge_recipe

    one, two = (str(model_folder(place, "t5", seed, num_layers=3, num_decoder_layers=3)) for seed in range(2))

    def slices(*ranges):
        return {"slices": [{"sources": [{"model": model, "layer_range": list(run)}]} for model, *run in ranges]}

    modules = {"encoder": slices((one, 0, 2), (two, 0, 3)), "decoder": slices((two, 1, 3))}
    merge_recipe({"modules": modules, "merge_method": "passthrough"}, tmp_path / "out")
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (5, 2)
    tokens = torch.tensor([[1, 5, 7]])
    assert torch.isfinite(model(input_ids=tokens, decoder_input_ids=tokens).logits).all()
    # Distances that the first block holds for all of its stack: those of the first slice, whichever layers it takes.
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ours, first, second = (flatten(checkpoint.load(folder).params) for folder in (tmp_path / "out", one, two))
    np.testing.assert_array_equal(ours[f"encoder.{bias}"], first[f"encoder.{bias}"])
    np.testing.assert_array_equal(ours[f"decoder.{bias}"], second[f"decoder.{bias}"])
    query = "layer.0.SelfAttention.q.weight"
    np.testing.assert_array_equal(ours[f"encoder.block.2.{query}"], second[f"encoder.block.0.{query}"])
    np.testing.assert_array_equal(ours[f"decoder.block.0.{query}"], second[f"decoder.block.1.{query}"])


def _leaf(jobs, source):
    from jaxtune.tree import flatten

    return flatten(jobs.models[source.model].params)[source.name]


def test_paths_count_from_here_and_from_the_recipes_folder(llamas, tmp_path, monkeypatch):
    shutil.copytree(llamas["a"], tmp_path / "recipes" / "model")
    path = tmp_path / "recipes" / "merge.yml"
    path.write_text("models:\n  - model: model\nmerge_method: linear\n")
    assert resolve(read_recipe(path)).models[0].path == tmp_path / "recipes" / "model"
    shutil.copytree(llamas["b"], tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert str(resolve(read_recipe(path)).models[0].path) == "model"
