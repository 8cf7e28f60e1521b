"""timm and OpenCLIP as oracles, without torchvision, which their networks never call.

Both import it for transforms and detection layers alone. It cannot be had beside a build of torch for CPUs, so empty
classes stand in its place while they are imported, and in that of ftfy, which cleans OpenCLIP's texts; afterwards they
are gone again, lest another library takes them for the real ones.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings

import pytest

ABSENT = ("torchvision", "ftfy")


class _Empty(type):
    """A class of which every attribute is such a class again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _stand_in():
    # It looks for torchvision once and remembers the answer: let it look before there is a false one.
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()
    finder = _Finder()
    sys.meta_path.append(finder)  # behind the real ones: what is installed is taken
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if isinstance(sys.modules[name], _Module)]:
            del sys.modules[name]


def import_oracle(name):
    """timm or open_clip; the test is skipped where it is not installed."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    with _stand_in(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
