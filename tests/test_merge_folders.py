"""Whole folders: recipes as mergekit's users write them, beside mergekit's own results; what is written loads."""

import warnings

import numpy as np
import pytest
import yaml
from hub_models import MODELS
from recipe_oracle import model_folder
from test_hub_recovery import draw_inputs, outputs_of

from jaxtune import checkpoint
from jaxtune.merging import merge_recipe
from jaxtune.tree import flatten

pytest.importorskip("mergekit")

DEPTH = {"num_hidden_layers": 4}
# The kinds of recipe of mergekit's examples, for small models: A, B, C are fine-tunes, BASE their base.
RECIPES = {
    "bio-merge": """
models:
  - {model: A, parameters: {density: 0.5, weight: 0.5}}
  - {model: B, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: BASE
parameters: {normalize: false, int8_mask: true}
dtype: float32
""",
    "gradient-slerp": """
slices:
  - sources:
      - {model: A, layer_range: [0, 4]}
      - {model: B, layer_range: [0, 4]}
merge_method: slerp
base_model: A
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
""",
    "linear": """
models:
  - {model: A, parameters: {weight: 1.0}}
  - {model: B, parameters: {weight: 0.3}}
  - {model: C, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
    "frankenmerge": """
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources: [{model: B, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float16
""",
    "ties": """
models:
  - model: A
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: B
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: C
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "arcee_fusion": """
models: [{model: A}, {model: B}]
merge_method: arcee_fusion
base_model: A
dtype: float32
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def name_models(text, place, family="llama", **changes):
    for seed, name in enumerate(("BASE", "A", "B", "C")):
        folder = model_folder(place, family, seed=seed, **changes)
        text = text.replace(f"model: {name}", f"model: {folder}")
    return text


def merge_with_mergekit(text, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder), options)
    return flatten(checkpoint.load(folder).params)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_mergekit_give_what_mergekit_gives(name, place, tmp_path):
    text = name_models(RECIPES[name], place, **DEPTH)
    merge_recipe(text, tmp_path / "ours")
    theirs = merge_with_mergekit(text, tmp_path / "theirs")
    ours = flatten(checkpoint.load(tmp_path / "ours").params)
    assert ours.keys() == theirs.keys()
    for tensor, leaf in ours.items():
        assert leaf.dtype == theirs[tensor].dtype, tensor
        scale = np.abs(theirs[tensor]).max()
        np.testing.assert_allclose(leaf, theirs[tensor], rtol=0, atol=1e-6 * float(scale), err_msg=tensor)


def test_the_mega_example_runs_as_it_stands(place, tmp_path, monkeypatch):
    """Two documents, each with its out_path, the second of which takes what the first makes."""
    first = RECIPES["gradient-slerp"].strip() + "\nout_path: ./models/gradient-slerp\n"
    second = f"""
models:
  - {{model: ./models/gradient-slerp, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}
  - model: C
    parameters:
      density: 0.33
      weight:
        - {{filter: mlp, value: 0.5}}
        - value: 0
merge_method: ties
base_model: {model_folder(place, "llama", seed=0, **DEPTH)}
parameters: {{normalize: true, int8_mask: true}}
dtype: float32
"""
    monkeypatch.chdir(tmp_path)
    texts = [name_models(text, place, **DEPTH) for text in (first, second)]
    (tmp_path / "mega.yml").write_text("---".join((texts[0], texts[1] + "out_path: ./models/gradient-slerp-ties\n")))
    merge_recipe("mega.yml", tmp_path / "ours")
    merge_with_mergekit(texts[0].replace("out_path: ./models/gradient-slerp\n", ""), "models/gradient-slerp")
    theirs = merge_with_mergekit(texts[1], tmp_path / "theirs")
    for tensor, leaf in flatten(checkpoint.load(tmp_path / "ours").params).items():
        scale = float(np.abs(theirs[tensor]).max())
        np.testing.assert_allclose(leaf, theirs[tensor], rtol=0, atol=1e-6 * scale, err_msg=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_what_is_written_loads_and_computes(family, place, tmp_path):
    import transformers

    recipe = name_models("merge_method: linear\nmodels: [{model: A}, {model: B}]\n", place, family)
    merge_recipe(recipe, tmp_path / "out")
    model = getattr(transformers, MODELS[family][0]).from_pretrained(tmp_path / "out")
    outputs = outputs_of(tmp_path / "out", family, draw_inputs(model))
    assert np.isfinite(outputs).all()
    one = outputs_of(model_folder(place, family, seed=1), family, draw_inputs(model))
    assert np.abs(outputs - one).max() > 0
