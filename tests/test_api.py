"""`import jaxtune as jt`: what loads, what can be called, and every call on trees and on checkpoints."""

import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune import symmetry, tree
from jaxtune.errors import ConfigError, DataError, NonFiniteError, SpecError, TreeMismatchError, UnknownNameError
from jaxtune.loading import check_same_architecture
from jaxtune.models import mlp, registry, vit
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.symmetry import canonical
from jaxtune.transport.prepared import apply_transport

CONFIG = vit.Config(
    image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=3, channels=1
)  # fmt: skip
MLP = mlp.Config(image_shape=(4, 4, 1), widths=(9, 8), num_outputs=3)
PACKAGES = ["align", "compose", "evaluate", "interpolate", "transport"]


def init(seed, config=MLP):
    return jax.tree.map(np.asarray, registry.init(jax.random.key(seed), config))


def tune(params, seed=7):
    draw = np.random.default_rng(seed)
    return tree.map_leaves(lambda _, x: x + (0.02 * draw.normal(size=x.shape)).astype(np.float32), params)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, dict(first), dict(second))


@pytest.fixture(scope="module")
def trees():
    source = init(0)
    return source, tune(source), init(1)


def save(path, params, config=MLP):
    return jt.save(path, params, config=registry.config_to_dict(config))


@pytest.fixture
def checkpoints(trees, tmp_path):
    return [jt.load(save(tmp_path / name, params)) for name, params in zip(("old", "tuned", "new"), trees, strict=True)]


def run_python(program):
    """What a fresh interpreter prints, as JSON."""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_importing_loads_nothing_heavy():
    new = run_python(
        "import json, sys; before = set(sys.modules)\n"
        "import jaxtune, jaxtune.cli\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.partition(".")[0] for name in new}
    assert "jaxtune" in roots
    others = sorted(root for root in roots if root not in sys.stdlib_module_names and root != "jaxtune")
    assert not others, f"import jaxtune loads {others}"
    ours = {name for name in new if name.startswith("jaxtune")}
    flags = {"jaxtune.commands", "jaxtune.commands.mergekit_flags"}  # arguments that the parser lists: argparse alone
    assert ours == {"jaxtune", "jaxtune.version", "jaxtune.cli", "jaxtune.errors", *flags}


def test_every_name_is_listed_and_found():
    assert set(dir(jt)) == set(jt.__all__) >= {"load", "save", "transport", "align", "__version__"}
    for name in jt.__all__:
        assert getattr(jt, name) is getattr(jt, name)
        assert name == "__version__" or callable(getattr(jt, name))


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(AttributeError, match=r"no attribute 'transprt'; it has: .*transport"):
        _ = jt.transprt
    with pytest.raises(ImportError):
        from jaxtune import transprt  # noqa: F401
    assert not hasattr(jt, "numpy")


ORDERS = {
    "the call first": "import jaxtune as jt; jt.transport; jt.align; jt.evaluate; jt.interpolate",
    "the package first": "import jaxtune.transport.registry, jaxtune.align.registry, jaxtune.interpolate.line",
    "from the package": "from jaxtune.transport import registry; from jaxtune.evaluate import classifier",
    "from the root": "from jaxtune import transport, align, evaluate, interpolate",
    "the calls behind it first": "import jaxtune.api",
    "a command first": "import jaxtune.commands.transport, jaxtune.commands.align",
    "by name": "import importlib; importlib.import_module('jaxtune.transport.auto')",
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_packages_are_calls_and_packages_in_every_order(order):
    facts = run_python(
        f"{ORDERS[order]}\n"
        "import inspect, json, sys, types\n"
        "import jaxtune as jt\n"
        "import jaxtune.align.registry, jaxtune.evaluate.classifier, jaxtune.interpolate.line\n"
        "import jaxtune.transport.registry\n"
        "from jaxtune.transport import registry\n"
        "import jaxtune.api as api\n"
        f"packages = {{name: getattr(jt, name) for name in {PACKAGES}}}\n"
        "print(json.dumps({name: ["
        "callable(package), isinstance(package, types.ModuleType), package is sys.modules['jaxtune.' + name], "
        "inspect.signature(package) == inspect.signature(getattr(api, name)),"
        "registry is jt.transport.registry, 'full' in jt.transport.registry.METHODS] "
        "for name, package in packages.items()}))"
    )
    assert facts == {name: [True] * 6 for name in PACKAGES}


def test_a_call_has_the_signature_of_what_answers_it():
    assert list(inspect.signature(jt.transport).parameters)[:3] == ["source", "finetuned", "target"]
    assert inspect.signature(jt.transport).parameters["method"].default == "auto"
    with pytest.raises(TypeError, match="finetuned"):
        jt.transport({})


def test_the_packages_that_answer_calls_are_all_there():
    for name in PACKAGES:
        assert importlib.util.find_spec(f"jaxtune.{name}").submodule_search_locations


@pytest.mark.parametrize("method", ["identity", "permutation", "auto"])
def test_a_tree_with_its_config_its_dict_or_its_spec_is_a_checkpoint(method, trees, checkpoints):
    wanted = jt.transport(*checkpoints, method=method)
    forms = [{"config": MLP}, {"config": registry.config_to_dict(MLP)}, {"spec": registry.symmetry_of(MLP)}]
    for form in forms:
        found = jt.transport(*trees, method=method, **form)
        assert_same(found.params, wanted.params)
        assert found.evidence == wanted.evidence
        if "spec" in form:
            assert found.equivalence is None
        else:
            assert found.equivalence == wanted.equivalence
    mixed = jt.transport(checkpoints[0], trees[1], checkpoints[2], method=method)
    assert_same(mixed.params, wanted.params)


def test_align_finds_scales_when_asked(trees):
    source = trees[0]
    spec = jt.symmetry_of(MLP, scales="free")
    target = symmetry.apply(spec, symmetry.random(jax.random.key(4), spec), source)
    found = jt.align(source, target, config=MLP, scales="free")
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), found.params, target)
    assert found.equivalence.is_exact
    plain = jt.align(source, target, config=MLP)
    assert plain.evidence.residual["found"] > 0.1 > 100 * found.evidence.residual["found"]


