"""Method `tied`: the weights' element without examples, the planted one with them, and what lies between."""

from functools import partial

import jax
import numpy as np
import pytest
from small_models import SIZES, random_params
from test_models_decoder import LLAMA
from test_transport_activations import KEY, networks, prepare, sample_of

from jaxtune import tree
from jaxtune.errors import ConfigError, SpecError
from jaxtune.models import mlp, registry, vit
from jaxtune.moments import gather_pairs
from jaxtune.sampling import make_text_sample
from jaxtune.symmetry import canonical
from jaxtune.symmetry import element as elements
from jaxtune.transport.folded_moments import lay_out_moments
from jaxtune.transport.full import prepare_full
from jaxtune.transport.site_maps import fit_site_maps, turn
from jaxtune.transport.tied import TIES, correct_element

VIT = vit.Config(**SIZES | {"depth": 1})
SPEC = registry.symmetry_of(VIT)
FOLDED = canonical.canonical_spec(SPEC)


def text_sample(config, num=8):
    return make_text_sample(config, np.random.default_rng(0).integers(0, config.vocab_size, (num, 9)))


@pytest.fixture(scope="module")
def planted():
    """(source, its fine-tune, target, the target's fine-tune, element of folded weights)."""
    pair, element = networks(VIT), elements.random(jax.random.key(5), FOLDED)

    def move(params):
        return canonical.realise(SPEC, elements.apply(FOLDED, element, canonical.fold(SPEC, params)), like=params)

    return *pair, *map(move, pair), element


def test_without_examples_it_is_full(planted):
    source, finetuned, *_ = planted
    target = random_params(VIT, seed=7, dtype=np.float32)
    full = prepare_full(KEY, partial(registry.symmetry_of, VIT), source, finetuned, target)
    none = prepare("tied", VIT, source, finetuned, target, sample=sample_of(VIT, 8).take([]))
    jax.tree.map(np.testing.assert_array_equal, full.task_vector, none.task_vector)
    sure = prepare("tied", VIT, source, finetuned, target, sample=sample_of(VIT, 8), prior=1e9)
    for path, leaf in tree.flatten(sure.task_vector).items():
        np.testing.assert_allclose(leaf, tree.flatten(full.task_vector)[path], atol=1e-5)


@pytest.mark.parametrize("tie", TIES)
def test_a_planted_element_is_kept(planted, tie):
    source, finetuned, target, truth, _ = planted
    prepared = prepare("tied", VIT, source, finetuned, target, sample=sample_of(VIT), prior=1.0, tie=tie)
    expected = tree.flatten(tree.task_vector(target, truth))
    for path, leaf in tree.flatten(prepared.task_vector).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=path)  # float32 activations
    if tie == "network":
        assert min(row["after"] for row in prepared.info["agreement"].values()) > 0.999


def test_activations_alone_find_what_the_weights_got_wrong(planted):
    """Stream and hidden units start from an element drawn at random; the weights count for nothing."""
    source, _, target, _, element = planted
    meetings = gather_pairs(source, target, sample_of(VIT))
    tables = lay_out_moments(SPEC.form, FOLDED, (source, target), meetings)
    other = elements.random(jax.random.key(9), FOLDED)
    start = {
        name: (other if group.role in ("stream", "hidden") else element)[name] for name, group in FOLDED.groups.items()
    }
    found, agreement = correct_element(FOLDED, start, tables, 64, 1e-6)
    for name in FOLDED.groups:
        np.testing.assert_allclose(found[name], element[name], atol=1e-3, err_msg=name)
    assert agreement["stream"]["before"] < 0.3 < 0.999 < agreement["stream"]["after"]


