"""Examples that a user names: texts by a model's own tokenizer, whoever opens them; labels where heads take them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune.commands import examples
from jaxtune.deciding.task_models import open_task_models, score_candidates
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import decoder, encoder, registry
from jaxtune.opening import open_examples
from jaxtune.recipes.reading import read_recipe

WORDS = ["mat", "the", "cat", "sat", "on", "a", "dog", "ran", "far", "[UNK]"]  # id 0 is a word
TEXTS = ["the cat sat on the mat", "a dog ran far", "the dog sat on a mat"]
IDS = [[1, 2, 3, 4, 1, 0], [5, 6, 7, 8], [1, 6, 3, 4, 5, 0]]
SIZES = {"vocab_size": 4096, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8}
LANGUAGE = decoder.Config(**SIZES, num_kv_heads=1, head_width=4)
ENCODER = encoder.Config(**SIZES, num_positions=16, head="sequence", head_dense="tanh", num_outputs=3)


def save_models(folder, config):
    """A base and two models beside it, each with the tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    base = jax.tree.map(np.asarray, registry.init(jax.random.key(0), config))
    for n, name in enumerate(("base", "a", "b")):
        params = jax.tree.map(lambda x, n=n: (x * (1 + 0.1 * n)).astype(np.float32), base)
        jt.save(folder / name, params, config=registry.config_to_dict(config))
        tokenizer.save(str(folder / name / "tokenizer.json"))


def save_texts(folder, *, labelled):
    lines = [{"split": "train", "text": text} | ({"label": n % 3} if labelled else {}) for n, text in enumerate(TEXTS)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "x.jsonl"


def recipe_of(folder, method="task_arithmetic"):
    sources = {str(folder / name): {"name": str(folder / "x.jsonl"), "validation_fraction": 0.0} for name in "ab"}
    models = [{"model": str(folder / name)} for name in "ab"]
    return read_recipe(
        {"merge_method": method, "base_model": str(folder / "base"), "models": models, "data": {"sources": sources}}
    )


def real_rows(sample):
    return [text[mask].tolist() for text, mask in zip(sample.batch["text"], sample.batch["mask"], strict=True)]


@pytest.mark.parametrize("config", [LANGUAGE, ENCODER], ids=("language", "encoder"))
def test_recipes_and_compositions_read_texts_by_the_models_own_tokenizer(tmp_path, monkeypatch, config):
    save_models(tmp_path, config)
    path = save_texts(tmp_path, labelled=config is ENCODER)
    uncut = {"validation_fraction": 0.0}
    opened = open_examples(config, path, models=[jt.load(tmp_path / "base")], options=uncut)
    assert real_rows(opened) == IDS
    for sample in open_task_models(recipe_of(tmp_path, "ada_merging")).samples:
        assert real_rows(sample) == IDS
        assert ("valid" in sample.batch) == (config is LANGUAGE)  # padding is no prediction
    given = []
    monkeypatch.setattr("jaxtune.compose.registry.compose", lambda *arguments, **options: given.append(arguments[3]))
    jt.compose("lot", tmp_path / "base", [tmp_path / "a"], [path])
    assert {tuple(row) for row in real_rows(given[0][0])} <= set(map(tuple, IDS))  # some may be "validation"
    assert ("valid" in given[0][0].batch) == (config is LANGUAGE)


def test_an_evaluation_reads_texts_by_the_models_own_tokenizer(tmp_path):
    save_models(tmp_path, LANGUAGE)
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"split": "test", "text": text}) for text in TEXTS))
    sample = open_examples(LANGUAGE, path, models=[jt.load(tmp_path / "base")], split="test")
    assert real_rows(sample) == IDS
    of_path, of_sample = (jt.evaluate(tmp_path / "base", source) for source in (path, sample))
    assert of_path == of_sample
    assert of_path.num_tokens == sum(len(row) - 1 for row in IDS)


def test_the_split_of_examples_can_be_named_on_the_command_line(tmp_path):
    save_models(tmp_path, ENCODER)
    path = tmp_path / "s.jsonl"
    lines = [{"split": split, "text": TEXTS[0], "label": 0} for split in ("train", "test", "test")]
    path.write_text("\n".join(map(json.dumps, lines)))
    model = jt.load(tmp_path / "base")

    def count(*pairs):
        pairs = ("validation_fraction=0.0", *pairs)
        return len(examples.open_examples(str(path), pairs, ENCODER, model, num_examples=None, seed=0))

    assert [count(), count("split=test")] == [1, 2]
    with pytest.raises(DataError, match="validation"):
        count("split=validation")


def test_windows_take_texts_of_any_length(tmp_path):
    save_models(tmp_path, LANGUAGE)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"split": "train", "text": " ".join(["the cat"] * 300)}))
    options = {"windows": 16, "validation_fraction": 0.0}
    sample = open_examples(LANGUAGE, path, models=[jt.load(tmp_path / "base")], options=options)
    assert sample.batch["valid"].sum() == 599


def test_a_decoder_with_a_head_for_whole_texts_learns_their_labels(tmp_path):
    save_models(tmp_path, dataclasses.replace(LANGUAGE, head="last", num_outputs=3))
    save_texts(tmp_path, labelled=True)
    models = open_task_models(recipe_of(tmp_path, "ada_merging"))
    np.testing.assert_array_equal(models.samples[0].batch["label"], [0, 1, 2])
    scores = score_candidates([models.base.params], models.samples)
    assert scores[0][0]["accuracy"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_words_are_no_numbering_for_a_model_with_a_vocabulary_of_its_own(tmp_path):
    save_models(tmp_path, LANGUAGE)
    path, model = save_texts(tmp_path, labelled=False), jt.load(tmp_path / "base")
    with pytest.raises(DataError, match=r"tokens is 'words', and .*base has a vocabulary of its own\. Take tokens out"):
        open_examples(LANGUAGE, path, models=[model], options={"tokens": "words"})
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "base" / "tokenizer.model")
    with pytest.raises(DataError, match=r"base: there is no tokenizer\.json, so texts cannot become this model's"):
        open_examples(LANGUAGE, path, models=[jt.load(tmp_path / "base")])
    (tmp_path / "base" / "tokenizer.model").unlink()
    ours = jt.load(tmp_path / "base")
    assert real_rows(open_examples(LANGUAGE, path, models=[ours])) != IDS[:2]  # tokens of ours, as it was trained on
    foreign = dataclasses.replace(ours, network=LANGUAGE)  # as `jt.load` gives a checkpoint of another library
    with pytest.raises(DataError, match=r"there is no tokenizer\.json"):
        open_examples(LANGUAGE, path, models=[foreign])
    with pytest.raises(DataError, match="a language model has no classes to learn labels of"):
        open_examples(LANGUAGE, path, models=[ours], needs_labels=True)
    with pytest.raises(ConfigError, match="num_examples is 0"):
        open_examples(LANGUAGE, path, num_examples=0)
    with pytest.raises(ConfigError, match="options windows are for a source that is opened here"):
        open_examples(LANGUAGE, jt.sampling, options={"windows": 3})
