"""jaxtune: carry a fine-tune to a new base model, without data and without training.

    import jaxtune as jt

    old, tuned, new = (jt.load(path) for path in ("old", "old-tuned", "new"))
    result = jt.transport(old, tuned, new)
    jt.save("new-tuned", result.params, like=new)

Nothing heavy loads before it is used: `import jaxtune` takes a few milliseconds.
"""

import importlib
import inspect
import sys
from types import ModuleType  # not `import types`: our own `jaxtune.types` would take its name here

from jaxtune.version import __version__

# Calls, and the module that each lives in.
_CALLS = {
    "load": "jaxtune.loading",
    "save": "jaxtune.checkpoint",
    "task_vector": "jaxtune.tree",
    "apply_task_vector": "jaxtune.tree",
    "symmetry_of": "jaxtune.models.registry",
    "merge_recipe": "jaxtune.merging",
}
# Calls that share their name with a package: the package itself answers the call, through `jaxtune.api`.
_PACKAGE_CALLS = ("align", "compose", "evaluate", "interpolate", "merge", "transport")

__all__ = ["__version__", *_CALLS, *_PACKAGE_CALLS]


class _CallablePackage(ModuleType):
    """A package whose name is also a verb: `jt.transport(...)` beside `jaxtune.transport.registry`."""

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    @property
    def _call(self):
        return getattr(importlib.import_module("jaxtune.api"), self.__name__.rpartition(".")[2])

    @property
    def __doc__(self):
        return self._call.__doc__

    @property
    def __signature__(self):
        return inspect.signature(self._call)


class _Root(ModuleType):
    """`import` binds a package to its parent; here the verbs among them become callable as they are bound."""

    def __setattr__(self, name, value):
        if name in _PACKAGE_CALLS and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root


def __getattr__(name):
    if name in _CALLS:
        return getattr(importlib.import_module(_CALLS[name]), name)
    if name in _PACKAGE_CALLS:
        return importlib.import_module(f"jaxtune.{name}")
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__():
    return __all__
