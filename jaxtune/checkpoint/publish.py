"""An output appears whole or not at all, and nothing that is not ours is ever deleted for it.

The work goes into a temporary folder beside the output, on the same file system, and is renamed into place at the
end. A process that is killed outright leaves at most that folder, `.jaxtune-<random>.tmp`; later runs ignore it.
Killed between the two renames of an overwrite, it leaves the former output whole as `.jaxtune-<random>.old`.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxtune.checkpoint.manifest import list_files, read_own_files, seal_manifest
from jaxtune.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def publish(
    out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = (), num_bytes: int = 0
) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an exception.

    Whatever ends the block otherwise, KeyboardInterrupt and SystemExit included, the folder is removed and an
    existing `out` is as it was. Missing parents of `out` are created, and removed again on failure. manifest.json
    is completed (or written, if the block wrote none) with the list of all files.

    Args:
        out: The folder to publish.
        overwrite: Whether a former output of ours at `out` may be replaced.
        inputs: Checkpoints the result is made from.
        num_bytes: What the output will take, if known: checked before, named in the message after.

    Yields:
        The temporary folder.

    Raises:
        OutputError: as `refuse_existing` and `check_space`; the disk is full, over quota or the file too big; the
            place cannot be written; something else appeared at `out` meanwhile.
    """
    out = refuse_existing(out, overwrite=overwrite, inputs=inputs)
    check_space(out, num_bytes)
    token = secrets.token_hex(8)
    staging, former = (out.parent / f".jaxtune-{token}.{end}" for end in ("tmp", "old"))
    made: list[Path] = []
    try:
        with explain_full_disk(out, num_bytes):
            _make_staging(out, staging, made)
            yield staging
            seal_manifest(staging)
            _sync(staging)
            _swap(out, staging, former, overwrite)
    finally:
        # Judged by what is on disk, not by how far we came: an interrupt can fall between a rename and the next line.
        if former.exists() and not os.path.lexists(out):
            former.rename(out)
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: the output is in it
                folder.rmdir()
        if former.exists():
            _remove(out, former)


