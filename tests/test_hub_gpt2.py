"""GPT-2 against transformers: learned positions, kernels stored [in, out]."""

import hub_decoders
import numpy as np
import pytest

from jaxtune.errors import ConfigError, DataError
from jaxtune.models import registry

pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "plain": ("GPT2LMHeadModel", SIZES),
    "unscaled scores, head apart, narrow MLP": (
        "GPT2LMHeadModel",
        {
            **SIZES,
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
            "n_inner": 19,
            "activation_function": "relu",
        },
    ),
    "no head": ("GPT2Model", SIZES),
    "classifier": ("GPT2ForSequenceClassification", {**SIZES, "num_labels": 3}),
}
stored = hub_decoders.stored_fixture(VARIANTS)
VALUES = {"model_type": "gpt2", **SIZES}


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


def test_fields_left_out_mean_what_they_mean_to_transformers():
    hub_decoders.check_defaults("GPT2Config", **SIZES)


def test_names_of_the_first_releases_are_read():
    """Without "transformer." in front, with the causal masks, and saved by the class with a head."""
    model = hub_decoders.make_model("GPT2LMHeadModel", **SIZES)
    own = {name: leaf.numpy() for name, leaf in model.state_dict().items() if name != "lm_head.weight"}
    old = {name.removeprefix("transformer."): leaf for name, leaf in own.items()}
    masks = {f"h.{index}.attn.bias": np.ones((1, 1, 16, 16)) for index in range(2)}
    masks |= {f"h.{index}.attn.masked_bias": np.asarray(-1e4) for index in range(2)}
    values = {**VALUES, "architectures": ["GPT2LMHeadModel"]}
    config, table = registry.read_stored(values, {**old, **masks})
    params = table.decode({**old, **masks})
    text, mask = hub_decoders.draw_texts(37)
    ours = np.asarray(hub_decoders.run(config, params, {"text": text, "mask": mask}))
    hub_decoders.assert_close(ours[mask], hub_decoders.outputs_of_oracle(model, text, mask)[mask])
    tensor_of = table.encoder(params, masks)
    assert all(np.array_equal(tensor_of(name), leaf) for name, leaf in {**old, **masks}.items())


def test_a_text_longer_than_the_positions_is_refused():
    config = registry.config_from_dict(VALUES)
    with pytest.raises(DataError, match="at most 16"):
        registry.apply(config, {}, {"text": np.zeros((1, 17), np.int32)})


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"activation_function": "mish"},
        {"pruned_heads": {"0": [1]}},
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        registry.config_from_dict({**VALUES, **fields})
