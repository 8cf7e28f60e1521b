"""Tiny models of transformers with adapters of PEFT on them, random in every tensor: what adapters are tested on."""

import json
import warnings

import numpy as np
from hub_decoders import draw_texts, make_model, outputs_of_oracle
from hub_models import write_folder

from jaxtune import checkpoint
from jaxtune.checkpoint import safetensors
from jaxtune.loading import load

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2, "head_dim": 8})
BIASED = (LLAMA[0], {**LLAMA[1], "attention_bias": True, "mlp_bias": True})
TIED = (LLAMA[0], {**LLAMA[1], "tie_word_embeddings": True})
GPT2 = ("GPT2LMHeadModel", {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32})
BERT = ("BertForSequenceClassification", {**SIZES, "num_labels": 3})
BERT_MLM = ("BertForMaskedLM", SIZES)
PHI3 = ("Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 2})
NEOX = ("GPTNeoXForCausalLM", {**SIZES, "rotary_pct": 0.5})
MIXTRAL = ("MixtralForCausalLM", {**LLAMA[1], "num_local_experts": 4, "experts_implementation": "eager"})

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (LLAMA, {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "llama, every linear": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": [*EVERY_LINEAR, "lm_head"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"v_proj": 11, "^model.layers.0.self_attn.o_proj": 1},
        },
    ),
    "llama, biases, saved modules": (
        BIASED,
        {"r": 3, "target_modules": ["k_proj", "up_proj"], "bias": "all", "modules_to_save": ["norm", "lm_head"]},
    ),
    "llama, table, regex": (LLAMA, {"r": 3, "target_modules": r".*(embed_tokens|layers\.1\.mlp\.(gate|down)_proj)"}),
    "llama, one block": (LLAMA, {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "llama, tied table": (
        TIED,
        {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "llama, tied table saved": (
        TIED,
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "gpt2": (GPT2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "lora_only"}),
    "bert": (
        BERT,
        {"r": 4, "target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS", "lora_dropout": 0.1},
    ),
    "phi3": (PHI3, {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "neox": (NEOX, {"r": 4, "target_modules": ["query_key_value", "dense", "dense_4h_to_h", "embed_out"]}),
    "mixtral, attention": (MIXTRAL, {"r": 4, "target_modules": ["q_proj", "o_proj"]}),
}


def adapt(model, *, seed=1, **options):
    """The model with a LoRA whose every trained tensor is random."""
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in adapted.named_parameters():
            if leaf.requires_grad and "base_layer.weight" not in name:
                leaf.add_(0.3 / np.sqrt(leaf.shape[-1]) * torch.randn(leaf.shape, generator=draw).to(leaf.dtype))
    return adapted.eval()


def write_case(folder, name, *, dtype=None):
    """(folder of the base, folder of the adapter, the adapted model) of one of `CASES`."""
    (cls, fields), options = CASES[name]
    base = write_folder(folder / "base", make_model(cls, dtype=dtype, **fields))
    adapted = adapt(make_model(cls, dtype=dtype, **fields), **options)
    return base, write_adapted(folder / "adapter", adapted), adapted


def write_adapted(folder, adapted):
    """`save_pretrained` of an adapted model; returns the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    return folder


def load_base(folder):
    """(checkpoint, key table) of a base."""
    stored = load(folder)
    return stored, stored.layout.codec.table


def load_with_peft(base, adapter):
    """The model of transformers in the folder `base`, with the adapter that PEFT reads from `adapter`."""
    import peft
    import transformers

    cls = getattr(transformers, load(base).config["architectures"][0])
    model = cls.from_pretrained(base, experts_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*adapter keys.*")  # of what is missing PEFT only warns
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def logits_of(model):
    """What a model of transformers makes of a few texts."""
    return outputs_of_oracle(model, *draw_texts(37))


def write_moved(folder, stored, params):
    """A base with other weights in the layout of `stored`."""
    checkpoint.save(folder, params, like=stored)
    return folder


def change_config(folder, **fields):
    """Other values in adapter_config.json."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def write_tensors(folder, tensors):
    """Other tensors in adapter_model.safetensors."""
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").unlink()
    safetensors.make_header(tensors).write(folder / "adapter_model.safetensors", tensors.__getitem__)
