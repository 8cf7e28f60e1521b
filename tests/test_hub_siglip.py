"""SigLIP as transformers stores it, both towers and each alone; the oracle is transformers itself."""

import json

import jax
import numpy as np
import pytest
from hub_vision import (
    EXACT64,
    SEEN,
    TOWER,
    change,
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
from small_models import random_params

from jaxtune import symmetry
from jaxtune.errors import ConfigError
from jaxtune.models import clip, registry, vit
from jaxtune.symmetry import canonical
from jaxtune.tree import flatten, map_leaves, unflatten

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 31,
    "max_position_embeddings": 9, "projection_size": 24,
}  # fmt: skip
VARIANTS = {
    "both": ("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": TOWER}),
    "vision": ("SiglipVisionModel", "SiglipVisionConfig", {**TOWER, "hidden_act": "gelu"}),
    "vision_with_a_rest": ("SiglipVisionModel", "SiglipVisionConfig", {**TOWER, "image_size": 11}),
    "text": ("SiglipTextModel", "SiglipTextConfig", TEXT),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)


def make(name, folder, **options):
    class_name, config_name, fields = VARIANTS[name]
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields))
    return model, write_model(folder, model, **options)


def batch_of(config, *, length=9):
    vision = config if isinstance(config, vit.Config) else getattr(config, "vision", None)
    batch = {} if vision is None else {"image": images(vision)}
    if hasattr(config, "text"):
        draw = np.random.default_rng(3)
        batch["text"] = draw.integers(0, 31, size=(4, length)).astype(np.int32)
        batch["mask"] = np.arange(length)[None] < np.array([[length], [3], [4], [length - 1]])
    return batch


def ask(model, batch):
    inputs = {"pixel_values": to_torch(batch["image"])} if "image" in batch else {}
    if "text" in batch:
        inputs["input_ids"] = torch.from_numpy(batch["text"]).long()
        if "mask" in batch:
            inputs["attention_mask"] = torch.from_numpy(batch["mask"]).long()
    with torch.no_grad():
        return model(**inputs)


def wanted(outputs):
    if "logits_per_image" in outputs:
        return {"image_features": outputs.image_embeds, "text_features": outputs.text_embeds}
    return outputs.pooler_output


@EVERY
def test_outputs_are_those_of_transformers(name, tmp_path):
    model, folder = make(name, tmp_path)
    config, stored = open_model(folder)
    batch = batch_of(config)
    check_outputs(config, stored.params, batch, wanted(ask(model, batch)))


def test_logits_masks_and_lengths(tmp_path):
    model, folder = make("both", tmp_path)
    config, stored = open_model(folder)
    for batch in (batch_of(config), batch_of(config, length=6)):
        unmasked = {name: leaf for name, leaf in batch.items() if name != "mask"}
        for one in (batch, unmasked):
            logits = clip.as_matrix(outputs_of(config, stored.params, one))
            np.testing.assert_allclose(logits, ask(model, one).logits_per_image, rtol=1e-4, atol=1e-4)


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
    config, stored = open_model(make("both", tmp_path_factory.mktemp("siglip"))[1])
    return config, stored.params, batch_of(config)


@pytest.mark.parametrize(
    "path",
    [
        "vision/pool/probe",
        "vision/pool/attn/q/kernel",
        "vision/pool/attn/k/kernel",
        "vision/pool/attn/out/kernel",
        "vision/pool/mlp/down/kernel",
        "vision/final_norm/scale",
        "text/projection/kernel",
    ],
)
def test_what_does_not_move_with_its_group_is_seen(path, both):
    check_skipped(*both, path)


def test_illegal_elements_are_seen(both):
    check_mixed_heads(*both, "vision/pool/attn", 4)
    check_mixed_heads(*both, "text/block_0/attn", 2)
    check_one_junction(*both, "vision/stream_4")
    check_illegal_sign(*both, "vision/pool/mlp/hidden", {})


