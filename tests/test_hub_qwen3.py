"""Qwen3 against transformers: queries and keys are normed head by head."""

import hub_decoders
import pytest
from hub_decoders import SIZES

from jaxtune import symmetry
from jaxtune.models import registry

pytest.importorskip("transformers")

VARIANTS = {
    "plain": ("Qwen3ForCausalLM", SIZES),
    "biases, tied, windows": (
        "Qwen3ForCausalLM",
        {
            **SIZES,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "classifier": ("Qwen3ForSequenceClassification", {**SIZES, "num_labels": 3}),
}
stored = hub_decoders.stored_fixture(VARIANTS)


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


def test_a_plane_has_a_sign_and_no_angle_behind_the_norm(tmp_path):
    """The gain of a unit differs from that of its partner in the plane."""
    config, params = hub_decoders.read(hub_decoders.write(tmp_path, VARIANTS["plain"])[0])
    spec, group = registry.symmetry_of(config), "block_0/attn/qk"
    element = symmetry.identity(spec)
    element[group][0, 1] = -1
    assert hub_decoders.difference_made(config, params, spec, element) < 1e-4
    spec = hub_decoders.with_kind(spec, group, "rotary")
    element = symmetry.identity(spec)
    element[group][0, :, 1] = (0, 1)  # a right angle
    assert hub_decoders.difference_made(config, params, spec, element) > 1e-3


def test_fields_left_out_mean_what_they_mean_to_transformers():
    sizes = {name: SIZES[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    hub_decoders.check_defaults("Qwen3Config", **sizes, hidden_size=64, num_attention_heads=32)
