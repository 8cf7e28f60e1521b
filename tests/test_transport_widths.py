"""A fine-tune carried to a wider base, in Python and on the command line, and refused by all that cannot."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from small_models import random_params

import jaxtune as jt
from jaxtune import tree
from jaxtune.cli import main
from jaxtune.errors import ConfigError, TreeMismatchError
from jaxtune.gradients import predict
from jaxtune.models import mlp, registry, vit
from jaxtune.moments import gather_pairs
from jaxtune.polish import polish_transport
from jaxtune.rng import named_key
from jaxtune.sample import example_divergences
from jaxtune.sampling import for_sizes, make_sample
from jaxtune.transport.prepared import Prepared, apply_transport
from jaxtune.transport.registry import METHODS, prepare_transport

NARROW = vit.Config(
    image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_width=20, num_outputs=16, channels=1
)
WIDE = replace(NARROW, width=24, num_heads=3, mlp_width=32)
ABLE = [name for name, method in METHODS.items() if method.widths_may_differ]
UNABLE = [name for name in METHODS if name not in ABLE]


def trees_of(target_config=WIDE):
    source, noise = (random_params(NARROW, seed=seed, dtype=np.float32) for seed in (0, 1))
    finetuned = tree.map_leaves(lambda _, x, y: x + np.float32(0.1) * y, source, noise)
    return {"source": source, "finetuned": finetuned, "target": random_params(target_config, seed=2, dtype=np.float32)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Role -> path of a checkpoint; the target is the wider one."""
    folder = tmp_path_factory.mktemp("widths")
    configs = {"source": NARROW, "finetuned": NARROW, "target": WIDE}
    return {
        role: str(jt.save(folder / role, params, config=registry.config_to_dict(configs[role])))
        for role, params in trees_of().items()
    }


@pytest.fixture(scope="module")
def sample():
    return make_sample(WIDE, "digits", num_examples=16, size=16)


@pytest.fixture(scope="module")
def carried(models, sample):
    return jt.transport(**models, method="theseus", sample=sample)


def test_the_wider_base_gets_what_the_method_itself_makes(carried, sample):
    both = for_sizes(sample, NARROW, WIDE)
    networks = trees_of()
    symmetry = partial(registry.symmetry_of, WIDE)
    key = named_key(jax.random.key(0), "transport")
    prepared = prepare_transport(key, symmetry, *networks.values(), method="theseus", sample=both)
    jax.tree.map(np.testing.assert_array_equal, carried.params, apply_transport(prepared, networks["target"]))
    assert carried.evidence is None  # there is no element between widths
    assert carried.equivalence is None
    changed = {path for path, leaf in tree.flatten(prepared.task_vector).items() if np.any(leaf)}
    assert changed == {path for path in tree.flatten(networks["target"]) if "norm" not in path} - {
        "class_token",
        "position",
    }


def test_it_does_not_matter_for_which_of_the_two_the_sample_was_made(carried, models):
    other = jt.transport(**models, method="theseus", sample=make_sample(NARROW, "digits", num_examples=16, size=16))
    jax.tree.map(np.testing.assert_array_equal, carried.params, other.params)


def test_bare_trees_take_a_sample_that_knows_both(carried, sample):
    call = partial(jt.transport, **trees_of(), config=WIDE, method="theseus")
    found = call(sample=for_sizes(sample, NARROW, WIDE))
    jax.tree.map(np.testing.assert_array_equal, carried.params, found.params)
    with pytest.raises(TreeMismatchError, match=r"config float32\[3, 8\], params float32\[2, 8\]"):
        call(sample=sample)


