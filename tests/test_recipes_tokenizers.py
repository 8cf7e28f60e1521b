"""Vocabularies in recipes: rows follow tokens as mergekit moves them, and what is written loads in transformers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_models import DECODER, randomise

from jaxtune.recipes.fills import fill_rows
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe
from jaxtune.recipes.resolve import resolve
from jaxtune.tree import flatten

pytest.importorskip("mergekit")
transformers = pytest.importorskip("transformers")

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "d", "e"]
SIZES = {**DECODER, "hidden_size": 8, "intermediate_size": 12, "head_dim": 2, "num_hidden_layers": 1}


def write_model(folder, words, *, added=(), rows=None, seed=0, template=None, tied=False):
    """A tiny Llama over `words`, the `added` behind them, with `rows` rows; its tokenizer beside it."""
    import tokenizers

    vocabulary = {word: row for row, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for token, is_special in added:
        fast.add_tokens([token], special_tokens=is_special)
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        **{**SIZES, "vocab_size": rows or len(words) + len(added), "tie_word_embeddings": tied}
    )
    randomise(transformers.LlamaForCausalLM(config), seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {
        "base": write_model(place / "base", WORDS, rows=12),
        "more": write_model(place / "more", WORDS, added=[("<chat>", True), ("new", False)], seed=1),
        "other": write_model(place / "other", [*WORDS[:3], "e", "d", "x", "y", "new"], seed=2, rows=10),
        "cut": write_model(place / "cut", [*WORDS, "z"], rows=8, seed=3),
    }


def align_with_mergekit(recipe):
    """Tensor -> {model: rows by token}, and the size of the vocabulary, as mergekit lays them out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.architecture import get_architecture_info
        from mergekit.config import MergeConfiguration
        from mergekit.io.tasks import LoaderCache
        from mergekit.merge import _model_out_config
        from mergekit.options import MergeOptions
        from mergekit.plan import MergePlanner
        from mergekit.tokenizer import PermutedVocabulary

        config, options = MergeConfiguration.model_validate(recipe), MergeOptions()
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
        planner._plan()
        built = planner._tokenizer_task.execute()
        aligned = {}
        for weight, task in planner._tensors:
            if isinstance(task.gather_tensors, PermutedVocabulary):
                gather = task.gather_tensors.gather_tensors
                loaded = gather.execute(**{key: one.execute() for key, one in gather.arguments().items()})
                made = task.gather_tensors.execute(built, loaded)
                aligned[weight.name] = {str(model): tensor.numpy() for model, tensor in made.items()}
    return aligned, built.tokenizer.get_vocab()


def align(jobs):
    """The same of ours: rows and what fills the missing ones."""
    flat = [flatten(model.params) for model in jobs.models]

    def read_rows(model, name, rows):
        return np.asarray(flat[model][name])[rows]

    aligned = {}
    for job in jobs.jobs:
        for source in (*job.sources, *([job.base] if job.base else [])):
            tensor = np.asarray(flat[source.model][source.name])
            if source.rows is not None:
                whole = tensor[np.maximum(source.rows, 0)].astype(np.float32)
                whole[source.rows < 0] = fill_rows(source, read_rows)
                tensor = whole
            assert tensor.shape == job.shape
            aligned.setdefault(job.name, {})[str(jobs.models[source.model].path)] = tensor
    return aligned