class TestPool:
    """What the head that pools by attention may do beyond orders of units, and what it may not."""

    def moved(self, both, changes):
        config, params, batch = both
        with jax.enable_x64(True):
            wide = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
            return change(config, unflatten(wide), unflatten({**wide, **changes(wide)}), batch)

    def test_only_the_queries_read_the_probe_so_it_takes_any_basis(self, both):
        basis = np.eye(24) + 0.2 * np.random.default_rng(0).normal(size=(24, 24))

        def changes(leaves):
            probe, kernel = "vision/pool/probe", "vision/pool/attn/q/kernel"
            return {probe: leaves[probe] @ basis, kernel: np.tensordot(np.linalg.inv(basis), leaves[kernel], axes=1)}

        assert self.moved(both, changes) < EXACT64

    def test_softmax_does_not_see_the_bias_of_its_keys(self, both):
        path = "vision/pool/attn/k/bias"
        assert self.moved(both, lambda leaves: {path: leaves[path] + 1.0}) < EXACT64

    def test_what_it_puts_out_meets_the_texts_and_is_fixed(self, both):
        """One order for all that writes or reads it inside the head: seen, since the texts keep theirs."""
        order = np.random.default_rng(0).permutation(24)

        def changes(leaves):
            names = ("attn/out/kernel", "attn/out/bias", "norm/scale", "norm/bias", "mlp/down/kernel", "mlp/down/bias")
            paths = [f"vision/pool/{name}" for name in names]
            up = "vision/pool/mlp/up/kernel"
            return {path: leaves[path][..., order] for path in paths} | {up: leaves[up][order]}

        def with_texts(leaves):
            paths = [f"text/projection/{name}" for name in ("kernel", "bias")]
            return changes(leaves) | {path: leaves[path][..., order] for path in paths}

        assert self.moved(both, changes) > SEEN
        assert self.moved(both, with_texts) < EXACT64  # the shared space may turn, but both towers at once

    def test_behind_a_classifier_it_has_an_order_of_its_own(self):
        config = vit.Config(
            image_size=8, patch_size=4, width=24, depth=1, num_heads=4, mlp_width=40, num_outputs=5, channels=2,
            pooling="attention",
        )  # fmt: skip
        params = random_params(config, dtype=np.float32)
        assert "pool/pooled" in registry.symmetry_of(config).groups
        check_invariance(config, params, {"image": images(config)})
        check_skipped(config, params, {"image": images(config)}, "head/kernel")


def test_folded_weights_are_the_same_function_and_take_the_whole_group(both):
    """The final norm goes into the keys and values of the pooling head, its value bias into what that puts out."""
    config, params, batch = both
    spec = registry.symmetry_of(config)
    whole = canonical.canonical_spec(spec)
    wide = map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), params)
    folded = canonical.fold(spec, wide)  # which has the dtype of the weights
    whole.check(folded)
    with jax.enable_x64(True):
        plain = canonical.realise(spec, folded, wide)
        assert change(config, wide, plain, batch) < EXACT64
        moved = symmetry.apply(whole, symmetry.random(jax.random.key(0), whole), folded)
        assert change(config, wide, canonical.realise(spec, moved, wide), batch) < EXACT64


def test_tensors_that_are_not_the_familys_are_named(tmp_path):
    check_names(make("both", tmp_path)[1])


REFUSED = {
    "another class": ({"architectures": ["SiglipForImageClassification"]}, "SiglipForImageClassification"),
    "no pooling head": ({"vision_config": {**TOWER, "vision_use_head": False}}, '"vision_use_head" is False'),
    "towers that do not meet": ({"text_config": {**TEXT, "projection_size": 16}}, "num_outputs is 24, embed_dim 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_supported_are_named(name):
    fields, message = REFUSED[name]
    values = {"model_type": "siglip", "architectures": ["SiglipModel"], **VARIANTS["both"][2]}
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict({**values, **fields})


def test_defaults_are_those_of_transformers():
    for model_type, name in (("siglip_text_model", "SiglipTextConfig"), ("siglip_vision_model", "SiglipVisionConfig")):
        full = json.loads(getattr(transformers, name)().to_json_string(use_diff=False))
        head = {"model_type": model_type, "architectures": [name.replace("Config", "Model")]}
        assert registry.config_from_dict(head) == registry.config_from_dict({**full, **head})
