"""`jaxtune merge` as a process: killed and called again, out of memory and disk, with others, on other formats."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

import jaxtune as jt
from jaxtune import checkpoint
from jaxtune.cli import main
from jaxtune.errors import JaxtuneError
from jaxtune.merging import merge_recipe, plan_recipe
from jaxtune.tree import flatten, unflatten

LAYERS = 6


def write_model(folder, seed, dtype=ml_dtypes.bfloat16, width=64, shards=3, format="folder"):
    """A made-up decoder of unknown family, in shards; every fine-tune is 5 % of a deviation away from seed 0."""
    base, draw = np.random.default_rng(0), np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, shape in {
            "q.weight": (width, width),
            "up.weight": (3 * width, width),
            "norm.weight": (width,),
        }.items():
            leaf = base.standard_normal(shape)
            tensors[f"layers.{layer}.{name}"] = (leaf + bool(seed) * 0.05 * draw.standard_normal(shape)).astype(dtype)
    config = {"model_type": "made_up", "num_hidden_layers": LAYERS}
    if format != "folder":
        checkpoint.save(folder, unflatten(tensors), config=config, format=format)
        return folder
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {f"model-{n + 1:05d}-of-{shards:05d}.safetensors": names[n::shards] for n in range(shards)}
    for file, part in files.items():
        header = checkpoint.safetensors.make_header({name: tensors[name] for name in part}, {"format": "pt"})
        header.write(folder / file, tensors.__getitem__)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_recipe(folder, method="ties", names=("a", "b"), base="base", **changes):
    recipe = {"merge_method": method, "models": [{"model": str(folder / name)} for name in names]}
    if base:
        recipe["base_model"] = str(folder / base)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return path


def write_case(folder, **how):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, seed, **how)
    return folder


def content_of(folder):
    """Bytes of what must be the same whenever and wherever a merge runs."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in ("report.json", "manifest.json"))
    return {name: (folder / name).read_bytes() for name in names}


