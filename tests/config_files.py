"""The config files of the project."""

from pathlib import Path
from types import ModuleType

from experiments.config_file import read_config_file

CONFIGS = Path(__file__).parents[1] / "configs"


def read_module(name: str) -> ModuleType:
    """The module of `configs/NAME.py`."""
    return read_config_file(CONFIGS / f"{name}.py")
