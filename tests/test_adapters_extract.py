"""Full weights as a LoRA: the best factors, the error as stated, PEFT as the reader."""

import numpy as np
import pytest
from hub_decoders import draw_texts, make_model, run
from hub_models import assert_close, randomise, write_folder
from peft_models import (
    BERT,
    BERT_MLM,
    BIASED,
    GPT2,
    LLAMA,
    MIXTRAL,
    NEOX,
    PHI3,
    TIED,
    adapt,
    load_base,
    load_with_peft,
    logits_of,
    write_adapted,
    write_case,
)

from jaxtune import tree
from jaxtune.adapters import adapter_task_vector, extract_adapter, merge_adapter, read_adapter, write_adapter
from jaxtune.adapters.extract import factorise
from jaxtune.errors import ConfigError
from jaxtune.models import registry

pytest.importorskip("transformers")
pytest.importorskip("peft")

MODELS = {"llama": LLAMA, "biases": BIASED, "tied": TIED, "gpt2": GPT2, "bert": BERT, "phi3": PHI3, "neox": NEOX}


def make_pair(folder, variant):
    """(stored base, key table, task vector of a full fine-tune) and the folder of the base."""
    cls, fields = variant
    model = make_model(cls, **fields)
    stored, table = load_base(write_folder(folder / "base", model))
    tuned, _ = load_base(write_folder(folder / "tuned", randomise(model, 5)))
    return stored, table, tree.task_vector(stored.params, tuned.params)


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_with_the_extracted_adapter_what_the_merged_weights_do(name, tmp_path):
    stored, table, vector = make_pair(tmp_path, MODELS[name])
    found = extract_adapter(vector, table, stored.params, rank=5, base=str(tmp_path / "base"))
    assert not found.not_held
    out = write_adapter(tmp_path / "adapter", found.adapter)
    merged = merge_adapter(read_adapter(out), table, stored.params)
    text, mask = draw_texts(37)
    ours = np.asarray(run(registry.config_from_dict(stored.config), merged, {"text": text, "mask": mask}))
    theirs = logits_of(load_with_peft(tmp_path / "base", out))
    at = mask if ours.ndim == 3 else np.ones(len(text), bool)
    assert_close(ours[at], theirs[at], 1e-4)


@pytest.mark.parametrize("name", ["biases", "gpt2", "phi3"])
def test_no_factors_of_the_rank_come_closer_and_the_error_is_theirs(name, tmp_path):
    stored, table, vector = make_pair(tmp_path, MODELS[name])
    found = extract_adapter(vector, table, stored.params, rank=5)
    held = tree.flatten(adapter_task_vector(found.adapter, table, stored.params))
    change = tree.flatten(vector)
    left_out, all_of_it, left_of_factors, of_factors = 0.0, 0.0, 0.0, 0.0
    for row in table.rows:
        ours, theirs = (row.encode({path: np.asarray(t[path]) for path in row.leaves}) for t in (held, change))
        for stored_name, wanted in theirs.items():
            gap, size = np.linalg.norm(wanted - ours[stored_name]), np.linalg.norm(wanted)
            left_out, all_of_it = left_out + gap**2, all_of_it + size**2
            if stored_name in found.errors:
                best = np.sqrt(np.sum(np.linalg.svd(wanted.astype(np.float64), compute_uv=False)[5:] ** 2))
                np.testing.assert_allclose(gap, best, rtol=1e-4)
                np.testing.assert_allclose(found.errors[stored_name], best / size, rtol=1e-4)
                left_of_factors, of_factors = left_of_factors + gap**2, of_factors + size**2
            else:
                assert gap <= 1e-5 * size, "held in full"
                assert stored_name in found.whole
    np.testing.assert_allclose(found.error, np.sqrt(left_of_factors / of_factors), rtol=1e-4)
    np.testing.assert_allclose(found.total_error, np.sqrt(left_out / all_of_it), rtol=1e-4)


def test_the_weights_of_an_adapter_come_back_as_an_adapter(tmp_path):
    """The change has the rank that is asked for, or less: nothing is lost."""
    base, folder, adapted = write_case(tmp_path, "llama, every linear")
    stored, table = load_base(base)
    vector = adapter_task_vector(read_adapter(folder), table, stored.params)
    found = extract_adapter(vector, table, stored.params, rank=7, task_type="CAUSAL_LM", base="there")
    assert found.error < 1e-6
    assert found.total_error < 1e-6
    assert not found.whole
    assert len(found.errors) == 15
    assert found.adapter.config["task_type"] == "CAUSAL_LM"
    assert found.adapter.config["base_model_name_or_path"] == "there"
    out = write_adapter(tmp_path / "again", found.adapter)
    _, mask = draw_texts(37)
    assert_close(logits_of(load_with_peft(base, out))[mask], logits_of(adapted)[mask], 1e-4)


def test_what_did_not_change_is_left_out(tmp_path):
    base, folder, _ = write_case(tmp_path, "llama, one block")
    stored, table = load_base(base)
    vector = adapter_task_vector(read_adapter(folder), table, stored.params)
    found = extract_adapter(vector, table, stored.params, rank=2)
    assert list(found.errors) == ["model.layers.1.self_attn.o_proj.weight"]
    assert found.adapter.config["target_modules"] == ["model.layers.1.self_attn.o_proj"]


