"""A killed run goes on where it stopped: finished searches and shards are taken, the result is the same to the byte."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_models import random_params

from jaxtune.align import weights
from jaxtune.align.memory import remember_searches
from jaxtune.checkpoint import safetensors
from jaxtune.checkpoint.formats import INDEX_NAME
from jaxtune.checkpoint.resume import count_kept, digest_of, finish_file, keep_work
from jaxtune.errors import OutputError
from jaxtune.models import decoder, registry
from jaxtune.tree import flatten

CONFIG = decoder.Config(vocab_size=40, width=16, depth=2, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24)

# The command line, with models of any size taken for large; after so many leaves have been written it kills itself.
PROGRAM = """
import os, signal, sys
from jaxtune import cli, loading
from jaxtune.checkpoint import safetensors
loading.LAZY_BYTES = 0
left = int(sys.argv.pop(1))
write = safetensors.Header.write
def counted(self, path, leaf_of):
    def leaf(name):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return leaf_of(name)
    print("writing", path.name, file=sys.stderr)
    write(self, path, leaf)
safetensors.Header.write = counted
sys.exit(cli.main())
"""


def write_sharded(folder, params):
    """Two shards and their index, as large checkpoints come."""
    folder.mkdir()
    leaves, index = flatten(params), {}
    names = sorted(leaves)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        infos = {path: np.asarray(leaves[path]) for path in part}
        safetensors.make_header(infos).write(folder / name, infos.__getitem__)
        index |= dict.fromkeys(part, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(registry.config_to_dict(CONFIG)))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write_sharded(tmp_path / name, random_params(CONFIG, seed=seed, dtype=np.float32))
        for seed, name in enumerate(("old", "tuned", "new"))
    ]


def run(folders, out, *, kill_after=0):
    roles = zip(("--source", "--finetuned", "--target"), folders, strict=True)
    words = [str(word) for pair in roles for word in pair]
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(kill_after),
        "transport",
        *words,
        "--method=permutation",
        "--no-verify",
    ]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_a_killed_transport_goes_on_and_ends_the_same(folders, tmp_path):
    whole = run(folders, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    num_leaves = len(flatten(random_params(CONFIG)))
    killed = run(folders, tmp_path / "out", kill_after=num_leaves // 2 + 3)  # within the second shard
    assert killed.returncode < 0
    assert not (tmp_path / "out").exists()
    (kept,) = tmp_path.glob(".jaxtune-*.work")
    assert [place.name for place in (kept / "shards").iterdir() if place.suffix != ".part"] == [
        "model-00001-of-00002.safetensors"
    ]
    assert len(list((kept / "searches").iterdir())) == 1
    again = run(folders, tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert "model-00001" not in again.stderr
    assert "model-00002" in again.stderr
    for place in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / place.name).read_bytes() == place.read_bytes()
    assert not list(tmp_path.glob(".jaxtune-*"))


def test_a_search_is_remembered_by_key_options_and_symmetry(tmp_path, monkeypatch):
    spec = registry.symmetry_of(CONFIG)
    target, source = (random_params(CONFIG, seed=seed, dtype=np.float32) for seed in (0, 1))
    keys = jax.random.split(jax.random.key(0))
    with remember_searches(tmp_path):
        first = weights.match_weights(keys[0], spec, target, source)
        monkeypatch.setattr(weights, "make_problem", lambda *_, **__: pytest.fail("searched again"))
        again = weights.match_weights(keys[0], spec, target, source)
        with pytest.raises(pytest.fail.Exception, match="searched again"):
            weights.match_weights(keys[1], spec, target, source)
        with pytest.raises(pytest.fail.Exception, match="searched again"):
            weights.match_weights(keys[0], spec, target, source, max_sweeps=3)
    for name, value in first.element.items():
        np.testing.assert_array_equal(again.element[name], value)
        assert again.element[name].dtype == np.asarray(value).dtype
    assert {**vars(again), "element": None} == {**vars(first), "element": None}
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        weights.match_weights(keys[0], spec, target, source)  # outside of the block


def end_with(error, out, *, finished=True):
    """A block of work that ends with an error."""
    with keep_work(out, "key") as work:
        if finished:
            finish_file(work / "piece", lambda place: place.write_text("done"))
        else:
            (work / "piece.part").write_text("half")
        raise error


def test_work_is_kept_for_an_interrupt_and_for_nothing_else(tmp_path, capsys):
    for error, stays in ((KeyboardInterrupt, True), (ValueError, False)):
        with pytest.raises(error):
            end_with(error, tmp_path / "out")
        assert [place.name for place in tmp_path.iterdir()] == [".jaxtune-key.work"] * stays
    assert "the same command goes on" in capsys.readouterr().err


def test_an_interrupt_before_anything_is_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        end_with(KeyboardInterrupt, tmp_path / "out", finished=False)
    assert not list(tmp_path.iterdir())


def test_work_is_gone_when_it_is_done(tmp_path):
    with keep_work(tmp_path / "out", "key") as work:
        finish_file(work / "piece", lambda place: place.write_text("done"))
    assert not work.exists()


def test_half_a_file_is_written_again(tmp_path):
    (tmp_path / "piece.part").write_text("half of someth")
    finish_file(tmp_path / "piece", lambda place: place.write_text("done"))
    finish_file(tmp_path / "piece", lambda place: pytest.fail("written twice"))
    assert (tmp_path / "piece").read_text() == "done"
    assert count_kept(tmp_path) == 1


def test_two_processes_do_not_make_the_same_output(tmp_path):
    with keep_work(tmp_path / "out", "key"):
        with pytest.raises(OutputError, match="another process"), keep_work(tmp_path / "out", "key"):
            pass
        with keep_work(tmp_path / "out", "other"):
            pass


def test_a_digest_is_that_of_the_values():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
