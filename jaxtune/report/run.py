"""What one run of a command did: inputs, choices, evidence, cost; as `report.json` holds it."""

import contextlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.report.waiting import Waiting
from jaxtune.version import __version__


@dataclass
class Run:
    """Collects the parts of a report while a command works.

    Attributes:
        command: Name of the command.
        timings: Stage -> seconds, in order.
    """

    command: str
    timings: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def stage(self, name: str, how_far: Callable[[], str] = str) -> Iterator[None]:
        """Times a part of the work, and shows on stderr that it goes on, with what `how_far` says of it."""
        began = time.perf_counter()
        try:
            with Waiting(lambda: f"jaxtune {self.command}: {name} {how_far()}".rstrip()):
                yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - began

    def cost(self) -> dict[str, Any]:
        """Seconds by stage and in all, and the most memory this process ever held."""
        total = time.perf_counter() - self._began
        return {
            "seconds": {name: round(value, 3) for name, value in {**self.timings, "total": total}.items()},
            "peak_memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    if os.path.exists("/proc/self/status"):  # on Linux the call below begins with what the parent held at its start
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_host() -> dict[str, Any]:
    """Versions and devices."""
    import jax

    devices = jax.devices()
    return {
        "jaxtune": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
    }


def to_json(values: Any) -> str:
    """Strict JSON: numpy numbers as numbers, NaN and Inf as words, keys in the order given."""
    return json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
