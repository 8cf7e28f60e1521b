"""OLMo 2 against transformers: norms of outputs, and of all heads of queries and keys together."""

import hub_decoders
import pytest
from hub_decoders import SIZES

pytest.importorskip("transformers")

SIZES = {name: size for name, size in SIZES.items() if name != "head_dim"} | {"hidden_size": 24}
VARIANTS = {
    "plain": ("Olmo2ForCausalLM", SIZES),
    "biases, tied": ("Olmo2ForCausalLM", {**SIZES, "attention_bias": True, "tie_word_embeddings": True}),
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
    hub_decoders.check_defaults("Olmo2Config", **sizes, num_attention_heads=6)
