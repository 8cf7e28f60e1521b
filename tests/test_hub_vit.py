"""ViT and DeiT as transformers stores them; the oracle is transformers itself, on random weights."""

import json

import numpy as np
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

from jaxtune.errors import ConfigError, DataError
from jaxtune.models import registry

transformers = pytest.importorskip("transformers")

PLAIN = {**TOWER, "num_labels": 5}
# Name -> class, its config's fields, options of the class, which output is compared.
VARIANTS = {
    "vit": ("ViTForImageClassification", PLAIN, {}, "logits"),
    "vit_relu_no_bias": ("ViTForImageClassification", {**PLAIN, "hidden_act": "relu", "qkv_bias": False}, {}, "logits"),
    "vit_pooler": ("ViTModel", {**TOWER, "hidden_act": "gelu_new", "pooler_output_size": 7}, {}, "pooler_output"),
    "vit_masked": ("ViTModel", TOWER, {"use_mask_token": True}, "pooler_output"),
    "vit_features": ("ViTModel", TOWER, {"add_pooling_layer": False}, "last_hidden_state"),
    "deit": ("DeiTForImageClassification", PLAIN, {}, "logits"),
    "deit_teacher": ("DeiTForImageClassificationWithTeacher", PLAIN, {}, "logits"),
    "deit_pooler": ("DeiTModel", TOWER, {}, "pooler_output"),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


def make(name, folder, **options):
    class_name, fields, arguments, _ = VARIANTS[name]
    config = getattr(transformers, "ViTConfig" if name.startswith("vit") else "DeiTConfig")(**fields)
    model = getattr(transformers, class_name)(config, **arguments)
    return model, write_model(folder, model, **options)


@EVERY
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    image = images(config)
    want = getattr(model(to_torch(image)), VARIANTS[name][3])
    check_outputs(config, stored.params, {"image": image}, want[:, 0] if want.ndim == 3 else want)


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    check_round_trip(make(name, tmp_path, bfloat16=bfloat16)[1])


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_invariance(config, stored.params, {"image": images(config)})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config, stored = open_model(make("deit_teacher", tmp_path_factory.mktemp("deit"))[1])
    return config, stored.params, {"image": images(config)}


@pytest.mark.parametrize(
    "path",
    ["distillation_token", "class_token", "position", "head_distillation/kernel", "block_1/norm2/scale", "patch/bias"],
)
def test_what_does_not_move_with_the_stream_is_seen(path, teacher):
    check_skipped(*teacher, path)


def test_illegal_elements_are_seen(teacher):
    check_mixed_heads(*teacher, "block_0/attn", 4)
    check_one_junction(*teacher, "stream_1")
    check_illegal_sign(*teacher, "block_0/mlp/hidden", {})


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    check_names(make("vit", tmp_path)[1])


def test_a_bare_model_without_its_pooler_is_one_whose_features_come_out(tmp_path):
    config, stored = open_model(make("vit_features", tmp_path)[1])
    assert (config.head, config.num_outputs) == ("none", config.width)
    assert registry.symmetry_of(config).form is None
    outputs = registry.apply(config, stored.params, {"image": images(config)})
    assert registry.as_matrix(config, outputs).shape == (3, 3)


REFUSED = {
    "another class": ({"architectures": ["ViTForMaskedImageModeling"]}, "ForMaskedImageModeling"),
    "a rectangle": ({"image_size": [8, 12]}, r'"image_size" is \[8, 12\].*only squares'),
    "an activation": ({"hidden_act": "mish"}, "\"hidden_act\" is 'mish'"),
    "heads of another width": ({"head_dim": 8}, '"head_dim" is 8'),
    "quantised": ({"quantization_config": {"bits": 4}}, '"quantization_config" is'),
    "another pooler": ({"architectures": ["ViTModel"], "pooler_act": "gelu"}, "\"pooler_act\" is 'gelu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_supported_are_named(name):
    fields, message = REFUSED[name]
    values = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **TOWER}
    registry.config_from_dict(values)
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({**values, **fields})


def test_images_of_another_size_are_refused(teacher):
    config, params, _ = teacher
    with pytest.raises(DataError, match=r"the model takes float\[N, 8, 8, 2\]"):
        registry.apply(config, params, {"image": np.zeros((1, 12, 12, 2), np.float32)})


def test_defaults_are_those_of_transformers():
    for model_type, class_name in (("vit", "ViTConfig"), ("deit", "DeiTConfig")):
        full = json.loads(getattr(transformers, class_name)().to_json_string(use_diff=False))
        head = {"model_type": model_type, "architectures": ["ForImageClassification"]}
        assert registry.config_from_dict(head) == registry.config_from_dict({**full, **head})
