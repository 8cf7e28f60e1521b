"""Config files as modules, for those that are built on another one."""

import importlib.util
from pathlib import Path
from types import ModuleType


def read_config_file(path: str | Path) -> ModuleType:
    """The module in a file of configs/, which is no package: its files are named on command lines."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
