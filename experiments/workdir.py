"""The folder of a run: who owns it, and the results that end up in it.

In it, in the order in which they appear:

    manifest.json   config, overrides, commit, versions, seeds, hashes of the parents
    checkpoints/    states to go on from
    metrics.csv     numbers over time; events.out.tfevents.* hold the same for TensorBoard
    model/          config.json, model.safetensors, manifest.json
    metrics.json    numbers of the finished model; a run that has them is over
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint import write_manifest
from jaxtune.checkpoint.manifest import MANIFEST_NAME
from jaxtune.checkpoint.publish import publish
from jaxtune.errors import ConfigError, OutputError
from jaxtune.tree import MAX_LINES

CHECKPOINTS_NAME, RESULT_NAME = "checkpoints", "metrics.json"


class Workdir:
    """One run's folder, made or found.

    A folder in which another config, or another parent, has got as far as a checkpoint is refused: going on in it
    would mix two runs.

    Args:
        path: The folder.
        config: The resolved config as JSON holds it.
        overrides: As said on the command line.
        parents: Role -> what `checkpoint.manifest.describe_checkpoint` says of it.
        seeds: Name -> seed.

    Raises:
        ConfigError: the folder belongs to another run.
        OutputError: it cannot be made.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        overrides: Sequence[str],
        parents: Mapping[str, Mapping[str, Any]],
        seeds: Mapping[str, int],
    ):
        self.path = path
        self._facts = {"config": config, "overrides": overrides, "parents": parents, "seeds": seeds}
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any((path / CHECKPOINTS_NAME).glob("*")):
                if not (path / MANIFEST_NAME).exists():
                    raise OutputError(
                        f"{path} holds checkpoints and no {MANIFEST_NAME}, so nothing says which run they are of. "
                        "Name another --workdir."
                    )
                self._check_owner(json.loads((path / MANIFEST_NAME).read_text()))
            else:
                write_manifest(path, **self._facts)
        except OSError as error:
            raise OutputError(f"{path}: cannot be used as --workdir: {error.strerror}. Name another.") from error

    def read_result(self) -> dict[str, Any] | None:
        """What `write_result` wrote; None while the run is unfinished."""
        path = self.path / RESULT_NAME
        return json.loads(path.read_text()) if path.exists() else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        self.publish_text(RESULT_NAME, json.dumps(result, indent=2, allow_nan=False) + "\n")

    def keep_measured(self, file: Path, rows: Any) -> None:
        """Keeps one part of what an experiment measures, so that the next run finds it; `file` lies in the folder."""
        self.publish_text(str(file.relative_to(self.path)), json.dumps(rows, indent=1, allow_nan=False))

    def publish_text(self, name: str, text: str) -> None:
        """Writes the file `name`, whole or not at all; folders on the way are made."""
        temporary = self.path / f"{name}.tmp"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, self.path / name)

    def publish(self, name: str, write: Callable[[Path], None], *, inputs: Iterable[Path] = ()) -> None:
        """Makes the subfolder `name` out of what `write(folder)` leaves, with a manifest, whole or not at all."""
        # One may be there already: of this very run, killed before it wrote its result.
        with publish(self.path / name, overwrite=True, inputs=inputs) as folder:
            write(folder)
            write_manifest(folder, **self._facts)

    def _check_owner(self, manifest):
        names = ("config", "parents")
        ours = _flatten(json.loads(json.dumps({name: self._facts[name] for name in names})))
        theirs = _flatten({name: manifest.get(name) for name in names})
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if odd:
            lines = [f"  {name}: began with {theirs.get(name)!r}, now {ours.get(name)!r}" for name in odd]
            more = [f"  ... and {len(odd) - MAX_LINES} more"] if len(odd) > MAX_LINES else []
            raise ConfigError(
                f"{self.path} holds a run that differs in {len(odd)} places:\n"
                + "\n".join(lines[:MAX_LINES] + more)
                + "\nGive this run a --workdir of its own, or repeat the config that the other one began with."
            )


def _flatten(values, prefix=""):
    """Nested dicts -> {"a.b": value}; an empty dict is a value."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in _flatten(value, f"{prefix}.{key}".lstrip(".")).items()
    }
