"""BERT: outputs equal transformers', tensors come back byte for byte, what is not supported is refused by name."""

import json

import numpy as np
import pytest
from hub_encoders import SIZES, assert_parity, draw_batch, outputs_of_oracle
from hub_models import assert_close, assert_round_trip, randomise, read_folder, write_folder
from safetensors.numpy import load_file, save_file
from small_models import run

import jaxtune
from jaxtune.errors import ConfigError, DataError, TreeMismatchError
from jaxtune.models import registry
from jaxtune.tree import flatten

transformers = pytest.importorskip("transformers")

MEMBERS = {
    "bare": ("BertModel", {}, {}),
    "bare_without_pooler": ("BertModel", {}, {"add_pooling_layer": False}),
    "pretraining": ("BertForPreTraining", {}, {}),
    "masked": ("BertForMaskedLM", {"hidden_act": "gelu_new"}, {}),
    "next_sentence": ("BertForNextSentencePrediction", {}, {}),
    "sequence": ("BertForSequenceClassification", {"num_labels": 5, "type_vocab_size": 3}, {}),
    "choice": ("BertForMultipleChoice", {}, {}),
    "tags": ("BertForTokenClassification", {"num_labels": 4, "hidden_act": "relu"}, {}),
    "answers": ("BertForQuestionAnswering", {"layer_norm_eps": 1e-5}, {}),
}


def make(name, **changes):
    class_name, fields, options = MEMBERS[name]
    config = transformers.BertConfig(**{**SIZES, **fields, **changes})
    return randomise(getattr(transformers, class_name)(config, **options), seed=3)


def rewrite(folder, change_tensors=None, **fields):
    """Edits a written folder's tensors and fields in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change_tensors(tensors) if change_tensors else tensors, path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_equal_transformers(name, tmp_path):
    config = assert_parity(tmp_path, make(name))
    assert config.pooler == (name in ("bare", "pretraining", "next_sentence", "sequence", "choice"))


def test_an_untied_decoder_is_a_leaf_of_its_own(tmp_path):
    import torch

    model = make("masked", tie_word_embeddings=False)
    predictions = model.cls.predictions
    with torch.no_grad():  # two names of one bias to every release but the newest
        predictions.bias.copy_(predictions.decoder.bias)
    config = assert_parity(tmp_path, model)
    assert not config.tied
    assert_round_trip(tmp_path)
    params = jaxtune.load(tmp_path).params
    assert params["head"]["kernel"].shape == (24, 37)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bare", "pretraining", "sequence", "answers"])
def test_every_tensor_comes_back(name, dtype, tmp_path):
    import torch

    assert_round_trip(write_folder(tmp_path, make(name).to(getattr(torch, dtype)), max_shard_size="20KB"))


def test_files_from_the_days_of_tensorflow_read_the_same(tmp_path):
    """`bert-base-uncased`: gamma and beta, a bias and a table stored twice, buffers, parts its class has not."""
    model = make("pretraining")
    theirs = outputs_of_oracle(model, draw_batch(7, num_segments=2))
    folder = write_folder(tmp_path, model)

    def age(tensors):
        old = {}
        for name, tensor in tensors.items():
            for new, then in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                name = name.replace(new, then)
            old[name] = tensor
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].copy()
        old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"].copy()
        old["bert.embeddings.position_ids"] = np.arange(20)[None]
        return old

    rewrite(folder, age, architectures=["BertForMaskedLM"])
    config, params, _ = read_folder(folder)
    outputs = run(config, params, draw_batch(7, num_segments=2))
    assert_close(outputs["logits"], theirs[0])
    assert_close(outputs["next"], theirs[1])
    assert_round_trip(folder)


def test_a_pooler_is_where_the_tensors_have_it(tmp_path):
    """One class, two networks: config.json does not say which."""
    for name in ("bare", "bare_without_pooler"):
        folder = write_folder(tmp_path / name, make(name))
        config, params, _ = read_folder(folder)
        assert config.pooler == (name == "bare")
        registry.symmetry_of(config).check(params)
        stored = jaxtune.load(folder)
        jaxtune.save(tmp_path / f"{name}_again", stored.params, like=stored)
        for file in ("config.json", "model.safetensors"):
            assert (folder / file).read_bytes() == (tmp_path / f"{name}_again" / file).read_bytes()


def test_a_trunk_without_its_prefix(tmp_path):
    folder = write_folder(tmp_path, make("tags"))
    plain = flatten(read_folder(folder)[1])
    rewrite(folder, lambda tensors: {name.removeprefix("bert."): tensor for name, tensor in tensors.items()})
    for path, leaf in flatten(read_folder(folder)[1]).items():
        np.testing.assert_array_equal(leaf, plain[path])
    assert_round_trip(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "\"position_embedding_type\" is 'relative_key'"),
        ({"is_decoder": True}, '"is_decoder" is True'),
        ({"add_cross_attention": True}, '"add_cross_attention" is True'),
        ({"pruned_heads": {"0": [1]}}, '"pruned_heads"'),
        ({"hidden_act": "mish"}, "\"hidden_act\" is 'mish'"),
        ({"architectures": ["BertLMHeadModel"]}, r"BertLMHeadModel"),
        ({"num_attention_heads": 5}, "width 24 cannot be shared equally by num_heads 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message, tmp_path):
    folder = rewrite(write_folder(tmp_path, make("masked")), **fields)
    with pytest.raises(ConfigError, match=message):
        jaxtune.load(folder)


def test_unknown_missing_and_untied_tensors_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path, make("masked"))
    original = load_file(folder / "model.safetensors")
    more = {**original, "bert.encoder.layer.2.output.dense.bias": original["cls.predictions.bias"]}
    untied = {**original, "cls.predictions.decoder.weight": original["bert.embeddings.word_embeddings.weight"] + 1}
    fewer = {name: tensor for name, tensor in original.items() if "1.intermediate.dense.weight" not in name}
    for tensors, message in (
        (more, "bert.encoder.layer.2.output.dense.bias: in the file, not known"),
        (fewer, "bert.encoder.layer.1.intermediate.dense.weight: expected, not in the file"),
        (untied, "cls.predictions.decoder.weight and bert.embeddings.word_embeddings.weight are tied"),
    ):
        rewrite(folder, lambda _, tensors=tensors: tensors)
        with pytest.raises(TreeMismatchError, match=message):
            jaxtune.load(folder)


def test_batches_that_do_not_fit_are_refused(tmp_path):
    config, params, _ = read_folder(write_folder(tmp_path, make("bare")))
    batch = draw_batch(6, num_segments=2)
    for change, message in (
        ({"text": np.zeros((2, 21), np.int32)}, "L at most 20"),
        ({"text": batch["text"] + 37}, "the vocabulary 0 to 36"),
        ({"mask": np.ones((2, 6), bool)}, r'batch\["mask"\]'),
        ({"segments": batch["segments"] + 1}, "1 to 2, the model knows 2"),
        ({"segments": batch["segments"][:, :3]}, r'batch\["segments"\]'),
    ):
        with pytest.raises(DataError, match=message):
            registry.apply(config, params, {**batch, **change})


def test_no_text_at_all_is_no_nan(tmp_path):
    config, params, _ = read_folder(write_folder(tmp_path, make("bare_without_pooler")))
    batch = draw_batch(6, num_segments=2)
    outputs = run(config, params, {**batch, "mask": np.zeros_like(batch["mask"])})
    assert np.isfinite(np.asarray(outputs)).all()