def test_maps_inside_heads_are_found_up_to_their_lengths(planted):
    """A head turned wrong by a rotation is turned back, on both of its sides at once."""
    source, _, target, _, element = planted
    tables = lay_out_moments(SPEC.form, FOLDED, (source, target), gather_pairs(source, target, sample_of(VIT)))
    wrong = elements.identity(FOLDED)
    draw = np.random.default_rng(1)
    for name in ("block_0/attn/qk", "block_0/attn/vo"):
        wrong[name] = np.linalg.qr(draw.normal(size=np.shape(wrong[name])))[0]
    found, _ = correct_element(FOLDED, elements.compose(FOLDED, wrong, element), tables, 64, 1e-6)
    for name in ("block_0/attn/qk", "block_0/attn/vo"):
        np.testing.assert_allclose(found[name], element[name], atol=2e-2, err_msg=name)


def test_the_stream_is_the_polar_factor_of_both_answers():
    """NumPy: activations of every reader and writer, folded by hand, beside the identity."""
    source, target = (random_params(VIT, seed=seed, dtype=np.float32) for seed in (1, 2))
    sample = sample_of(VIT, 12)
    meetings = gather_pairs(source, target, sample)
    tables = lay_out_moments(SPEC.form, FOLDED, (source, target), meetings)
    found, _ = correct_element(FOLDED, elements.identity(FOLDED), tables, 12, 32.0)
    networks_ = [canonical.realise(SPEC, canonical.fold(SPEC, p), like=p) for p in (source, target)]
    sites = [sample.record(p, {"image": sample.batch["image"]}) for p in networks_]
    total, count = 0.0, 0
    for path, side in [(f"block_0/attn/{name}/kernel", "inputs") for name in "qkv"] + [
        ("block_0/mlp/up/kernel", "inputs"),
        ("head/kernel", "inputs"),
        ("patch/kernel", "outputs"),
        ("block_0/attn/out/kernel", "outputs"),
        ("block_0/mlp/down/kernel", "outputs"),
    ]:
        x, y = (np.asarray(getattr(site[path], side), np.float64) for site in sites)
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        total, count = total + 24 * x.T @ y / np.linalg.norm(x) / np.linalg.norm(y), count + 1
    mean = np.eye(24) - 1 / 24
    left, _, right = np.linalg.svd(mean @ (12 * total / count + 32 * np.eye(24)) @ mean)
    expected = left[:, :-1] @ right[:-1] + 1 / 24  # the ones vector stays
    np.testing.assert_allclose(found["stream"], expected, atol=1e-3)


def test_site_maps_are_those_of_plain_numpy_and_turn_what_they_belong_to():
    source, target = (random_params(VIT, seed=seed, dtype=np.float32) for seed in (1, 2))
    sample = sample_of(VIT, 12)
    tables = lay_out_moments(SPEC.form, FOLDED, (source, target), gather_pairs(source, target, sample))
    moved = [table.cross for table in tables]
    networks_ = [canonical.realise(SPEC, canonical.fold(SPEC, p), like=p) for p in (source, target)]
    sites = [sample.record(p, {"image": sample.batch["image"]}) for p in networks_]

    def correlation(path, side):
        x, y = (np.asarray(getattr(site[path], side), np.float64) for site in sites)
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        size = x.shape[1]
        head = path.endswith(("q/kernel", "k/kernel", "v/kernel")) and side == "outputs"
        return size * x.T @ y / (np.sum(y * y) if head else np.linalg.norm(x) * np.linalg.norm(y))

    def rotation(*sides):
        left, _, right = np.linalg.svd(
            12 * np.mean([correlation(*side) for side in sides], axis=0) + 32 * np.eye(len(correlation(*sides[0])))
        )
        return left @ right

    up, down = "block_0/mlp/up/kernel", "block_0/mlp/down/kernel"
    queries = "block_0/attn/q/kernel"
    stream = [(up, "inputs"), (down, "outputs")]
    expected = {
        "site": {(up, True): rotation((up, "inputs")), (up, False): rotation((up, "outputs"))}
        | {(queries, False): rotation((queries, "outputs"))},
        "block": {(up, True): rotation(*stream), (up, False): rotation((up, "outputs"), (down, "inputs"))},
    }
    draw = np.random.default_rng(0)
    change = tree.map_leaves(lambda _, x: draw.normal(size=x.shape), canonical.fold(SPEC, source))
    for tie, rows in expected.items():
        maps, streams = fit_site_maps(FOLDED, tables, moved, tie=tie, num_examples=12, prior=32.0)
        for where, value in rows.items():
            np.testing.assert_allclose(maps[where], value, atol=1e-3, err_msg=f"{tie} {where}")
        turned = turn(FOLDED, change, tables, maps, streams)
        mlp_, before = turned["block_0"]["mlp"], change["block_0"]["mlp"]
        np.testing.assert_allclose(
            mlp_["up"]["kernel"], rows[up, True].T @ before["up"]["kernel"] @ rows[up, False], atol=1e-2
        )
        np.testing.assert_allclose(mlp_["up"]["bias"], before["up"]["bias"] @ rows[up, False], atol=1e-2)
        np.testing.assert_allclose(turned["position"], change["position"] @ streams["stream"], atol=1e-9)
        np.testing.assert_array_equal(turned["head"]["bias"], change["head"]["bias"])
    whole = change["block_0"]["attn"]["q"]["kernel"].reshape(24, 24)
    maps, streams = fit_site_maps(FOLDED, tables, moved, tie="site", num_examples=12, prior=32.0)
    np.testing.assert_allclose(
        turn(FOLDED, change, tables, maps, streams)["block_0"]["attn"]["q"]["kernel"].reshape(24, 24),
        maps[queries, True].T @ whole @ expected["site"][queries, False],
        atol=1e-2,
    )