def test_align_by_the_whole_group_where_no_network_holds_the_moved_source():
    config = dataclasses.replace(CONFIG, stream_norm=True)
    pair = init(0, config), init(1, config)
    found = jt.align(*pair, config=config, method="full")
    assert found.params is None
    assert found.equivalence is None
    own = registry.symmetry_of(config)
    moved = symmetry.apply(found.spec, found.element, canonical.fold(own, pair[0]))
    assert found.evidence.residual["found"] < found.evidence.residual["identity"]
    target, moved = (
        np.concatenate([leaf.ravel() for path, leaf in tree.flatten(params).items() if leaf.ndim > 1])
        for params in (canonical.fold(own, pair[1]), moved)
    )
    residual = np.linalg.norm(target - moved) / np.linalg.norm(target)
    assert residual == pytest.approx(found.evidence.residual["found"], rel=1e-4)


def test_align_by_the_whole_group_asks_for_norms_that_fold(trees):
    with pytest.raises(SpecError, match="no canonical form"):
        jt.align(trees[0], trees[2], config=MLP, method="full")


def test_align_moves_the_source_onto_a_reordered_copy(trees, checkpoints, tmp_path):
    spec = registry.symmetry_of(MLP)
    planted = symmetry.random(jax.random.key(5), spec)
    copy = symmetry.apply(spec, planted, trees[0])
    found = jt.align(trees[0], copy, config=MLP)
    assert_same(found.params, copy)
    jax.tree.map(np.testing.assert_array_equal, dict(found.element), planted)
    assert found.evidence.lineage.verdict == "same"
    assert found.equivalence.is_exact
    assert found.info["is_converged"]
    assert found.spec.groups == spec.groups
    on_disk = jt.load(save(tmp_path / "copy", copy))
    assert_same(jt.align(checkpoints[0], on_disk).params, copy)
    assert jt.align(trees[0], copy, spec=spec).equivalence is None


def test_a_fine_tune_arrives_on_a_reordered_copy(trees):
    spec = registry.symmetry_of(MLP)
    planted = symmetry.random(jax.random.key(5), spec)
    source, finetuned, _ = trees
    copy, wanted = (symmetry.apply(spec, planted, params) for params in (source, finetuned))
    found = jt.transport(source, finetuned, copy, config=MLP)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), found.params, wanted)
    half = jt.transport(source, finetuned, copy, config=MLP, scale=0.5)
    assert_same(half.params, apply_transport(found.prepared, copy, 0.5))
    assert found.evidence.lineage.verdict == "same"
    assert found.equivalence.is_exact


@pytest.mark.parametrize("method", ["full", "transfusion"])
def test_transformers_know_the_methods_of_transformers(method):
    source, target = init(0, CONFIG), init(1, CONFIG)
    found = jt.transport(source, source, target, config=CONFIG, method=method)
    assert_same(found.params, target)  # nothing was added, so nothing arrives
    assert found.prepared.spec.groups
    if method == "full":
        assert found.equivalence.is_exact


