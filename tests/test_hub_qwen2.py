"""Qwen2 against transformers: biases on queries, keys and values; windows in the later blocks."""

import hub_decoders
import pytest
from hub_decoders import SIZES

from jaxtune.errors import ConfigError
from jaxtune.models import registry

pytest.importorskip("transformers")

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
VARIANTS = {
    "plain": ("Qwen2ForCausalLM", SIZES),
    "windows, tied": ("Qwen2ForCausalLM", {**SIZES, **WINDOWS, "tie_word_embeddings": True}),
    "windows by name": (
        "Qwen2ForCausalLM",
        {**SIZES, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "no head": ("Qwen2Model", SIZES),
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
    sizes = {name: SIZES[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    hub_decoders.check_defaults("Qwen2Config", **sizes, hidden_size=64, num_attention_heads=32)
    hub_decoders.check_defaults("Qwen2Config", **sizes, hidden_size=64, num_attention_heads=32, **WINDOWS)


VALUES = {"model_type": "qwen2", **SIZES}


def test_windows_are_off_unless_asked_for():
    assert registry.config_from_dict({**VALUES, "sliding_window": 4, "max_window_layers": 0}).window is None


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({**WINDOWS, "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({**WINDOWS, "layer_types": ["sliding_attention"]}, "windowed has 1 answers for 2 blocks"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "'mrope'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        registry.config_from_dict({**VALUES, **fields})
