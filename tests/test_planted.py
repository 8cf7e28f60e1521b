"""Every kind of symmetry, alone and together, planted under noise and found again; see `benchmarks/planted.py`."""

from functools import partial

import jax
import numpy as np
import pytest
from small_models import outputs_of, random_batch

from benchmarks.planted import CASES, KEY, draw_params, error_of, find, plant, shares_of
from jaxtune import symmetry, tree
from jaxtune.align.weights import match_weights
from jaxtune.errors import ConfigError
from jaxtune.models import decoder, mlp, registry
from jaxtune.transport.prepared import apply_transport
from jaxtune.transport.registry import prepare_transport

RAW = [name for name, case in CASES.items() if not case.is_folded]
# Noise -> least share recovered: orders come back whole; of maps that mix units, least cosine with the planted one.
ORDERS = {0.1: 1.0, 0.3: 1.0, 1.0: 0.9}
MAPS = {0.1: 0.998, 0.3: 0.98, 1.0: 0.85}
# Noise -> largest relative error of a moved task vector: about half the noise for maps, less for orders.
ERRORS = {0.1: 0.06, 0.3: 0.18, 1.0: 0.6}


def relative(wanted, got):
    return np.abs(wanted - got).max() / np.abs(wanted).max()


@pytest.mark.parametrize("name", CASES)
def test_without_noise_every_kind_is_found_exactly(name):
    planted = plant(CASES[name], 0.0, 0)
    found = find(CASES[name], planted)
    assert error_of(planted, found) < 1e-5  # of float32 products
    shares = shares_of(planted, found)
    assert shares == pytest.approx(dict.fromkeys(shares, 1.0), abs=1e-9)


@pytest.mark.parametrize("noise", ERRORS)
@pytest.mark.parametrize("name", CASES)
def test_under_noise_every_kind_is_found_nearly(name, noise):
    case = CASES[name]
    planted = plant(case, noise, 1)
    found = find(case, planted)
    for kind, share in shares_of(planted, found).items():
        floor = (MAPS if symmetry.KINDS[kind].order is None else ORDERS)[noise]
        assert share >= floor, (kind, share)
    assert error_of(planted, found) < ERRORS[noise]


@pytest.mark.parametrize("name", RAW)
def test_the_carried_fine_tune_computes_what_the_old_one_did(name):
    """float32, relative to the largest output; the planted element itself keeps the function to 1e-10 in float64."""
    case, planted = CASES[name], plant(CASES[name], 0.0, 2)
    batch = random_inputs(case.config)
    tuned = tree.apply_task_vector(planted.source, planted.task_vector)
    wanted = outputs_of(case.config, tuned, batch)
    vector = symmetry.apply(planted.spec, find(case, planted), planted.task_vector)
    carried = outputs_of(case.config, tree.apply_task_vector(planted.target, vector), batch)
    assert relative(wanted, carried) < 1e-5
    with jax.enable_x64(True):
        wide = tree.map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), tuned)
        moved = symmetry.apply(planted.spec, planted.element, wide)
        assert relative(*(outputs_of(case.config, params, batch) for params in (wide, moved))) < 1e-10


def random_inputs(config):
    """Images of the size that the config asks for; texts for a decoder."""
    if isinstance(config, decoder.Config):
        return {"text": np.random.default_rng(0).integers(0, config.vocab_size, size=(4, 9)).astype(np.int32)}
    size, channels = getattr(config, "image_size", None), getattr(config, "channels", 3)
    if size is None:
        return random_batch(config)
    return {"image": np.random.default_rng(0).uniform(size=(4, size, size, channels)).astype(np.float32)}