def tokens_of(jobs, folder):
    """The tokenizer that the jobs write, as transformers loads it."""
    folder.mkdir()
    for name, content in jobs.side_files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    (folder / "config.json").write_text(json.dumps(dict(jobs.config)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(folder)


MODEL_TOKEN = {"kind": "model_token", "model": "more", "token": "new"}
BLOCKS = {
    "base": {"tokenizer_source": "base"},
    "union": {"tokenizer_source": "union"},
    "of a model": {"tokenizer_source": "other"},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
    "tokens": {
        "tokenizer": {
            "source": "union",
            "pad_to_multiple_of": 4,
            "tokens": {
                "<fresh>": {"source": MODEL_TOKEN},
                "<chat>": {"source": {"kind": "zero"}},
                "a": {"source": "more", "force": True},
                "new": {"source": {"kind": "model_token", "model": "other", "token_id": 4}, "force": True},
                "b": {"source": {"kind": "zero"}, "force": True},
            },
        }
    },
}


def name_models(value, models):
    if isinstance(value, dict):
        return {key: name_models(one, models) for key, one in value.items()}
    if isinstance(value, list):
        return [name_models(one, models) for one in value]
    return str(models[value]) if isinstance(value, str) and value in models and value != "base" else value


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_rows_are_mergekits(block, with_base, models, tmp_path):
    recipe = {
        "models": [{"model": str(models[name])} for name in ("base", "more", "other")],
        "merge_method": "task_arithmetic" if with_base else "karcher",
        **({"base_model": str(models["base"]), "parameters": {"weight": 1}} if with_base else {}),
        **name_models(BLOCKS[block], models),
    }
    if not with_base:
        if block in ("base", "of a model"):
            pytest.skip("mergekit takes any of the models for the first, by the order of a set")
        recipe["base_model"] = str(models["base"])
    theirs, vocabulary = align_with_mergekit(json.loads(json.dumps(recipe)))
    jobs = resolve(read_recipe(recipe))
    ours = align(jobs)
    tokenizer = tokens_of(jobs, tmp_path / "out")
    own = tokenizer.get_vocab()
    assert own.keys() == vocabulary.keys()
    assert sorted(own.values()) == list(range(len(own)))
    assert theirs.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    for name, each in theirs.items():
        for model, expected in each.items():
            found = ours[name][model]
            assert found.shape == expected.shape
            for token, row in vocabulary.items():
                np.testing.assert_allclose(
                    found[own[token]], expected[row], rtol=1e-6, err_msg=f"{name} {model} {token}"
                )
            np.testing.assert_allclose(found[len(own) :], expected[len(own) :], rtol=1e-5, atol=1e-7)
    assert jobs.config["vocab_size"] == len(next(iter(theirs["lm_head.weight"].values())))
    assert tokenizer("a e <chat> new x")["input_ids"] is not None
    for token, row in own.items():
        assert tokenizer.convert_ids_to_tokens(row) == token


def test_a_union_with_padding_has_eighty_rows(tmp_path):
    words = [*WORDS[:3], *(f"w{n}" for n in range(61))]
    base = write_model(tmp_path / "base", words)
    more = write_model(tmp_path / "more", words, added=[("<x>", True), ("<y>", True)], seed=1)
    recipe = {
        "models": [{"model": str(more)}], "merge_method": "ties", "base_model": str(base),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 16},
    }  # fmt: skip
    jobs = resolve(read_recipe(recipe))
    assert jobs.config["vocab_size"] == 80
    assert {job.shape[0] for job in jobs.jobs if job.sources[0].fills} == {80}


def test_tokens_without_a_row_leave_the_tokenizer(models, tmp_path):
    recipe = {
        "models": [{"model": str(models["base"])}], "merge_method": "task_arithmetic",
        "base_model": str(models["cut"]), "tokenizer_source": "base",
    }  # fmt: skip
    jobs = resolve(read_recipe(recipe))
    assert tokens_of(jobs, tmp_path / "out").get_vocab() == {word: row for row, word in enumerate(WORDS)}
    assert jobs.config["vocab_size"] == 8
    assert any("base: 4 of 12 rows stand for no token" in note for note in jobs.notes)


def test_equal_vocabularies_need_no_rows(models):
    recipe = {
        "models": [{"model": str(models["more"])}], "merge_method": "linear", "tokenizer_source": "union",
    }  # fmt: skip
    jobs = resolve(read_recipe(recipe))
    assert all(job.sources[0].rows is None for job in jobs.jobs)


def test_tied_tables_are_matched_once(tmp_path):
    base = write_model(tmp_path / "base", WORDS, tied=True)
    more = write_model(tmp_path / "more", WORDS, added=[("<x>", True)], seed=1, tied=True)
    recipe = {"models": [{"model": str(more)}], "merge_method": "ties", "base_model": str(base)}
    with pytest.raises(RecipeError, match="base 8 rows"):
        resolve(read_recipe(recipe))
    jobs = resolve(read_recipe({**recipe, "tokenizer_source": "union"}))
    (table,) = [job for job in jobs.jobs if job.base.fills]
    assert (table.name, table.shape[0], jobs.config["tie_word_embeddings"]) == ("model.embed_tokens.weight", 9, True)


def test_without_a_tokenizer_block_nothing_is_cut(models):
    recipe = {
        "models": [{"model": str(models["more"])}], "merge_method": "ties", "base_model": str(models["base"]),
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        resolve(read_recipe(recipe))
    message = str(caught.value)
    assert f"{models['more']} 10 rows, {models['base']} 12 rows" in message
    assert "tokenizer_source: union" in message


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"<x>": {"source": "elsewhere"}}, "'elsewhere' is none of the recipe's models"),
        ({"<x>": {"source": "more"}}, "has no token '<x>'"),
        ({"<x>": {"source": {"kind": "model_token", "model": "more", "token_id": 99}}}, "token_id 99, .* has 10 rows"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_made_are_named(tokens, words, models):
    recipe = {
        "models": [{"model": str(models["more"])}], "merge_method": "ties", "base_model": str(models["base"]),
        "tokenizer": {"source": "union", "tokens": name_models(tokens, models)},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=words):
        resolve(read_recipe(yaml.safe_dump(recipe)))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "B{{ x }}"), ("chatml", "<|im_start|>"), ("{{ own }}", "{{ own }}"), (None, "A{{ x }}")],
)
def test_chat_templates(asked, expected, tmp_path):
    folders = [
        write_model(tmp_path / name, WORDS, seed=seed, template=template)
        for seed, (name, template) in enumerate({"a": "A{{ x }}", "b": "B{{ x }}", "c": "B{{ x }}"}.items())
    ]
    recipe = {"models": [{"model": str(folder)} for folder in folders], "merge_method": "linear"}
    jobs = resolve(read_recipe(recipe | ({"chat_template": asked} if asked else {})))
    template = tokens_of(jobs, tmp_path / "out").chat_template
    assert expected in template
    if asked == "chatml":
        tokenizer = tokens_of(jobs, tmp_path / "again")
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_unknown_templates_are_named(models):
    recipe = {"models": [{"model": str(models["more"])}], "merge_method": "linear", "chat_template": "chatlm"}
    with pytest.raises(RecipeError, match="Did you mean 'chatml'"):
        resolve(read_recipe(recipe))


