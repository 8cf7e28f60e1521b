"""The program `jaxtune`: every command on every format, and what it says to bad input."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch_files
from safetensors import safe_open

import jaxtune as jt
from jaxtune import symmetry, tree
from jaxtune.cli import main, prepare_process
from jaxtune.commands import transport_plan
from jaxtune.models import mlp, registry, vit
from jaxtune.symmetry import canonical
from jaxtune.transport.registry import without_data

CONFIG = vit.Config(
    image_size=8, patch_size=4, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=10, channels=1
)


def save(path, params, config=CONFIG, **options):
    return str(jt.save(path, params, config=registry.config_to_dict(config), **options))


def init(seed, config=CONFIG):
    return jax.tree.map(np.asarray, registry.init(jax.random.key(seed), config))


def tune(params, seed=7):
    draw = np.random.default_rng(seed)
    return tree.map_leaves(lambda _, x: x + (0.02 * draw.normal(size=x.shape)).astype(np.float32), params)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of an old base, its fine-tune, an unrelated base, and a reordered copy of the old one."""
    folder = tmp_path_factory.mktemp("models")
    old = init(0)
    element = symmetry.random(jax.random.key(5), registry.symmetry_of(CONFIG))
    trees = {
        "old": old,
        "tuned": tune(old),
        "other": init(1),
        "copy": symmetry.apply(registry.symmetry_of(CONFIG), element, old),
    }
    return {name: save(folder / name, params) for name, params in trees.items()}


