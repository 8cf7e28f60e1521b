"""Trust weights: cosines against plain NumPy, powers, and what they must leave alone."""

import jax
import numpy as np
import pytest
from toys import add_noise, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align.evidence import block_of
from jaxtune.errors import ConfigError
from jaxtune.transport.registry import prepare_transport
from jaxtune.transport.trust import weigh_by_trust

KEY = jax.random.key(0)
LINE = symmetry.make_spec([symmetry.Group("g", 3)], {"a/w": ("g", None), "a/b": ("g",), "z/w": ("g",), "n": (None,)})


def toy_symmetry(**options):
    return toy_transformer(0, **options)[0]


def draw(seed):
    numbers = np.random.default_rng(seed)
    shapes = {"a/w": (3, 4), "a/b": (3,), "z/w": (3,)}
    leaves = {path: numbers.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return tree.unflatten({**leaves, "n": np.arange(2)})


def test_factors_are_cosines_of_blocks_after_the_move():
    target, source, vector = draw(0), draw(1), draw(2)
    target["z"]["w"] = -source["z"]["w"]  # opposed: nothing is carried
    order = np.array([2, 0, 1], np.int32)
    source["z"]["w"] = source["z"]["w"][np.argsort(order)]
    weighed, factors = weigh_by_trust(LINE, {"g": order}, vector, target, source, trust=2.0)
    ours = np.concatenate([target["a"]["w"].ravel(), target["a"]["b"]])
    theirs = np.concatenate([source["a"]["w"][order].ravel(), source["a"]["b"][order]])
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert factors == pytest.approx({"a": max(cosine, 0) ** 2, "z": 0.0}, rel=1e-5)
    for leaf in ("w", "b"):
        np.testing.assert_allclose(weighed["a"][leaf], factors["a"] * vector["a"][leaf], rtol=1e-6)
        assert weighed["a"][leaf].dtype == np.float32
    np.testing.assert_array_equal(weighed["z"]["w"], 0 * vector["z"]["w"])
    np.testing.assert_array_equal(weighed["n"], vector["n"])


def test_a_block_of_zeros_is_carried_whole_and_a_perfect_match_at_any_power():
    source, vector = draw(1), draw(2)
    target = draw(1)
    target["z"]["w"] = np.zeros(3, np.float32)
    still = symmetry.identity(LINE)
    weighed, factors = weigh_by_trust(LINE, still, vector, target, source, trust=3.0)
    assert factors == pytest.approx({"a": 1.0, "z": 1.0})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weighed, vector)


@pytest.mark.parametrize("trust", [-1.0, np.inf, np.nan])
def test_a_power_that_makes_no_sense_is_refused(trust):
    source = toy_transformer(0)[1]
    for method in ("full", "permutation"):
        with pytest.raises(ConfigError, match="finite power of at least 0"):
            prepare_transport(KEY, toy_symmetry, source, source, source, method=method, trust=trust)


@pytest.mark.parametrize("method", ["permutation", "full"])
def test_trust_scales_what_the_method_moves_and_zero_leaves_its_bits(method):
    spec, source = toy_transformer(0)
    finetuned = add_noise(source, 0.1, 1)
    target = add_noise(symmetry.apply(spec, symmetry.random(KEY, spec), source), 1.0, 2)

    def prepare(**options):
        return prepare_transport(KEY, toy_symmetry, source, finetuned, target, method=method, **options)

    plain, whole, weighed = prepare(), prepare(trust=0.0), prepare(trust=1.0)
    jax.tree.map(np.testing.assert_array_equal, plain.task_vector, whole.task_vector)
    assert plain.info["trust"] == {}
    factors = weighed.info["trust"]
    assert all(0 < factor <= 1 for factor in factors.values())
    assert set(factors) >= {"patch", "block_0/attn", "block_0/mlp", "head"}
    ours, theirs = tree.flatten(weighed.task_vector), tree.flatten(plain.task_vector)
    for path in (p for p in ours if p.endswith(("mlp/down/kernel", "out/kernel", "position"))):
        np.testing.assert_allclose(ours[path], factors[block_of(path)] * theirs[path], rtol=1e-4, atol=1e-7)


def errors_of(noise, trusts):
    """Relative error of the task vector that `permutation` moves, against the planted one."""
    spec, source = toy_transformer(0)
    finetuned, planted = add_noise(source, 0.1, 1001), symmetry.random(KEY, spec)
    target = add_noise(symmetry.apply(spec, planted, source), noise, 2000)
    truth = tree.flatten(symmetry.apply(spec, planted, tree.task_vector(source, finetuned)))
    errors = []
    for trust in trusts:
        prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="permutation", trust=trust)
        moved = tree.flatten(prepared.task_vector)
        missed = sum(np.sum((moved[path] - truth[path]) ** 2) for path in truth)
        errors.append(float(np.sqrt(missed / sum(np.sum(leaf**2) for leaf in truth.values()))))
    return errors


def test_trust_costs_where_the_order_is_found_and_pays_where_it_is_not():
    """Why the default is 0."""
    assert errors_of(0.0, (0.0, 1.0)) == pytest.approx([0.0, 0.0], abs=1e-6)
    found = errors_of(1.0, (0.0, 0.5, 1.0))
    assert found[0] == 0
    assert found == sorted(found)
    lost = errors_of(4.0, (0.0, 1.0))
    assert lost[1] < lost[0]
