"""GPT-NeoX against transformers: parallel blocks, a part of every head turns, fused queries, keys and values."""

import hub_decoders
import numpy as np
import pytest
from hub_decoders import SIZES

from jaxtune.models import decoder, registry

pytest.importorskip("transformers")

SIZES = {name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
SIZES |= {"hidden_size": 24, "num_attention_heads": 3}


def turn(share):
    """Rotary parameters that turn a share of every head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": share}}


VARIANTS = {
    "half of a head turns": ("GPTNeoXForCausalLM", {**SIZES, **turn(0.5)}),
    "all of it, in a row, tied": (
        "GPTNeoXForCausalLM",
        {**SIZES, **turn(1.0), "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "no head": ("GPTNeoXModel", {**SIZES, **turn(0.25), "hidden_act": "gelu_new"}),
    "classifier": ("GPTNeoXForSequenceClassification", {**SIZES, **turn(0.5), "num_labels": 3}),
}
stored = hub_decoders.stored_fixture(VARIANTS)


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


def test_what_turns_and_what_does_not_are_leaves_apart():
    config = registry.config_from_dict({"model_type": "gpt_neox", **SIZES, **turn(0.5)})
    spec = decoder.symmetry(config)
    assert spec.groups["block_0/attn/qk_rotary"].kind == "rotary"
    assert spec.groups["block_0/attn/qk"].kind == "general_linear"
    assert {name for name in spec.unmatched if "block_0" in name} == {"block_0/attn/k/plain/bias"}


def test_fields_left_out_mean_what_they_mean_to_transformers():
    hub_decoders.check_defaults(
        "GPTNeoXConfig",
        vocab_size=37,
        hidden_size=32,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=2,
    )


def test_older_names_mean_the_same():
    values = {"model_type": "gpt_neox", **SIZES}
    old = registry.config_from_dict({**values, "rotary_pct": 0.5, "rotary_emb_base": 100})
    assert old == registry.config_from_dict({**values, **turn(0.5)})


def test_buffers_of_older_releases_are_carried():
    model = hub_decoders.make_model("GPTNeoXForCausalLM", **{**SIZES, **turn(0.5)})
    own = {name.replace("lm_head", "embed_out"): leaf.numpy() for name, leaf in model.state_dict().items()}
    extra = {
        f"gpt_neox.layers.{index}.attention.{name}": np.ones(3)
        for index in range(2)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    _, table = registry.read_stored({"model_type": "gpt_neox", **SIZES, **turn(0.5)}, {**own, **extra})
    params = table.decode({**own, **extra})
    assert params["head"]["kernel"].shape == (24, 37)
    assert all(table.encoder(params, extra)(name) is extra[name] for name in extra)
