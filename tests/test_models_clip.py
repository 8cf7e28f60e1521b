"""CLIP: sizes, the text tower's pooling, the tokenizer, the zero-shot classifier."""

from functools import partial

import jax
import numpy as np
import pytest
from small_models import CONFIGS, random_batch, random_params, run, shapes_of

from jaxtune import tree
from jaxtune.errors import ConfigError, DataError
from jaxtune.models import clip, registry, vit
from jaxtune.models.readout import read_out
from jaxtune.models.tokenizer import END_ID, PAD_ID, START_ID, VOCAB_SIZE, tokenize

CONFIG = CONFIGS["clip"]
NAMES, TEMPLATES = ["cat", "grey owl", "ß"], ["a {}", "{}, {}!"]

# A text tower for the byte tokenizer.
BYTES = clip.Config(
    vision=CONFIG.vision,
    text=clip.TextConfig(vocab_size=VOCAB_SIZE, context_length=24, width=16, depth=1, num_heads=2, mlp_width=20),
    embed_dim=CONFIG.embed_dim,
)


def openai_config(patch_size, width=768, num_heads=12):
    options = {"activation": "quick_gelu", "norm_eps": 1e-5}
    vision = vit.Config(
        image_size=224, patch_size=patch_size, width=width, depth=12, num_heads=num_heads, mlp_width=4 * width,
        num_outputs=512, stream_norm=True, head_bias=False, patch_bias=False, **options,
    )  # fmt: skip
    text = clip.TextConfig(
        vocab_size=49408, context_length=77, width=512, depth=12, num_heads=8, mlp_width=2048, **options
    )
    return clip.Config(vision=vision, text=text, embed_dim=512)


@pytest.mark.parametrize(
    ("patch_size", "vision", "total"), [(16, 86_192_640, 149_620_737), (32, 87_849_216, 151_277_313)]
)
def test_real_sizes_have_the_published_number_of_parameters(patch_size, vision, total):
    config = openai_config(patch_size)
    shapes = shapes_of(config)
    assert tree.count_parameters(shapes["vision"]) == vision
    assert tree.count_parameters(shapes["text"]) == 63_428_096
    assert tree.count_parameters(shapes) == total
    registry.symmetry_of(config).check(shapes)


def test_outputs_follow_the_batch():
    params, batch = random_params(CONFIG, dtype=np.float32), random_batch(CONFIG)
    both = run(CONFIG, params, batch)
    for name in ("image", "text"):
        one = run(CONFIG, params, {name: batch[name]})
        assert one.keys() == {f"{name}_features", "logit_scale"}
        np.testing.assert_allclose(one[f"{name}_features"], both[f"{name}_features"], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(one[f"{name}_features"], axis=1), 1, rtol=1e-6)
    with pytest.raises(DataError, match="it has: label"):
        clip.apply(CONFIG, params, {"label": np.zeros(2, np.int32)})


def test_what_follows_the_end_of_text_does_not_count():
    params = random_params(CONFIG, dtype=np.float32)
    end = CONFIG.text.vocab_size - 1
    text = np.array([[1, 5, 7, end, 0, 0, 0, 0, 0], [1, 5, 7, end, 3, 9, 2, 2, 4]], np.int32)
    encode = jax.jit(partial(clip.encode_text, CONFIG))
    long = encode(params, text)
    np.testing.assert_array_equal(long[0], long[1])
    np.testing.assert_allclose(encode(params, text[:1, :4]), long[:1], atol=1e-6)
    other = encode(params, np.array([[1, 6, 7, end]], np.int32))
    assert np.abs(other - long[:1]).max() > 1e-3


