"""Work that outlives a killed process: finished shards and searches wait beside the output for the same command.

The folder `.jaxtune-<key>.work` lies beside the output, `key` being a digest of everything that decides the result. A
later run with the same key takes what it finds there and does the rest; a run with another key never looks at it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.errors import OutputError

LOCK_NAME = "lock"


def digest_of(values: Any) -> str:
    """32 hexadecimal digits that stand for plain values: the same for the same values, in any process."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def keep_work(out: str | Path, key: str) -> Iterator[Path]:
    """A folder for what is finished on the way to `out`.

    Removed when the block ends, except by an interrupt: then, and when the process is killed outright, it stays, and
    the same command goes on from there.

    Args:
        out: The folder that will be published.
        key: Of `digest_of`.

    Raises:
        OutputError: another process is at the same work, or the place cannot be written.
    """
    work = work_folder(out, key)
    out = Path(os.path.abspath(out))
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK_NAME, "w")  # noqa: SIM115 - held for as long as the block runs
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be prepared in {out.parent}: {error.strerror}. Name another place."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"{out}: another process is making this very output (it holds {work / LOCK_NAME}). Wait for it to end."
            ) from error
        try:
            yield work
        except (KeyboardInterrupt, SystemExit):
            if count_kept(work):
                print(f"Interrupted. What is finished is kept in {work}: the same command goes on.", file=sys.stderr)
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.close()


def work_folder(out: str | Path, key: str) -> Path:
    """Where the work for `out` lies, whether it is there or not."""
    return Path(os.path.abspath(out)).parent / f".jaxtune-{key}.work"


def count_kept(work: Path) -> int:
    """How many finished pieces lie in a work folder."""
    return sum(
        1 for place in work.rglob("*") if place.is_file() and place.name != LOCK_NAME and place.suffix != ".part"
    )


def finish_file(place: Path, write: Any) -> None:
    """Makes a file by `write(path)` unless a former run finished it; whatever is there under its name is whole."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.part")
    part.unlink(missing_ok=True)
    write(part)
    part.rename(place)
