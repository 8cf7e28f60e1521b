"""manifest.json beside each result: what made it, from what, and which files are its own."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.files import open_regular, parse_object, read_small
from jaxtune.checkpoint.formats import Checkpoint
from jaxtune.checkpoint.shards import INDEX_NAME
from jaxtune.errors import CheckpointError
from jaxtune.version import __version__

MANIFEST_NAME = "manifest.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_dtypes", "numpy", "scipy")


def write_manifest(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    parents: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Mapping[str, int] | None = None,
) -> None:
    """Writes manifest.json into a folder that is about to be published.

    Args:
        folder: What `publish` yields; `publish` adds the list of files when it is done.
        config: The resolved config of the run, as JSON can hold it.
        overrides: What was said on the command line, as said.
        parents: Role ("source", "target", …) -> what `describe_checkpoint` says of it.
        seeds: Name -> seed.

    Raises:
        OSError: the disk refused.
    """
    content = {
        **_describe_origin(),
        "config": config,
        "overrides": list(overrides),
        "parents": dict(parents or {}),
        "seeds": dict(seeds or {}),
    }
    _write(folder, content)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Path, format, hashes and what is left out, for the manifest and the report alike: the files are read once.

    Raises:
        CheckpointError: a file can no longer be read.
    """
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "sha256": hash_checkpoint(checkpoint),
        "left_out": checkpoint.left_out,
    }


def hash_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of every file that a checkpoint consists of or carries along.

    Config and index are hashed as they were loaded; the others are read, a block at a time.

    Returns:
        File name, relative to the checkpoint's folder -> hexadecimal digest.

    Raises:
        CheckpointError: a file can no longer be read.
    """
    layout, path = checkpoint.layout, checkpoint.path
    places = checkpoint.side_files | checkpoint.read_from
    for file in layout.files if not checkpoint.read_from else ():
        if checkpoint.format == "orbax":
            root = path / file.name if (path / file.name).is_dir() else path
            places |= {f"{file.name}/{name}": root / name for name in list_files(root)}
        else:
            places[file.name] = path / file.name if path.is_dir() else path
    hashes = {name: hash_file(place) for name, place in places.items()}
    for name, data in ((layout.config_name, layout.config), (INDEX_NAME, layout.index)):
        if data is not None and not (checkpoint.read_from and name == INDEX_NAME):
            hashes[name] = hashlib.sha256(data).hexdigest()
    return dict(sorted(hashes.items()))


def list_files(folder: Path) -> list[str]:
    """Every entry under a folder that is not a folder, sorted, by relative name; links are not followed."""
    found = []
    for root, subfolders, names in os.walk(folder):
        links = [name for name in subfolders if os.path.islink(os.path.join(root, name))]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(found)


def seal_manifest(folder: Path) -> None:
    """Adds the list of all files to the manifest, which it writes if nobody did: `--overwrite` deletes these alone."""
    try:
        content = parse_object((folder / MANIFEST_NAME).read_bytes(), MANIFEST_NAME)
    except FileNotFoundError:
        content = _describe_origin()
    _write(folder, content | {"files": [name for name in list_files(folder) if name != MANIFEST_NAME]})


def read_own_files(folder: Path) -> frozenset[str] | None:
    """Files that a former run of ours put into `folder`, by its manifest; `None` without a manifest of ours."""
    try:
        content = parse_object(read_small(folder / MANIFEST_NAME), MANIFEST_NAME)
    except CheckpointError:
        return None
    listed = content.get("files")
    if "jaxtune" not in content or not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return None
    return frozenset((*listed, MANIFEST_NAME))


def _describe_origin():
    """Program, time, code and machine."""
    return {
        "jaxtune": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _find_commit(),
        "versions": {"python": platform.python_version(), **{name: _find_version(name) for name in PACKAGES}},
        "device": _find_device(),
    }


def _find_commit():
    """Commit of the code that runs and whether it was edited since; `None` for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(here), *arguments],
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
            check=True,
            text=True,
        ).stdout.strip()

    try:
        # Installed in a virtual environment inside someone's repository, that repository's commit would say nothing.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "is_edited": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _find_version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_device():
    """Kind and number of the devices; `None` where JAX was not used, which would start it for a line of text."""
    if "jax" not in sys.modules:
        return None
    import jax

    try:
        devices = jax.devices()
    except RuntimeError:
        return None
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}


def hash_file(path):
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder, content):
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