@pytest.fixture
def run(capsys):
    """Runs the program in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def transport(models, out, **changes):
    paths = {"source": models["old"], "finetuned": models["tuned"], "target": models["other"], **changes}
    return ["transport", *(word for role, path in paths.items() for word in (f"--{role}", path)), "--out", out]


def test_a_fine_tune_arrives_on_a_reordered_copy(models, run, tmp_path):
    code, out, err = run(*transport(models, tmp_path / "out", target=models["copy"]))
    assert code == 0, err
    assert "lineage of the bases" in out
    assert re.search(r"expected share of the fine-tuning gain +97 to 100 %", out)
    assert "the same function" in out
    carried, tuned = jt.load(tmp_path / "out"), jt.load(models["tuned"])
    images = {"image": np.random.default_rng(0).random((4, 8, 8, 1), np.float32)}
    outputs = [registry.apply(CONFIG, model.params, images) for model in (carried, tuned)]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evidence"]["lineage"]["verdict"] == "same"
    assert report["equivalence"]["is_exact"]
    assert report["info"]["chosen"] == "permutation"
    assert set(report["inputs"]) == {"source", "finetuned", "target"}
    assert all(row["sha256"] for row in report["inputs"].values())
    assert report["cost"]["peak_memory_bytes"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "block_1/mlp" in page


@pytest.mark.parametrize("method", ["identity", "orthogonal_shift", "permutation", "transfusion", "full"])
def test_every_method_publishes_the_targets_layout_and_repeats_itself(method, models, run, tmp_path):
    for name in ("first", "second"):
        assert run(*transport(models, tmp_path / name), "--method", method)[0] == 0
    first, second, target = (jt.load(path) for path in (tmp_path / "first", tmp_path / "second", models["other"]))
    for checkpoint in (first, second):
        assert list(checkpoint.layout.tensors) == list(target.layout.tensors)
        assert checkpoint.config == target.config
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)
    moved = tree.task_vector(target.params, first.params)
    assert any(np.abs(leaf).max() > 1e-4 for leaf in tree.flatten(moved).values())


def test_a_base_stored_by_torch_comes_back_as_safetensors(models, run, tmp_path):
    """The same as from safetensors, and said; here written without torch."""
    leaves = tree.flatten(jt.load(models["other"]).params)
    opcodes, storages = {}, {}
    for key, (path, leaf) in enumerate(leaves.items()):
        strides = np.array(leaf.strides) // leaf.itemsize
        opcodes[path] = torch_files.tensor(leaf.shape, map(int, strides), key=str(key), count=leaf.size)
        storages[str(key)] = leaf.tobytes()
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(torch_files.archive(torch_files.state(**opcodes), storages))
    shutil.copy(f"{models['other']}/config.json", folder)
    code, out, err = run(*transport(models, tmp_path / "out", target=folder))
    assert code == 0, err
    assert "stored as pickles, which are never written" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "stored as model.safetensors" in report["inputs"]["target"]["left_out"]["pytorch_model.bin"]
    assert run(*transport(models, tmp_path / "plain"))[0] == 0
    carried, wanted = (tree.flatten(jt.load(tmp_path / name).params) for name in ("out", "plain"))
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(carried[path], leaf)


@pytest.mark.parametrize("form", ["safetensors", "npz", "orbax"])
def test_every_format_comes_back_as_it_was(form, models, run, tmp_path):
    stored = {name: save(tmp_path / name, jt.load(models[name]).params, format=form) for name in models}
    if form == "safetensors":  # the single file itself
        stored = {name: f"{path}/model.safetensors" for name, path in stored.items()}
    assert run(*transport(stored, tmp_path / "out"), "--method", "identity")[0] == 0
    result = jt.load(tmp_path / "out" / "model.safetensors" if form == "safetensors" else tmp_path / "out")
    assert result.format == jt.load(stored["other"]).format
    old, tuned, other = (jt.load(models[name]).params for name in ("old", "tuned", "other"))
    expected = tree.apply_task_vector(other, tree.task_vector(old, tuned))
    jax.tree.map(np.testing.assert_array_equal, result.params, expected)


def test_low_precision_targets_keep_their_dtype(models, run, tmp_path):
    half = tree.map_leaves(lambda _, leaf: leaf.astype(np.float16), jt.load(models["other"]).params)
    target = save(tmp_path / "half", half)
    assert run(*transport(models, tmp_path / "out", target=target), "--method", "identity")[0] == 0
    assert {leaf.dtype.name for leaf in tree.flatten(jt.load(tmp_path / "out").params).values()} == {"float16"}


def test_measured_on_data_the_table_shows_every_model(models, run, tmp_path):
    draw = np.random.default_rng(0)
    data = {f"{split}_x": draw.random((20, 8, 8), np.float32) for split in ("train", "test")}
    data |= {f"{split}_y": np.arange(20) % 10 for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **data, class_names=np.array([str(n) for n in range(10)]))
    code, out, _ = run(*transport(models, tmp_path / "out"), "--evaluate", tmp_path / "data.npz")
    assert code == 0
    assert "task accuracy" in out
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["measured"]
    assert [row["model"] for row in rows] == [
        "old base", "old base, fine-tuned", "new base", "new base with the fine-tune",
    ]  # fmt: skip
    images = {"image": data["test_x"][..., None]}
    logits = registry.apply(CONFIG, jt.load(models["tuned"]).params, images)
    assert rows[1]["task"] == pytest.approx(np.mean(np.argmax(logits, -1) == data["test_y"]))


def test_a_plan_reads_and_writes_nothing(models, run, tmp_path):
    code, out, _ = run(*transport(models, tmp_path / "out"), "--plan")
    assert code == 0
    assert "peak memory" in out
    assert not (tmp_path / "out").exists()


def test_a_plan_knows_the_memory_of_every_method_that_needs_no_data():
    assert set(transport_plan.COPIES) == set(without_data())


@pytest.mark.parametrize("method", ["full", "transfusion"])
def test_a_plan_refuses_a_method_that_the_family_has_no_symmetry_for(method, run, tmp_path):
    config = mlp.Config(image_shape=(4, 4, 1), widths=(8,), num_outputs=3)
    models = {name: save(tmp_path / name, init(0, config), config) for name in ("old", "tuned", "other")}
    code, _, err = run(*transport(models, tmp_path / "out"), "--plan", "--method", method)
    assert code == 2
    assert "permutation" in err


def test_align_writes_the_element_and_the_moved_source(models, run, tmp_path):
    code, out, _ = run("align", "--source", models["old"], "--target", models["copy"], "--out", tmp_path / "out")
    assert code == 0
    assert "the same function" in out
    moved, target = jt.load(tmp_path / "out"), jt.load(models["copy"])
    jax.tree.map(np.testing.assert_array_equal, moved.params, target.params)
    assert (tmp_path / "out" / "alignment.safetensors").exists()
    code, out, _ = run(
        "align", "--source", models["old"], "--target", models["other"], "--out", tmp_path / "paper",
        "--method", "transfusion", "-o", "order=forward", "-o", "repair_stop=false",
    )  # fmt: skip
    assert code == 0
    assert not (tmp_path / "paper" / "model.safetensors").exists()
    report = json.loads((tmp_path / "paper" / "report.json").read_text())
    assert (report["is_exact"], report["equivalence"]["is_exact"]) == (False, False)
    assert report["method"]["options"]["repair_stop"] is False


def test_align_by_the_whole_group_writes_rotations_and_the_moved_source(models, run, tmp_path):
    """What is written computes what the source does, and the element moves the folded source onto it."""
    for target in ("copy", "other"):
        place = tmp_path / target
        code, out, _ = run(
            "align", "--source", models["old"], "--target", models[target], "--out", place, "--method", "full"
        )  # fmt: skip
        assert code == 0
        assert "every gain" in out
        report = json.loads((place / "report.json").read_text())
        assert report["groups"]["stream"]["kind"] == "centred_orthogonal"
        assert report["equivalence"]["is_exact"]
        assert report["evidence"]["residual"]["found"] < report["evidence"]["residual"]["identity"]
        moved, source = jt.load(place), jt.load(models["old"])
        spec = registry.symmetry_of(registry.config_from_dict(source.config))
        with safe_open(place / "alignment.safetensors", "np") as file:
            element = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        folded = symmetry.apply(canonical.canonical_spec(spec), element, canonical.fold(spec, source.params))
        again = tree.flatten(canonical.fold(spec, moved.params))
        for path, leaf in tree.flatten(folded).items():
            np.testing.assert_allclose(again[path], leaf, atol=2e-5, err_msg=path)
    copy = json.loads((tmp_path / "copy" / "report.json").read_text())
    assert copy["evidence"]["residual"]["found"] < 1e-4


def test_align_by_examples_says_which_and_refuses_what_nothing_reads(models, run, tmp_path):
    align = ["align", "--source", models["old"], "--target", models["copy"], "--out", tmp_path / "out"]
    code, _, err = run(*align, "--method", "activations")
    assert code == 2
    assert "--method activations needs unlabelled inputs: give --data DATA" in err
    assert "does not look at examples" in run(*align, "--data", "digits")[2]
    assert "--samples goes with --data" in run(*align, "--samples", "9")[2]
    draw = np.random.default_rng(0)
    data = {f"{split}_x": draw.integers(0, 256, (40, 8, 8), dtype=np.uint8) for split in ("train", "test")}
    data |= {f"{split}_y": np.arange(40, dtype=np.int32) % 10 for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **data, class_names=np.array([str(n) for n in range(10)]))
    code, _, err = run(*align, "--method", "activations", "--data", tmp_path / "data.npz", "--samples", "16")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["examples"]["num_examples"] == 16
    assert report["equivalence"]["is_exact"]


@pytest.mark.parametrize(("weight", "end"), [("0", "old"), ("1", "tuned")])
def test_the_ends_of_a_line_are_the_models_themselves(weight, end, models, run, tmp_path):
    arguments = ["interpolate", models["old"], models["tuned"], "--weight", weight, "--out", tmp_path / "out"]
    assert run(*arguments)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, jt.load(models[end]).params)


def test_inspect_says_what_moves_with_what(models, run):
    code, out, _ = run("inspect", models["old"])
    assert code == 0
    assert "block_{0..1}/attn/head" in out
    facts = json.loads(run("inspect", models["old"], "--json")[1])
    assert facts["family"] == "jaxtune_vit"
    assert facts["num_parameters"] == tree.count_parameters(jt.load(models["old"]).params)
    leaf = next(row for row in facts["leaves"] if row["path"] == "block_0/attn/q/kernel")
    assert leaf["axes"] == ["stream", "block_0/attn/head", "block_0/attn/qk"]
    assert facts["not_understood"] is None


def test_inspect_shows_a_family_that_it_does_not_know(models, run, tmp_path):
    params = jt.load(models["old"]).params
    path = jt.save(tmp_path / "mamba", params, config={"model_type": "mamba", "hidden_size": 16})
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "unknown model_type 'mamba'" in out


def test_methods_lists_every_option(run):
    facts = json.loads(run("methods", "--json")[1])
    assert {"auto", "identity", "orthogonal_shift", "permutation", "transfusion", "full"} <= set(facts["transport"])
    assert facts["transport"]["permutation"]["options"]["head_cost"] == "exact"
    assert "repair_stop=True" in run("methods")[1]


def bad_inputs(models, folder):
    """Name -> (arguments changed, words that the message must hold)."""
    wide = vit.Config(**{**vars(CONFIG), "num_heads": 4})
    deep = vit.Config(**{**vars(CONFIG), "depth": 3})
    old = jt.load(models["old"]).params

    def nan(path, leaf):
        return np.full_like(leaf, np.nan) if path == "position" else leaf

    with open(f"{models['old']}/model.safetensors", "rb") as file:
        whole = file.read()
    (folder / "empty").mkdir()
    for name, content in (
        ("truncated", whole[:-100]),
        ("header", b"\xff" * 8 + whole[8:]),
        ("json", whole[:8] + b"!" * 99),
    ):
        (folder / name).mkdir()
        shutil.copy(f"{models['old']}/config.json", folder / name)
        (folder / name / "model.safetensors").write_bytes(content)
    fewer = tree.unflatten({p: x for p, x in tree.flatten(old).items() if p != "class_token"})
    integers = tree.map_leaves(lambda p, x: x.astype(np.int32) if p == "position" else x, old)
    return {
        "missing": ({"target": folder / "nowhere"}, ["nowhere", "no such file"]),
        "empty": ({"target": folder / "empty"}, ["empty", "Expected one of"]),
        "truncated": ({"target": folder / "truncated"}, ["truncated/model.safetensors"]),
        "header": ({"source": folder / "header"}, ["header/model.safetensors"]),
        "json": ({"finetuned": folder / "json"}, ["json/model.safetensors"]),
        "heads": ({"target": save(folder / "heads", init(1, wide), wide)}, ["num_heads: source 2, target 4"]),
        "depth": ({"target": save(folder / "depth", init(1, deep), deep)}, ["depth: source 2, target 3"]),
        "keys": ({"finetuned": save(folder / "keys", fewer)}, ["class_token", "only in source"]),
        "dtype": ({"finetuned": save(folder / "dtype", integers)}, ["position", "int32"]),
        "nan": ({"target": save(folder / "nan", tree.map_leaves(nan, old))}, ["target holds NaN", "position"]),
        "pickle": ({"target": make(folder / "model.bin")}, ["pickle"]),
    }


def make(path):
    path.write_bytes(b"\x80\x04.")
    return path


BAD = ["missing", "empty", "truncated", "header", "json", "heads", "depth", "keys", "dtype", "nan", "pickle"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_message_and_leaves_nothing(name, models, run, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    changes, words = bad_inputs(models, inputs)[name]
    (tmp_path / "work").mkdir()
    code, out, err = run(*transport(models, tmp_path / "work" / "out", **changes))
    assert (code, out) == (2, "")
    assert err.startswith("jaxtune transport: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "permutatoin"], "Did you mean 'permutation'"),
        (["-o", "speed=9"], "unknown option of transport method 'auto' 'speed'"),
        (["--method", "permutation", "-o", "head_cost"], "NAME=VALUE"),
        (["--method", "permutation", "-o", "max_sweeps=many"], "expected a int"),
        (["--method", "permutation", "-o", "head_cost=nearest"], "Known: circuit, exact, spectral"),
        (["--scale", "nan"], "finite"),
        (["--evaluate", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_bad_arguments_list_the_known_ones(arguments, words, models, run, tmp_path):
    code, _, err = run(*transport(models, tmp_path / "out"), *arguments)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_and_replaced_on_request(models, run, tmp_path):
    arguments = [*transport(models, tmp_path / "out"), "--method", "identity"]
    assert run(*arguments)[0] == 0
    code, _, err = run(*arguments)
    assert code == 2
    assert "exists" in err
    assert run(*arguments, "--overwrite", "--scale", "0")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, jt.load(models["other"]).params)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    code, _, err = run(*transport(models, precious), "--overwrite")
    assert code == 2
    assert (precious / "letter.txt").read_text() == "dear"


def test_a_full_disk_publishes_nothing(models, run, tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "work").mkdir()
    code, _, err = run(*transport(models, tmp_path / "work" / "out"), "--method", "identity")
    monkeypatch.setattr(os, "fsync", real)
    assert code == 2
    assert "disk" in err.lower() or "space" in err.lower()
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_leaves_nothing_half_written(number, tmp_path):
    """Sent in the middle of an alignment that takes much longer than the two seconds after which it is announced."""
    large = vit.Config(**{**vars(CONFIG), "width": 192, "depth": 4, "num_heads": 6, "mlp_width": 768})
    old = init(0, large)
    trees = {"old": old, "tuned": tune(old), "other": init(1, large)}
    paths = {name: save(tmp_path / name, params, large) for name, params in trees.items()}
    (tmp_path / "work").mkdir()
    arguments = [*transport(paths, tmp_path / "work" / "out"), "--method", "full", "-o", "tolerance=0.0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxtune", *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    announced = process.stderr.readline()
    assert announced.startswith(b"jaxtune transport: transport")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"interrupted; nothing was written" in err
    assert os.listdir(tmp_path / "work") == []


def test_a_fault_of_ours_exits_with_one_and_a_traceback(models, run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.commands.inspect._describe", lambda model: 1 / 0)
    code, _, err = run("inspect", models["old"])
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "fault of jaxtune" in err


def test_help_needs_no_jax():
    code = "import sys; from jaxtune.cli import build_parser; build_parser().format_help(); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_stream_may_have_one_order_per_junction_on_request(models, run, tmp_path):
    align = ["align", "--source", models["old"], "--target", models["other"], "-o", "junctions=each"]
    assert run(*align, "--out", tmp_path / "align")[0] == 0
    report = json.loads((tmp_path / "align" / "report.json").read_text())
    assert not report["is_exact"]
    assert report["evidence"]["coherence"] < 0.9
    assert {f"stream_{n}" for n in range(5)} <= set(report["groups"])
    arguments = [*transport(models, tmp_path / "out"), "--method", "permutation", "-o", "junctions=each"]
    assert run(*arguments)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert not report["equivalence"]["is_exact"]
    assert run(*arguments[:-1], "junctions=some", "--overwrite")[0] == 2


def test_the_process_is_prepared_where_the_system_lets_it_be(monkeypatch):
    asked = []

    class Libc:
        def mallopt(self, name, value):
            asked.append((name, value))

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setattr("jaxtune.cli.ctypes.CDLL", lambda name: Libc())
    prepare_process()
    assert asked == [(-8, 1), (-3, 8 * 2**20)]
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"  # what is set stays
    monkeypatch.setattr("jaxtune.cli.ctypes.CDLL", lambda name: object())  # no such call
    prepare_process()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setattr("jaxtune.cli.ctypes.CDLL", lambda name: pytest.fail("it is set already"))
    prepare_process()
