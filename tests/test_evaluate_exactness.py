"""The proof that every run makes: a legal element passes, an illegal one is refused and its block named."""

import functools

import jax
import numpy as np
import pytest
from small_models import random_params

import jaxtune as jt
from jaxtune import symmetry
from jaxtune.errors import InexactElementError
from jaxtune.evaluate.exactness import verify_element
from jaxtune.evaluate.example import apply_to_matrix, example_batch
from jaxtune.models import registry, vit
from jaxtune.symmetry import make_spec

CONFIG = vit.Config(
    image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=5, channels=1
)  # fmt: skip


def with_axes(spec, changes, *, kinds=None):
    """The same table with some rows replaced, and some groups of another kind."""
    groups = [
        symmetry.Group(g.name, g.size, (kinds or {}).get(g.name, g.kind), g.parent, g.role)
        for g in spec.groups.values()
    ]
    axes = {path: tuple(axis.mark if axis else None for axis in row) for path, row in spec.axes.items()}
    return make_spec(groups, axes | changes, unmatched=spec.unmatched, junctions=spec.junctions)


def verify(spec, element, params):
    def move(element, params):
        return symmetry.apply(spec, element, params)

    batch = example_batch(jax.random.key(1), CONFIG, 4)
    return verify_element(functools.partial(apply_to_matrix, CONFIG), spec, element, move, params, batch)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_legal_element_passes_in_every_dtype(dtype):
    spec, params = registry.symmetry_of(CONFIG), random_params(CONFIG, dtype=np.float32)
    params = jt.tree.map_leaves(lambda _, leaf: leaf.astype(dtype), params)
    assert verify(spec, symmetry.random(jax.random.key(0), spec), params).is_exact


BROKEN = {
    "a gain stays behind": ({"block_1/norm2/scale": (None,)}, "stream"),
    "queries move, keys do not": ({"block_1/attn/k/kernel": ("stream", "block_1/attn/head", None)}, "block_1/attn"),
    "hidden units lose their bias": ({"block_0/mlp/up/bias": (None,)}, "block_0/mlp/hidden"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_declaration_is_refused_and_its_group_named(what):
    changes, group = BROKEN[what]
    spec, params = with_axes(registry.symmetry_of(CONFIG), changes), random_params(CONFIG, dtype=np.float32)
    with pytest.raises(InexactElementError, match=f"Groups that change most:\n  {group}"):
        verify(spec, symmetry.random(jax.random.key(0), spec), params)


def test_rounding_in_float32_alone_is_no_fault():
    """Maps far worse conditioned than any that is ever found: visibly off in float32, exact in float64."""
    names = [f"block_{block}/attn/{part}" for block in (0, 1) for part in ("qk", "vo")]
    spec = with_axes(registry.symmetry_of(CONFIG), {}, kinds=dict.fromkeys(names, "general_linear"))
    left, right = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2, 8, 8)))[0]
    element = symmetry.identity(spec) | dict.fromkeys(names, left @ np.diag(np.geomspace(3e-6, 3e2, 8)) @ right)
    params = random_params(CONFIG, dtype=np.float32)

    def move(element, params):  # leaf by leaf: `symmetry.apply` refuses such an element
        return jt.tree.map_leaves(lambda path, leaf: symmetry.element.apply_to_leaf(spec, element, path, leaf), params)

    batch = example_batch(jax.random.key(1), CONFIG, 4)
    found = verify_element(functools.partial(apply_to_matrix, CONFIG), spec, element, move, params, batch)
    assert found.max_relative > 1e-4
    assert found.is_exact


def test_align_refuses_before_anything_is_returned():
    spec = with_axes(registry.symmetry_of(CONFIG), {"block_1/norm2/scale": (None,)})
    source = random_params(CONFIG, dtype=np.float32)
    target = symmetry.apply(spec, symmetry.random(jax.random.key(3), spec), source)
    with pytest.raises(InexactElementError, match="stream"):
        jt.align(source, target, config=CONFIG, spec=spec)
    assert jt.align(source, target, config=CONFIG, spec=spec, verify=False).equivalence is None


def test_orders_per_junction_are_reported_and_not_refused():
    source, target = (random_params(CONFIG, seed=seed, dtype=np.float32) for seed in (0, 1))
    found = jt.align(source, target, config=CONFIG, method="transfusion")
    assert not found.spec.is_exact
    assert not found.equivalence.is_exact
