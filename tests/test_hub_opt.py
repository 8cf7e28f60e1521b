"""OPT against transformers: positions count real tokens; OPT-350m norms sums and has a narrow token table."""

import hub_decoders
import pytest

from jaxtune.errors import ConfigError
from jaxtune.models import decoder, registry

pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "ffn_dim": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {**SIZES, "do_layer_norm_before": False, "word_embed_proj_dim": 10}
VARIANTS = {
    "plain": ("OPTForCausalLM", SIZES),
    "350m": ("OPTForCausalLM", SMALL),
    "no biases, head apart": ("OPTForCausalLM", {**SIZES, "enable_bias": False, "tie_word_embeddings": False}),
    "no last norm": ("OPTForCausalLM", {**SIZES, "_remove_final_layer_norm": True}),
    "no head": ("OPTModel", SIZES),
    "350m classifier": ("OPTForSequenceClassification", {**SMALL, "num_labels": 3}),
}
stored = hub_decoders.stored_fixture(VARIANTS)
VALUES = {"model_type": "opt", **SIZES}


def test_outputs_are_those_of_transformers(stored):
    hub_decoders.check_parity(*stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_byte_for_byte(name, tmp_path):
    hub_decoders.check_bytes(tmp_path, VARIANTS[name])


def test_a_random_element_leaves_the_function_alone(stored):
    hub_decoders.check_symmetry(stored[0])


def test_key_biases_say_nothing_about_their_units():
    spec = decoder.symmetry(registry.config_from_dict(VALUES))
    assert spec.unmatched == {f"block_{index}/attn/k/bias" for index in range(2)}


def test_fields_left_out_mean_what_they_mean_to_transformers():
    names = ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
    hub_decoders.check_defaults("OPTConfig", **{name: SIZES[name] for name in names})


def test_names_without_model_in_front_are_read():
    model = hub_decoders.make_model("OPTForCausalLM", **SIZES)
    own = {name.removeprefix("model."): leaf.numpy() for name, leaf in model.state_dict().items()}
    _, table = registry.read_stored(VALUES, own)
    assert table.decode(own)["embed"]["position"].shape == (34, 24)


def test_norms_without_gains_are_refused():
    with pytest.raises(ConfigError, match="layer_norm_elementwise_affine"):
        registry.config_from_dict({**VALUES, "layer_norm_elementwise_affine": False})
