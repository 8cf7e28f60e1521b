"""Mistral against transformers: a window in every block."""

import hub_decoders
import pytest
from hub_decoders import SIZES

from jaxtune.models import registry

pytest.importorskip("transformers")

VARIANTS = {
    "window shorter than the text": ("MistralForCausalLM", {**SIZES, "sliding_window": 4}),
    "no window": ("MistralForCausalLM", {**SIZES, "sliding_window": None, "head_dim": None, "hidden_size": 24}),
    "reward model": ("MistralForSequenceClassification", {**SIZES, "sliding_window": 4, "num_labels": 1}),
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
    hub_decoders.check_defaults("MistralConfig", **sizes, hidden_size=64, num_attention_heads=16)


def test_a_window_of_null_is_none_and_one_left_out_is_not():
    values = {"model_type": "mistral", **SIZES}
    assert registry.config_from_dict(values).window == 4096
    assert registry.config_from_dict({**values, "sliding_window": None}).window is None