def test_a_small_matrix_gets_the_rank_that_it_has(tmp_path):
    stored, table, vector = make_pair(tmp_path, LLAMA)
    found = extract_adapter(vector, table, stored.params, rank=18)
    ranks = {low.module.split(".")[-1]: len(found.adapter.tensors[low.a]) for low in found.adapter.low_rank}
    assert ranks["k_proj"] == 16
    assert ranks["q_proj"] == 18
    assert found.errors["model.layers.0.self_attn.k_proj.weight"] < 1e-6
    write_adapter(tmp_path / "adapter", found.adapter)
    loaded = load_with_peft(tmp_path / "base", tmp_path / "adapter")
    scales = {m.scaling["default"] for m in loaded.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert scales == {1.0}


def test_experts_are_reported_as_not_held(tmp_path):
    stored, table, vector = make_pair(tmp_path, MIXTRAL)
    found = extract_adapter(vector, table, stored.params, rank=4)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in found.not_held
    assert found.total_error > found.error
    assert found.as_dict()["not_held"] == found.not_held


@pytest.mark.parametrize("kept", ["bias", "scale"])
def test_one_tensor_of_a_module_alone_may_have_changed(kept, tmp_path):
    stored, table, vector = make_pair(tmp_path, GPT2)
    stays = (kept, "block_0/mlp/up/kernel")
    vector = tree.map_leaves(lambda path, leaf: leaf if path.endswith(stays) else 0 * leaf, vector)
    found = extract_adapter(vector, table, stored.params, rank=24)
    assert found.total_error < 1e-6
    out = write_adapter(tmp_path / "adapter", found.adapter)
    merged = tree.apply_task_vector(stored.params, vector)
    text, mask = draw_texts(37)
    ours = np.asarray(run(registry.config_from_dict(stored.config), merged, {"text": text, "mask": mask}))
    assert_close(ours[mask], logits_of(load_with_peft(tmp_path / "base", out))[mask], 1e-4)


def test_a_parameter_beside_modules_is_reported_as_not_held(tmp_path):
    """The bias of BERT's vocabulary belongs to no layer."""
    stored, table, vector = make_pair(tmp_path, BERT_MLM)
    found = extract_adapter(vector, table, stored.params, rank=4)
    assert found.not_held == {"cls.predictions.bias": "a parameter of cls.predictions, which has modules inside"}
    out = write_adapter(tmp_path / "adapter", found.adapter)
    merged = merge_adapter(read_adapter(out), table, stored.params)
    text, mask = draw_texts(37)
    ours = np.asarray(run(registry.config_from_dict(stored.config), merged, {"text": text, "mask": mask}))
    assert_close(ours[mask], logits_of(load_with_peft(tmp_path / "base", out))[mask], 1e-4)


def test_half_precision_changes_are_factorised_in_float32(tmp_path):
    stored, table, vector = make_pair(tmp_path, LLAMA)
    found = extract_adapter(vector, table, stored.params, rank=4, dtype=np.float16)
    assert {tensor.dtype for name, tensor in found.adapter.tensors.items() if "lora" in name} == {np.dtype(np.float16)}


def test_large_matrices_get_factors_as_good_as_those_of_all_singular_values():
    draw = np.random.default_rng(0)
    # A tail that decays slowly, as that of task vectors does.
    values = 1.0 / np.arange(1, 401) ** 0.5
    left, right = (np.linalg.qr(draw.normal(size=(n, 400)))[0] for n in (700, 500))
    matrix = ((left * values) @ right.T).astype(np.float32)
    a, b, error = factorise(matrix, 12, np.random.default_rng(1))
    best = np.sqrt(np.sum(values[12:] ** 2))
    assert a.shape == (12, 500)
    assert b.shape == (700, 12)
    np.testing.assert_allclose(error, np.linalg.norm(matrix - b @ a), rtol=1e-5)
    assert best <= error * (1 + 1e-5)
    assert error <= 1.001 * best
    again = factorise(matrix, 12, np.random.default_rng(1))
    np.testing.assert_array_equal(again[0], a)


def test_nothing_to_extract_and_no_rank_are_refused(tmp_path):
    stored, table, vector = make_pair(tmp_path, LLAMA)
    with pytest.raises(ConfigError, match="rank is 0"):
        extract_adapter(vector, table, stored.params, rank=0)
    zero = tree.task_vector(stored.params, stored.params)
    with pytest.raises(ConfigError, match="changes no matrix"):
        extract_adapter(zero, table, stored.params, rank=2)


def test_an_adapter_beside_a_changed_norm_keeps_both(tmp_path):
    """Extraction from a model that PEFT trained with biases and saved modules."""
    cls, fields = BIASED
    stored, table = load_base(write_folder(tmp_path / "base", make_model(cls, **fields)))
    adapted = adapt(
        make_model(cls, **fields), r=3, target_modules=["q_proj"], bias="lora_only", modules_to_save=["norm"]
    )
    adapter = read_adapter(write_adapted(tmp_path / "first", adapted))
    found = extract_adapter(adapter_task_vector(adapter, table, stored.params), table, stored.params, rank=3)
    assert found.total_error < 1e-6
    assert any(name.endswith("q_proj.bias") for name in found.whole)
    assert any(name.endswith("norm.weight") for name in found.whole)
    assert found.adapter.config["bias"] == "lora_only"
    out = write_adapter(tmp_path / "second", found.adapter)
    _, mask = draw_texts(37)
    assert_close(logits_of(load_with_peft(tmp_path / "base", out))[mask], logits_of(adapted)[mask], 1e-4)
