"""Granite against transformers: a Llama with four multipliers."""

from pathlib import Path

import hub_decoders
import pytest
from hub_decoders import SIZES

pytest.importorskip("transformers")

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
    "logits_scaling": 5.0,
}
VARIANTS = {
    "plain": ("GraniteForCausalLM", {**SIZES, **MULTIPLIERS}),
    "biases, tied": (
        "GraniteForCausalLM",
        {**SIZES, **MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
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
    hub_decoders.check_defaults("GraniteConfig", **sizes, hidden_size=24, num_attention_heads=6)


def test_the_page_on_adding_a_family_shows_this_one():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "add_a_family.md").read_text()
    assert (root / "jaxtune" / "models" / "hub" / "granite.py").read_text().rstrip() in page
