"""RoBERTa and its kin: positions count real tokens, heads of its own; outputs equal transformers'."""

import numpy as np
import pytest
from hub_encoders import SIZES, assert_parity, draw_batch, outputs_of_oracle
from hub_models import assert_close, assert_round_trip, randomise, read_folder, write_folder
from small_models import run

from jaxtune.errors import ConfigError
from jaxtune.models import registry

transformers = pytest.importorskip("transformers")

MEMBERS = {
    "bare": ("RobertaModel", {"type_vocab_size": 1}, {}),
    "bare_without_pooler": ("RobertaModel", {"type_vocab_size": 1}, {"add_pooling_layer": False}),
    "masked": ("RobertaForMaskedLM", {"type_vocab_size": 1}, {}),
    "sequence": ("RobertaForSequenceClassification", {"num_labels": 5, "pad_token_id": 3}, {}),
    "choice": ("RobertaForMultipleChoice", {}, {}),
    "tags": ("RobertaForTokenClassification", {"num_labels": 4}, {}),
    "answers": ("RobertaForQuestionAnswering", {"pad_token_id": 0}, {}),
    "many_tongues": ("XLMRobertaForMaskedLM", {"type_vocab_size": 1}, {}),
    "french": ("CamembertForTokenClassification", {"type_vocab_size": 1}, {}),
}


def make(name):
    class_name, fields, options = MEMBERS[name]
    made = getattr(transformers, class_name)
    return randomise(made(made.config_class(**{**SIZES, **fields}), **options), seed=4)


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_equal_transformers(name, tmp_path):
    model = make(name)
    config = assert_parity(tmp_path, model)
    assert config.counted_from == model.config.pad_token_id + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bare", "masked", "sequence"])
def test_every_tensor_comes_back(name, dtype, tmp_path):
    import torch

    assert_round_trip(write_folder(tmp_path, make(name).to(getattr(torch, dtype))))


def test_positions_count_the_tokens_that_are_no_padding_wherever_it_stands(tmp_path):
    """Also where the mask does not say so."""
    model = make("masked")
    config, params, _ = read_folder(write_folder(tmp_path, model))
    batch = draw_batch(9, padding=1)
    batch["text"][0, 3:5] = 1
    batch["mask"][:] = True
    assert_close(run(config, params, batch), outputs_of_oracle(model, batch)[0])


def test_the_longest_text_leaves_room_for_the_rows_of_padding(tmp_path):
    config, params, _ = read_folder(write_folder(tmp_path, make("masked")))
    assert config.max_length == 18
    assert np.isfinite(np.asarray(run(config, params, draw_batch(18, padding=1)))).all()


def test_a_classifier_with_an_old_pooler_beside_it(tmp_path):
    """Older releases stored one; nothing reads it, and it comes back."""
    model = make("sequence")
    import torch

    model.roberta.pooler = randomise(torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24)}), seed=1)
    folder = write_folder(tmp_path, model)
    model.roberta.pooler = None
    config, params, _ = read_folder(folder)
    batch = draw_batch(6, padding=3)
    assert config.pooler
    assert_close(run(config, params, batch), outputs_of_oracle(model, batch)[0])
    assert_round_trip(folder)
    registry.symmetry_of(config).check(params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pad_token_id": None}, '"pad_token_id" is None'),
        ({"position_embedding_type": "relative_key_query"}, '"position_embedding_type"'),
        ({"is_decoder": True}, '"is_decoder" is True'),
        ({"architectures": ["RobertaForCausalLM"]}, "RobertaForCausalLM"),
        ({"max_position_embeddings": 2}, "positions counted from 2 in a table of 2"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    values = {**make("masked").config.to_dict(), "architectures": ["RobertaForMaskedLM"], **fields}
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict(values)
