"""The ladder by number of examples: three pairs of small vision transformers of other seeds.

    python -m experiments.few --config=configs/few.py --workdir=runs/few --config.data_dir=DIR

DIR holds the sets of configs/ladder.py, whose bases and fine-tunes these are: --config.networks=runs/ladder/checkpoints
takes them from there.
"""

import importlib.util
from pathlib import Path

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data_dir = ""
    c.networks = ""
    c.split = "test"
    c.num_pairs = 3
    vit = dict(model_type="jaxtune_vit", image_size=28, patch_size=7, depth=2, num_heads=4, num_outputs=64, channels=1)
    c.models = dict(narrow=vit | dict(width=64, mlp_width=128))
    c.learning_rates = dict(narrow=6e-3)
    c.pretrain = dict(
        sources=(
            dict(name="mnist.npz", options=dict(class_prefix="mnist/")),
            dict(name="dhcd_digits.npz", options=dict(class_prefix="dhcd/")),
        ),
        num_steps=1500,
        batch_size=64,
    )
    c.rungs = dict(release=(), branch=(), continued_rate=1e-3, has_other_data=False)
    c.tasks = _read_neighbour("ladder").tasks.to_dict()
    c.finetune = dict(num_steps=150, batch_size=64, learning_rate=1e-3)
    c.num_test, c.num_support = 1000, 500
    c.num_kept = 64
    c.sizes = ("2 a class", 8, 32, 128, 512)
    c.ways = ways()
    c.comparisons = (
        ("full, then distil", "distil"),
        ("tied, then distil", "distil"),
        ("learned, then distil", "distil"),
        ("full, then polish", "polish"),
        ("learned, then polish", "polish"),
        ("full, then distil, support kept", "distil, support kept"),
        ("full, then tune", "tune"),
        ("tied", "theseus"),
        ("align, then mask", "gradfix"),
        ("gradfix_teacher", "gradfix"),
        ("align, then mask, no labels", "align, then mask"),
    )
    return c


def ways():
    """Name -> what is done with the examples."""
    rows = {
        name: dict(way="free transport", method=name, options=dict()) for name in ("identity", "transfusion", "full")
    }
    for name in ("theseus", "bico", "tied", "learned", "gradfix_teacher"):
        rows[name] = dict(way="transport by inputs", method=name, options=dict())
    rows["gradfix"] = dict(way="transport by labels", method="gradfix", options=dict())
    rows["align, then mask"] = dict(way="transport by labels", method="align_then_mask", options=dict())
    rows["align, then mask, no labels"] = dict(way="transport by inputs", method="align_then_mask", options=dict())
    rows["distil"] = dict(way="distil", start="base", options=dict())
    rows["full, then distil"] = dict(way="distil", start="full", options=dict())
    rows["tied, then distil"] = dict(way="distil", start="tied", options=dict())
    rows["learned, then distil"] = dict(way="distil", start="learned", options=dict())
    for start in ("base", "full"):
        name = "distil, support kept" if start == "base" else f"{start}, then distil, support kept"
        rows[name] = dict(way="distil", start=start, is_kept=True, options=dict())
    for start in ("base", "full", "learned"):
        name = "polish" if start == "base" else f"{start}, then polish"
        rows[name] = dict(way="polish", start=start, options=dict())
    rows["tune"] = dict(way="tune", start="base", options=dict())
    rows["tune LoRA"] = dict(way="tune", start="base", options=dict(lora_rank=4))
    rows["full, then tune"] = dict(way="tune", start="full", options=dict())
    rows["proxy logits"] = dict(way="proxy logits")
    rows["nearest mean"] = dict(way="nearest mean")
    return rows


def _read_neighbour(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
