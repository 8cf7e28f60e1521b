"""Mixtral, Qwen3-MoE, Qwen2-MoE: transformers' outputs, its tensors in both layouts, the declared symmetry."""

import jax
import numpy as np
import pytest
from hub_decoders import SIZES, check_invariance, check_parity, draw_texts, make_model, run
from hub_models import assert_round_trip, write_folder
from small_models import difference

from jaxtune import symmetry, tree
from jaxtune.checkpoint import load
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.models import registry
from jaxtune.models.hub import read_stored_config

pytest.importorskip("transformers")

SPARSE = {**SIZES, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9}
MODELS = {
    "mixtral": ("MixtralForCausalLM", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_window": (
        "MixtralForCausalLM",
        {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**SPARSE, "norm_topk_prob": True}),
    "qwen3_moe_some": (
        "Qwen3MoeForCausalLM",
        {**SPARSE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "qwen3_moe_window": ("Qwen3MoeModel", {**SPARSE, "use_sliding_window": True, "sliding_window": 3}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**SPARSE, "shared_expert_intermediate_size": 7, "mlp_only_layers": [1]}),
    "qwen2_moe_window": (
        "Qwen2MoeForCausalLM",
        {
            **SPARSE,
            "shared_expert_intermediate_size": 7,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
EVERY = pytest.mark.parametrize("name", MODELS)
ONE_EACH = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_some", "qwen2_moe"])


def make(name, **options):
    cls, fields = MODELS[name]
    # torch's grouped products want sizes that are multiples of four.
    return make_model(cls, **fields, experts_implementation="eager", **options)


@EVERY
def test_outputs_equal_transformers(name, tmp_path):
    model = make(name)
    check_parity(write_folder(tmp_path / "m", model), model)


@ONE_EACH
def test_the_fused_layout_reads_as_the_one_with_an_expert_a_tensor(name, tmp_path):
    model = make(name)
    old, new = (load(write_folder(tmp_path / str(o), model, save_original_format=o)) for o in (True, False))
    assert any("experts.gate_up_proj" in path for path in tree.flatten(new.params))
    assert not any("experts.gate_up_proj" in path for path in tree.flatten(old.params))
    first, second = (
        tree.flatten(registry.read_stored(stored.config, stored.params)[1].decode(stored.params))
        for stored in (old, new)
    )
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


@ONE_EACH
@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_comes_back_byte_for_byte(name, is_old, dtype, tmp_path):
    assert_round_trip(write_folder(tmp_path / "m", make(name, dtype=dtype), save_original_format=is_old))


@ONE_EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-9)])
def test_a_random_element_leaves_the_outputs_alone(name, dtype, tolerance, tmp_path):
    stored = load(write_folder(tmp_path / "m", make(name)))
    config, table = registry.read_stored(stored.config, stored.params)
    with jax.enable_x64(dtype == np.float64):
        check_invariance(config, table.decode(stored.params), dtype=dtype, tolerance=tolerance)


def without_router(element, spec):
    """Experts change places, their router columns do not."""
    return [path for path in spec.axes if path.endswith("router/kernel")]


def without_gain(element, spec):
    """The stream changes its order, the gain of one norm does not."""
    return ["block_0/norm2/scale"]


def without_shared_gate(element, spec):
    """The gate of the shared expert reads the old order."""
    return ["block_0/mlp/shared_gate/kernel"]


@pytest.mark.parametrize("left_out", [without_router, without_gain, without_shared_gate])
def test_an_element_that_skips_a_leaf_changes_the_outputs(left_out, tmp_path):
    stored = load(write_folder(tmp_path / "m", make("qwen2_moe")))
    config, table = registry.read_stored(stored.config, stored.params)
    params = tree.map_leaves(lambda _, leaf: np.asarray(leaf), table.decode(stored.params))
    spec = registry.symmetry_of(config)
    element = symmetry.random(jax.random.key(3), spec)
    moved, own = (tree.flatten(p) for p in (symmetry.apply(spec, element, params), params))
    skipped = left_out(element, spec)
    assert skipped
    assert all(path in own for path in skipped)
    text, mask = draw_texts(config.vocab_size)
    illegal = tree.unflatten({**moved, **{path: own[path] for path in skipped}})
    first, second = (np.asarray(run(config, p, {"text": text, "mask": mask})) for p in (params, illegal))
    assert difference(first, second) > 1e-2


def values_of(name, **changes):
    cls, fields = MODELS[name]
    import transformers

    return {**getattr(transformers, cls).config_class(**fields).to_dict(), "architectures": [cls], **changes}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mixtral", {"hidden_act": "mish"}, "\"hidden_act\" is 'mish'"),
        ("mixtral", {"num_experts": 7}, '"num_experts" is 7 and "num_local_experts" 4'),
        ("mixtral", {"num_experts_per_tok": 5}, "num_chosen 5 of only num_experts 4"),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "\"rope_type\" is 'yarn'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, '"decoder_sparse_step" is 0'),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, '"use_sliding_window" is True'),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, '"use_sliding_window" is False'),
        ("qwen2_moe", {"quantization_config": {"bits": 4}}, '"quantization_config"'),
    ],
)
def test_what_changes_the_function_is_refused_by_name(name, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        read_stored_config(values_of(name, **changes))


def test_a_mixture_without_a_sparse_block_is_a_dense_network():
    assert read_stored_config(values_of("qwen3_moe", mlp_only_layers=[0, 1])).experts is None


def test_tensors_that_are_not_the_mixtures_are_refused_by_name(tmp_path):
    stored = load(write_folder(tmp_path / "m", make("mixtral")))
    for odd, change in (
        ("model.layers.0.block_sparse_moe.experts.2.w3.weight: expected", None),
        ("model.layers.0.block_sparse_moe.gate.bias: in the file", np.zeros(4, np.float32)),
    ):
        tensors = dict(stored.params)
        name = odd.split(":")[0]
        tensors = {n: t for n, t in tensors.items() if n != name} | ({} if change is None else {name: change})
        with pytest.raises(TreeMismatchError, match=odd.replace(".", r"\.")):
            registry.read_stored(stored.config, tensors)[1].decode(tensors)
