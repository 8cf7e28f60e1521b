"""The evidence of an alignment: every number against a loop, the verdict at its edges."""

import math

import jax
import numpy as np
import pytest
from toys import add_noise, residual_mlp, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align.evidence import block_of, judge_lineage, judge_match, stream_coherence
from jaxtune.errors import SpecError, TreeMismatchError
from jaxtune.symmetry import Group, make_spec

KEY = jax.random.key(3)


def move_by_hand(params, element):
    """A residual MLP's leaves, unit by unit, without the package."""
    moved = {}
    for path, leaf in tree.flatten(params).items():
        block, _, name = path.rpartition("/")
        stream, hidden = element["stream"], element.get(f"hidden_{block[-1:]}")
        rows = {"embed": None, "up": stream, "down": hidden, "head": stream}[name]
        columns = {"embed": stream, "up": hidden, "down": stream, "head": None}[name]
        rows = range(leaf.shape[0]) if rows is None else rows.tolist()
        columns = range(leaf.shape[1]) if columns is None else columns.tolist()
        moved[path] = [[float(leaf[r, c]) for c in columns] for r in rows]
    return moved


def sums_by_hand(target, moved, only=lambda path: True):
    product = ours = theirs = 0.0
    for path, leaf in tree.flatten(target).items():
        if only(path):
            for row, other in zip(leaf.tolist(), moved[path], strict=True):
                for a, b in zip(row, other, strict=True):
                    product, ours, theirs = product + a * b, ours + a * a, theirs + b * b
    return product, ours, theirs


def test_every_number_equals_a_loop():
    spec, target = residual_mlp(0, 6)
    _, source = residual_mlp(1, 6)
    element = symmetry.random(jax.random.key(7), spec)
    found = judge_match(KEY, spec, target, source, element, num_random=3)
    near = {"rel": 1e-5}  # float32 products
    for name, used in (("identity", symmetry.identity(spec)), ("found", element)):
        moved = move_by_hand(source, used)
        product, ours, theirs = sums_by_hand(target, moved)
        assert found.objective[name] == pytest.approx(product, **near)
        assert found.cosine[name] == pytest.approx(product / math.sqrt(ours * theirs), **near)
        gap = sum((np.subtract(leaf, moved[path]) ** 2).sum() for path, leaf in tree.flatten(target).items())
        assert found.residual[name] == pytest.approx(math.sqrt(gap / ours), **near)
        assert set(found.agreement) == {"embed", "head", "block_0", "block_1", "block_2"}
        for block, values in found.agreement.items():
            product, ours, theirs = sums_by_hand(target, moved, lambda path, block=block: path.split("/")[0] == block)
            assert values[name] == pytest.approx(product / math.sqrt(ours * theirs), **near)
    assert found.coherence == 1
    assert len(found.objective["random"]) == len(found.cosine["random"]) == 3
    assert len(set(found.cosine["random"])) == 3


def test_random_elements_are_a_null_of_the_same_leaves():
    spec, target = residual_mlp(0, 24)
    _, source = residual_mlp(1, 24)
    found = judge_match(KEY, spec, target, source, symmetry.identity(spec))
    num_weights = tree.count_parameters(target)
    # Cosines of unrelated random trees scatter by about 1 / sqrt(number of weights).
    assert np.abs(found.cosine["random"]).max() < 6 / math.sqrt(num_weights)
    for values in found.agreement.values():
        assert abs(values["random"]) < 0.1
    again = judge_match(KEY, spec, target, source, symmetry.identity(spec))
    other = judge_match(jax.random.key(4), spec, target, source, symmetry.identity(spec))
    assert found == again
    assert found.cosine["random"] != other.cosine["random"]
    assert found.objective["identity"] == other.objective["identity"]


def test_vectors_count_in_the_objective_and_blind_leaves_nowhere():
    groups = [Group("units", 4)]
    axes = {"a/kernel": (None, "units"), "a/bias": ("units",), "a/blind": ("units",), "scale": ()}
    spec = make_spec(groups, axes, unmatched=["a/blind"])
    draw = np.random.default_rng(0)
    shapes = {"a/kernel": (3, 4), "a/bias": (4,), "a/blind": (4,), "scale": ()}
    target, source = ({path: draw.normal(size=shape) for path, shape in shapes.items()} for _ in range(2))
    found = judge_match(KEY, spec, tree.unflatten(target), tree.unflatten(source), symmetry.identity(spec))
    counted = ["a/kernel", "a/bias", "scale"]
    assert found.objective["identity"] == pytest.approx(sum((target[p] * source[p]).sum() for p in counted), rel=1e-5)
    gap = sum(((target[p] - source[p]) ** 2).sum() for p in counted) / sum((target[p] ** 2).sum() for p in counted)
    assert found.residual["identity"] == pytest.approx(math.sqrt(gap), rel=1e-5)
    a, b = target["a/kernel"], source["a/kernel"]
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.cosine["identity"] == pytest.approx(cosine, rel=1e-5)
    assert list(found.agreement) == ["a"]
    assert found.agreement["a"]["identity"] == pytest.approx(cosine, rel=1e-5)


