"""Gemma 3 against transformers: two rotaries, norms of queries and keys."""

import hub_decoders
import pytest
from hub_decoders import SIZES

from jaxtune.errors import ConfigError
from jaxtune.models import decoder, registry

pytest.importorskip("transformers")

SIZES = {**SIZES, "hidden_size": 24, "sliding_window": 4, "query_pre_attn_scalar": 13, "num_hidden_layers": 3}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
ROTARIES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
VARIANTS = {
    "both kinds of block": ("Gemma3ForCausalLM", {**SIZES, "layer_types": KINDS, "rope_parameters": ROTARIES}),
    "final cap, biases, head apart": (
        "Gemma3ForCausalLM",
        {**SIZES, "final_logit_softcapping": 3.0, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "no head": ("Gemma3TextModel", {**SIZES, "layer_types": KINDS}),
}
stored = hub_decoders.stored_fixture(VARIANTS)


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


def test_fields_left_out_mean_what_they_mean_to_transformers():
    sizes = {name: SIZES[name] for name in ("vocab_size", "intermediate_size", "hidden_size")}
    hub_decoders.check_defaults("Gemma3TextConfig", **sizes, num_hidden_layers=7, num_attention_heads=8)


VALUES = {"model_type": "gemma3_text", **SIZES}


def test_older_names_of_both_rotaries_mean_the_same():
    old = {
        "sliding_window_pattern": 3,
        "rope_theta": 300.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    found = registry.config_from_dict({**VALUES, **old})
    assert found == registry.config_from_dict({**VALUES, "layer_types": KINDS, "rope_parameters": ROTARIES})
    assert [found.rotary_of(index).theta for index in range(3)] == [20.0, 20.0, 300.0]
    assert found.rotary == decoder.Rotary(theta=300.0, scaling="linear", factor=2.0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),  # EmbeddingGemma
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3"}, "unknown model_type 'gemma3'"),  # with images
        ({"sliding_window": None}, "sliding_window"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        registry.config_from_dict({**VALUES, **fields})
