"""Errors that say what was asked, what came, where, and what to do.

Everything here is the caller's to mend: the command line prints the message alone and exits with 2.
Whatever else is raised is ours, and exits with 1.
"""

import difflib
from collections.abc import Iterable


class JaxtuneError(Exception):
    """Base of every error that the caller can mend."""


class TreeMismatchError(JaxtuneError, ValueError):
    """Two trees differ in a path, a shape or a dtype."""


class NonFiniteError(JaxtuneError, ValueError):
    """A leaf holds NaN or Inf."""


class SpecError(JaxtuneError, ValueError):
    """A symmetry spec and a tree, or a spec and an element, do not fit."""


class InexactElementError(JaxtuneError, ValueError):
    """An element that should leave a network's function alone does not."""


class ConfigError(JaxtuneError, ValueError):
    """A model or experiment config is missing, unknown or inconsistent."""


class CheckpointError(JaxtuneError, ValueError):
    """A checkpoint is missing, damaged, hostile or of a kind that is not read."""


class OutputError(JaxtuneError, OSError):
    """A result could not be published: it exists, or the disk refused."""


class DataError(JaxtuneError, ValueError):
    """A data source is missing, empty or inconsistent."""


class UnknownNameError(JaxtuneError, ValueError):
    """A method, option, family or data set that does not exist."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An error that lists the known names and the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")