def test_the_command_writes_the_targets_own_layout(carried, models, tmp_path, capsys):
    roles = [word for role, path in models.items() for word in (f"--{role}", path)]
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (8, 16, 16, 1), dtype=np.uint8), np.arange(8, dtype=np.int32)
    np.savez(tmp_path / "dots.npz", train_x=images, train_y=labels, test_x=images, test_y=labels)
    data = ["--data", "digits", "--data-option", "size=16", "--samples", "16"]
    data += ["--evaluate", str(tmp_path / "dots.npz")]
    code = main(["transport", *roles, *data, "--method", "theseus", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 0, said.err
    written, target = jt.load(tmp_path / "out"), jt.load(models["target"])
    assert written.config == target.config
    tree.check_same({"written": written.params, "target": target.params}, dtypes=True)
    jax.tree.map(np.testing.assert_array_equal, written.params, carried.params)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evidence"] is None
    assert [row["model"] for row in report["measured"]][2:] == ["new base", "new base with the fine-tune"]


def test_a_plan_is_made_between_widths_too(models, capsys):
    roles = [word for role, path in models.items() for word in (f"--{role}", path)]
    assert main(["transport", *roles, "--method", "theseus", "--plan"]) == 0
    assert "The three fit together" in capsys.readouterr().out


def test_a_polish_has_a_teacher_of_another_width():
    narrow, wide = (mlp.Config(image_shape=(16, 16, 1), widths=(n,), num_outputs=10) for n in (6, 9))
    teacher, student = random_params(narrow, dtype=np.float32), random_params(wide, seed=1, dtype=np.float32)
    sample = for_sizes(make_sample(wide, "digits", num_examples=16, size=16), narrow)
    prepared = Prepared(tree.task_vector(student, student), registry.symmetry_of(wide))
    options = {"polish": "distill", "num_steps": 5, "learning_rate": 1e-3, "held_out": 0.0}
    polished, _ = polish_transport(jax.random.key(0), prepared, student, teacher, student, sample, **options)
    said, before, after = (predict(sample, params) for params in (teacher, student, polished))
    before, after = (np.mean(example_divergences(logits, said, {})) for logits in (before, after))
    assert after < before


@pytest.mark.parametrize("method", UNABLE)
def test_methods_of_one_width_say_so(method, models, sample):
    with pytest.raises(ConfigError, match=r"(?s)differ in width:.*mlp_width: source 20, target 32.*theseus, bico"):
        jt.transport(**models, method=method, sample=sample)


def test_the_command_says_so_before_it_looks_for_examples(models, tmp_path, capsys):
    roles = [word for role, path in models.items() for word in (f"--{role}", path)]
    assert main(["transport", *roles, "--out", str(tmp_path / "out")]) == 2
    assert "--method theseus --data DATA" in capsys.readouterr().err


def test_what_is_more_than_another_width_is_refused(models, sample, tmp_path):
    deep = replace(WIDE, depth=2)
    path = jt.save(tmp_path / "deep", random_params(deep, dtype=np.float32), config=registry.config_to_dict(deep))
    with pytest.raises(ConfigError, match="depth: source 1, target 2"):
        jt.transport(**models | {"target": path}, method="theseus", sample=sample)
    with pytest.raises(TreeMismatchError, match="block_1"):
        jt.transport(**trees_of(deep), config=deep, method="theseus", sample=sample)
    networks = trees_of(deep).values()
    with pytest.raises(TreeMismatchError, match="not in depth"):
        prepare_transport(
            jax.random.key(0),
            partial(registry.symmetry_of, deep),
            *networks,
            method="theseus",
            sample=for_sizes(make_sample(deep, "digits", num_examples=16, size=16), NARROW),
        )
    with pytest.raises(TreeMismatchError, match="source and finetuned differ in 23 leaves"):
        jt.transport(**models | {"finetuned": models["target"]}, method="theseus", sample=sample)
    perceptron = mlp.Config(image_shape=(16, 16, 1), widths=(8,), num_outputs=16)
    config = registry.config_to_dict(perceptron)
    path = jt.save(tmp_path / "mlp", random_params(perceptron, dtype=np.float32), config=config)
    with pytest.raises(ConfigError, match="model_type"):
        jt.transport(**models | {"target": path}, method="theseus", sample=sample)


def test_networks_that_cut_images_into_other_tokens_do_not_meet(sample):
    """What stands behind the class token would meet alone, and most of the fine-tune would be lost unsaid."""
    fine = replace(WIDE, patch_size=4)
    networks = trees_of(fine)
    with pytest.raises(ConfigError, match="reads 4 rows in one network and 16 in the other"):
        prepare_transport(
            jax.random.key(0),
            partial(registry.symmetry_of, fine),
            *networks.values(),
            method="theseus",
            sample=for_sizes(sample, NARROW, fine),
        )


def test_a_sample_of_ones_own_cannot_be_asked_by_two_widths(sample):
    own = replace(sample, forward=lambda params, batch: batch["image"])
    with pytest.raises(ConfigError, match="only samples of `sampling`"):
        for_sizes(own, NARROW)
    assert for_sizes(replace(sample, record=None), NARROW).record is None
    with pytest.raises(ConfigError, match="recorded"):
        gather_pairs(*list(trees_of().values())[1:], for_sizes(replace(sample, record=None), NARROW))
