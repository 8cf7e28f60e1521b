"""Several processes at one merge: who is who, and where they wait for each other."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; alone by default.

    Attributes:
        index, count: Of `jax.distributed`.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that makes and names files."""
        return self.index == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def wait_for(self, name: str) -> None:
        """Returns when all have come here."""
        if not self.is_alone:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def share(self, values: Any) -> Any:
        """What the first process says, as plain JSON, in all of them."""
        if self.is_alone:
            return values
        import numpy as np
        from jax.experimental import multihost_utils

        data = np.frombuffer(json.dumps(values).encode(), np.uint8) if self.is_first else np.zeros(0, np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        padded = np.zeros(length, np.uint8)
        padded[: len(data)] = data
        return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


ALONE = Processes()


def join_processes(coordinator: str | None, index: int | None, count: int | None) -> Processes:
    """Starts `jax.distributed`; on clusters that JAX knows (cloud TPU, Slurm) without any argument.

    Args:
        coordinator: host:port of the first process.
        index, count: Of this process, and of all.
    """
    import jax

    jax.distributed.initialize(coordinator_address=coordinator, num_processes=count, process_id=index)
    return Processes(jax.process_index(), jax.process_count())
