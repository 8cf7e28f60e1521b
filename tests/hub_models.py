"""Checkpoints of the Hugging Face families with random weights, made from their own configs.

python tests/hub_models.py OUT [--family llama ...] [--seed 0]      writes OUT/llama, ...: config.json, safetensors
"""

import argparse
from pathlib import Path

import numpy as np

from jaxtune import checkpoint
from jaxtune.models import registry
from jaxtune.tree import flatten

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


def make_model(name, *, seed=0):
    """A small model of a family, in evaluation mode, with random weights."""
    import torch
    import transformers

    torch.set_num_threads(1)
    made, fields = MODELS[name]
    made = getattr(transformers, made)
    return randomise(made(made.config_class(**fields)), seed)


def randomise(model, seed):
    """Every parameter with signal: no zero biases, no equal gains. In place; returns the model in eval mode."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=draw, dtype=torch.float32).to(leaf.dtype)
            if leaf.ndim < 2:
                is_gain = "norm" in name.lower() or "ln" in name.lower()
                leaf.copy_((1.0 if is_gain and name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                leaf.copy_(noise / np.sqrt(leaf.shape[-1]))
    return model.eval()


def write_folder(folder, model, **options):
    """`save_pretrained` of a model; returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder, **options)
    return folder


def read_folder(folder):
    """(config, params, checkpoint) of a folder, through the family's key table."""
    stored = checkpoint.load(folder)
    tensors = flatten(stored.params)
    config, table = registry.read_stored(stored.config, tensors)
    return config, table.decode(tensors), stored


def assert_close(ours, theirs, tolerance=1e-4):
    """Largest difference over the root mean square of the oracle's outputs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.sqrt(np.mean(theirs**2))


def assert_round_trip(folder):
    """Every stored tensor comes back byte for byte."""
    stored = checkpoint.load(folder)
    tensors = flatten(stored.params)
    _, table = registry.read_stored(stored.config, tensors)
    params = table.decode(tensors)
    tensor_of = table.encoder(params, tensors)
    for name, tensor in tensors.items():
        again = tensor_of(name)
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape), name
        assert np.ascontiguousarray(again).tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.family:
        print(write_folder(arguments.out / name, make_model(name, seed=arguments.seed)))


if __name__ == "__main__":
    main()