def test_a_union_leaves_out_the_tokens_of_a_former_base(models, tmp_path):
    old = write_model(tmp_path / "old", [*WORDS, "old"], seed=4)
    entry = {"model": str(models["more"]), "transport": {"base": str(old), "method": "identity"}}
    recipe = {"models": [entry], "merge_method": "ties", "base_model": str(models["base"]), "tokenizer_source": "union"}
    jobs = resolve(read_recipe(recipe))
    assert "old" not in tokens_of(jobs, tmp_path / "out").get_vocab()


def test_as_many_rows_of_other_tokens_are_noted(tmp_path):
    base = write_model(tmp_path / "base", WORDS)
    same = write_model(tmp_path / "same", WORDS, seed=1)
    other = write_model(tmp_path / "other", [*WORDS[:6], "y", "z"], seed=2)
    recipe = {"models": [{"model": str(same)}], "merge_method": "ties", "base_model": str(base)}
    assert not [note for note in resolve(read_recipe(recipe)).notes if "tokenizers" in note]
    recipe["models"] = [{"model": str(other)}]
    (note,) = [note for note in resolve(read_recipe(recipe)).notes if "tokenizers" in note]
    assert f"differ in 2 rows, and rows are merged by number: row 6 is 'd' in {base} and 'y' in {other}" in note
