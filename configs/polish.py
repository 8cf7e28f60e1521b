"""What `--data` does to a transport, from kin to strangers: three pairs of each of three rungs of the ladder.

    python -m experiments.few --config=configs/polish.py --workdir=runs/polish --config.data_dir=DIR

DIR and --config.networks are those of configs/few.py. Bases: a new release (trained on for as long again, on more
data), a branch (the same first half of the training), and another seed.
"""

import importlib.util
from pathlib import Path


def get_config():
    c = _read_neighbour("few")
    c.rungs.update(release=(1.0,), branch=(0.5,))
    c.tasks = {name: c.tasks[name].to_dict() for name in ("thai_digits", "consonants")}
    c.sizes = (8, 32, 64)
    del c.ways
    c.ways = {
        "auto": dict(way="free transport", method="auto", options=dict()),
        "auto, then polish": dict(way="polish", start="auto", options=dict()),
        "auto, then polish, support kept": dict(way="polish", start="auto", is_kept=True, options=dict()),
    }
    c.comparisons = (("auto, then polish, support kept", "auto, then polish"),)
    return c


def _read_neighbour(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
