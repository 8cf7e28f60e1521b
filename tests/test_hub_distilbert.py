"""DistilBERT: no segments, no pooler, a ReLU before its classes; outputs equal transformers'."""

import pytest
from hub_encoders import FEW, assert_parity
from hub_models import assert_round_trip, randomise, write_folder

import jaxtune
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.models import registry

transformers = pytest.importorskip("transformers")

SIZES = {**FEW, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
MEMBERS = {
    "bare": ("DistilBertModel", {}),
    "masked": ("DistilBertForMaskedLM", {"activation": "relu"}),
    "untied": ("DistilBertForMaskedLM", {"tie_word_embeddings": False}),
    "sequence": ("DistilBertForSequenceClassification", {"num_labels": 5, "sinusoidal_pos_embds": True}),
    "choice": ("DistilBertForMultipleChoice", {}),
    "tags": ("DistilBertForTokenClassification", {"num_labels": 4}),
    "answers": ("DistilBertForQuestionAnswering", {}),
}


def make(name):
    class_name, fields = MEMBERS[name]
    return randomise(getattr(transformers, class_name)(transformers.DistilBertConfig(**{**SIZES, **fields})), seed=5)


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_equal_transformers(name, tmp_path):
    config = assert_parity(tmp_path, make(name))
    assert (config.num_segments, config.pooler, config.tied) == (None, False, name != "untied")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bare", "masked", "untied", "sequence"])
def test_every_tensor_comes_back(name, dtype, tmp_path):
    import torch

    assert_round_trip(write_folder(tmp_path, make(name).to(getattr(torch, dtype))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "mish"}, "\"activation\" is 'mish'"),
        ({"tie_weights_": False}, '"tie_weights_" is False'),
        ({"architectures": ["DistilBertForSomethingNew"]}, "DistilBertForSomethingNew"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    values = {**make("masked").config.to_dict(), "architectures": ["DistilBertForMaskedLM"], **fields}
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict(values)


def test_tensors_of_another_head_are_refused_by_name(tmp_path):
    model = make("sequence")
    model.config.architectures = ["DistilBertForTokenClassification"]
    folder = write_folder(tmp_path, model)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("ForSequenceClassification", "ForTokenClassification"))
    with pytest.raises(TreeMismatchError, match=r"pre_classifier\.weight: in the file, not known"):
        jaxtune.load(folder)
