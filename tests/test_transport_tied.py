"""Networks whose table is their readout: `full` is proven on the network with a readout of its own."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_models import random_params

import jaxtune as jt
from jaxtune import symmetry, tree
from jaxtune.models import decoder, registry, t5

CONFIGS = {
    "gpt-2": decoder.Config(
        vocab_size=40, width=16, depth=2, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24, norm="layer",
        gated=False, activation="gelu", num_positions=30, tied=True, qkv_bias=True, out_bias=True, mlp_bias=True,
    ),
    "qwen": decoder.Config(
        vocab_size=40, width=16, depth=2, num_heads=2, num_kv_heads=1, head_width=8, mlp_width=24, tied=True,
        rotary=decoder.Rotary(),
    ),
    "t5": t5.Config(
        vocab_size=40, width=16, depth=1, decoder_depth=1, num_heads=2, head_width=8, mlp_width=24, num_buckets=8,
        max_distance=12, tied=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_full_is_proven_on_the_untied_network(name):
    config = CONFIGS[name]
    source, other = (random_params(config, seed=seed, dtype=np.float32) for seed in (0, 1))
    spec = registry.symmetry_of(config)
    target = symmetry.apply(spec, symmetry.random(jax.random.key(2), spec), source)
    tuned = tree.map_leaves(lambda _, a, b: a + np.float32(0.05) * b, source, other)
    found = jt.transport(source, tuned, target, config=config, method="full")
    assert found.equivalence.is_exact
    assert found.prepared.realise is None


def test_entry_norms_are_left_unproven_and_not_claimed():
    config = replace(CONFIGS["qwen"], norm="rms_plus_one", placement="sandwich")
    source, target = (random_params(config, seed=seed, dtype=np.float32) for seed in (0, 1))
    assert jt.transport(source, source, target, config=config, method="full").equivalence is None
