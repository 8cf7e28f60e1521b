"""The series of states that a training run can go on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxtune.errors import CheckpointError
from jaxtune.train.step import TrainState


class StateSeries:
    """Checkpoints of one run in one folder, a subfolder per step, written by orbax.

    A checkpoint appears whole or not at all; leftovers of a killed write are removed on opening. Saving waits
    until the bytes are on disk: the buffers of the state are donated to the next step.

    Args:
        folder: Made on opening; belongs to one run.
        num_kept: The newest that stay; older ones are deleted after each save.
    """

    def __init__(self, folder: Path, *, num_kept: int = 3):
        self.folder = folder
        training = ocp.training
        self._checkpointer = training.Checkpointer(
            folder.absolute(),
            preservation_policy=training.preservation_policies.LatestN(num_kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Writes a state and, beside it, `progress`: JSON-able facts about everything that is not an array."""
        self._checkpointer.save(int(state.step), state, force=True, custom_metadata=dict(progress))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, placed like `like`, and its `progress`.

        Args:
            like: A state of the same run; structure, shapes, dtypes and shardings are taken from it.

        Raises:
            CheckpointError: the checkpoint belongs to another model or optimiser. orbax would cast and pad.
        """
        saved = self._checkpointer.metadata()
        wanted, found = _leaves(like), _leaves(saved.metadata)
        if wanted != found:
            odd = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
            lines = [f"  {path}: wanted {wanted.get(path, 'none')}, saved {found.get(path, 'none')}" for path in odd]
            raise CheckpointError(
                f"{saved.path}: the saved state differs from this run's in {len(odd)} leaves:\n"
                + "\n".join(lines[:12])
                + "\nIt belongs to another model or optimiser. Choose another --workdir, or the config that began it."
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._checkpointer.load(saved.step, abstract), dict(saved.custom_metadata)

    def close(self) -> None:
        """Stops orbax's threads."""
        self._checkpointer.close()

    def __enter__(self) -> "StateSeries":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _leaves(state):
    """{path: "float32[3, 4]"}; the saved metadata holds lists and dicts where the state holds tuples and records."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    return found
