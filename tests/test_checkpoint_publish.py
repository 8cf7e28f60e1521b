"""Whole or not at all: every way to fail leaves the place as it was, and nothing of the user's is deleted."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxtune import checkpoint
from jaxtune.checkpoint import publish as publish_module
from jaxtune.checkpoint.publish import check_space, publish, refuse_existing
from jaxtune.errors import OutputError


def put(out, text="new", **options):
    with publish(out, **options) as folder:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "a.txt").write_text(text)


def fail(folder, error):
    """Gives up half-way."""
    (folder / "half").write_text("x")
    raise error


def read(out):
    return (out / "sub" / "a.txt").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_output_appears_at_the_end(tmp_path):
    out = tmp_path / "out"
    with publish(out) as folder:
        (folder / "a").write_text("x")
        assert not out.exists()
        assert folder.parent == out.parent  # a rename never crosses file systems
    assert names(tmp_path) == ["out"]
    assert names(out) == ["a", "manifest.json"]


def test_the_output_has_the_permissions_of_any_folder(tmp_path):
    put(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_whatever_ends_the_work_leaves_nothing(tmp_path, error):
    put(tmp_path / "kept", "old")
    for out, options in [(tmp_path / "deep" / "er" / "out", {}), (tmp_path / "kept", {"overwrite": True})]:
        with pytest.raises(error), publish(out, **options) as folder:
            fail(folder, error)
        assert names(tmp_path) == ["kept"]
    assert read(tmp_path / "kept") == "old"


def test_missing_parents_are_made(tmp_path):
    put(tmp_path / "a" / "b" / "out")
    assert read(tmp_path / "a" / "b" / "out") == "new"


CALLS = ["write_text", "write_text", *["fsync"] * 4, "rename", "rename", "fsync"]


@pytest.mark.parametrize("moment", range(len(CALLS)))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interrupt_at_any_system_call_leaves_old_or_new(tmp_path, monkeypatch, moment, after):
    """Ctrl-C before or after the n-th call that changes the folder; a signal cannot be aimed so well."""
    out = tmp_path / "out"
    put(out, "old")
    num_calls = 0

    def interrupted(function):
        def call(*arguments, **options):
            nonlocal num_calls
            num_calls += 1
            hit = num_calls == moment + 1
            if hit and not after:
                raise KeyboardInterrupt
            result = function(*arguments, **options)
            if hit:
                raise KeyboardInterrupt
            return result

        return call

    with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch:
        for owner, name in [(Path, "rename"), (os, "fsync"), (Path, "write_text")]:
            patch.setattr(owner, name, interrupted(getattr(owner, name)))
        put(out, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["manifest.json", "sub"]
    assert read(out) in ("old", "new")
    assert (out / "manifest.json").stat().st_size


def test_every_moment_of_the_last_test_exists(tmp_path, monkeypatch):
    """An overwrite makes these calls and no others: all is synced before any rename, the parent after."""
    put(tmp_path / "out")
    calls = []
    for owner, name in [(Path, "rename"), (os, "fsync"), (Path, "write_text")]:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    put(tmp_path / "out", overwrite=True)
    assert calls == CALLS


# --- what may be replaced


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    put(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"out: exists\. Name another folder, or pass --overwrite"):
        refuse_existing(tmp_path / "out")
    started = False
    with pytest.raises(OutputError, match="exists"), publish(tmp_path / "out"):
        started = True
    assert not started
    assert read(tmp_path / "out") == "old"


def test_a_former_output_is_replaced_whole(tmp_path):
    put(tmp_path / "out", "old")
    with publish(tmp_path / "out", overwrite=True) as folder:
        (folder / "b").write_text("x")
        assert read(tmp_path / "out") == "old"
    assert names(tmp_path / "out") == ["b", "manifest.json"]
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        put(tmp_path / "out")
    put(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == "new"


FOREIGN_MANIFESTS = [
    "",
    "[]",
    "{}",
    '{"jaxtune": "1"}',
    '{"files": ["thesis.txt"]}',
    '{"jaxtune": "1", "files": [3]}',
    '{"jaxtune": "1", "files": "thesis.txt"}',
]


@pytest.mark.parametrize("manifest", [None, *FOREIGN_MANIFESTS])
def test_a_folder_of_the_users_own_is_never_replaced(tmp_path, manifest):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    (out / "report.json").write_text("{}")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    with pytest.raises(OutputError, match=r"not a former output .*'report\.json', 'thesis\.txt'"):
        put(out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years"


def test_what_was_added_to_an_output_is_never_deleted(tmp_path):
    put(tmp_path / "out", "old")
    (tmp_path / "out" / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"files that no run of ours wrote: 'sub/notes\.txt'\. Move them"):
        put(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "sub" / "notes.txt").unlink()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="'link'"):
        put(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == "old"


def test_what_was_added_during_the_work_is_never_deleted(tmp_path):
    put(tmp_path / "out", "old")
    with pytest.raises(OutputError, match=r"notes\.txt"), publish(tmp_path / "out", overwrite=True):
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert read(tmp_path / "out") == "old"
    with pytest.raises(OutputError, match="exists"), publish(tmp_path / "other"):
        put(tmp_path / "other", "first")
    assert read(tmp_path / "other") == "first"
    assert names(tmp_path) == ["other", "out"]


def test_home_and_the_current_folder_are_never_replaced(tmp_path, monkeypatch):
    put(tmp_path / "out")
    (tmp_path / "out" / "deep").mkdir()
    for place in ("out", "out/deep"):
        with monkeypatch.context() as patch:
            patch.setenv("HOME", str(tmp_path / place))
            with pytest.raises(OutputError, match="is or contains"):
                put(tmp_path / "out", overwrite=True)
            patch.setenv("HOME", "/nowhere")
            patch.chdir(tmp_path / place)
            with pytest.raises(OutputError, match="is or contains"):
                put(tmp_path / "out", overwrite=True)


def test_links_and_files_are_no_outputs(tmp_path):
    put(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "file").write_text("x")
    for name, kind in [("link", "a symbolic link"), ("dangling", "a symbolic link"), ("file", "a file")]:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=f"{name}: is {kind}"):
                refuse_existing(tmp_path / name, overwrite=overwrite)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "not the name of a folder"),
        ("/", "not the name of a folder"),
        ("..", "not the name of a folder"),
        ("a\0b", "not the name of a folder"),
        ("model.safetensors", "an output is a folder"),
        ("model.npz", "an output is a folder"),
        ("n" * 300, "File name too long"),
        ("file/out", "Not a directory|is not a folder"),
    ],
    ids=lambda text: text[:20].replace("\0", "NUL"),
)
def test_impossible_places_are_refused_before_any_work(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=message):
        refuse_existing(place)
    assert names(tmp_path) == ["file"]


def test_no_permission_is_refused_before_any_work(tmp_path, monkeypatch):
    # Root may write anywhere, so the kernel's answer is given by hand.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError, match=f"no permission to write in {tmp_path}"):
        refuse_existing(tmp_path / "a" / "out")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="cannot be created: Permission denied"):
        put(tmp_path / "a" / "out")


def test_inputs_are_never_touched(tmp_path):
    inside = tmp_path / "models" / "base"
    inside.mkdir(parents=True)
    (inside / "model.safetensors").write_text("x")
    (tmp_path / "alias").symlink_to("models")
    for out in ("models/base", "models/base/out", "models/base/a/b", "models", "alias/base/out"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="overlaps the input"):
                refuse_existing(tmp_path / out, overwrite=overwrite, inputs=[tmp_path / "nowhere", inside])
    file = inside / "model.safetensors"
    assert refuse_existing(inside / "out", inputs=[file]) == inside / "out"  # beside a single file is fine
    with pytest.raises(OutputError, match="overlaps the input"):
        refuse_existing(inside, overwrite=True, inputs=[file])
    assert refuse_existing(tmp_path / "models" / "out", inputs=[inside]) == tmp_path / "models" / "out"


def test_a_former_output_that_cannot_be_deleted_is_named(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")
    real = shutil.rmtree

    def refuse(path, **options):
        if str(path).endswith(".old"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(OutputError, match=r"published, but the former output could not be removed .*Delete .*\.old"):
        put(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == "new"


# --- a full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_is_needed(tmp_path, code):
    put(tmp_path / "out", "old")
    message = f"{os.strerror(code)}: 12345 bytes are needed, .* are free"
    with (
        pytest.raises(OutputError, match=message),
        publish(tmp_path / "out", overwrite=True, num_bytes=12345) as folder,
    ):
        fail(folder, OSError(code, os.strerror(code)))
    assert names(tmp_path) == ["out"]
    assert read(tmp_path / "out") == "old"


def test_a_disk_that_fills_while_syncing_is_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="quota"):
        put(tmp_path / "out")
    assert names(tmp_path) == []


def test_other_errors_of_the_system_pass(tmp_path):
    with pytest.raises(ConnectionError), publish(tmp_path / "out"):
        raise ConnectionError(errno.ECONNRESET, "reset")


def test_too_little_space_is_seen_before_any_work(tmp_path):
    with pytest.raises(OutputError, match=f"not enough space: {2**62} bytes are needed"):
        check_space(tmp_path / "a" / "out", 2**62)
    with pytest.raises(OutputError, match="not enough space"), publish(tmp_path / "a" / "out", num_bytes=2**62):
        pytest.fail("work was started")
    assert names(tmp_path) == []


def test_a_file_over_the_size_limit_is_explained(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OutputError, match=r"File too large: .* bytes are needed"):
            checkpoint.save(tmp_path / "out", {"w": np.ones(1 << 16, np.float32)}, config={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("no permission to mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("format", ["folder", "npz"])
def test_a_disk_that_is_really_full_ends_in_one_message(small_disk, monkeypatch, format):
    checkpoint.save(small_disk / "out", {"w": np.ones(10, np.float32)}, config={}, format=format)
    params = {"w": np.ones(1 << 19, np.float32)}
    for expected in ("not enough space", "No space left on device"):
        with pytest.raises(OutputError, match=f"{expected}: 2097152 bytes are needed"):
            checkpoint.save(small_disk / "out", params, config={}, format=format, overwrite=True)
        assert names(small_disk) == ["out"]
        monkeypatch.setattr(publish_module, "check_space", lambda *_: None)  # as if it filled up meanwhile
    assert checkpoint.load(small_disk / "out").params["w"].size == 10


def test_orbax_on_a_full_disk(small_disk, monkeypatch):
    """In a process of its own: the tasks that orbax leaves behind warn when they are collected."""
    script = (
        "import numpy as np, sys\n"
        "from jaxtune import checkpoint\n"
        "from jaxtune.checkpoint import publish\n"
        "from jaxtune.errors import OutputError\n"
        "publish.check_space = lambda *_: None\n"
        "try:\n"
        "    params = {'w': np.random.RandomState(0).rand(1 << 18)}\n"
        "    checkpoint.save(sys.argv[1], params, config={}, format='orbax')\n"
        "except OutputError as error:\n"
        "    print('caught', error)\n"
    )
    done = run(script, small_disk / "out")
    assert "No space left on device: 2097152 bytes are needed" in done.stdout, done.stderr
    assert names(small_disk) == []


# --- killed from outside


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=60)


SLOW = """
import signal, sys, time
from jaxtune.checkpoint.publish import publish
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a command line does
with publish(sys.argv[1], overwrite=True) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def kill_in_the_middle(out, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=30) != 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_leaves_nothing(tmp_path, number):
    put(tmp_path / "old", "old")
    for out in ("old", "new"):
        kill_in_the_middle(tmp_path / out, number)
        assert names(tmp_path) == ["old"]
    assert read(tmp_path / "old") == "old"


def test_a_kill_leaves_one_hidden_folder_that_the_next_run_ignores(tmp_path):
    put(tmp_path / "out", "old")
    kill_in_the_middle(tmp_path / "out", signal.SIGKILL)
    (left,) = [name for name in names(tmp_path) if name != "out"]
    assert left.startswith(".jaxtune-")
    assert left.endswith(".tmp")
    assert read(tmp_path / "out") == "old"
    put(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == "new"


def test_of_two_runs_at_once_the_second_to_finish_is_told(tmp_path):
    with pytest.raises(OutputError, match="exists"), publish(tmp_path / "out"):
        put(tmp_path / "out", "first")
    assert read(tmp_path / "out") == "first"
