"""Whether kept states are of a run with the settings of this one."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ConfigError


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
