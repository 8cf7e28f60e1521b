"""T5: outputs equal transformers', tied and untied, alone and in pairs; what is not supported is refused by name."""

import json

import numpy as np
import pytest
from hub_models import assert_close, assert_round_trip, randomise, read_folder, write_folder
from safetensors.numpy import load_file, save_file
from small_models import run

import jaxtune
from jaxtune.errors import ConfigError, DataError, TreeMismatchError
from jaxtune.models import registry
from jaxtune.models.t5.distances import bucket_of

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 41,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MEMBERS = {
    "v1.0": ("T5ForConditionalGeneration", {}),
    "v1.1": ("T5ForConditionalGeneration", {**V11, "num_decoder_layers": 3}),
    "silu": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-3}),
    "encoder": ("T5EncoderModel", V11),
    "pair": ("T5Model", V11),
    "mt5": ("MT5ForConditionalGeneration", {}),
    "mt5_encoder": ("MT5EncoderModel", {}),
}
UNTIED = ("v1.1", "mt5")


def make(name):
    """With the head's kernel, if it has one, not the table of tokens."""
    import torch

    torch.set_num_threads(1)
    class_name, fields = MEMBERS[name]
    made = getattr(transformers, class_name)
    config = made.config_class(**{**SIZES, **fields})
    config._attn_implementation = "eager"
    model = made(config)
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    model = randomise(model, seed=6)
    with torch.no_grad():  # scores are not scaled: without this one token would win each
        for leaf_name, leaf in model.named_parameters():
            if leaf_name.endswith((".q.weight", "shared.weight")):
                leaf.mul_(0.5 if leaf_name.endswith("q.weight") else 4.0)
    return model


def draw_batch(length, decoder_length, seed=0):
    """Three pairs: whole; both padded behind; the first padded in front."""
    draw = np.random.default_rng(seed)
    mask, decoder_mask = np.ones((3, length), bool), np.ones((3, decoder_length), bool)
    mask[1, length // 2 :] = decoder_mask[1, decoder_length // 2 :] = False
    mask[2, : length // 3] = False
    texts = [draw.integers(0, 41, size=m.shape).astype(np.int32) for m in (mask, decoder_mask)]
    return {"text": texts[0], "mask": mask, "decoder_text": texts[1], "decoder_mask": decoder_mask}


def outputs_of_oracle(model, batch):
    import torch

    names = {"text": "input_ids", "mask": "attention_mask"}
    if hasattr(model, "decoder"):
        names |= {"decoder_text": "decoder_input_ids", "decoder_mask": "decoder_attention_mask"}
    with torch.no_grad():
        out = model(**{theirs: torch.from_numpy(batch[ours].astype(np.int64)) for ours, theirs in names.items()})
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def rewrite(folder, change_tensors=None, **fields):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change_tensors(tensors) if change_tensors else tensors, path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", MEMBERS)
def test_outputs_equal_transformers(name, tmp_path):
    model = make(name)
    config, params, _ = read_folder(write_folder(tmp_path, model))
    assert (config.tied, config.scaled) == (name in ("v1.0", "silu"), name in ("v1.0", "silu"))
    for lengths in ((5, 9), (17, 4)):
        batch = draw_batch(*lengths)
        assert_close(run(config, params, batch), outputs_of_oracle(model, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["v1.0", "v1.1", "encoder"])
def test_every_tensor_comes_back(name, dtype, tmp_path):
    import torch

    assert_round_trip(write_folder(tmp_path, make(name).to(getattr(torch, dtype)), max_shard_size="20KB"))


def test_published_configs_mean_what_their_releases_meant(tmp_path):
    """FLAN-T5 says "tie_word_embeddings": false alone, T5 1.0 nothing; both store the table of tokens many times."""
    for name, is_tied in (("v1.1", False), ("v1.0", True)):
        model = make(name)
        theirs = outputs_of_oracle(model, draw_batch(6, 7))
        folder = write_folder(tmp_path / name, model)

        def age(tensors, is_tied=is_tied):
            tables = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * is_tied
            unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
            old = {unread: np.ones((8, 4), np.float32)}
            return tensors | old | {table: tensors["shared.weight"].copy() for table in tables}

        rewrite(folder, age)
        values = json.loads((folder / "config.json").read_text())
        for field in ("scale_decoder_outputs", "is_gated_act", "dense_act_fn", "tie_word_embeddings"):
            values.pop(field, None)
        values |= {} if is_tied else {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(values))
        config, params, _ = read_folder(folder)
        assert (config.tied, config.scaled) == (is_tied, is_tied)
        assert_close(run(config, params, draw_batch(6, 7)), theirs)
        assert_round_trip(folder)
        assert registry.config_from_dict(values) == config


def test_a_head_that_should_be_tied_and_is_not_is_refused(tmp_path):
    folder = write_folder(tmp_path, make("v1.0"))
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["shared.weight"] + 1})
    with pytest.raises(TreeMismatchError, match=r"lm_head\.weight and shared\.weight are tied"):
        jaxtune.load(folder)


def test_an_unstored_head_is_the_table_also_where_nothing_is_scaled(tmp_path):
    folder = write_folder(tmp_path, make("v1.1"))
    rewrite(folder, lambda tensors: {name: leaf for name, leaf in tensors.items() if name != "lm_head.weight"})
    config, params, _ = read_folder(folder)
    assert (config.tied, config.scaled) == (True, False)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    assert_close(run(config, params, draw_batch(6, 7)), outputs_of_oracle(model.eval(), draw_batch(6, 7)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12), (4, 20), (6, 9), (64, 1000)])
