"""Every transport method on planted pairs, on kin, and on what it must refuse."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import add_noise, toy_transformer

from jaxtune import symmetry, tree
from jaxtune.align.bases import centred_polar_factor
from jaxtune.errors import ConfigError, TreeMismatchError, UnknownNameError
from jaxtune.sample import Sample
from jaxtune.symmetry import canonical
from jaxtune.transport.orthogonal_shift import prepare_orthogonal_shift
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.transport.registry import METHODS, Method, prepare_transport, without_data

KEY = jax.random.key(0)
WITHOUT_DATA = without_data()


def toy_symmetry(*, junctions="shared", inside="separate"):
    return toy_transformer(0, junctions=junctions, inside=inside)[0]


@pytest.fixture(scope="module")
def bases():
    """(old base, its fine-tune)."""
    _, source = toy_transformer(0)
    return source, add_noise(source, 0.1, 1)


def moved_pair(bases, seed=3):
    """(new base, what its fine-tune must be, element): the old ones moved by a random element."""
    spec = toy_symmetry()
    element = symmetry.random(jax.random.key(seed), spec)
    return *(symmetry.apply(spec, element, params) for params in bases), element


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, *, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_every_method_has_the_same_face(method, bases):
    source, finetuned = bases
    target = add_noise(source, 0.2, 2)
    names = list(inspect.signature(METHODS[method].prepare).parameters)
    assert names[:5] == ["key", "symmetry", "source", "finetuned", "target"]
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method=method)
    moved = apply_transport(prepared, target)
    assert jax.tree.structure(moved) == jax.tree.structure(target)
    for path, leaf in tree.flatten(moved).items():
        want = tree.flatten(target)[path]
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
    assert_same(apply_transport(prepared, target, 0.0), target)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_onto_its_own_base_every_method_gives_the_finetuned_model(method, bases):
    source, finetuned = bases
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, source, method=method)
    expected = tree.apply_task_vector(source, tree.task_vector(source, finetuned))
    if method == "full":  # the same function in other weights: gains stay as they are, their readers take the change
        moved = canonical.fold(toy_symmetry(), apply_transport(prepared, source))
        assert_close(moved, canonical.fold(toy_symmetry(), expected), atol=1e-5)
    else:
        assert_same(apply_transport(prepared, source), expected)


@pytest.mark.parametrize("method", ["permutation", "auto", "transfusion"])
def test_onto_a_reordered_copy_the_fine_tune_arrives_exactly(method, bases):
    source, finetuned = bases
    target, expected, _ = moved_pair((source, tree.apply_task_vector(source, tree.task_vector(source, finetuned))))
    options = {"junctions": "shared", "inside": "separate"} if method == "transfusion" else {}
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method=method, **options)
    assert_same(apply_transport(prepared, target), expected)
    plain = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="identity")
    assert not np.allclose(apply_transport(plain, target)["head"]["kernel"], expected["head"]["kernel"], atol=1e-3)


def test_the_papers_own_element_recovers_a_joint_scramble(bases):
    """Planted with one order for QK and VO, which is all that the paper's group can express."""
    source, finetuned = bases
    spec = toy_symmetry(junctions="each", inside="joint")
    element = symmetry.random(jax.random.key(4), spec)
    element |= dict.fromkeys(spec.junctions, element["stream_0"])
    target = symmetry.apply(spec, element, source)
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="transfusion")
    assert_same(prepared.task_vector, symmetry.apply(spec, element, tree.task_vector(source, finetuned)))
    assert prepared.info["reached_inside"]


def test_auto_stays_among_kin_and_moves_for_a_copy(bases):
    source, finetuned = bases
    for target, chosen, verdict in (
        (tree.map_leaves(lambda _, x: np.float32(0.7) * x, source), "identity", "related"),
        (moved_pair(bases)[0], "permutation", "same"),
        (toy_transformer(9)[1], "full", "unrelated"),
    ):
        info = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="auto").info
        assert (info["chosen"], info["because"]["verdict"]) == (chosen, verdict)


def test_auto_tells_a_turned_copy_with_drift_from_noise(bases):
    """A small rotation of the stream between kin is more than chance, so the full group carries it; noise is not."""
    source, finetuned = bases
    spec = toy_symmetry()
    folded_spec = canonical.canonical_spec(spec)
    element = symmetry.identity(folded_spec)
    turn = symmetry.random(jax.random.key(5), folded_spec)["stream"]
    element["stream"] = centred_polar_factor(np.eye(len(turn)) + 0.5 * turn)
    turned = symmetry.apply(folded_spec, element, canonical.fold(spec, source))
    turned = add_noise(canonical.realise(spec, turned, source), 0.1, 3)
    infos = [
        prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="auto").info
        for target in (turned, *(add_noise(source, noise, 6) for noise in (0.05, 0.3, 1.0)))
    ]
    assert infos[0]["chosen"] == "full"
    assert {info["because"]["verdict"] for info in infos} == {"related"}
    assert infos[0]["saved"] > 3 * infos[0]["saved_of_noise"] > 0
    for info in infos[1:]:  # the search finds something in noise too, and as much of it in the noise drawn to compare
        assert info["saved"] == pytest.approx(info["saved_of_noise"], rel=0.08)


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_another_fine_tune_moves_along_without_aligning_again(method, bases):
    source, finetuned = bases
    other, target = add_noise(source, 0.3, 7), add_noise(source, 0.5, 8)
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method=method)
    assert_same(prepared.move(finetuned), prepared.task_vector)
    afresh = prepare_transport(KEY, toy_symmetry, source, other, target, method=method)
    assert_same(prepared.move(other), afresh.task_vector)


