"""The config.json of releases that people use, and how many parameters their pages count."""

import math

import pytest
from small_models import shapes_of

from jaxtune.models import registry
from jaxtune.tree import flatten

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(vocab, width, hidden, depth, heads, kv_heads=None, **more):
    """Fields by their usual names."""
    values = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    return {**values, **({} if kv_heads is None else {"num_key_value_heads": kv_heads}), **more}


RELEASES = {
    "gpt2": (
        124_439_808,
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "vocab_size": 50257,
        },
    ),
    "opt-350m": (
        331_196_416,
        {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "activation_dropout": 0.0,
            "_remove_final_layer_norm": False,
            "do_layer_norm_before": False,
            "ffn_dim": 4096,
            "hidden_size": 1024,
            "max_position_embeddings": 2048,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "pad_token_id": 1,
            "prefix": "</s>",
            "vocab_size": 50272,
            "word_embed_proj_dim": 512,
        },
    ),
    "pythia-160m": (
        162_322_944,
        {
            **sizes(50304, 768, 3072, 12, 12),
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
        },
    ),
    "Llama-2-7b": (
        6_738_415_616,
        {
            **sizes(32000, 4096, 11008, 32, 32, 32),
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            **sizes(128256, 4096, 14336, 32, 32, 8),
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            **sizes(128256, 2048, 8192, 16, 32, 8, head_dim=64),
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_scaling": {**LLAMA3, "factor": 32.0},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            **sizes(32000, 4096, 14336, 32, 32, 8),
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            **sizes(151936, 896, 4864, 24, 14, 2),
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "max_window_layers": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            **sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128),
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            **sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256),
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            **sizes(262144, 1152, 6912, 26, 4, 1, head_dim=256),
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "Phi-3-mini-4k": (
        3_821_079_552,
        {
            **sizes(32064, 3072, 8192, 32, 32, 32),
            "architectures": ["Phi3ForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
            "model_type": "phi3",
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "attention_bias": False,
        },
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_parameters_are_as_many_as_published(name):
    count, values = RELEASES[name]
    shapes = flatten(shapes_of(registry.config_from_dict(values)))
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) == count