def test_without_an_architecture_only_arithmetic_is_done():
    source = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int32(3)}
    finetuned = {"w": source["w"] + 1, "step": np.int32(4)}
    target = {"w": 2 * source["w"], "step": np.int32(9)}
    found = jt.transport(source, finetuned, target, method="identity")
    assert_same(found.params, {"w": 2 * source["w"] + 1, "step": np.int32(9)})
    assert found.evidence is None
    assert found.equivalence is None
    assert jt.transport(source, finetuned, target, method="orthogonal_shift").params["w"].shape == (2, 3)
    for call in (lambda: jt.transport(source, finetuned, target), lambda: jt.align(source, target)):
        with pytest.raises(ConfigError, match=r"config=.*spec="):
            call()


def test_nothing_is_gathered_when_nothing_is_asked(trees):
    found = jt.transport(*trees, config=MLP, method="permutation", verify=False)
    assert found.evidence is None
    assert found.equivalence is None
    assert_same(found.params, jt.transport(*trees, config=MLP, method="permutation").params)


def test_the_same_seed_gives_the_same_model(trees):
    results = [jt.align(trees[0], trees[2], config=MLP, num_restarts=1, seed=seed) for seed in (3, 3, 4)]
    assert_same(results[0].params, results[1].params)
    assert results[0].evidence == results[1].evidence
    assert results[0].evidence != results[2].evidence


