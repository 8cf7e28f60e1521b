"""jaxtune: carry a fine-tune to a new base model, without data and without training.

    import jaxtune as jt

    old, tuned, new = (jt.load(path) for path in ("old", "old-tuned", "new"))
    result = jt.transport(old, tuned, new)
    jt.save("new-tuned", result.params, like=new)

Nothing heavy loads before it is used: `import jaxtune` takes a few milliseconds.
"""

import importlib

from jaxtune.version import __version__

_HOME = {
    "load": "jaxtune.checkpoint",
    "save": "jaxtune.checkpoint",
    "task_vector": "jaxtune.tree",
    "apply_task_vector": "jaxtune.tree",
    "symmetry_of": "jaxtune.models.registry",
    "align": "jaxtune.api",
    "transport": "jaxtune.api",
    "interpolate": "jaxtune.api",
    "evaluate": "jaxtune.api",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__():
    return __all__
