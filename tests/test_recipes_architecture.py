"""Places of stored tensors: modules, layers and their fields in config.json, with and without a key table."""

import time

import pytest
from recipe_oracle import model_folder

from jaxtune import checkpoint
from jaxtune.models import registry
from jaxtune.recipes.architecture import find_architecture, get_field, with_field
from jaxtune.recipes.vocabularies import find_vocabulary

STACKS = {
    "llama": {"default": ("model.layers.", "num_hidden_layers")},
    "gpt2": {"default": ("transformer.h.", "n_layer")},
    "gpt_neox": {"default": ("gpt_neox.layers.", "num_hidden_layers")},
    "opt": {"default": ("model.decoder.layers.", "num_hidden_layers")},
    "mixtral": {"default": ("model.layers.", "num_hidden_layers")},
    "bert": {"default": ("bert.encoder.layer.", "num_hidden_layers")},
    "distilbert": {"default": ("distilbert.transformer.layer.", "n_layers")},
    "vit": {"default": ("vit.encoder.layer.", "num_hidden_layers")},
    "t5": {"encoder": ("encoder.block.", "num_layers"), "decoder": ("decoder.block.", "num_decoder_layers")},
    "clip": {
        "vision": ("vision_model.encoder.layers.", "vision_config.num_hidden_layers"),
        "text": ("text_model.encoder.layers.", "text_config.num_hidden_layers"),
    },
}
# Held by the first block, added by all of its stack.
DISTANCES = {
    f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")
}
FIRST = {
    "llama": {"model.embed_tokens.weight"},
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight"},
    "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
    "t5": {"shared.weight", *DISTANCES},
}
ROWS = {
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt2": {"transformer.wte.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "embed_out.weight"},
    "bert": {"bert.embeddings.word_embeddings.weight"},
    "clip": {"text_model.embeddings.token_embedding.weight"},
    "t5": {"shared.weight"},
    "vit": set(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("family", STACKS)
def test_modules_and_layers_of_a_family(family, with_table, place):
    stored = checkpoint.load(model_folder(place, family))
    tensors = stored.layout.tensors
    table = registry.read_stored(stored.config, tensors)[1] if with_table else None
    found = find_architecture(stored.config, tensors, table)
    assert {module: (stack.prefix, stack.field) for module, stack in found.stacks.items()} == STACKS[family]
    assert {stack.num_layers for stack in found.stacks.values()} == {2}
    assert list(found.places) == list(tensors)
    for name, one in found.places.items():
        assert found.name_of(one) == name
        inside = [module for module, (prefix, _) in STACKS[family].items() if name.startswith(prefix)]
        assert (one.layer is not None) == (bool(inside) and name not in DISTANCES)
        assert one.module in (inside or found.stacks)
    if family in FIRST:
        assert {name for name, one in found.places.items() if one.is_first} == FIRST[family]
    if family in ROWS:
        assert find_vocabulary(tensors) == dict.fromkeys(ROWS[family], 0)


def test_a_layer_is_renamed():
    name = "model.layers.3.mlp.experts.11.up.weight"
    found = find_architecture({}, [f"model.layers.{n}.mlp.experts.11.up.weight" for n in range(5)])
    assert found.name_of(found.places[name], 27) == "model.layers.27.mlp.experts.11.up.weight"
    ours = find_architecture({"depth": 2}, ["block_0/attn/q/kernel", "block_1/attn/q/kernel", "head/kernel"])
    assert ours.stacks["default"].field == "depth"
    assert ours.name_of(ours.places["block_1/attn/q/kernel"], 12) == "block_12/attn/q/kernel"


def test_a_list_that_is_no_stack_of_layers_is_told_by_the_config():
    names = [f"model.layers.{n}.w" for n in range(3)] + ["classifier.0.weight", "classifier.1.weight"]
    found = find_architecture({"num_hidden_layers": 3}, names)
    assert list(found.stacks) == ["default"]
    assert found.places["classifier.1.weight"].layer is None
    vague = find_architecture({}, names)
    assert {"model.layers", "classifier"} == set(vague.stacks)


def test_numbers_with_a_gap_count_no_layers():
    found = find_architecture({}, ["head.0.weight", "head.2.weight", "norm.weight"])
    assert found.stacks == {"default": None}
    assert {one.layer for one in found.places.values()} == {None}


def test_fields_of_a_config():
    config = {"a": {"b": 1}, "c": 2}
    assert get_field(config, "a.b") == 1
    assert get_field(config, "a.x.y") is None
    assert with_field(config, "a.b", 5) == {"a": {"b": 5}, "c": 2}
    assert config == {"a": {"b": 1}, "c": 2}


def test_the_cost_is_linear_in_tensors():
    def seconds(num_experts):
        names = [f"model.layers.{n}.mlp.experts.{e}.up.weight" for n in range(48) for e in range(num_experts)]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            find_architecture({"num_hidden_layers": 48}, names)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(1000) < 40 * seconds(100) + 0.2  # ten times the tensors; a square would be a hundred