def test_different_architectures_are_named_with_files_and_fields(checkpoints, tmp_path):
    other_config = dataclasses.replace(CONFIG, width=32, pooling="mean")
    paths = [save(tmp_path / name, init(0, config), config) for name, config in (("a", CONFIG), ("b", other_config))]
    first, second = (jt.load(path) for path in paths)
    for call in (
        lambda: jt.align(first, second),
        lambda: jt.transport(first, first, second, method="identity"),
        lambda: jt.interpolate(first, second),
        lambda: check_same_architecture({"source": first, "target": second}),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        text = str(error.value)
        assert all(str(path) in text for path in paths)
        assert "width: " in text
        assert "16" in text
        assert "32" in text
        assert "pooling: " in text
        assert "'mean'" in text
        assert "depth" not in text, "what agrees is not listed"
    with pytest.raises(ConfigError, match=r"model_type: source 'jaxtune_mlp', target 'jaxtune_vit'"):
        check_same_architecture({"source": checkpoints[0], "target": first})


def test_bad_input_is_refused_before_any_work(trees, checkpoints):
    source, finetuned, target = trees
    broken = tree.map_leaves(lambda _, x: x * np.float32(np.nan), finetuned)
    with pytest.raises(NonFiniteError, match="finetuned holds NaN"):
        jt.transport(source, broken, target, config=MLP)
    with pytest.raises(TreeMismatchError, match="source and target differ"):
        jt.align(source, tree.select(target, exclude="head/.*"), config=MLP)
    with pytest.raises(UnknownNameError, match="permutation"):
        jt.transport(source, finetuned, target, config=MLP, method="permutations")
    with pytest.raises(UnknownNameError, match="Did you mean 'weights'"):
        jt.align(source, target, config=MLP, method="weight")
    with pytest.raises(UnknownNameError, match="max_sweeps"):
        jt.align(source, target, config=MLP, max_sweep=3)
    with pytest.raises(ConfigError, match="config="):
        jt.align(source, target, spec=registry.symmetry_of(MLP), method="transfusion")
    with pytest.raises(ConfigError, match="jaxtune_bert"):
        jt.align(source, target, config={"model_type": "jaxtune_bert"})


def test_interpolate_takes_trees_and_checkpoints(trees, checkpoints):
    middle = jt.interpolate(trees[0], trees[2], 0.25)
    assert_same(middle, jt.interpolate(checkpoints[0], checkpoints[2], 0.25))
    jax.tree.map(
        lambda got, a, b: np.testing.assert_allclose(got, 0.75 * a + 0.25 * b, atol=1e-7), middle, trees[0], trees[2]
    )
    assert_same(jt.interpolate(trees[0], trees[2]), jt.interpolate(trees[0], trees[2], 0.5))


class Records:
    """Images whose label the model itself gives, but for one."""

    class_names = ("a", "b", "c")

    def __init__(self, params):
        draw = np.random.default_rng(0)
        self.image = draw.uniform(size=(10, 4, 4, 1)).astype(np.float32)
        outputs = np.asarray(registry.apply(MLP, params, {"image": self.image}))
        self.label = outputs.argmax(axis=-1).astype(np.int32)
        self.label[3] = (self.label[3] + 1) % 3

    def __len__(self):
        return len(self.label)

    def __getitems__(self, indices):
        return {"image": self.image[indices], "label": self.label[indices]}


class Empty(Records):
    def __len__(self):
        return 0


def test_evaluate_takes_trees_and_checkpoints(trees, checkpoints):
    records = Records(trees[0])
    metrics = jt.evaluate(trees[0], records, config=MLP)
    assert metrics.accuracy == 0.9
    assert metrics.num_examples == 10
    assert jt.evaluate(trees[0], records, config=registry.config_to_dict(MLP)) == metrics
    assert jt.evaluate(checkpoints[0], records) == metrics
    assert jt.evaluate(trees[0], records, config=MLP, batch_size=3, top_k=2).top_k == 2
    with pytest.raises(ConfigError, match="config="):
        jt.evaluate(trees[0], records)
    with pytest.raises(DataError, match="empty"):
        jt.evaluate(trees[0], Empty(trees[0]), config=MLP)


def test_evaluate_takes_several_models_samples_and_named_splits(trees, tmp_path):
    records = Records(trees[0])
    several = jt.evaluate(trees[:2], records, config=MLP)
    for one, params in zip(several, trees[:2], strict=True):
        alone = dataclasses.asdict(jt.evaluate(params, records, config=MLP))
        assert dataclasses.asdict(one) == pytest.approx(alone, rel=1e-5)
    sample = Sample("images", {"image": records.image, "label": records.label}, Forward(MLP))
    assert jt.evaluate(trees[0], sample) == several[0]
    assert jt.evaluate(trees[:1], sample) == several[:1]
    with pytest.raises(ConfigError, match="no model"):
        jt.evaluate([], sample)
    with pytest.raises(ConfigError, match="read-out already"):
        jt.evaluate(trees[0], sample, embeddings=np.ones((3, 3)))
    path = tmp_path / "images.npz"
    image = (records.image * 255).astype(np.uint8)
    np.savez(path, train_x=image, train_y=records.label, class_names=np.array(["a", "b", "c"]))
    parts = [jt.evaluate(trees[0], path, config=MLP, split=split).num_examples for split in ("train", "validation")]
    assert sum(parts) == 10
    with pytest.raises(DataError, match="test"):
        jt.evaluate(trees[0], path, config=MLP)
    with pytest.raises(UnknownNameError, match="validation"):
        jt.evaluate(trees[0], path, config=MLP, split="valid")


def test_symmetry_of_is_the_familys():
    spec = jt.symmetry_of(CONFIG)
    assert spec.is_exact
    assert {group.role for group in spec.groups.values()} == {"stream", "head", "qk", "vo", "hidden"}
    assert len(jt.symmetry_of(CONFIG, junctions="each", inside="joint").junctions) == 2 * CONFIG.depth + 1
    spec.check(init(0, CONFIG))


def test_task_vectors_by_hand(trees):
    source, finetuned, target = trees
    vector = jt.task_vector(source, finetuned)
    jax.tree.map(lambda got, a, b: np.testing.assert_array_equal(got, b - a), vector, source, finetuned)
    moved = jt.apply_task_vector(target, vector, 2.0)
    jax.tree.map(lambda got, base, v: np.testing.assert_array_equal(got, base + 2 * v), moved, target, vector)


def test_what_is_saved_comes_back(trees, tmp_path):
    model = jt.load(save(tmp_path / "model", trees[0]))
    assert_same(model.params, trees[0])
    assert model.config == registry.config_to_dict(MLP)
    again = jt.load(jt.save(tmp_path / "again", jt.transport(model, model, model).params, like=model))
    assert again.format == model.format
    assert_same(again.params, trees[0])


def test_the_lines_of_the_package_docstring_run(checkpoints, tmp_path, monkeypatch):
    program = inspect.cleandoc(jt.__doc__.partition("import jaxtune as jt\n")[2].partition("Nothing heavy")[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").rename(tmp_path / "old-tuned")
    exec(compile(program, "docstring", "exec"), {"jt": jt})
    assert_same(jt.load("new-tuned").params, jt.transport(*checkpoints).params)


def test_fresh_zeros_and_dead_gains_never_blow_up_what_is_written():
    """Zero biases say nothing about a match; nothing behind a gain of zero is read, so nothing is written there."""
    config = small_vit()
    source = noisy(fresh(config, 0), 1)
    tuned = noisy(source, 2)
    target = fresh(config, 3)  # every bias zero
    target["block_0"]["norm1"]["scale"] = np.zeros_like(target["block_0"]["norm1"]["scale"])
    largest = max(np.abs(leaf).max() for leaf in tree.flatten(target).values())
    for method in ("full", "auto"):
        carried = jt.transport(source, tuned, target, config=config, method=method).params
        assert max(np.abs(leaf).max() for leaf in tree.flatten(carried).values()) < 10 * largest


def test_two_equal_units_in_a_head_give_no_map_that_blows_up():
    config = small_vit()
    source, target = noisy(fresh(config, 0), 1), noisy(fresh(config, 1), 2)
    for params, name in ((source, "q"), (target, "k")):
        kernel = params["block_0"]["attn"][name]["kernel"]
        kernel[..., 1] = kernel[..., 0]
        params["block_0"]["attn"][name]["bias"][..., 1] = params["block_0"]["attn"][name]["bias"][..., 0]
    tuned = noisy(source, 3)
    step = max(np.abs(leaf).max() for leaf in tree.flatten(tree.task_vector(source, tuned)).values())
    moved = jt.transport(source, tuned, target, config=config, method="full").prepared.task_vector
    assert max(np.abs(leaf).max() for leaf in tree.flatten(moved).values()) < 100 * step


def test_auto_falls_back_where_weights_cannot_be_folded():
    config = small_vit(head_bias=False)
    source, target = noisy(fresh(config, 0), 1), noisy(fresh(config, 1), 2)
    source["final_norm"]["scale"][0] = 0.0  # before a head without a bias
    info = jt.transport(source, noisy(source, 3), target, config=config).prepared.info
    assert info["chosen"] == "permutation"
    assert "final_norm/scale" in info["full_refused"]


def test_half_precision_bases_are_judged_in_full(tmp_path):
    config = small_vit()
    trees = {"old": noisy(fresh(config, 0), 1), "new": noisy(fresh(config, 1), 2)}
    trees["tuned"] = noisy(trees["old"], 3)
    paths = {}
    for name, params in trees.items():
        half = tree.map_leaves(lambda _, leaf: leaf.astype(np.float16), params)
        paths[name] = jt.save(tmp_path / name, half, config=registry.config_to_dict(config))
    result = jt.transport(paths["old"], paths["tuned"], paths["new"], method="full")  # paths are models too
    assert result.equivalence.is_exact


def test_a_config_that_contradicts_the_checkpoints_is_refused(tmp_path):
    config, other = small_vit(), small_vit(activation="relu")
    path = jt.save(tmp_path / "model", fresh(config, 0), config=registry.config_to_dict(config))
    with pytest.raises(ConfigError, match="Leave config= out"):
        jt.align(path, path, config=other)


def test_what_is_no_tree_is_refused_by_what_it_is(tmp_path):
    config = small_vit()
    path = jt.save(tmp_path / "model", fresh(config, 0), config=registry.config_to_dict(config))
    model = jt.load(path)
    with pytest.raises(TreeMismatchError, match=r"take its \.params"):
        jt.task_vector(model, model)
    with pytest.raises(TreeMismatchError, match="w: expected an array, got list"):
        jt.task_vector({"w": [1.0]}, {"w": [2.0]})
    assert jt.symmetry_of(model.config).groups == jt.symmetry_of(config).groups
    assert "Carries what fine-tuning added" in jt.transport.__doc__
    with pytest.raises(ConfigError, match="max_sweeps"):
        jt.align(path, path, max_sweeps=0)


def small_vit(**changes):
    sizes = dict(image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=5, channels=1)
    return vit.Config(**{**sizes, **changes})


def fresh(config, seed):
    return tree.map_leaves(lambda _, leaf: np.array(leaf), registry.init(jax.random.key(seed), config))


def noisy(params, seed):
    draw = np.random.default_rng(seed)
    return tree.map_leaves(lambda _, x: (x + 0.05 * draw.normal(size=x.shape)).astype(np.float32), params)


def test_evaluate_takes_the_name_of_a_source():
    config = vit.Config(
        image_size=28, patch_size=14, width=8, depth=1, num_heads=1, mlp_width=8, num_outputs=10, channels=1
    )
    metrics = jt.evaluate(fresh(config, 0), "digits", config=config)
    assert metrics.num_examples == 359
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        jt.evaluate(fresh(config, 0), "nowhere.npz", config=config)
