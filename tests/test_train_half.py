"""Half fine-tuning: what is frozen stays, has no state, and is what the merge takes back; images mixed for BANG."""

import json

import jax
import ml_collections
import numpy as np
import pytest
from config_files import read_module
from small_models import random_params

from experiments.finetune import finetune
from jaxtune.checkpoint import load, save
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS
from jaxtune.models import mlp, registry, vit
from jaxtune.rng import named_key
from jaxtune.train.half import draw_half
from jaxtune.train.optimizer import make_optimizer
from jaxtune.train.step import create_state, cross_entropy, make_mesh, make_train_step, mix_images
from jaxtune.tree import flatten, map_leaves

DEEP = vit.Config(image_size=16, patch_size=8, channels=1, width=16, depth=4, num_heads=2, mlp_width=16, num_outputs=12)
FLAT = mlp.Config(image_shape=(16, 16, 1), widths=(8, 8, 8), num_outputs=12)
PATHS = list(flatten(random_params(DEEP)))
KEY = jax.random.key(7)


@pytest.mark.parametrize("level", ["category", "layer", "leaf"])
@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_trained_is_what_half_reset_keeps(level, stage):
    half = draw_half(PATHS, seed=5, stage=stage, level=level)
    assert sorted((*half.trained, *half.frozen)) == sorted(PATHS)
    base = random_params(DEEP, dtype=np.float32)
    tuned = map_leaves(lambda path, leaf: leaf + np.float32(1), base)
    models = [base] * stage + [tuned]  # the model's place is the stage
    merged = flatten(merge_trees(METHODS["half_reset"], models, base, seed=5, level=level))
    kept = {path for path, leaf in flatten(base).items() if not np.array_equal(merged[path], leaf)}
    assert kept == set(half.trained)
    # Two pairs of layers have four halves; the other levels a new one nearly always.
    for draws in ([(seed, stage) for seed in range(20)], [(5, stage) for stage in range(20)]):
        found = {draw_half(PATHS, seed=seed, stage=stage, level=level).trained for seed, stage in draws}
        assert len(found) == (4 if level == "layer" else 20)


def test_levels_are_halves():
    half = draw_half(PATHS, seed=1, level="category")
    for n in range(DEEP.depth):
        kernels = [f"block_{n}/attn/{part}/kernel" for part in ("q", "k", "v", "out")]
        present = [path for path in PATHS if path.startswith(f"block_{n}/attn/") and path.endswith("kernel")]
        assert len(present) == len(kernels)
        assert sum(half.is_trained(path) for path in present) == 2
        biases = [path.replace("kernel", "bias") for path in present]
        assert [half.is_trained(path) for path in biases] == [half.is_trained(path) for path in present]
    layers = draw_half(PATHS, seed=1, level="layer")
    whole = [{layers.is_trained(path) for path in PATHS if path.startswith(f"block_{n}/")} for n in range(4)]
    assert sorted(map(sorted, whole)) == [[False], [False], [True], [True]]
    assert all(layers.is_trained(path) for path in PATHS if not path.startswith("block_"))


def forward(params, frozen, batch, key):
    return registry.apply_train(FLAT, params, batch, key)


def test_frozen_leaves_have_no_state_and_do_not_move():
    half = draw_half(flatten(random_params(FLAT)), seed=0, level="leaf")
    optimizer, mesh = make_optimizer(1e-2, weight_decay=1.0), make_mesh(4, jax.local_devices()[:1])
    params = random_params(FLAT, dtype=np.float32)
    state = create_state(params, optimizer, mesh, is_trainable=half.is_trained)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(flatten(params)[path].size for path in half.trained)
    step = make_train_step(forward, optimizer, mesh, KEY, is_trainable=half.is_trained, mixup=0.4)
    draw = np.random.default_rng(0)
    batch = {"image": draw.random((4, 16, 16, 1), np.float32), "label": np.arange(4, dtype=np.int32)}
    for _ in range(2):
        state, metrics = step(state, {}, batch)
    moved = {path for path, leaf in flatten(state.params).items() if not np.array_equal(leaf, flatten(params)[path])}
    assert moved == set(half.trained)
    assert np.isfinite(metrics["loss"])


