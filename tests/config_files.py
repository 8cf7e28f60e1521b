"""The config files of the project, read as the launcher of experiments reads them."""

import importlib.util
from pathlib import Path
from types import ModuleType

CONFIGS = Path(__file__).parents[1] / "configs"


def read_module(name: str) -> ModuleType:
    """The module of `configs/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