def test_distances_fall_into_the_same_buckets(is_causal, num_buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional=not is_causal, num_buckets=num_buckets, max_distance=max_distance
    )
    ours = bucket_of(distance, is_causal=is_causal, num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert set(ours) <= set(range(num_buckets))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "gated-mish"}, "\"feed_forward_proj\" is 'gated-mish'"),
        ({"feed_forward_proj": "parallel-relu"}, "\"feed_forward_proj\" is 'parallel-relu'"),
        ({"dense_act_fn": "silu"}, "\"dense_act_fn\" is 'silu'"),
        ({"is_gated_act": False}, '"is_gated_act" is False'),
        ({"is_decoder": True}, '"is_decoder" is True'),
        ({"architectures": ["T5ForSequenceClassification"]}, "T5ForSequenceClassification"),
        ({"relative_attention_num_buckets": 2}, "num_buckets 2 are fewer than 4"),
        ({"relative_attention_max_distance": 4}, "max_distance 4 lies among"),
        ({"model_type": "umt5"}, "unknown model_type 'umt5'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    values = {**transformers.T5Config(**SIZES, **V11).to_dict(), **fields}
    with pytest.raises(ConfigError, match=message):
        registry.config_from_dict(values)


def test_missing_unknown_tensors_and_texts_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path, make("v1.1"))
    config, params, _ = read_folder(folder)
    batch = draw_batch(6, 7)
    with pytest.raises(DataError, match='no "decoder_text"'):
        registry.apply(config, params, {"text": batch["text"]})
    with pytest.raises(DataError, match=r'batch\["decoder_mask"\]'):
        registry.apply(config, params, {**batch, "decoder_mask": batch["mask"]})
    original = load_file(folder / "model.safetensors")
    name = "decoder.block.2.layer.1.EncDecAttention.q.weight"
    for tensors, message in (
        ({**original, f"{name}_more": original[name]}, f"{name}_more: in the file, not known"),
        ({key: leaf for key, leaf in original.items() if key != name}, f"{name}: expected, not in the file"),
    ):
        rewrite(folder, lambda _, tensors=tensors: tensors)
        with pytest.raises(TreeMismatchError, match=message):
            jaxtune.load(folder)
