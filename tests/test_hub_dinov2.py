"""DINOv2 as transformers stores it, with and without registers; the oracle is transformers itself."""

import json

import pytest
from hub_vision import (
    TOWER,
    check_illegal_sign,
    check_invariance,
    check_mixed_heads,
    check_names,
    check_one_junction,
    check_outputs,
    check_round_trip,
    check_skipped,
    images,
    open_model,
    to_torch,
    write_model,
)

from jaxtune.errors import ConfigError, SpecError
from jaxtune.models import registry
from jaxtune.symmetry import canonical

transformers = pytest.importorskip("transformers")

PLAIN = {name: value for name, value in TOWER.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
GATED = {**PLAIN, "use_swiglu_ffn": True}
VARIANTS = {
    "classifier": ("Dinov2ForImageClassification", {**PLAIN, "num_labels": 5}),
    "classifier_gated": ("Dinov2ForImageClassification", {**GATED, "num_labels": 5, "use_mask_token": False}),
    "bare": ("Dinov2Model", PLAIN),
    "registers": ("Dinov2WithRegistersForImageClassification", {**PLAIN, "num_labels": 5, "num_register_tokens": 3}),
    "registers_bare": ("Dinov2WithRegistersModel", {**GATED, "num_register_tokens": 1}),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


def make(name, folder, **options):
    class_name, fields = VARIANTS[name]
    config = getattr(transformers, "Dinov2WithRegistersConfig" if "reg" in name else "Dinov2Config")(**fields)
    model = getattr(transformers, class_name)(config)
    return model, write_model(folder, model, **options)


@EVERY
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    image = images(config)
    want = model(to_torch(image))
    check_outputs(config, stored.params, {"image": image}, want.pooler_output if "bare" in name else want.logits)


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    check_round_trip(make(name, tmp_path, bfloat16=bfloat16)[1])


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_invariance(config, stored.params, {"image": images(config)})


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    config, stored = open_model(make("classifier_gated", tmp_path_factory.mktemp("dinov2"))[1])
    return config, stored.params, {"image": images(config)}


@pytest.mark.parametrize(
    "path",
    [
        "block_0/layer_scale1/scale",
        "block_1/layer_scale2/scale",
        "block_0/mlp/gate/kernel",
        "block_0/mlp/gate/bias",
        "head_patches/kernel",
        "class_token",
    ],
)
def test_what_does_not_move_with_its_group_is_seen(path, gated):
    check_skipped(*gated, path)


def test_registers_follow_the_stream(tmp_path):
    config, stored = open_model(make("registers", tmp_path)[1])
    check_skipped(config, stored.params, {"image": images(config)}, "registers")


def test_illegal_elements_are_seen(gated):
    check_mixed_heads(*gated, "block_0/attn", 4)
    check_one_junction(*gated, "stream_2")
    # The sign of a hidden unit may not reach its gate.
    own = registry.symmetry_of(gated[0]).axes
    marks = {
        f"block_0/mlp/gate/{name}": tuple(axis and axis.group for axis in own[f"block_0/mlp/gate/{name}"])
        for name in ("kernel", "bias")
    }
    check_illegal_sign(*gated, "block_0/mlp/hidden", marks)


def test_features_that_come_out_have_no_folded_form_and_say_so(tmp_path):
    config, _ = open_model(make("bare", tmp_path)[1])
    with pytest.raises(SpecError, match="no canonical form: the features behind its last norm are what comes out"):
        canonical.canonical_spec(registry.symmetry_of(config))


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    check_names(make("bare", tmp_path)[1])


def test_backbones_and_poolers_of_others_are_refused():
    values = {"model_type": "dinov2", "architectures": ["Dinov2Backbone"], **PLAIN}
    with pytest.raises(ConfigError, match="Dinov2Backbone"):
        registry.config_from_dict(values)


def test_defaults_are_those_of_transformers():
    for model_type, class_name in (("dinov2", "Dinov2Config"), ("dinov2_with_registers", "Dinov2WithRegistersConfig")):
        full = json.loads(getattr(transformers, class_name)().to_json_string(use_diff=False))
        head = {"model_type": model_type, "architectures": ["ForImageClassification"]}
        assert registry.config_from_dict(head) == registry.config_from_dict({**full, **head})