def run_cli(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jaxtune.cli", *map(str, words)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_result_has_files_names_and_side_files_of_the_base(tmp_path):
    write_case(tmp_path)
    assert main(["merge", str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]) == 0
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    base, out = checkpoint.load(tmp_path / "base"), checkpoint.load(tmp_path / "out")
    assert [file.header.raw for file in out.layout.files] == [file.header.raw for file in base.layout.files]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["merge_method"] == "ties"
    assert len(report["inputs"]) == 3
    assert "ties" in (tmp_path / "out" / "README.md").read_text()


def test_checksums_in_the_report_are_those_of_zlib(tmp_path):
    import zlib

    write_case(tmp_path)
    report = merge_recipe(write_recipe(tmp_path), tmp_path / "out")
    for folder, files in [(tmp_path / "out", report["output"]["files"])] + [
        (Path(one["path"]), {name: file["crc32"] for name, file in one["files"].items()}) for one in report["inputs"]
    ]:
        assert files
        for name, crc in files.items():
            assert int(crc, 16) == zlib.crc32((folder / name).read_bytes())


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "model_stock", "karcher"])
def test_memory_threads_and_places_do_not_change_a_byte(method, tmp_path):
    write_case(tmp_path)
    recipe = write_recipe(tmp_path, method, seed=3)
    for name, limits in {"one": {"num_workers": 1}, "two": {"num_workers": 5}, "elsewhere/three": {}}.items():
        merge_recipe(recipe, tmp_path / name, **limits)
    one = content_of(tmp_path / "one")
    for name in ("two", "elsewhere/three"):
        other = content_of(tmp_path / name)
        assert {k: v for k, v in other.items() if k != "README.md"} == {
            k: v for k, v in one.items() if k != "README.md"
        }


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed, width=640, shards=4)
    recipe = write_recipe(tmp_path, "dare_ties", parameters={"density": 0.4})
    merge_recipe(recipe, tmp_path / "expected" / "out")
    command = [sys.executable, "-m", "jaxtune.cli", "merge", str(recipe), "--out", str(tmp_path / "out"), "--threads=1"]
    num_killed = 0
    for wait in (0.3, 0.45, 0.6, 0.8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            num_killed += 1
        process.wait()
        assert (tmp_path / "out").exists() or process.returncode != 0
        if (tmp_path / "out").exists():  # a kill can come behind the publication too
            break
    assert num_killed
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        process.returncode = 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected" / "out")
    assert process.returncode != 0 or not list(tmp_path.glob(".jaxtune-*.work"))


def test_files_that_were_finished_before_the_kill_are_kept(tmp_path, monkeypatch):
    write_case(tmp_path)
    recipe = write_recipe(tmp_path)
    merge_recipe(recipe, tmp_path / "expected" / "out")
    from jaxtune.stream import engine

    real, spans = engine.merge_on_host, []

    def stop_half_way(*args):
        spans.append(args)
        if len(spans) > 14:  # of 18 tensors, the first two files done
            raise KeyboardInterrupt
        return real(*args)

    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out", num_workers=1, merge_span=stop_half_way)
    (work,) = tmp_path.glob(".jaxtune-*.work")
    kept = sorted(path.name for path in work.rglob("*.safetensors"))
    assert kept
    assert all((work / "files-0" / f"{name}.done").exists() for name in kept)
    before = {name: (work / "files-0" / name).stat().st_ino for name in kept}
    merge_recipe(recipe, tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected" / "out")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == before


def test_a_full_disk_publishes_nothing(tmp_path, monkeypatch, capsys):
    write_case(tmp_path)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert main(["merge", str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".jaxtune-*"))


def test_too_little_memory_names_the_tensor_and_what_it_takes(tmp_path, capsys):
    write_case(tmp_path)
    assert main(["merge", str(write_recipe(tmp_path)), "--out", str(tmp_path / "out"), "--memory", "1MiB"]) == 2
    message = capsys.readouterr().err
    assert "too little: tensor 'layers." in message
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_headers_and_writes_nothing(tmp_path, capsys):
    write_case(tmp_path)
    assert main(["merge", str(write_recipe(tmp_path)), "--plan"]) == 0
    assert "18 ties" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "recipe.yml"]


def test_planning_takes_no_jax(tmp_path):
    write_case(tmp_path)
    words = f"import sys; from jaxtune.cli import main; main(['merge', {str(write_recipe(tmp_path))!r}, '--plan']); "
    done = subprocess.run(
        [sys.executable, "-c", words + "sys.exit('jax' in sys.modules)"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("format", ["npz", "orbax"])
def test_other_formats_are_read_and_written(format, tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed, dtype=np.float32, format=format)
        write_model(tmp_path / "files" / name, seed, dtype=np.float32)
    merge_recipe(write_recipe(tmp_path), tmp_path / "out")
    merge_recipe(write_recipe(tmp_path / "files"), tmp_path / "files" / "out")
    out = checkpoint.load(tmp_path / "out")
    assert out.format == format
    expected = flatten(checkpoint.load(tmp_path / "files" / "out").params)
    assert flatten(out.params).keys() == expected.keys()
    for name, leaf in flatten(out.params).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_eight_devices_give_the_bytes_of_one(tmp_path):
    write_case(tmp_path)
    recipe = write_recipe(tmp_path, "dare_ties", parameters={"density": 0.3})
    for name, count in {"one": 1, "eight": 8}.items():
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        done = run_cli("merge", recipe, "--out", tmp_path / name / "out", "--device", "jax", **flags)
        assert done.returncode == 0, done.stderr
    assert content_of(tmp_path / "eight" / "out") == content_of(tmp_path / "one" / "out")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_two_processes_give_the_bytes_of_one(method, tmp_path):
    write_case(tmp_path)
    recipe = write_recipe(tmp_path, method, parameters={"density": 0.5} if method == "ties" else {})
    merge_recipe(recipe, tmp_path / "alone" / "out")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "together" / "out"
    words = ["merge", recipe, "--out", out, "--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxtune.cli", *map(str, [*words, n])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )
        for n in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert content_of(out) == content_of(tmp_path / "alone" / "out")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=str)
@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "slerp", "ties", "breadcrumbs", "model_stock", "karcher"]
)
def test_values_are_those_of_float64_rounded_once(method, dtype, tmp_path):
    """But for ties and what is near to one: fewer than 2 in 10,000."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed, dtype=dtype, width=128)
        stored = checkpoint.load(tmp_path / name)
        wide = unflatten({path: np.asarray(leaf, np.float64) for path, leaf in flatten(stored.params).items()})
        checkpoint.save(tmp_path / "wide" / name, wide, config=stored.config)
    changes = {"names": ("a",), "parameters": {"t": 0.3}} if method == "slerp" else {}
    if method in ("ties", "breadcrumbs"):
        changes = {"parameters": {"density": 0.5, "weight": 0.7}}
    merge_recipe(write_recipe(tmp_path, method, **changes), tmp_path / "out")
    merge_recipe(write_recipe(tmp_path / "wide", method, **changes), tmp_path / "wide" / "out")
    found, exact = (flatten(checkpoint.load(folder / "out").params) for folder in (tmp_path, tmp_path / "wide"))
    num_other = sum(
        np.count_nonzero(checkpoint.rounding.round_to_stored(name, np.asarray(exact[name]), leaf.dtype) != leaf)
        for name, leaf in found.items()
    )
    assert num_other < 2e-4 * sum(leaf.size for leaf in found.values())


def test_merges_of_one_file_go_into_each_other(tmp_path):
    write_case(tmp_path)
    first = yaml.safe_load(write_recipe(tmp_path, "linear", base=None).read_text()) | {"name": "between"}
    second = yaml.safe_load(write_recipe(tmp_path, "task_arithmetic", names=("a",)).read_text())
    second["models"].append({"model": "between"})
    path = tmp_path / "both.yml"
    path.write_text(yaml.safe_dump_all([second, first], sort_keys=False))
    merge_recipe(path, tmp_path / "out")

    def load(name):
        return jt.load(tmp_path / name, config={}).params

    between = jt.merge([load("a"), load("b")])
    expected = flatten(jt.merge([load("a"), between], base=load("base"), method="task_arithmetic"))
    for name, leaf in flatten(load("out")).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_post_steps_come_behind_the_method(tmp_path):
    write_case(tmp_path, dtype=np.float32)
    merge_recipe(write_recipe(tmp_path, "task_arithmetic"), tmp_path / "plain")
    steps = [{"lines": {"alpha": 0.25}}]
    merge_recipe(write_recipe(tmp_path, "task_arithmetic", post=steps), tmp_path / "scaled")
    base, plain, scaled = (flatten(checkpoint.load(tmp_path / name).params) for name in ("base", "plain", "scaled"))
    for name, leaf in scaled.items():
        share = 0.25 + 0.75 * int(name.split(".")[1]) / (LAYERS - 1)
        np.testing.assert_allclose(leaf, base[name] + share * (plain[name] - base[name]), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_the_strength_of_lines_is_read_off_the_models(method, tmp_path):
    from jaxtune.merge.post_steps import balance_norms

    write_case(tmp_path, dtype=np.float32)
    given = {"ties": {"density": 0.3}}.get(method, {})
    merge_recipe(write_recipe(tmp_path, method, parameters=given), tmp_path / "plain")
    base, a, b, plain = (checkpoint.load(tmp_path / name).params for name in ("base", "a", "b", "plain"))
    alpha = balance_norms([a, b], plain, base)
    assert method == "ties" or alpha == pytest.approx(0.5)  # the sum itself: one over the number of tasks
    for n, strength in enumerate(("balanced", alpha)):
        for workers in (1, 2):
            recipe = write_recipe(tmp_path, method, parameters=given, post=[{"lines": {"alpha": strength}}])
            report = merge_recipe(recipe, tmp_path / f"out{n}{workers}", num_workers=workers)
            if strength == "balanced":
                (note,) = (note for note in report["notes"] if "balanced" in note)
                assert float(note.split("alpha ")[1].split(",")[0]) == pytest.approx(alpha, rel=1e-5)
    for name, data in content_of(tmp_path / "out01").items():
        assert name == "README.md" or (tmp_path / "out02" / name).read_bytes() == data
    found, expected = (flatten(checkpoint.load(tmp_path / name).params) for name in ("out01", "out12"))
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_model_from_another_base_is_carried_over_first(tmp_path, capsys):
    from hub_models import make_model, randomise, write_folder

    for seed, name in enumerate(("old", "old-tuned", "new")):
        model = make_model("llama")
        randomise(model, seed)
        write_folder(tmp_path / name, model)
    recipe = write_recipe(tmp_path, "task_arithmetic", names=(), base="new")
    values = yaml.safe_load(recipe.read_text())
    carried = {"base": str(tmp_path / "old"), "method": "identity"}
    values["models"] = [{"model": str(tmp_path / "old-tuned"), "transport": carried}]
    recipe.write_text(yaml.safe_dump(values))
    assert main(["merge", str(recipe), "--plan"]) == 0
    said = capsys.readouterr().out
    assert f"old-tuned, carried over from {tmp_path / 'old'}" in said
    assert "1 model is carried over first" in said
    merge_recipe(recipe, tmp_path / "out")
    expected = jt.transport(*(jt.load(tmp_path / name) for name in ("old", "old-tuned", "new")), method="identity")
    for name, leaf in flatten(jt.load(tmp_path / "out").params).items():
        np.testing.assert_allclose(leaf, flatten(expected.params)[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_refusals_name_everything_at_once(tmp_path):
    write_model(tmp_path / "base", 0)
    write_model(tmp_path / "a", 1, width=32)
    with pytest.raises(JaxtuneError, match="shapes differ in 18 tensors"):
        plan_recipe(write_recipe(tmp_path, names=("a",)))


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_data_beside_the_weights_comes_from_files(method, tmp_path):
    write_case(tmp_path, dtype=np.float32)
    draw, recipe = np.random.default_rng(5), yaml.safe_load(write_recipe(tmp_path, method, base=None).read_text())
    extras = []
    for entry in recipe["models"]:
        tensors = flatten(checkpoint.load(entry["model"]).params)
        if method == "fisher":
            data = {name: draw.random(leaf.shape, np.float32) for name, leaf in tensors.items() if "norm" not in name}
        else:
            inputs = {
                name: draw.standard_normal((100, leaf.shape[1])) for name, leaf in tensors.items() if leaf.ndim > 1
            }
            data = {name: (x.T @ x).astype(np.float32) for name, x in inputs.items()}
        entry["data"] = entry["model"] + "-data"
        checkpoint.save(entry["data"], data, config={}, format="safetensors")
        extras.append(data)
    path = tmp_path / "with_data.yml"
    path.write_text(yaml.safe_dump(recipe))
    merge_recipe(path, tmp_path / "out")
    from jaxtune.merge.arrays import merge_trees
    from jaxtune.merge.registry import METHODS

    trees = [checkpoint.load(entry["model"]).params for entry in recipe["models"]]
    expected = flatten(merge_trees(METHODS[method], trees, extras=extras, input_axis=-1))
    for name, leaf in flatten(checkpoint.load(tmp_path / "out").params).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    del recipe["models"][0]["data"]
    with pytest.raises(JaxtuneError, match=r"needs .*: name a file as 'data' beside"):
        plan_recipe(recipe)


@pytest.mark.parametrize("parameters", [{"density": 0.3, "scope": "model"}, {"density": [0.2, 0.9]}], ids=str)
def test_forked_processes_give_the_bytes_of_threads(parameters, tmp_path):
    """pytest has JAX loaded, so that merges inside it run in threads; those of the command line fork."""
    write_case(tmp_path)
    recipe = write_recipe(tmp_path, "ties", parameters=parameters)
    merge_recipe(recipe, tmp_path / "threads" / "out", num_workers=2)
    script = f"""
import sys
from jaxtune.cli import main
from jaxtune.stream import run
counts, real = [], run.run_forked
run.run_forked = lambda count, *rest: counts.append(count) or real(count, *rest)
words = ["merge", {str(recipe)!r}, "--out", {str(tmp_path / "forks" / "out")!r}, "--threads", "3", "--device", "host"]
sys.exit(main(words) or (3 if counts == [3] and "jax" not in sys.modules else 1))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert content_of(tmp_path / "forks" / "out") == content_of(tmp_path / "threads" / "out")


def test_a_plan_asks_for_headers_as_often_however_many_tensors_there_are(tmp_path, monkeypatch):
    """Anything else would be quadratic: 50,000 tensors would take hours."""
    real, asked = checkpoint.formats.Layout.tensors, []
    counting = property(lambda layout: asked.append(layout) or real.fget(layout))
    monkeypatch.setattr(checkpoint.formats.Layout, "tensors", counting)
    counts = []
    for layers in (2, 30):
        monkeypatch.setattr(sys.modules[__name__], "LAYERS", layers)
        write_case(tmp_path / str(layers))
        asked.clear()
        plan_recipe(write_recipe(tmp_path / str(layers)))
        counts.append(len(asked))
    assert counts[0] == counts[1]