def refuse_existing(out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Refuses an output that could not be published, before any work is done.

    With `overwrite`, only an empty folder or a former output is replaced: every file in it must stand in the
    manifest.json that we put there. So no folder of the user's own can be deleted, nor a file added to an output.

    Args:
        out: The folder to publish.
        overwrite: Whether a former output may be replaced.
        inputs: Checkpoints the result is made from; `out` may not be one of them, nor contain nor lie in one.

    Returns:
        `out` as an absolute path.

    Raises:
        OutputError: exists, is not a folder, is not ours, overlaps an input, or cannot be created.
    """
    out = Path(out)
    if not out.name or "\0" in str(out) or out.name == "..":
        raise OutputError(f"{str(out)!r}: not the name of a folder to create. Name a new folder.")
    out = Path(os.path.abspath(out))
    if out.suffix.lower() in (".safetensors", ".npz"):
        raise OutputError(
            f"{out}: an output is a folder, which holds a file of the target's name. Drop {out.suffix!r}."
        )
    try:
        exists = _exists(out)
        _refuse_overlap(out, inputs)
        if exists and (out.is_symlink() or not out.is_dir()):
            kind = "a symbolic link" if out.is_symlink() else "a file"
            raise OutputError(f"{out}: is {kind}, expected a folder or nothing. Name another folder.")
        if exists and not overwrite:
            raise OutputError(f"{out}: exists. Name another folder, or pass --overwrite to replace a former output.")
        if exists:
            _refuse_foreign(out)
        parent = _nearest_folder(out)
        if not parent.is_dir():
            raise OutputError(f"{out}: {parent} is not a folder. Name another place.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{out}: no permission to write in {parent}. Name another place.")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{out}: cannot be used: {error.strerror}. Name another folder.") from error
    return out


def check_space(out: str | Path, num_bytes: int) -> None:
    """Checks that the file system of `out` has `num_bytes` left; a quota shows only when it is met.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    out = Path(os.path.abspath(out))
    free = shutil.disk_usage(_nearest_folder(out)).free
    if num_bytes > free:
        raise OutputError(_describe_full(out, "not enough space", num_bytes, free))


def _make_staging(out, staging, made):
    """The temporary folder and the missing parents, which are noted innermost first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        made += missing
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        staging.mkdir()
    except OSError as error:
        if error.errno in FULL:
            raise
        raise OutputError(f"{out}: cannot be created: {error.strerror}. Name another place.") from error


def _swap(out, staging, former, overwrite):
    """Puts the finished folder into place; a former output steps aside first."""
    try:
        if os.path.lexists(out):
            refuse_existing(out, overwrite=overwrite)  # again: hours may have passed
            out.rename(former)
        staging.rename(out)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{out}: the finished result could not be put in place: {error.strerror}.") from error
    _sync_folder(out.parent)


def _remove(out, former):
    """Deletes the former output, which now lies aside."""
    try:
        shutil.rmtree(former)
    except OSError as error:
        raise OutputError(
            f"{out}: published, but the former output could not be removed ({error.strerror}). Delete {former}."
        ) from error


def _refuse_overlap(out, inputs):
    """`out` must not be, contain or lie in an input; compared by device and inode, so links hide nothing."""
    above_out = _identities(out)
    for path in inputs:
        path = Path(os.path.abspath(path))
        if not path.exists():
            continue
        above_input = _identities(path)
        if above_input[0] in above_out or (out.exists() and above_out[0] in above_input):
            raise OutputError(f"{out}: overlaps the input {path}. Name a folder that is apart from every input.")


def _refuse_foreign(out):
    """Only what a former run wrote may be replaced."""
    for place in (Path.cwd(), Path(os.path.expanduser("~"))):
        if place.exists() and _identities(out)[0] in _identities(place):
            raise OutputError(f"{out}: is or contains {place} and is never overwritten. Name another folder.")
    present = list_files(out)
    own = read_own_files(out)
    if present and own is None:
        shown = ", ".join(repr(name) for name in present[:3])
        raise OutputError(f"{out}: not a former output (no manifest.json of ours): {shown}, … Name another folder.")
    strangers = [name for name in present if name not in own] if present else []
    if strangers:
        shown = ", ".join(repr(name) for name in strangers[:3]) + (", …" if len(strangers) > 3 else "")
        raise OutputError(f"{out}: holds files that no run of ours wrote: {shown}. Move them, or name another folder.")


def _identities(path):
    """Device and inode of a path and of every folder above it, innermost first; of those that exist."""
    real = Path(os.path.realpath(path))
    states = [place.stat() for place in (real, *real.parents) if place.exists()]
    return [(state.st_dev, state.st_ino) for state in states]


def _exists(out):
    """Like `os.path.lexists`, which however takes a name that is too long for one that is free."""
    try:
        out.lstat()
    except FileNotFoundError:
        return False
    return True


def _nearest_folder(out):
    """The first thing above `out` that exists."""
    return next(folder for folder in out.parents if os.path.lexists(folder))


@contextlib.contextmanager
def explain_full_disk(out: Path, num_bytes: int) -> Iterator[None]:
    """Turns the errors of a full disk into one that says what is needed and what is free.

    Raises:
        OutputError: in their place.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(_nearest_folder(out)).free
        raise OutputError(_describe_full(out, os.strerror(error.errno), num_bytes, free)) from error


def _describe_full(out, reason, num_bytes, free):
    needed = f"{num_bytes} bytes are needed, " if num_bytes else ""
    return (
        f"{out}: {reason}: {needed}{free} are free on the file system of {out.parent}. "
        "Nothing was published. Free some space, or name a folder on another disk."
    )


def _sync(folder):
    """Everything in the folder reaches the disk before its name does."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(root)


def _sync_folder(folder):
    """Some network file systems cannot sync a folder; their rename is as durable as it gets."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