def test_text_that_the_tower_cannot_take():
    params = random_params(CONFIG, dtype=np.float32)
    with pytest.raises(DataError, match=r"int32\[2, 10\].*L at most 9"):
        clip.encode_text(CONFIG, params, np.zeros((2, 10), np.int32))
    with pytest.raises(DataError, match=r"float32\[2, 4\]"):
        clip.encode_text(CONFIG, params, np.zeros((2, 4), np.float32))
    beyond = run(CONFIG, params, {"text": np.full((1, 4), CONFIG.text.vocab_size, np.int32)})["text_features"]
    assert np.isnan(beyond).all()


def test_towers_must_meet():
    with pytest.raises(ConfigError, match="num_outputs is 5, embed_dim 6"):
        clip.Config(vision=CONFIG.vision, text=CONFIG.text, embed_dim=6)


def test_classifier_is_a_loop_over_prompts():
    params, tokens = random_params(BYTES, dtype=np.float32), partial(tokenize, context_length=24)
    encode = jax.jit(partial(clip.encode_text, BYTES))
    means = []
    for name in NAMES:
        features = [np.asarray(encode(params, tokens([prompt])))[0] for prompt in (f"a {name}", f"{name}, {name}!")]
        means.append(sum(features) / 2)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    assert np.all(lengths < 0.999)  # so that renormalising is seen

    plain = clip.zero_shot_classifier(BYTES, params, NAMES, TEMPLATES, tokens, renormalise=False)
    np.testing.assert_allclose(plain, means, atol=1e-6)
    classifier = clip.zero_shot_classifier(BYTES, params, NAMES, TEMPLATES, tokens)
    assert classifier.dtype == np.float32
    np.testing.assert_allclose(classifier, means / lengths, atol=1e-6)

    outputs = run(BYTES, params, {"image": random_batch(BYTES)["image"]})
    logits = read_out(outputs["image_features"], classifier, scale=outputs["logit_scale"])
    by_hand = np.exp(params["logit_scale"]) * np.asarray(outputs["image_features"]) @ np.asarray(classifier).T
    np.testing.assert_allclose(logits, by_hand, rtol=1e-5, atol=1e-5)


def test_classifier_refuses():
    params, tokens = random_params(CONFIG, dtype=np.float32), partial(tokenize, context_length=9)
    with pytest.raises(ConfigError, match="has no place for the class"):
        clip.zero_shot_classifier(CONFIG, params, NAMES, ["a photo"], tokens)
    with pytest.raises(ConfigError, match="got 3 and 0"):
        clip.zero_shot_classifier(CONFIG, params, NAMES, [], tokens)
    with pytest.raises(DataError, match="vocabulary has 31"):
        clip.zero_shot_classifier(CONFIG, params, ["a"], ["{}"], tokens)
    with pytest.raises(DataError, match="for 1 texts"):
        clip.zero_shot_classifier(CONFIG, params, ["a"], ["{}"], lambda texts: np.zeros((2, 4), np.int32))


def test_tokens_are_bytes():
    got = tokenize(["ab", "", "ß"], context_length=5)
    assert got.dtype == np.int32
    assert got.tolist() == [
        [START_ID, 98, 99, END_ID, PAD_ID],
        [START_ID, END_ID, PAD_ID, PAD_ID, PAD_ID],
        [START_ID, 0xC3 + 1, 0x9F + 1, END_ID, PAD_ID],
    ]
    assert tokenize([], context_length=5).shape == (0, 5)
    assert tokenize(["\x00\xff"], context_length=5).max() == END_ID == VOCAB_SIZE - 1
    with pytest.raises(DataError, match="'abcd' takes 6 tokens"):
        tokenize(["abcd"], context_length=5)


def test_symmetry_holds_the_shared_space_and_the_vocabulary():
    spec = registry.symmetry_of(CONFIG)
    assert spec.axes["vision/head/kernel"][1] is None
    assert spec.axes["text/projection/kernel"][1] is None
    assert spec.axes["text/token_embedding"][0] is None
    assert spec.axes["logit_scale"] == ()
    assert jax.tree.structure(shapes_of(CONFIG)["vision"]) == jax.tree.structure(shapes_of(CONFIG.vision))