def test_networks_of_zeros_have_no_cosine_and_no_warning():
    spec, target = residual_mlp(0, 4)
    zeros = tree.map_leaves(lambda _, leaf: np.zeros_like(leaf), target)
    for ours, theirs in ((target, zeros), (zeros, zeros)):
        found = judge_match(KEY, spec, ours, theirs, symmetry.identity(spec))
        assert found.cosine["identity"] == found.objective["identity"] == 0
        assert found.residual["identity"] == (1 if ours is target else 0)


def test_coherence_by_hand():
    names = ["stream_0", "stream_1", "stream_2"]
    groups = [Group(name, 4, role="stream") for name in names] + [Group("hidden", 4)]
    spec = make_spec(groups, {f"{name}/w": (name,) for name in [*names, "hidden"]}, junctions=names)
    element = {
        "stream_0": np.array([0, 1, 2, 3]),
        "stream_1": np.array([0, 1, 3, 2]),  # two of four as before
        "stream_2": np.array([1, 0, 3, 2]),  # two of four as before, none as at the start
        "hidden": np.array([3, 2, 1, 0]),
    }
    assert stream_coherence(spec, element) == 0.5
    assert stream_coherence(spec, {**element, "stream_2": element["stream_1"]}) == 0.75
    assert stream_coherence(spec, {**element, "stream_1": element["stream_0"]}) == 0.5
    assert stream_coherence(spec, dict.fromkeys(element, element["stream_0"])) == 1
    for junctions in ([], ["stream_0"]):
        one = make_spec(groups, {f"{name}/w": (name,) for name in [*names, "hidden"]}, junctions=junctions)
        assert stream_coherence(one, element) == 1


def test_coherence_of_random_junctions_is_chance():
    spec, _ = toy_transformer(0, width=32, depth=16, junctions="each", inside="joint")
    coherence = stream_coherence(spec, symmetry.random(KEY, spec))
    # 32 pairs of orders of 32 units: 1 / 32 each with deviation sqrt(1 / 32**3).
    assert abs(coherence - 1 / 32) < 5 / 32**1.5


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("position", "position"),
        ("patch/kernel", "patch"),
        ("block_3/attn/q/kernel", "block_3/attn"),
        ("block_3/mlp/up/kernel", "block_3/mlp"),
        ("block_3/norm1/scale", "block_3/norm1"),
        ("block_3/up", "block_3"),
        ("vision/block_10/mlp/down/bias", "vision/block_10/mlp"),
        ("text/token_embedding", "text"),
        ("stage_1/block_0/conv1/kernel", "stage_1/block_0"),
        ("layer2/kernel", "layer2"),
        ("residual_block_7/a/b/c", "residual_block_7/a"),
        ("blocks/kernel", "blocks"),
        ("block_0", "block_0"),
    ],
)
def test_the_block_of_a_leaf(path, block):
    assert block_of(path) == block


def numbers(identity, found, random=(0.0, 0.01, -0.01), residual=(1.4, 1.3)):
    return {"identity": identity, "found": found, "random": list(random)}, {
        "identity": residual[0],
        "found": residual[1],
    }