def test_transport_commutes_with_scaling_and_sweeps_in_one_vmap(bases):
    source, finetuned = bases
    target, _, _ = moved_pair(bases)
    prepared = prepare_transport(KEY, toy_symmetry, source, finetuned, target, method="permutation")
    half = tree.apply_task_vector(source, tree.task_vector(source, finetuned), 0.5)
    of_half = prepare_transport(KEY, toy_symmetry, source, half, target, method="permutation")
    assert_close(apply_transport(of_half, target), apply_transport(prepared, target, 0.5), atol=1e-6)
    on_device = jax.tree.map(jnp.asarray, target)
    scales = jnp.array([0.0, 0.5, 1.0])
    swept = jax.vmap(lambda scale: apply_transport(prepared, on_device, scale))(scales)
    for n, scale in enumerate(scales):
        one = apply_transport(prepared, target, float(scale))
        jax.tree.map(lambda many, x, n=n: np.testing.assert_allclose(many[n], x, atol=1e-6), swept, one)


def fixed(*_, **__):
    return symmetry.make_spec([], {"w": (None,)})


def test_orthogonal_shift_leaves_what_the_release_did_not_do():
    def leaf(*values):
        return {"w": np.array(values, np.float32)}

    prepared = prepare_orthogonal_shift(KEY, fixed, leaf(1, 1), leaf(4, 5), leaf(3, 1))
    np.testing.assert_allclose(prepared.task_vector["w"], [0, 4])
    assert prepared.info["kept_norm"] == pytest.approx(4 / 5)
    still = prepare_orthogonal_shift(KEY, fixed, leaf(1, 1), leaf(4, 5), leaf(1, 1))
    np.testing.assert_array_equal(still.task_vector["w"], [3, 4])


def test_plain_addition_at_scale_two():
    source, target = {"w": np.zeros(2, np.float32)}, {"w": np.full(2, 10, np.float32)}
    finetuned = {"w": np.array([1.25, 2.5], np.float32)}
    prepared = prepare_transport(KEY, fixed, source, finetuned, target, method="identity")
    np.testing.assert_array_equal(apply_transport(prepared, target, 2.0)["w"], [12.5, 15])


@pytest.mark.parametrize("as_jax", [False, True])
def test_running_variances_stay_at_zero_or_above(as_jax):
    spec = symmetry.make_spec([], {"var": (None,), "mean": (None,)}, nonnegative=["var"])
    vector = {"var": np.array([-2.0, 1.0], np.float32), "mean": np.array([-2.0, 1.0], np.float32)}
    target = {"var": np.ones(2, np.float32), "mean": np.ones(2, np.float32)}
    if as_jax:
        target = jax.tree.map(jnp.asarray, target)
    moved = apply_transport(Prepared(vector, spec), target)
    np.testing.assert_array_equal(moved["var"], [0, 2])
    np.testing.assert_array_equal(moved["mean"], [-1, 2])


def test_unknown_methods_and_options_list_the_known(bases):
    source, finetuned = bases
    with pytest.raises(UnknownNameError, match="Did you mean 'permutation'"):
        prepare_transport(KEY, toy_symmetry, source, finetuned, source, method="permutations")
    with pytest.raises(UnknownNameError, match="unknown option of transport method 'permutation' 'headcost'"):
        prepare_transport(KEY, toy_symmetry, source, finetuned, source, method="permutation", headcost="exact")
    with pytest.raises(TreeMismatchError, match="base and finetuned"):
        prepare_transport(KEY, toy_symmetry, source, toy_transformer(0, depth=2)[1], source, method="identity")


def test_a_method_that_needs_examples_says_so(bases, monkeypatch):
    source, finetuned = bases
    asked = []

    def prepare(key, symmetry, source, finetuned, target, *, sample, strength=1.0):
        asked.append((sample, strength))

    for data, given in (("unlabelled inputs", {"image": np.zeros(1)}), ("labelled examples", {"label": np.zeros(1)})):
        monkeypatch.setitem(METHODS, "looking", Method(prepare, "", data, ""))
        assert METHODS["looking"].options == {"strength": 1.0}
        call = partial(prepare_transport, KEY, toy_symmetry, source, finetuned, source, method="looking")
        with pytest.raises(ConfigError, match=f"'looking' needs {data}.*--data"):
            call()
        if data == "labelled examples":
            with pytest.raises(ConfigError, match="needs labelled examples"):
                call(sample=Sample("few", {"image": np.zeros(1)}, None))
        sample = Sample("few", given, None)
        call(sample=sample, strength=2.0)
        assert asked[-1] == (sample, 2.0)
    prepare_transport(KEY, toy_symmetry, source, finetuned, source, method="identity", sample=sample)