def test_clip_carries_a_fine_tune_through_orders_and_maps_inside_heads():
    """What an unfolded CLIP can be moved by: its entry norm lets no rotation of the image tower's stream be planted."""
    config = CASES["whole group, CLIP"].config
    spec = registry.symmetry_of(config)
    groups = [g if g.role not in ("qk", "vo") else symmetry.Group(g.name, g.size, "general_linear", g.parent, g.role)
              for g in spec.groups.values()]  # fmt: skip
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in spec.axes.items()}
    inside = symmetry.make_spec(groups, axes, unmatched=spec.unmatched)
    source, other = draw_params(config, 0), draw_params(config, 1)
    tuned = tree.map_leaves(lambda _, a, b: a + np.float32(0.05) * b, source, other)
    planted = symmetry.random(jax.random.key(3), inside)
    target, wanted = (symmetry.apply(inside, planted, params) for params in (source, tuned))
    prepared = prepare_transport(KEY, partial(registry.symmetry_of, config), source, tuned, target, method="full")
    assert max(prepared.info["lost"].values()) < 1e-3  # the rotation that was found is an order, to float32
    draw = np.random.default_rng(0)
    vision, text = config.vision, config.text
    tokens = draw.integers(0, text.vocab_size - 1, size=(4, text.context_length)).astype(np.int32)
    tokens[:, -1] = text.vocab_size - 1
    images = draw.uniform(size=(4, vision.image_size, vision.image_size, vision.channels)).astype(np.float32)
    batch = {"image": images, "text": tokens}
    before, after = (outputs_of(config, p, batch) for p in (wanted, apply_transport(prepared, target)))
    assert relative(before, after) < 2e-5  # a matrix of float32 products stands where a diagonal was


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_signs_and_scales_never_lose_ground_between_unrelated_networks(activation):
    config = mlp.Config(image_shape=(4, 4, 1), widths=(24, 20, 16), num_outputs=5, activation=activation)
    spec = registry.symmetry_of(config, scales="free" if activation == "relu" else "fixed")
    target, source = (draw_params(config, seed) for seed in range(2))
    found = match_weights(KEY, spec, target, source)
    assert list(found.history) == sorted(found.history)
    assert found.objective >= found.objective_of_identity
    moved = tree.flatten(symmetry.apply(spec, found.element, source))
    own, theirs = tree.flatten(source), tree.flatten(target)
    by_hand = sum(
        np.vdot(theirs[p], moved[p]) - (np.vdot(moved[p], moved[p]) - np.vdot(own[p], own[p])) / 2 for p in own
    )
    assert found.objective == pytest.approx(by_hand, rel=1e-4)
    assert found.history[-1] == pytest.approx(by_hand, rel=1e-4)


def test_free_scales_are_worth_having():
    """Without them the orders of rescaled units are hard to find and the task vector arrives in the wrong lengths."""
    case = CASES["scaled_permutation, ReLU perceptron"]
    planted = plant(case, 0.3, 0)
    orders = registry.symmetry_of(case.config)
    element = match_weights(KEY, orders, planted.target, planted.source).element
    lifted = {name: np.stack([order, np.ones(len(order))]) for name, order in element.items()}
    assert error_of(planted, lifted) > 5 * error_of(planted, find(case, planted))


def test_the_permutation_transport_frees_scales_when_asked():
    case = CASES["scaled_permutation, ReLU perceptron"]
    planted = plant(case, 0.0, 3)
    symmetry_of = partial(registry.symmetry_of, case.config)
    tuned = tree.apply_task_vector(planted.source, planted.task_vector)
    batch = random_inputs(case.config)
    wanted = outputs_of(case.config, tuned, batch)
    misses = {}
    for scales in ("fixed", "free"):
        prepared = prepare_transport(
            KEY, symmetry_of, planted.source, tuned, planted.target, method="permutation", scales=scales
        )
        misses[scales] = relative(wanted, outputs_of(case.config, apply_transport(prepared, planted.target), batch))
    assert misses["free"] < 1e-5
    assert misses["fixed"] > 1e-2
    tower = partial(registry.symmetry_of, CASES["permutation, ViT"].config)
    with pytest.raises(ConfigError, match=r"no symmetry with scales='free'.*junctions, inside"):
        prepare_transport(KEY, tower, {}, {}, {}, method="permutation", scales="free")
