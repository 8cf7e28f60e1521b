"""The manifest tells what made a result, and never stands in its way."""

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune import checkpoint
from jaxtune.checkpoint import manifest
from jaxtune.checkpoint.publish import publish
from jaxtune.errors import CheckpointError
from jaxtune.version import __version__

PARAMS = {"w": np.ones((2, 2), np.float32)}


def published(out, **options):
    with publish(out) as folder:
        (folder / "a.txt").write_text("x")
        checkpoint.write_manifest(folder, **options)
    return json.loads((out / "manifest.json").read_text())


def test_it_says_what_was_run(tmp_path):
    parent = checkpoint.load(checkpoint.save(tmp_path / "parent", PARAMS, config={"a": 1}))
    before = datetime.now(UTC).replace(microsecond=0)
    found = published(
        tmp_path / "out",
        config={"scale": 0.5},
        overrides=["--config.scale=0.5"],
        parents={"source": checkpoint.describe_checkpoint(parent)},
        seeds={"align": 3},
    )
    assert found["config"] == {"scale": 0.5}
    assert found["overrides"] == ["--config.scale=0.5"]
    assert found["seeds"] == {"align": 3}
    assert found["jaxtune"] == __version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": len(jax.devices())}
    assert before <= datetime.fromisoformat(found["created"]) <= datetime.now(UTC)
    assert found["parents"]["source"]["path"] == str(tmp_path / "parent")
    assert found["parents"]["source"]["sha256"].keys() == {"config.json", "model.safetensors"}
    assert found["files"] == ["a.txt"]


def test_every_publication_has_one(tmp_path):
    with publish(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert found["files"] == ["sub/a"]
    assert found["jaxtune"] == __version__


@pytest.mark.parametrize("format", ["folder", "npz", "orbax"])
def test_hashes_are_those_of_the_files(tmp_path, format):
    out = checkpoint.save(tmp_path / "a", PARAMS, config={"a": 1}, format=format)
    (out / "tokenizer.txt").write_text("side")
    hashes = checkpoint.hash_checkpoint(checkpoint.load(out))
    expected = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert hashes == expected
    assert list(hashes) == sorted(hashes)


def test_hashes_of_single_files_and_bare_orbax_folders(tmp_path):
    out = checkpoint.save(tmp_path / "a", PARAMS, config={"a": 1})
    whole = checkpoint.hash_checkpoint(checkpoint.load(out))
    assert checkpoint.hash_checkpoint(checkpoint.load(out / "model.safetensors")) == whole
    out = checkpoint.save(tmp_path / "b", PARAMS, config={"a": 1}, format="orbax")
    whole = checkpoint.hash_checkpoint(checkpoint.load(out))
    assert checkpoint.hash_checkpoint(checkpoint.load(out / "params")) == whole


def test_one_changed_byte_changes_one_hash(tmp_path):
    out = checkpoint.save(tmp_path / "a", PARAMS, config={"a": 1})
    loaded = checkpoint.load(out)
    before = checkpoint.hash_checkpoint(loaded)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    after = checkpoint.hash_checkpoint(loaded)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.hash_checkpoint(loaded)


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_code_or_none(tmp_path, monkeypatch):
    module = tmp_path / "repository" / "manifest.py"
    module.parent.mkdir()
    module.write_text("1")
    monkeypatch.setattr(manifest, "__file__", str(module))
    assert published(tmp_path / "a")["git"] is None  # no repository
    git(module.parent, "init", "-q")
    assert published(tmp_path / "b")["git"] is None  # a repository, but not of this code
    git(module.parent, "add", ".")
    git(module.parent, "commit", "-q", "-m", "x")
    commit = git(module.parent, "rev-parse", "HEAD")
    assert published(tmp_path / "c")["git"] == {"commit": commit, "is_edited": False}
    module.write_text("2")
    assert published(tmp_path / "d")["git"] == {"commit": commit, "is_edited": True}
    monkeypatch.setenv("PATH", "")
    assert published(tmp_path / "e")["git"] is None  # no git


def test_jax_is_not_started_for_it(tmp_path):
    script = (
        "import sys, numpy as np\n"
        "from jaxtune import checkpoint\n"
        "out = checkpoint.save(sys.argv[1], {'w': np.ones(2)}, config={})\n"
        "assert checkpoint.load(out).params['w'].size == 2\n"
        "print([name for name in ('jax', 'orbax', 'safetensors') if name in sys.modules])\n"
        "print((out / 'manifest.json').read_text())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True)
    modules, text = done.stdout.split("\n", 1)
    assert modules == "[]"
    assert json.loads(text)["device"] is None
