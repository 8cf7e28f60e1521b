"""Gemma 2 against transformers: norms on both sides, gains that count from 1, soft caps, windows, a scaled table."""

import hub_decoders
import jax.numpy as jnp
import numpy as np
import pytest
from hub_decoders import SIZES

from jaxtune.errors import ConfigError
from jaxtune.models import decoder, registry

pytest.importorskip("transformers")

SIZES = {**SIZES, "hidden_size": 24, "sliding_window": 4, "query_pre_attn_scalar": 13, "num_hidden_layers": 3}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
VARIANTS = {
    "caps that bite": ("Gemma2ForCausalLM", {**SIZES, **CAPS}),
    "no caps, biases, head apart": (
        "Gemma2ForCausalLM",
        {
            **SIZES,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "reward model": ("Gemma2ForSequenceClassification", {**SIZES, **CAPS, "num_labels": 1}),
}
stored = hub_decoders.stored_fixture(VARIANTS)


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.bfloat16, 4.90625), (jnp.float32, np.float32(24**0.5))])
def test_the_scale_of_the_table_is_rounded_to_its_dtype(dtype, scale):
    """The root of 24 is 4.89898; the checkpoints are trained with it in bfloat16."""
    config = registry.config_from_dict({"model_type": "gemma2", **SIZES})
    params = {"embed": {"token": jnp.ones((config.vocab_size, config.width), dtype)}}
    stream = decoder.embed(config, params, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    assert float(stream[0, 0, 0]) == scale


def test_fields_left_out_mean_what_they_mean_to_transformers():
    sizes = {name: SIZES[name] for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "hidden_size")}
    hub_decoders.check_defaults("Gemma2Config", **sizes, num_attention_heads=8)


def test_attention_to_both_sides_is_refused():
    with pytest.raises(ConfigError, match="use_bidirectional_attention"):
        registry.config_from_dict({"model_type": "gemma2", **SIZES, "use_bidirectional_attention": True})
