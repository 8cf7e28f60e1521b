"""CLIP as transformers stores it, both towers and each alone; the oracle is transformers itself."""

import copy
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
    outputs_of,
    to_torch,
    write_model,
)

from jaxtune.errors import ConfigError, DataError
from jaxtune.models import clip, registry

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 31,
    "max_position_embeddings": 9,
}  # fmt: skip
END = 30
BOTH = {"text_config": {**TEXT, "eos_token_id": END}, "vision_config": TOWER, "projection_dim": 6}
GELU = {
    "text_config": {**TEXT, "eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    "vision_config": {**TOWER, "hidden_act": "gelu"},
    "projection_dim": 6,
}
VARIANTS = {
    "both": ("CLIPModel", "CLIPConfig", BOTH),
    "both_gelu_legacy_end": ("CLIPModel", "CLIPConfig", GELU),
    "vision_projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**TOWER, "projection_dim": 6}),
    "vision_bare": ("CLIPVisionModel", "CLIPVisionConfig", TOWER),
    "text_projected": (
        "CLIPTextModelWithProjection", "CLIPTextConfig", {**TEXT, "projection_dim": 6, "eos_token_id": END}
    ),
    "text_bare": ("CLIPTextModel", "CLIPTextConfig", {**TEXT, "eos_token_id": 2}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", VARIANTS)


def make(name, folder, **options):
    class_name, config_name, fields = VARIANTS[name]
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields))
    return model, write_model(folder, model, **options)


def texts(*, seed=0, size=4, length=9):
    """Ids whose end stands anywhere, with padding behind it; the mask hides the padding."""
    draw = np.random.default_rng(seed)
    text = draw.integers(3, END, size=(size, length)).astype(np.int32)
    ends = np.concatenate([[length - 1], draw.integers(2, length - 1, size=size - 1)])
    text[np.arange(size), ends] = END
    mask = np.arange(length)[None] <= ends[:, None]
    text[~mask] = 1
    return {"text": text, "mask": mask}


def batch_of(config, **options):
    if isinstance(config, clip.Config):
        return {"image": images(config.vision), **texts(**options)}
    return texts(**options) if hasattr(config, "text") else {"image": images(config)}


def ask(model, batch):
    """The oracle's outputs on a batch."""
    inputs = {}
    if "image" in batch:
        inputs["pixel_values"] = to_torch(batch["image"])
    if "text" in batch:
        inputs["input_ids"] = torch.from_numpy(batch["text"]).long()
        if "mask" in batch:
            inputs["attention_mask"] = torch.from_numpy(batch["mask"]).long()
    with torch.no_grad():
        return model(**inputs)


def wanted(model, batch):
    outputs = ask(model, batch)
    if "logits_per_image" in outputs:
        return {"image_features": outputs.image_embeds, "text_features": outputs.text_embeds}
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if outputs.get(name) is not None:
            return outputs[name]
    raise AssertionError(outputs.keys())


@EVERY
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    batch = batch_of(config)
    check_outputs(config, stored.params, batch, wanted(model, batch))


def test_logits_masks_and_lengths(tmp_path):
    model, folder = make("both", tmp_path)
    config, stored = open_model(folder)
    batch = batch_of(config)
    logits = clip.as_matrix(outputs_of(config, stored.params, batch))
    np.testing.assert_allclose(logits, ask(model, batch).logits_per_image.detach(), rtol=1e-4, atol=1e-4)
    # Without a mask, and shorter: a causal tower reads its end before any padding.
    unmasked = {"image": batch["image"], "text": batch["text"]}
    check_outputs(config, stored.params, unmasked, wanted(model, unmasked))
    short = {"image": batch["image"], **texts(seed=1, length=5)}
    check_outputs(config, stored.params, short, wanted(model, short))
    # A mask in the middle is seen; one that hides a text whole gives numbers all the same.
    holes = {**batch, "mask": batch["mask"] & (np.arange(9)[None] != 1)}
    check_outputs(config, stored.params, holes, wanted(model, holes))
    change = outputs_of(config, stored.params, holes)["text_features"] - wanted(model, batch)["text_features"].numpy()
    assert np.abs(change).max() > 1e-3
    hidden = {**batch, "mask": np.zeros_like(batch["mask"])}
    assert np.isfinite(outputs_of(config, stored.params, hidden)["text_features"]).all()
    with pytest.raises(DataError, match=r"mask is bool\[4, 3\], expected bool\[4, 9\]"):
        registry.apply(config, stored.params, {**batch, "mask": batch["mask"][:, :3]})


@EVERY
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_tensor_comes_back_byte_for_byte(name, bfloat16, tmp_path):
    check_round_trip(make(name, tmp_path, bfloat16=bfloat16)[1])


@EVERY
def test_a_random_element_changes_nothing_that_comes_out(name, tmp_path):
    config, stored = open_model(make(name, tmp_path)[1])
    check_invariance(config, stored.params, batch_of(config))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    config, stored = open_model(make("both", tmp_path_factory.mktemp("clip"))[1])
    return config, stored.params, batch_of(config)


@pytest.mark.parametrize(
    "path",
    [
        "vision/stream_norm/scale",
        "vision/class_token",
        "vision/head/kernel",
        "text/token_embedding",
        "text/block_0/norm1/scale",
        "text/block_1/mlp/down/kernel",
    ],
)
def test_what_does_not_move_with_its_group_is_seen(path, both):
    check_skipped(*both, path)


def test_illegal_elements_are_seen(both):
    check_mixed_heads(*both, "vision/block_0/attn", 4)
    check_mixed_heads(*both, "text/block_1/attn", 2)
    check_one_junction(*both, "vision/stream_1")
    check_one_junction(*both, "text/stream_0")
    check_illegal_sign(*both, "text/block_0/mlp/hidden", {})


def test_position_ids_are_carried_and_older_names_are_read(tmp_path):
    """Files of one tower had its name before every tensor, and counts beside the weights."""
    import safetensors.torch

    model, folder = make("text_bare", tmp_path)
    file = folder / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in safetensors.torch.load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    safetensors.torch.save_file(tensors, file)
    config, stored = open_model(folder)
    batch = batch_of(config)
    check_outputs(config, stored.params, batch, wanted(model, batch))
    check_round_trip(folder)


def test_two_dicts_of_one_tower_as_older_files_have_them():
    """The second wins, with its defaults; as in transformers."""
    legacy = {**BOTH, "text_config_dict": {"hidden_size": 32, "vocab_size": 31}}
    theirs = transformers.CLIPConfig(**copy.deepcopy(legacy)).text_config  # which writes into what it is given
    text = registry.config_from_dict({"model_type": "clip", **legacy}).text
    assert (text.width, text.mlp_width, text.context_length, text.end_id) == (
        theirs.hidden_size, theirs.intermediate_size, theirs.max_position_embeddings, theirs.eos_token_id
    )  # fmt: skip


def test_example_texts_end_where_the_tower_reads(both):
    import jax

    config = both[0]
    batch = registry.example(jax.random.key(0), config, 8)
    assert ((np.asarray(batch["text"]) == END).sum(axis=1) == 1).all()
    ends = np.argmax(np.asarray(batch["text"]) == END, axis=1)
    np.testing.assert_array_equal(ends, np.asarray(batch["mask"]).sum(axis=1) - 1)
    assert len(set(ends)) > 1


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    check_names(make("both", tmp_path)[1])


REFUSED = {
    "another class": ({"architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification"),
    "several ends": ({"text_config": {"eos_token_id": [1, 2]}}, r'"eos_token_id" is \[1, 2\]'),
    "an activation": ({"vision_config": {**TOWER, "hidden_act": "mish"}}, "\"hidden_act\" is 'mish'"),
    "quantised": ({"quantization_config": {"bits": 4}}, '"quantization_config" is'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_supported_are_named(name):
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({"model_type": "clip", "architectures": ["CLIPModel"], **BOTH, **fields})


def test_defaults_are_those_of_transformers():
    for model_type, name, architecture in (
        ("clip_text_model", "CLIPTextConfig", "CLIPTextModelWithProjection"),
        ("clip_vision_model", "CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    ):
        full = json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
        head = {"model_type": model_type, "architectures": [architecture]}
        assert registry.config_from_dict(head) == registry.config_from_dict({**full, **head})
