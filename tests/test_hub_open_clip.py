"""OpenCLIP's own folders; the oracle is open_clip itself, imported as `vision_oracles` says."""

import json

import numpy as np
import pytest
from hub_models import randomise
from hub_vision import (
    check_illegal_sign,
    check_invariance,
    check_mixed_heads,
    check_one_junction,
    check_outputs,
    check_round_trip,
    check_skipped,
    images,
    open_model,
    outputs_of,
    to_torch,
)
from vision_oracles import import_oracle

import jaxtune
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.models import clip, registry

open_clip = import_oracle("open_clip")
torch = pytest.importorskip("torch")

VISION = {"layers": 2, "width": 24, "head_width": 6, "patch_size": 4, "image_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 9, "vocab_size": 31, "width": 16, "heads": 2, "layers": 2}
PLAIN = {"embed_dim": 6, "vision_cfg": VISION, "text_cfg": TEXT}
VARIANTS = {
    "plain": ("CLIP", PLAIN),
    "quick_gelu": ("CLIP", {**PLAIN, "quick_gelu": True}),
    "bias_and_vectors": ("CLIP", {**PLAIN, "init_logit_bias": -10.0, "nonscalar_logit_scale": True}),
    "layer_scale_mean": (
        "CLIP",
        {
            **PLAIN,
            "vision_cfg": {
                **VISION, "ls_init_value": 0.1, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True,
                "pos_embed_type": "sin_cos_2d", "norm_kwargs": {"eps": 1e-3},
            },
            "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 30},
        },
    ),
    "custom_text": (
        "CustomTextCLIP",
        {
            **PLAIN,
            "custom_text": True,
            "vision_cfg": {**VISION, "pool_type": "avg"},
            "text_cfg": {
                **TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6},
            },
        },
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", VARIANTS)


def write(model, model_cfg, folder):
    """As `open_clip.push_to_hf_hub` lays it out."""
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    values = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(values, indent=2))
    (folder / "merges.txt").write_text("a b\n")
    return folder


def make(name, folder, *, bfloat16=False):
    torch.set_num_threads(1)
    class_name, model_cfg = VARIANTS[name]
    own = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model = randomise(getattr(open_clip, class_name)(**own), 0)
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    return model, write(model.to(torch.bfloat16) if bfloat16 else model, model_cfg, folder)


def batch_of(config, *, seed=0):
    draw = np.random.default_rng(seed)
    text = draw.integers(0, 30, size=(4, 9)).astype(np.int32)
    text[np.arange(4), draw.integers(2, 9, size=4)] = 30
    return {"image": images(config.vision), "text": text}


def wanted(model, batch):
    text = torch.from_numpy(batch["text"]).long()
    with torch.no_grad():
        return {
            "image_features": model.encode_image(to_torch(batch["image"]), normalize=True),
            "text_features": model.encode_text(text, normalize=True),
        }


@EVERY
def test_outputs_are_those_of_open_clip(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    batch = batch_of(config)
    check_outputs(config, stored.params, batch, wanted(model, batch))
    with torch.no_grad():
        logits, _ = model.get_logits(to_torch(batch["image"]), torch.from_numpy(batch["text"]).long())
    got = clip.as_matrix(outputs_of(config, stored.params, batch))
    np.testing.assert_allclose(got, logits.numpy(), rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    check_round_trip(make(name, tmp_path, bfloat16=bfloat16)[1])


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_invariance(config, stored.params, batch_of(config))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    config, stored = open_model(make("layer_scale_mean", tmp_path_factory.mktemp("open_clip"))[1])
    return config, stored.params, batch_of(config)


@pytest.mark.parametrize("path", ["vision/block_0/layer_scale2/scale", "vision/position", "text/projection/kernel"])
def test_what_does_not_move_with_its_group_is_seen(path, scaled):
    check_skipped(*scaled, path)


def test_illegal_elements_are_seen(scaled):
    check_mixed_heads(*scaled, "vision/block_1/attn", 4)
    check_one_junction(*scaled, "text/stream_3")
    check_illegal_sign(*scaled, "vision/block_0/mlp/hidden", {})


def test_a_saved_folder_is_one_that_open_clip_reads(tmp_path):
    """Config and tokenizer files as they were, under their own names."""
    (tmp_path / "before").mkdir()
    model, folder = make("plain", tmp_path / "before")
    stored = jaxtune.load(folder)
    jaxtune.save(tmp_path / "after", stored.params, like=stored)
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "merges.txt"):
        assert (tmp_path / "after" / name).read_bytes() == (folder / name).read_bytes(), name
    again = open_clip.CLIP(**VARIANTS["plain"][1])
    open_clip.load_checkpoint(again, str(tmp_path / "after" / "open_clip_model.safetensors"))
    batch = batch_of(registry.config_from_dict(stored.config))
    for name, leaf in wanted(again.eval(), batch).items():
        torch.testing.assert_close(leaf, wanted(model, batch)[name])


def test_pickled_weights_are_read_by_the_same_names(tmp_path):
    model, folder = make("plain", tmp_path)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    config, stored = open_model(folder)
    batch = batch_of(config)
    check_outputs(config, stored.params, batch, wanted(model, batch))
    assert open_model(folder / "open_clip_pytorch_model.bin")[0] == config


def test_beside_the_weights_of_transformers_those_are_read(tmp_path):
    """Hubs keep one model in the names of both libraries in one folder."""
    _, folder = make("plain", tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "of_another_family"}))
    (folder / "model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    stored = jaxtune.load(folder)
    assert stored.config == {"model_type": "of_another_family"}
    assert "open_clip_model.safetensors" in stored.left_out
    alone = jaxtune.load(folder / "open_clip_model.safetensors")
    assert "model_cfg" in alone.config


def test_the_causal_mask_is_carried_and_odd_tensors_are_named(tmp_path):
    model, _ = make("plain", tmp_path)
    state = dict(model.state_dict())
    import safetensors.torch

    file = tmp_path / "open_clip_model.safetensors"
    safetensors.torch.save_file({**state, "attn_mask": model.attn_mask.clone()}, file)
    check_round_trip(tmp_path)
    safetensors.torch.save_file({**state, "visual.stranger": torch.zeros(2)}, file)
    with pytest.raises(TreeMismatchError, match=r"visual\.stranger: in the file, not known"):
        open_model(tmp_path)
    del state["visual.proj"]
    safetensors.torch.save_file(state, file)
    with pytest.raises(TreeMismatchError, match=r"visual\.proj: expected, not in the file"):
        open_model(tmp_path)


REFUSED = {
    "a text tower of another library": ({"text_cfg": {"hf_model_name": "roberta-base"}}, '"hf_model_name" is'),
    "an image tower of timm": ({"vision_cfg": {"timm_model_name": "vit_base"}}, "\"timm_model_name\" is 'vit_base'"),
    "a ResNet": ({"vision_cfg": {**VISION, "layers": [3, 4, 6, 3]}}, '"layers" is .3, 4, 6, 3.: a ResNet'),
    "CoCa": ({"multimodal_cfg": {"layers": 2}}, "has multimodal_cfg, which is not supported"),
    "attentional pooling": ({"vision_cfg": {**VISION, "attentional_pool": True}}, '"attentional_pool" is True'),
    "norms of queries": ({"text_cfg": {**TEXT, "qk_norm": True}}, '"qk_norm" is True'),
    "another pooling": ({"text_cfg": {**TEXT, "pool_type": "first"}}, "\"pool_type\" is 'first'"),
    "no projection": ({"text_cfg": {**TEXT, "proj_type": "none"}}, "\"proj_type\" is 'none'"),
    "a field": ({"vision_cfg": {**VISION, "rope": True}}, "vision_cfg of open_clip_config.json has rope"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({"model_cfg": {**PLAIN, **fields}})


@pytest.mark.slow
def test_every_config_that_comes_with_open_clip_is_read_or_refused_by_name():
    """Of what is read, the tensors are those of open_clip."""
    read = []
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        try:
            config = registry.config_from_dict({"model_cfg": model_cfg})
        except ConfigError as error:
            own = {"timm_model_name", "hf_model_name"} & {*model_cfg["vision_cfg"], *model_cfg["text_cfg"]}
            is_resnet = not isinstance(model_cfg["vision_cfg"].get("layers", 0), int)
            known = own or is_resnet or "multimodal_cfg" in model_cfg
            if not known:
                raise AssertionError(name) from error
            continue
        read.append(name)
        own = {key: value for key, value in model_cfg.items() if key != "custom_text"}
        for tower in ("vision_cfg", "text_cfg"):
            own[tower] = {**own[tower], "layers": 1}
        with torch.device("meta"):
            class_name = "CustomTextCLIP" if model_cfg.get("custom_text") else "CLIP"
            model = getattr(open_clip, class_name)(**own)
        small, table = registry.read_stored({"model_cfg": own}, model.state_dict())
        table.check(model.state_dict())
        assert model.visual.transformer.resblocks[0].attn.num_heads == config.vision.num_heads
        assert small.vision.width == config.vision.width
    assert len(read) > 40
