"""Recipes as files and as values: every key is read or refused, with its line and the nearest known key."""

import time

import pytest

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe, read_recipes
from jaxtune.recipes.references import ModelReference

START = "models:\n  - model: a\nmerge_method: linear\n"


def refuse(text):
    with pytest.raises(RecipeError) as caught:
        read_recipe(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models:\n  - modle: a\nmerge_method: linear\n", "line 2, column 5: models[0].modle: unknown key"),
        (START + "base_modle: b\n", "line 4, column 1: base_modle: unknown key 'base_modle'. Did you mean 'base_model"),
        (START.replace("linear", "liner"), "line 3, column 15: merge_method: unknown merge method 'liner'. Did"),
        (START + "dtype: bfloat61\n", "line 4, column 8: dtype: unknown dtype 'bfloat61'. Did you mean 'bfloat16'?"),
        (START + "parameters: {weight: 1, weight: 2}\n", "key 'weight' stands twice; the first is on line 4"),
        (START + "genome: {}\n", "genome: not read here: it belongs to a search over recipes"),
        (START + "metric_method: cossim\n", "metric_method: not read here: it is of a fork"),
        (START.replace("linear", "ranked_ties"), "'ranked_ties' is not made here: it is of a fork"),
        (START.replace("linear", "encoder_decoder_weighted"), "Write modules, encoder and decoder"),
        (START + "align_weights: zipit\n", "line 4, column 1: align_weights: not read here: it is of a fork"),
        (START.replace("model: a", "model: a\n    lora: b"), "models[0].lora: not read here: write the adapter behind"),
        (START + "gate_mode: hidden\n", "it builds a mixture of experts"),
        (START + "density: 0.5\n", "write it under 'parameters'"),
        (START + "slices: []\n", "expected exactly one of models, slices and modules; found models and slices"),
        ("# text\nmerge_method: linear\n", "expected exactly one of models, slices and modules; found none of them"),
        ("models:\n  - model: a\n", "merge_method is missing"),
        ("models: []\nmerge_method: linear\n", "models: the list is empty"),
        ("models:\n  - a\nmerge_method: linear\n", "models[0]: expected 'model: PATH'"),
        (START + "tokenizer: union\n", "expected keys (source, tokens, pad_to_multiple_of)"),
        (START + "tokenizer: {source: base}\ntokenizer_source: base\n", "say the same thing"),
        (START + "tokenizer: {pad_to_multiple_of: 0}\n", "expected a number of rows, at least 1"),
        (START + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n", "unknown kind 'zeros'. Did you mean 'zero'?"),
        (START + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n", "'token' and 'token_id'"),
        (START + "tokenizer: {tokens: {x: {force: true}}}\n", "force: true needs a source"),
        (START + "seed: -1\n", "seed: expected a seed of at least 0"),
        (START + "post: {lines: {}}\n", "post: expected a list of steps"),
        (START.replace("model: a", "model: a+b+c"), "with 2 '+'. Merge one adapter at a time"),
        (START.replace("model: a", "model: 3"), "models[0].model: expected a model: PATH"),
        (START.replace("model: a", "model: a\n    transport: {method: full}"), "'base' is missing"),
        ("a: [\nb\n", "not YAML"),
        ("models: !!python/object:os.system x\nb: 1\n", "the tag 'tag:yaml.org,2002:python/object:os.system' is"),
        ("? [a, b]\n: 1\nmerge_method: linear\n", "expected a key that is text"),
        ("x: &a\n  b: *a\nmerge_method: linear\n", "aliases or nesting"),
        (START + "---\n" + START, "two merges without a name"),
        (START + "name: x\n---\n" + START + "name: x\n", "two merges are called 'x'"),
        (
            START.replace(": a", ": y") + "name: x\n---\n" + START.replace(": a", ": x") + "name: y\n",
            "merges that need each other: x -> y -> x",
        ),
        (
            "slices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\n      - {model: b, layer_range: [0, 3]}\n"
            "merge_method: slerp\n",
            "sources of a slice need as many layers each; found a 2, b 3",
        ),
        ("slices:\n  - sources: [{model: a}]\nmerge_method: linear\n", "layer_range is missing"),
        ("slices:\n  - sources: [{model: a, layer_range: [3, 1]}]\nmerge_method: linear\n", "0 <= first <= end"),
        (
            "slices:\n  - sources: [{model: a, layer_range: [0, 1]}]\n    residual_weight: 1\nmerge_method: linear\n",
            "does nothing with it",
        ),
        ("modules:\n  text: {}\nmerge_method: linear\n", "expected models or slices, one of the two"),
    ],
)  # fmt: skip
def test_messages_name_place_key_and_remedy(text, words):
    assert words in refuse(text)


def test_aliases_of_aliases_end(tmp_path):
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    start = time.process_time()
    assert "aliases or nesting" in refuse(bomb)
    assert time.process_time() - start < 10


def test_anchors_and_merge_keys_are_read_as_yaml_reads_them():
    text = """
models:
  - model: a
    parameters: &shared {weight: 0.5, density: 0.25}
  - model: b
    parameters: {<<: *shared, weight: 0.75}
merge_method: ties
base_model: c
"""
    first, second = read_recipe(text).models
    assert first.parameters["weight"].conditions[0].value == 0.5
    assert second.parameters["weight"].conditions[0].value == 0.75
    assert second.parameters["density"].conditions[0].value == 0.25


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("org/name", ModelReference("org/name")),
        ("org/name@v1+org/lora@v2", ModelReference("org/name", "v1", "org/lora", "v2")),
        ({"model": "org/name", "lora": "x"}, ModelReference("org/name", None, "x")),
        (
            {"model": {"path": "a", "revision": "r"}, "lora": None, "override_architecture": "LlamaForCausalLM"},
            ModelReference("a", "r", architecture="LlamaForCausalLM"),
        ),
        ({"path": "a", "revision": "r"}, ModelReference("a", "r")),
    ],
)
def test_forms_of_a_model(value, reference):
    recipe = read_recipe({"models": [{"model": value}], "merge_method": "linear"})
    assert recipe.models[0].model == reference


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path):
    (tmp_path / "a+b").mkdir()
    recipe = read_recipe({"models": [{"model": str(tmp_path / "a+b")}], "merge_method": "linear"})
    assert recipe.models[0].model == ModelReference(str(tmp_path / "a+b"))


