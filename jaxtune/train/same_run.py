"""Whether kept states are of this very run: of a call with the same arguments, and with the same settings."""

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxtune.errors import ConfigError
from jaxtune.sample import Sample

STATES = ("series", "states")  # arguments that say where states are kept; one series, or one for each part
NUM_SHOWN = 16  # numbers or names of one argument that are kept as they are; of more a digest

Function = TypeVar("Function", bound=Callable[..., Any])


def check_settings(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Checks that states are of a run with the settings of this one.

    Args:
        settings: JSON-able, of this run; what is handed to `StateSeries.save` as progress.
        saved: What `StateSeries.restore` gave.

    Raises:
        ConfigError: they are of another run; names what differs.
    """
    odd = [name for name in {**settings, **saved} if settings.get(name) != saved.get(name)]
    if odd:
        theirs, ours = (", ".join(f"{name} {one.get(name)}" for name in odd) for one in (saved, settings))
        raise ConfigError(f"the saved states are of a run with {theirs}; this one has {ours}.")


def own_states(*beside: str) -> Callable[[Function], Function]:
    """Marks a function whose states are of its arguments: a call with others refuses what it finds in the series.

    Beside every state stand all arguments: numbers and names as they are, of networks and samples a digest of what they
    hold, of functions the name. The arguments and nothing that is computed of them, since on some devices the same sum
    has other last bits in the next process. A marked function that another one calls leaves the series to the outer.

    Args:
        *beside: Arguments that change no state, such as what is only reported.
    """

    def mark(function):
        signature = inspect.signature(function)
        places = [name for name in STATES if name in signature.parameters]

        @functools.wraps(function)
        def call(*args, **kwargs):
            given = [name for name in places if kwargs.get(name) is not None]
            if not given:
                return function(*args, **kwargs)

            @functools.cache
            def facts():
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                told = {name: value for name, value in bound.arguments.items() if name not in (*places, *beside)}
                return {name: describe(value) for name, value in told.items()}

            return function(*args, **kwargs | {name: _own(kwargs[name], facts) for name in given})

        return call

    return mark


def describe(value: Any) -> Any:
    """What tells a value from another, JSON-able: numbers, names and a few of them as they are, else a digest."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else repr(value)
    if isinstance(value, list | tuple) and len(value) <= NUM_SHOWN:
        return [describe(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dict(_fields(value))
        if all(one is None or isinstance(one, bool | int | float | str) for one in fields.values()):
            return {name: describe(one) for name, one in fields.items()}
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class OwnSeries:
    """A series of states that knows the arguments they are of; see `own_states`.

    Attributes:
        series: Where they are kept.
        facts: () -> the arguments, JSON-able; asked for when there is a state, behind the function's own checks.
    """

    series: Any
    facts: Callable[[], Mapping[str, Any]]

    @property
    def latest_step(self) -> int | None:
        """Step of the newest state; None where there is none."""
        return self.series.latest_step

    def save(self, state: Any, progress: Mapping[str, Any]) -> None:
        """Keeps a state, and the arguments beside it."""
        self.series.save(state, {**progress, "arguments": self.facts()})

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, and what was beside it.

        Raises:
            ConfigError: it is of other arguments, or does not say of which.
        """
        state, saved = self.series.restore(like)
        theirs = saved.pop("arguments", None)
        if theirs is None:
            raise ConfigError(
                "the saved states do not say which arguments they are of, as an older version kept them. "
                "Begin anew in an empty folder."
            )
        check_settings(self.facts(), theirs)
        return state, saved


def _own(series, facts):
    if isinstance(series, Sequence):
        return [_own(one, facts) for one in series]
    return series if series is None or isinstance(series, OwnSeries) else OwnSeries(series, facts)


def _add(digest, value):
    """Feeds everything that a value holds to a digest; nothing of it depends on the process, as addresses do."""
    name, parts = _open(value)
    if isinstance(parts, np.ndarray):
        digest.update(f"{name}:{parts.dtype}{parts.shape};".encode())
        digest.update(np.ascontiguousarray(parts).reshape(-1).view(np.uint8))
        return
    digest.update(f"{name}:{len(parts)};".encode())
    for part in parts:
        _add(digest, part)


def _open(value):
    """(what kind of thing a value is, what it holds: one array, or parts)."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value), ()
    if isinstance(value, type | types.ModuleType) or hasattr(value, "__qualname__"):  # classes and functions
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(type(value)))}", ()
    if isinstance(value, Sample):  # by whatever name
        return "sample", (value.batch, value.forward)
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return "key", np.asarray(jax.random.key_data(value))
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return "array", np.asarray(value)
    if isinstance(value, Mapping):
        return "mapping", [part for key in sorted(value, key=str) for part in (str(key), value[key])]
    if isinstance(value, list | tuple):
        return "sequence", value
    if isinstance(value, functools.partial):
        return "partial", (value.func, value.args, value.keywords)
    return f"{type(value).__module__}.{type(value).__qualname__}", _fields(value)


def _fields(value):
    """[(name, value)] of a record, without what it has cached, or of an object that computes something."""
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return sorted(getattr(value, "__dict__", {}).items())
