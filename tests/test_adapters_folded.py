"""Adapters that move with folded weights, where the stream turns: the same as folding, moving and unfolding weights."""

import numpy as np
import pytest
from hub_decoders import draw_texts, make_model, run
from hub_models import assert_close, write_folder
from peft_models import LLAMA, MIXTRAL, TIED, adapt, load_base, write_adapted, write_case

from jaxtune import symmetry, tree
from jaxtune.adapters import adapter_task_vector, extract_adapter, merge_adapter, move_adapter, read_adapter
from jaxtune.errors import SpecError
from jaxtune.models import registry
from jaxtune.symmetry import canonical

pytest.importorskip("transformers")
pytest.importorskip("peft")
GEMMA2 = ("Gemma2ForCausalLM", {**LLAMA[1], "query_pre_attn_scalar": 8, "tie_word_embeddings": False})
QWEN2 = ("Qwen2ForCausalLM", LLAMA[1])
CASES = {
    "llama": (LLAMA, {"r": 4, "target_modules": "all-linear"}),
    "llama, table and head": (LLAMA, {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied": (TIED, {"r": 4, "target_modules": "all-linear"}),
    "qwen2": (QWEN2, {"r": 4, "target_modules": "all-linear"}),
    "gemma2": (GEMMA2, {"r": 4, "target_modules": "all-linear"}),
    "mixtral": (MIXTRAL, {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
}


def make(folder, case):
    """(stored base, key table, adapter, another base of the same kind)."""
    (cls, fields), options = case
    stored, table = load_base(write_folder(folder / "base", make_model(cls, **fields)))
    other, _ = load_base(write_folder(folder / "other", make_model(cls, seed=9, **fields)))
    adapter = read_adapter(write_adapted(folder / "adapter", adapt(make_model(cls, **fields), **options)))
    return stored, table, adapter, other


@pytest.mark.parametrize("name", CASES)
def test_factors_move_as_folded_weights_do(name, tmp_path, key):
    stored, table, adapter, other = make(tmp_path, CASES[name])
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    folded = canonical.canonical_spec(spec)
    element = symmetry.random(key, folded)
    moved = move_adapter(
        adapter, table, source=stored.params, target=other.params, spec=folded, element=element, folded=spec
    )
    for own, tensor in moved.tensors.items():
        assert tensor.shape == adapter.tensors[own].shape
    ours = tree.flatten(adapter_task_vector(moved, table, other.params))
    tuned = merge_adapter(adapter, table, tree.map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), stored.params))
    before, after = (canonical.fold(spec, params) for params in (stored.params, tuned))
    change = symmetry.apply(folded, element, tree.task_vector(before, after))
    theirs = tree.flatten(canonical.unfold(spec, change, other.params).task_vector)
    for path, leaf in theirs.items():
        size = max(np.abs(leaf).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(ours[path]), leaf, atol=1e-4 * size, err_msg=path)


def test_onto_a_base_that_is_the_old_one_turned_it_computes_what_it_did(tmp_path, key):
    stored, table, adapter, _ = make(tmp_path, CASES["llama"])
    config = registry.config_from_dict(stored.config)
    spec = registry.symmetry_of(config)
    folded = canonical.canonical_spec(spec)
    element = symmetry.random(key, folded)
    turned = symmetry.apply(folded, element, canonical.fold(spec, stored.params))
    target = canonical.realise(spec, turned, stored.params)
    moved = move_adapter(adapter, table, source=stored.params, target=target, spec=folded, element=element, folded=spec)
    text, mask = draw_texts(37)
    before, after = (
        np.asarray(run(config, merge_adapter(a, table, params), {"text": text, "mask": mask}))[mask]
        for a, params in ((adapter, stored.params), (moved, target))
    )
    assert_close(after, before, 1e-4)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((LLAMA, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}), "norm.weight is replaced"),
        (
            (TIED, {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
            "embed_tokens.weight has factors, and it is tied",
        ),
        (
            ((LLAMA[0], {**LLAMA[1], "attention_bias": True}), {"r": 2, "target_modules": ["o_proj"]}),
            "o_proj.weight has factors, and a value bias passes through it",
        ),
    ],
    ids=["norm", "tie", "bias"],
)
def test_what_folding_spreads_over_other_weights_is_refused(case, reason, tmp_path, key):
    stored, table, adapter, other = make(tmp_path, case)
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    folded = canonical.canonical_spec(spec)
    element = symmetry.random(key, folded)
    with pytest.raises(SpecError, match=reason):
        move_adapter(
            adapter, table, source=stored.params, target=other.params, spec=folded, element=element, folded=spec
        )


def test_layer_norms_are_refused(tmp_path, key):
    base, folder, _ = write_case(tmp_path, "gpt2")
    stored, table = load_base(base)
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    folded = canonical.canonical_spec(spec)
    sizes = dict(source=stored.params, target=stored.params, spec=folded, element=symmetry.random(key, folded))
    with pytest.raises(SpecError, match="layer norms, which fold into biases"):
        move_adapter(read_adapter(folder), table, **sizes, folded=spec)


def test_a_gain_near_zero_is_refused(tmp_path, key):
    stored, table, adapter, other = make(tmp_path, CASES["llama"])
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    folded = canonical.canonical_spec(spec)
    params = tree.map_leaves(lambda _, leaf: np.array(leaf), other.params)
    params["block_1"]["norm2"]["scale"][3] = 1e-4
    sizes = dict(source=stored.params, target=params, spec=folded, element=symmetry.random(key, folded))
    with pytest.raises(SpecError, match="block_1/norm2/scale of the target has gains near zero"):
        move_adapter(adapter, table, **sizes, folded=spec)


def test_where_factors_cannot_move_one_by_one_the_moved_weights_are_factors_of_the_same_rank(tmp_path, key):
    """Layer norms: the moved change has the rank of the adapter, and biases beside it."""
    base, folder, _ = write_case(tmp_path, "gpt2")
    stored, table = load_base(base)
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    folded = canonical.canonical_spec(spec)
    adapter = read_adapter(folder)
    tuned = merge_adapter(adapter, table, tree.map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), stored.params))
    change = tree.task_vector(canonical.fold(spec, stored.params), canonical.fold(spec, tuned))
    moved = canonical.unfold(spec, symmetry.apply(folded, symmetry.random(key, folded), change), stored.params)
    found = extract_adapter(moved.task_vector, table, stored.params, rank=adapter.rank)
    assert not found.not_held
    assert found.total_error < 1e-5
    assert len(found.errors) == len(adapter.low_rank)