def test_what_is_added_to_mergekits_schema():
    recipe = read_recipe("""
models:
  - model: a
    transport: {base: old, method: full, scale: 0.5}
merge_method: ties
base_model: b
preset: peft
seed: 7
post:
  - lines: {alpha: 0.5}
  - subspace_boosting
evaluate: {data: digits}
""")
    transport = recipe.models[0].transport
    assert (transport.base.path, transport.method, transport.options) == ("old", "full", {"scale": 0.5})
    assert (recipe.preset, recipe.seed, recipe.evaluate) == ("peft", 7, {"data": "digits"})
    assert recipe.post == (("lines", {"alpha": 0.5}), ("subspace_boosting", {}))
    assert recipe.plain["models"][0]["transport"]["base"] == "old"


def test_every_key_of_mergekits_schema_is_read():
    recipe = read_recipe("""
modules:
  default:
    parameters: {weight: 1}
    slices:
      - base_model: c
        parameters: {density: [0.1, 0.9]}
        sources:
          - {model: a, layer_range: [0, 2], parameters: {weight: 2}}
          - {model: c, layer_range: [0, 2]}
merge_method: ties
base_model: b
dtype: torch.float32
out_dtype: bfloat16
tokenizer:
  source: union
  pad_to_multiple_of: 16
  tokens:
    <a>: {source: a}
    <b>: {source: {kind: zero}, force: true}
    <c>: {source: {kind: model_token, model: b, token_id: 3}}
chat_template: chatml
name: x
parameters: {normalize: false}
""")
    (part,) = recipe.modules["default"].slices
    assert part.base_model.path == "c"
    assert [source.layer_range for source in part.sources] == [(0, 2), (0, 2)]
    assert (recipe.dtype, recipe.out_dtype, recipe.name) == ("float32", "bfloat16", "x")
    tokens = recipe.tokenizer.tokens
    assert [tokens[name].kind for name in ("<a>", "<b>", "<c>")] == ["model", "zero", "model_token"]
    assert tokens["<b>"].force
    assert tokens["<c>"].token_id == 3
    assert recipe.tokenizer.pad_to_multiple_of == 16


def test_every_method_of_mergekit_is_known():
    mergekit = (
        "linear slerp nuslerp multislerp karcher task_arithmetic ties dare_linear dare_ties breadcrumbs "
        "breadcrumbs_ties della della_linear sce ram ramplus_tl model_stock nearswap arcee_fusion passthrough"
    )
    assert not set(mergekit.split()) - set(METHODS)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.yml").write_text("\n# nothing\n")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    for name, words in (("missing.yml", "cannot be read"), ("empty.yml", "empty"), ("binary.yml", "not UTF-8")):
        with pytest.raises(RecipeError, match=words):
            read_recipe(tmp_path / name)
    with pytest.raises(RecipeError, match="expected text, a number"):
        read_recipe({"models": [{"model": object()}], "merge_method": "linear"})
    (tmp_path / "two.yml").write_text(START + "name: x\n---\n" + START.replace("model: a", "model: x"))
    assert len(read_recipes(tmp_path / "two.yml")) == 2
    with pytest.raises(RecipeError, match="a file of 2 merges"):
        read_recipe(tmp_path / "two.yml")