@pytest.mark.parametrize("name", ["entry norm", "grouped heads, rotary positions", "tied table", "layer scale"])
def test_other_forms_have_evidence_too(name):
    config = {
        "entry norm": vit.Config(**SIZES | {"depth": 1}, stream_norm=True),
        "grouped heads, rotary positions": registry.config_from_dict(
            registry.config_to_dict(LLAMA) | {"depth": 1, "tied": False}
        ),
        "tied table": registry.config_from_dict(registry.config_to_dict(LLAMA) | {"depth": 1, "tied": True}),
        "layer scale": vit.Config(**SIZES | {"depth": 1}, layer_scale=True),
    }[name]
    sample = sample_of(config, 32) if isinstance(config, vit.Config) else text_sample(config, 32)
    spec = registry.symmetry_of(config)
    folded = canonical.canonical_spec(spec)
    source, other = (random_params(config, seed=seed, dtype=np.float32) for seed in (1, 2))
    target = tree.map_leaves(lambda _, x, y: x + np.float32(0.02) * y, source, other)
    meetings = gather_pairs(source, target, sample)
    tables = lay_out_moments(spec.form, folded, (source, target), meetings)
    wrong = elements.identity(folded) | {
        group: elements.random(jax.random.key(3), folded)[group]
        for group, one in folded.groups.items()
        if one.role == "stream"
    }
    found, agreement = correct_element(folded, wrong, tables, 32, 1e-3)
    assert agreement["stream"]["before"] < 0.4
    for group, one in folded.groups.items():
        if one.role == "stream":
            assert np.trace(found[group]) / one.size > 0.95, group


def test_what_cannot_be_used_is_refused():
    source, finetuned = networks(VIT)
    with pytest.raises(ConfigError, match="prior=0"):
        prepare("tied", VIT, source, finetuned, source, sample=sample_of(VIT, 4), prior=0.0)
    with pytest.raises(ConfigError, match="needs unlabelled inputs"):
        prepare("tied", VIT, source, finetuned, source)
    plain = mlp.Config(image_shape=(8, 8, 3), widths=(7, 6), num_outputs=5)
    with pytest.raises(SpecError, match="no canonical form"):
        prepare("tied", plain, *networks(plain), networks(plain)[0], sample=sample_of(plain, 4))
