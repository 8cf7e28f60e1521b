"""Vision transformers of timm; the oracle is timm itself, imported as `vision_oracles` says."""

import json

import numpy as np
import pytest
from hub_models import randomise
from hub_vision import (
    check_invariance,
    check_names,
    check_outputs,
    check_round_trip,
    check_skipped,
    images,
    open_model,
    to_torch,
)
from vision_oracles import import_oracle

from jaxtune.errors import ConfigError
from jaxtune.models import registry
from jaxtune.models.hub import timm as ours
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.timm_architectures import arguments_of
from jaxtune.models.transformer import ACTIVATIONS

timm = import_oracle("timm")
torch = pytest.importorskip("torch")

# Every architecture at a tiny size: sizes in "model_args", as timm itself writes them.
TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
VARIANTS = {
    "vit": ("vit_base_patch16_224", {}),
    "mean_behind_class": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "mean_norm_first": ("vit_base_patch16_gap_224", {}),
    "no_bias": ("vit_medium_patch16_gap_256", {}),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 0}),
    "dinov2_giant_registers": ("vit_giant_patch14_reg4_dinov2", {}),
    "registers_with_positions": ("vit_so150m2_patch16_reg1_gap_256", {}),
    "siglip": ("vit_base_patch32_siglip_256", {"num_classes": 0}),
    "siglip_classifier": ("vit_base_patch16_siglip_224", {}),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


def make(name, folder, *, bfloat16=False):
    """A model with random weights, and its folder as `timm.models.save_for_hf` writes it."""
    torch.set_num_threads(1)
    architecture, options = VARIANTS[name]
    model = timm.create_model(architecture, **{"num_classes": 5, **TINY, **options})
    randomise(model, 0)
    timm.models.save_for_hf(model.to(torch.bfloat16) if bfloat16 else model, folder, safe_serialization=True)
    return model, folder


@EVERY
def test_outputs_are_those_of_timm(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    image = images(config)
    with torch.no_grad():
        check_outputs(config, stored.params, {"image": image}, model(to_torch(image)))


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    check_round_trip(make(name, tmp_path, bfloat16=bfloat16)[1])


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_invariance(config, stored.params, {"image": images(config)})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("deit3", "block_1/layer_scale1/scale"),
        ("dinov2_giant_registers", "registers"),
        ("dinov2_giant_registers", "block_0/mlp/gate/kernel"),
        ("deit_distilled", "distillation_token"),
        ("siglip_classifier", "pool/norm/scale"),
    ],
)
def test_what_does_not_move_with_its_group_is_seen(name, path, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_skipped(config, stored.params, {"image": images(config)}, path)


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    check_names(make("vit", tmp_path)[1])


def test_sizes_come_from_the_tensors_and_heads_from_the_name(tmp_path):
    """A file that says nothing but its name, of a network with fewer blocks and a larger image."""
    import safetensors.torch

    torch.set_num_threads(1)
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=3), 0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224.augreg_in21k"}))
    config, stored = open_model(tmp_path)
    assert (config.image_size, config.depth, config.num_heads, config.num_outputs) == (48, 1, 3, 3)
    image = images(config)
    with torch.no_grad():
        check_outputs(config, stored.params, {"image": image}, model(to_torch(image)))


def test_a_width_that_is_not_the_architectures_is_refused(tmp_path):
    """The same tensors make another network with another number of heads."""
    _, folder = make("vit", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["model_args"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="the blocks are 24 wide, and a vit_base_patch16_224 is 768"):
        open_model(folder)


def test_a_norm_on_the_other_side_of_the_mean_is_refused(tmp_path):
    _, folder = make("mean_behind_class", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["model_args"]["global_pool"] = "token"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"the file has fc_norm where .* 'token' has norm"):
        open_model(folder)


REFUSED = {
    "another class of networks": ({"architecture": "eva02_base_patch14_224"}, "'eva02_base_patch14_224'"),
    "parallel blocks": ({"architecture": "vit_base_patch16_18x2_224"}, "'vit_base_patch16_18x2_224'"),
    "norms of queries and keys": ({"model_args": {"qk_norm": True}}, '"qk_norm" is True'),
    "another pooling": ({"global_pool": "max"}, "\"global_pool\" is 'max'"),
    "an argument": ({"model_args": {"rope": True}}, "has rope, which is not supported"),
    "an activation": ({"model_args": {"act_layer": "mish"}}, "\"act_layer\" is 'mish'"),
    "a rectangle": ({"pretrained_cfg": {"input_size": [3, 224, 192]}}, "only squares"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({"architecture": "vit_base_patch16_224", **fields})


KNOWN_CLASSES = ("VisionTransformer", "VisionTransformerDistilled")


@pytest.mark.slow
def test_every_name_that_we_read_builds_what_timm_builds():
    """All of timm's names of these classes: the same network, tensor by tensor, or a refusal by name."""
    read, refused = [], []
    names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    for name in names:
        default = timm.models.get_pretrained_cfg(name, allow_unregistered=True).to_dict()
        values = {"architecture": name, "pretrained_cfg": default}
        if arguments_of(name) is None:
            with pytest.raises(ConfigError, match=repr(name)):
                ours.read_config(values)
            refused.append(name)
            continue
        config = ours.read_config(values)
        read.append(name)
        with torch.device("meta"):
            model = timm.create_model(name, pretrained_cfg=timm.models.get_pretrained_cfg(name), depth=2)
        assert type(model).__name__ in KNOWN_CLASSES
        tensors = {key: Shape(tensor.shape) for key, tensor in model.state_dict().items()}
        seen = ours.read_config({**values, FACTS: ours.facts(values, tensors)})
        # From the name alone: the same as from the tensors, but for the depth, kept small here.
        assert config.depth == timm_depth(name)
        assert {**vars(seen), "depth": config.depth} == vars(config), name
        ours.key_table(seen, values, tensors).check(tensors)
        block = model.blocks[0]
        assert block.attn.num_heads == config.num_heads
        assert block.norm1.eps == config.norm_eps
        assert model.global_pool == {"class": "token", "class_and_distillation": "token", "attention": "map"}.get(
            config.pooling, "avg"
        )
        assert check_activation(block.mlp.act, config.activation), name
    assert len(read) > 100
    odd = ("18x2", "rpn", "_xp_", "radio", "aimv2", "beit3", "intern", "dwee", "pwee", "dlittle", "map_256", "test_vit")
    assert not [name for name in refused if not any(word in name for word in odd)]


class Shape:
    """What `facts` asks of a tensor."""

    def __init__(self, shape):
        self.shape = tuple(shape)


def timm_depth(name):
    """The depth that timm gives a name, without building it."""
    import unittest.mock

    from timm.models import vision_transformer

    with unittest.mock.patch.object(vision_transformer, "build_model_with_cfg", lambda *_, **options: options):
        from timm.models import deit

        with unittest.mock.patch.object(deit, "build_model_with_cfg", lambda *_, **options: options):
            return timm.models.model_entrypoint(name)()["depth"]


def check_activation(module, name):
    x = np.linspace(-3, 3, 7)
    wanted = np.asarray(ACTIVATIONS[name](np.asarray(x, np.float32)))
    return np.allclose(module(torch.from_numpy(x).float()).numpy(), wanted, atol=1e-5)
