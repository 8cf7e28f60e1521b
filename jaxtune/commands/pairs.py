"""Options of data on the command line, as NAME=VALUE."""

from collections.abc import Sequence

from jaxtune.errors import ConfigError


def parse_pairs(pairs: Sequence[str]) -> dict[str, int | float | str]:
    """NAME -> VALUE, as a number where it is one.

    Raises:
        ConfigError: one that is not NAME=VALUE.
    """
    return dict(_split(pair) for pair in pairs)


def _split(pair):
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise ConfigError(f"{pair!r} as an option of data: write it as NAME=VALUE, for instance task=mine.")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
