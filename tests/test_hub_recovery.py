"""The main job on real folders: a planted new base takes the fine-tune whole, as the oracle library sees it.

B = g(A) for a random element of everything the family declares, written as a folder; `transport --method auto` of the
fine-tune must then give a folder whose outputs in transformers are those of the fine-tune itself.
"""

import jax
import numpy as np
import pytest
from hub_models import randomise

import jaxtune as jt
from jaxtune import symmetry
from jaxtune.loading import load, network_of
from jaxtune.models import registry
from jaxtune.rng import named_key

pytest.importorskip("transformers")

DECODER = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OLD_DECODER = {key: DECODER[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
ENCODER = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TEXT = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}

# Family -> class of transformers, fields of its config.
MODELS = {
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", DECODER | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in DECODER.items() if k != "head_dim"}),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", DECODER),
    "gemma3": ("Gemma3ForCausalLM", DECODER),
    "phi3": ("Phi3ForCausalLM", {k: v for k, v in DECODER.items() if k != "head_dim"}),
    "gpt2": ("GPT2LMHeadModel", OLD_DECODER | {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")} | {"rotary_pct": 0.5},
    ),
    "opt": (
        "OPTForCausalLM",
        OLD_DECODER
        | {"hidden_size": 48, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 48},
    ),
    "mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "decoder_sparse_step": 1},
    ),
    "bert": ("BertForSequenceClassification", ENCODER | {"num_labels": 5}),
    "roberta": ("RobertaForSequenceClassification", ENCODER | {"num_labels": 5}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 48, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40}
        | {"num_labels": 5},
    ),
    "vit": ("ViTForImageClassification", VISION | {"num_labels": 5}),
    "deit": ("DeiTForImageClassification", VISION | {"num_labels": 5}),
    "dinov2": ("Dinov2ForImageClassification", VISION | {"num_labels": 5}),
    "clip": (
        "CLIPModel",
        {"vision_config": VISION, "text_config": TEXT | {"max_position_embeddings": 20}, "projection_dim": 32},
    ),
    "siglip": (
        "SiglipModel",
        {"vision_config": VISION, "text_config": TEXT | {"hidden_size": 48, "max_position_embeddings": 20}},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}
        | {
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
    ),
}
# The softest units of a small random network, which noise of a fine-tune's size already moves.
TOLERANCE = 1e-3


def build(name, seed):
    import torch
    import transformers

    torch.set_num_threads(1)
    made, fields = MODELS[name]
    made = getattr(transformers, made)
    return randomise(made(made.config_class(**fields)), seed)


def write(folder, model):
    model.save_pretrained(folder)
    return folder


def draw_inputs(model):
    """Inputs that fit, as torch tensors: what the oracle's forward takes."""
    import inspect

    import torch

    generator = torch.Generator().manual_seed(3)
    takes, config = inspect.signature(model.forward).parameters, model.config
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    inputs = {}
    if "input_ids" in takes:
        inputs["input_ids"] = torch.randint(3, text.vocab_size, (3, 10), generator=generator)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.randint(3, text.vocab_size, (3, 6), generator=generator)
    if "pixel_values" in takes:
        side = getattr(vision, "image_size", 32)
        inputs["pixel_values"] = torch.randn(3, 3, side, side, generator=generator)
    return inputs


def outputs_of(folder, name, inputs):
    import torch
    import transformers

    torch.set_num_threads(1)
    model = getattr(transformers, MODELS[name][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits_per_image if "logits_per_image" in out else out.logits).numpy()


def move(folder, out, element, spec):
    """The network of a folder moved by an element, as a folder."""
    stored = load(folder)
    return jt.save(out, symmetry.apply(spec, element, stored.params), like=stored)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_base_takes_the_fine_tune_whole(name, tmp_path):
    import torch

    model = build(name, 0)
    old = write(tmp_path / "old", model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, leaf in model.named_parameters():
            leaf.add_(0.1 * leaf.std(correction=0) * torch.randn(leaf.shape, generator=generator))
    tuned = write(tmp_path / "tuned", model)
    inputs = draw_inputs(model)

    spec = registry.symmetry_of(network_of(load(old)))
    element = symmetry.random(named_key(jax.random.key(0), "planted"), spec)
    new = move(old, tmp_path / "new", element, spec)
    scale = np.sqrt(np.mean(outputs_of(tuned, name, inputs) ** 2))
    apart = np.abs(outputs_of(new, name, inputs) - outputs_of(old, name, inputs)).max()
    assert apart < TOLERANCE * scale  # the planted base computes what the old one does

    found = jt.transport(old, tuned, new)
    assert found.prepared.info["chosen"] != "identity"
    assert found.equivalence is None or found.equivalence.is_exact
    result = jt.save(tmp_path / "result", found.params, like=load(new))
    ours, theirs = outputs_of(result, name, inputs), outputs_of(tuned, name, inputs)
    moved = np.abs(theirs - outputs_of(old, name, inputs)).max()
    assert moved > 20 * TOLERANCE * scale  # the fine-tune does something
    assert np.abs(ours - theirs).max() < TOLERANCE * scale