def test_mixed_images_and_their_loss_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    batch = {"image": draw.random((6, 2, 2, 1), np.float32), "label": np.arange(6, dtype=np.int32)}
    keys = jax.vmap(lambda n: jax.random.fold_in(KEY, n))(np.arange(300))
    drawn = jax.jit(jax.vmap(lambda key: mix_images(key, batch, 0.5)))(keys)
    mixed, others, shares = jax.tree.map(np.asarray, drawn)
    for n, share in enumerate(shares):
        assert sorted(others[n].tolist()) == list(range(6))
        expected = share * batch["image"] + (1 - share) * batch["image"][others[n]]
        np.testing.assert_allclose(mixed["image"][n], expected, rtol=1e-5)
    # Beta(α, α) has mean 1/2 and variance 1 / (4 (2 α + 1)); five standard errors of 300 draws.
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * np.sqrt(1 / 8 / 300))
    assert np.var(shares) == pytest.approx(1 / 8, abs=0.03)

    optimizer, mesh = make_optimizer(0.1, name="sgd"), make_mesh(6, jax.local_devices()[:1])

    def linear(params, frozen, batch, key):
        return batch["image"].reshape(6, 4) @ params["head"]["kernel"], params

    params = {"head": {"kernel": draw.normal(size=(4, 6)).astype(np.float32)}}
    step = make_train_step(linear, optimizer, mesh, KEY, mixup=0.5, label_smoothing=0.1)
    _, metrics = step(create_state(params, optimizer, mesh), {}, batch)
    mixed, others, share = mix_images(named_key(jax.random.fold_in(KEY, 0), "mixup"), batch, 0.5)
    logits = mixed["image"].reshape(6, 4) @ params["head"]["kernel"]
    ends = [cross_entropy(logits, labels, 0.1) for labels in (batch["label"], others)]
    np.testing.assert_allclose(metrics["loss"], share * ends[0] + (1 - share) * ends[1], rtol=1e-5)


def test_a_run_records_its_half(tmp_path):
    save(tmp_path / "base", registry.init(KEY, FLAT), config=registry.config_to_dict(FLAT))
    changes = {
        "base": str(tmp_path / "base"), "batch_size": 8, "num_steps": 2, "eval_batch_size": 100, "mixup": 0.2,
        "seed": 3, "schedule": {}, "half": {"level": "leaf", "stage": 1},
    }  # fmt: skip
    config = ml_collections.ConfigDict(read_module("finetune_digits").get_config().to_dict() | changes)
    config.data.options = {"size": 16, "margin": 1}
    assert finetune(config, tmp_path / "run") is None
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before, after = (flatten(load(tmp_path / name).params) for name in ("base", "run/model"))
    half = draw_half(before, seed=3, stage=1, level="leaf", is_trainable=lambda path: registry.is_trainable(FLAT, path))
    assert result["half"] == half.facts()
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert set(half.frozen) <= same
    assert not same & {path for path in half.trained if path.endswith("kernel")}
    config.lora.rank = 2
    with pytest.raises(ConfigError, match=r"half\.level and config\.lora\.rank are both set"):
        finetune(config, tmp_path / "other")


def test_refusals():
    with pytest.raises(UnknownNameError, match=r"level of half fine-tuning 'layers'\. Did you mean 'layer'"):
        draw_half(PATHS, seed=0, level="layers")
    with pytest.raises(ConfigError, match="stages are counted from 0"):
        draw_half(PATHS, seed=0, stage=-1)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        draw_half(PATHS, seed=0, is_trainable=lambda path: False)
    with pytest.raises(ConfigError, match="mixup is -1"):
        make_train_step(forward, make_optimizer(0.1), make_mesh(4), KEY, mixup=-1)
    with pytest.raises(DataError, match="mixup mixes images, the batch has: text, label"):
        mix_images(KEY, {"text": np.zeros((2, 3), np.int32), "label": np.zeros(2, np.int32)}, 0.5)
