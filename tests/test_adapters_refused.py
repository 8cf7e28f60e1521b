"""Adapters that are no plain LoRA of their base are refused by name."""

import numpy as np
import pytest
from hub_decoders import make_model
from hub_models import write_folder
from peft_models import LLAMA, TIED, adapt, change_config, load_base, write_adapted, write_case, write_tensors

from jaxtune.adapters import adapter_task_vector, read_adapter
from jaxtune.errors import CheckpointError, ConfigError, TreeMismatchError

pytest.importorskip("transformers")
pytest.importorskip("peft")


REFUSED = {
    "'use_dora' is DoRA": ({"use_dora": True}, "use_dora: True .DoRA"),
    "another method": ({"peft_type": "LOHA"}, '"peft_type" is \'LOHA\'; only "LORA"'),
    "prompts": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: .1, 2. .the adapter acts on some"),
    "replicated": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "stacks": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "biases of factors": ({"lora_bias": True}, "lora_bias: True"),
    "a field of tomorrow": ({"use_marvel": {"strength": 2}}, "use_marvel: {'strength': 2}"),
    "a rewritten base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
    "a rewritten base, quantised": ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq'"),
    "no rank": ({"r": 0}, "r: 0, expected a rank"),
    "no scale": ({"lora_alpha": "much"}, "lora_alpha: 'much', expected a number"),
    "no pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern: .*no regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_computes_something_else_is_refused_by_name(name, tmp_path):
    fields, reason = REFUSED[name]
    _, folder, _ = write_case(tmp_path, "llama")
    change_config(folder, **fields)
    with pytest.raises(ConfigError, match=reason):
        read_adapter(folder)


def test_a_real_dora_is_refused(tmp_path):
    write_adapted(tmp_path, adapt(make_model(LLAMA[0], **LLAMA[1]), r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ConfigError, match="use_dora"):
        read_adapter(tmp_path)
    change_config(tmp_path, use_dora=False)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector: not a factor that a plain LoRA has"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {"x": t.pop("PREFIX.q_proj.lora_A.weight")}, "x: does not begin with"),
        (lambda t: t.pop("PREFIX.q_proj.lora_B.weight"), "q_proj.lora_A.weight: has no B beside it"),
        (lambda t: t.update({"PREFIX.q_proj.lora_A.weight": np.ones((3, 24), np.float32)}), "says rank 4"),
        (lambda t: t.update({"PREFIX.q_proj.lora_A.weight": np.ones((4, 24), np.int32)}), "int32; only floats"),
        (
            lambda t: t.update(
                {
                    "PREFIX.k_proj.lora_A.weight": np.ones((4, 24), np.float32),
                    "PREFIX.k_proj.lora_B.weight": np.ones((16, 4), np.float32),
                }
            ),
            "does not target model.layers.0.self_attn.k_proj",
        ),
        (lambda t: t.update({"PREFIX.q_proj.lora_E": np.ones((4, 1), np.float32)}), "lora_E: not a factor"),
    ],
    ids=["name", "half", "rank", "dtype", "target", "other"],
)
def test_tensors_that_are_not_understood_are_refused_by_name(change, reason, tmp_path):
    _, folder, _ = write_case(tmp_path, "llama")
    tensors = dict(read_adapter(folder).tensors)
    prefix = "base_model.model.model.layers.0.self_attn"
    short = {name.replace(prefix, "PREFIX"): tensor for name, tensor in tensors.items()}
    extra = change(short)
    short |= extra if isinstance(extra, dict) else {}
    tensors = {name.replace("PREFIX", prefix): tensor for name, tensor in short.items()}
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=reason):
        read_adapter(folder)


def test_another_base_is_refused_by_name(tmp_path):
    _, folder, _ = write_case(tmp_path / "a", "llama, every linear")
    base, _, _ = write_case(tmp_path / "b", "gpt2")
    stored, table = load_base(base)
    with pytest.raises(TreeMismatchError, match=r"14 tensors that its base does not have:\n  model.layers.0.mlp"):
        adapter_task_vector(read_adapter(folder), table, stored.params)
    wider = make_model(LLAMA[0], **{**LLAMA[1], "intermediate_size": 28})
    stored, table = load_base(write_folder(tmp_path / "wider", wider))
    with pytest.raises(TreeMismatchError, match=r"gate_proj.weight: \[28, 24\] in the base, factors float32\[4, 24\]"):
        adapter_task_vector(read_adapter(folder), table, stored.params)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "target_modules": ["embed_tokens"]},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["factors", "saved"],
)
def test_an_adapter_that_takes_tied_tensors_apart_is_refused(options, tmp_path):
    stored, table = load_base(write_folder(tmp_path / "base", make_model(TIED[0], **TIED[1])))
    write_adapted(tmp_path / "adapter", adapt(make_model(TIED[0], **TIED[1]), **options))
    with pytest.raises(TreeMismatchError, match=r"changed, and .* tied to it, is not"):
        adapter_task_vector(read_adapter(tmp_path / "adapter"), table, stored.params)


def test_a_folder_without_its_files_is_refused(tmp_path):
    _, folder, _ = write_case(tmp_path, "llama")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_adapter(tmp_path)
