"""Llama against transformers: outputs, bytes, symmetry, and what is refused."""

import hub_decoders
import numpy as np
import pytest
from hub_decoders import SIZES
from small_models import shapes_of

from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.models import registry
from jaxtune.models.decoder.rotary import rotary_frequencies
from jaxtune.tree import flatten

pytest.importorskip("transformers")

SIZES = {**SIZES, "hidden_size": 24}  # its config wants a multiple of the heads
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "plain": ("LlamaForCausalLM", SIZES),
    "biases, tied": (
        "LlamaForCausalLM",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "one query a group": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 6, "hidden_act": "gelu"}),
    "rotary llama3": ("LlamaForCausalLM", {**SIZES, "rope_parameters": LLAMA3}),
    "rotary linear": (
        "LlamaForCausalLM",
        {**SIZES, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0}},
    ),
    "no head": ("LlamaModel", SIZES),
    "classifier": ("LlamaForSequenceClassification", {**SIZES, "num_labels": 3}),
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
    hub_decoders.check_defaults(
        "LlamaConfig",
        vocab_size=37,
        hidden_size=24,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=6,
    )


VALUES = {"model_type": "llama", **SIZES}


def test_older_names_of_the_rotary_mean_the_same():
    new = registry.config_from_dict({**VALUES, "rope_parameters": LLAMA3})
    old = {("type" if name == "rope_type" else name): value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert registry.config_from_dict({**VALUES, "rope_theta": 100.0, "rope_scaling": old}) == new


@pytest.mark.parametrize("name", ["plain", "rotary llama3", "rotary linear"])
def test_frequencies_are_those_of_transformers_to_the_last_bit(name):
    model = hub_decoders.make_model(*VARIANTS[name][:1], **VARIANTS[name][1])
    config = registry.config_from_dict({**VALUES, **VARIANTS[name][1]})
    theirs = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_array_max_ulp(rotary_frequencies(config.rotary, config.head_width), theirs, maxulp=1)


REFUSED = {
    "rope_type": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "'dynamic'": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "'longrope'": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
    "lacks factor": {"rope_scaling": {"rope_type": "linear"}},
    "kind of block": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "hidden_act": {"hidden_act": "relu2"},
    "architectures": {"architectures": ["LlamaForTokenClassification"]},
    "quantization_config": {"quantization_config": {"quant_method": "gptq"}},
    "is_causal": {"is_causal": False},
    "hidden_size": {"hidden_size": None},
    "num_kv_heads": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        registry.config_from_dict({**VALUES, **REFUSED[name]})


@pytest.fixture(scope="module")
def tensors():
    values = {**VALUES, "num_hidden_layers": 1}
    model = hub_decoders.make_model("LlamaForCausalLM", **{**SIZES, "num_hidden_layers": 1})
    return values, {name: leaf.numpy() for name, leaf in model.state_dict().items()}


def test_frequencies_of_older_releases_are_carried(tensors):
    values, own = tensors
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4), "model.rotary_emb.inv_freq": np.ones(4)}
    _, table = registry.read_stored(values, {**own, **extra})
    params = table.decode({**own, **extra})
    tensor_of = table.encoder(params, extra)
    assert all(tensor_of(name) is extra[name] for name in extra)


def test_a_tied_head_that_is_stored_too_must_be_the_table(tensors):
    values, own = tensors
    values = {**values, "tie_word_embeddings": True}
    with pytest.raises(TreeMismatchError, match=r"lm_head.weight and model.embed_tokens.weight are tied"):
        registry.read_stored(values, own)[1].decode(own)
    same = {**own, "lm_head.weight": own["model.embed_tokens.weight"]}
    _, table = registry.read_stored(values, same)
    params = table.decode(same)
    assert "head" not in params
    np.testing.assert_array_equal(table.encoder(params, {})("lm_head.weight"), same["lm_head.weight"])


def test_unknown_and_missing_ones_are_named(tensors):
    values, own = tensors
    odd = {**own, "model.layers.0.self_attn.sinks": np.ones(6)}
    del odd["model.norm.weight"]
    with pytest.raises(TreeMismatchError, match=r"(?s)sinks: in the file.*model.norm.weight: expected"):
        registry.read_stored(values, odd)[1].decode(odd)


def test_every_leaf_is_filled(tensors):
    values, own = tensors
    config, table = registry.read_stored(values, own)
    assert flatten(table.decode(own)).keys() == flatten(shapes_of(config)).keys()