@pytest.mark.parametrize(
    ("cosine", "residual", "verdict", "is_in_place"),
    [
        # One model: the residual alone decides, whatever the cosines.
        ((1.0, 1.0), (0.0, 0.0), "same", True),
        ((0.0, 1.0), (1.4, 0.0), "same", False),
        ((0.0, 1.0), (1.4, 0.0099), "same", False),
        ((1.0, 1.0), (0.0099, 0.0099), "same", True),
        ((1.0, 0.0), (0.0, 1.4), "same", True),
        # Kin in place: well above chance, and at least half of what aligning reaches.
        ((0.9, 0.9), (0.0101, 0.0101), "related", True),
        ((0.2, 0.39), (1.3, 1.2), "related", True),
        ((0.2, 0.41), (1.3, 1.2), "related", False),
        ((0.101, 0.2), (1.4, 1.3), "related", True),
        ((0.099, 0.1), (1.4, 1.3), "unrelated", False),
        # A reordered copy of a kin.
        ((0.0, 0.51), (1.4, 1.2), "related", False),
        ((0.0, 0.49), (1.4, 1.2), "unrelated", False),
        ((-0.9, -0.9), (2.0, 2.0), "unrelated", False),
    ],
)
def test_the_verdict_at_its_edges(cosine, residual, verdict, is_in_place):
    lineage = judge_lineage(*numbers(*cosine, residual=residual))
    assert (lineage.verdict, lineage.is_in_place) == (verdict, is_in_place)
    assert isinstance(lineage.is_in_place, bool)
    assert f"{cosine[0]:.3f} in place, {cosine[1]:.3f} aligned" in lineage.reason


def test_a_cosine_within_the_scatter_of_random_elements_says_nothing():
    wide = (0.3, 0.0, -0.3, 0.1)  # deviation 0.25: 0.2 is no news
    assert judge_lineage(*numbers(0.2, 0.3, random=wide)).verdict == "unrelated"
    shifted = (0.6, 0.61, 0.59)  # weights with a common mean agree in any order
    assert judge_lineage(*numbers(0.6, 0.45, random=shifted)).verdict == "unrelated"
    equal = (0.2, 0.2)  # no scatter at all
    assert judge_lineage(*numbers(0.2, 0.3, random=equal)).verdict == "unrelated"


@pytest.mark.parametrize(("noise", "verdict"), [(0.0, "same"), (1e-3, "same"), (0.3, "related"), (2.0, "related")])
def test_kin_are_recognised_in_place_and_reordered(noise, verdict):
    spec, source = toy_transformer(0, width=32, depth=2)
    near, element = add_noise(source, noise, seed=1), symmetry.random(KEY, spec)
    kept = judge_match(KEY, spec, near, source, symmetry.identity(spec)).lineage
    assert (kept.verdict, kept.is_in_place) == (verdict, True)
    reordered = symmetry.apply(spec, element, near)
    moved = judge_match(KEY, spec, reordered, source, element).lineage
    # Two deviations of noise leave a cosine of 0.45: enough in place, too little for an order that was searched.
    assert (moved.verdict, moved.is_in_place) == ("unrelated" if noise == 2 else verdict, False)


def test_strangers_are_unrelated_whatever_the_order():
    spec, target = toy_transformer(0, width=32, depth=2)
    _, source = toy_transformer(5, width=32, depth=2)
    for element in (symmetry.identity(spec), symmetry.random(KEY, spec)):
        assert judge_match(KEY, spec, target, source, element).lineage.verdict == "unrelated"


def test_half_precision_and_jax_leaves_give_the_same_numbers():
    spec, target = residual_mlp(0, 8)
    _, source = residual_mlp(1, 8)
    half = [tree.map_leaves(lambda _, leaf: leaf.astype(np.float16), params) for params in (target, source)]
    wide = [tree.map_leaves(lambda _, leaf: leaf.astype(np.float64), params) for params in half]
    element = symmetry.random(KEY, spec)
    found, wanted, on_device = (
        judge_match(KEY, spec, *pair, element) for pair in (half, wide, jax.tree.map(jax.numpy.asarray, half))
    )
    assert found.objective["found"] == pytest.approx(wanted.objective["found"], rel=1e-6)
    assert found.residual["found"] == pytest.approx(on_device.residual["found"], rel=1e-6)


def test_the_report_gets_plain_values():
    spec, target = residual_mlp(0, 4)
    found = judge_match(KEY, spec, target, target, symmetry.identity(spec)).as_dict()
    assert set(found) == {"objective", "cosine", "agreement", "residual", "coherence", "lineage"}
    assert found["lineage"]["verdict"] == "same"
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {float, str, bool}


def test_bad_input_is_refused_at_the_door():
    spec, target = residual_mlp(0, 4)
    _, other = residual_mlp(0, 5)
    with pytest.raises(TreeMismatchError, match="target and source differ"):
        judge_match(KEY, spec, target, other, symmetry.identity(spec))
    with pytest.raises(SpecError, match="stream: missing"):
        judge_match(KEY, spec, target, target, {})
