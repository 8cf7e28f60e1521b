"""Phi-3 against transformers: queries, keys and values in one tensor, gate and up in another."""

import hub_decoders
import pytest
from hub_decoders import SIZES

from jaxtune.errors import ConfigError
from jaxtune.models import registry

pytest.importorskip("transformers")

SIZES = {name: size for name, size in SIZES.items() if name != "head_dim"} | {"hidden_size": 24}
VARIANTS = {
    "window": ("Phi3ForCausalLM", {**SIZES, "sliding_window": 4}),
    "one query a group, tied": (
        "Phi3ForCausalLM",
        {**SIZES, "num_key_value_heads": None, "tie_word_embeddings": True},
    ),
    "no head": ("Phi3Model", SIZES),
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
    sizes = {name: SIZES[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "hidden_size")}
    hub_decoders.check_defaults("Phi3Config", **sizes, num_attention_heads=6, pad_token_id=0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}}, "longrope"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}}, "su"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        registry.config_from_dict({"model_type": "phi3", **SIZES, **fields})
