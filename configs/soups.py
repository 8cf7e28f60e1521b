"""Sixteen fine-tunes of one base on Devanagari digits, few of them a class; soups of them, under five shifts.

    python -m experiments.soups --config=configs/soups.py --workdir=runs/soups --config.data_dir=DIR

DIR holds dhcd_digits.npz. --config.networks=runs/merge_glyphs/checkpoints takes the bases from there.
"""

import importlib.util
from pathlib import Path

import ml_collections


def get_config():
    spec = importlib.util.spec_from_file_location("merge_glyphs", Path(__file__).with_name("merge_glyphs.py"))
    glyphs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(glyphs)
    shared = glyphs.get_config()
    c = ml_collections.ConfigDict()
    c.seeds = (0, 1, 2)
    c.data_dir = ""
    c.networks = ""
    c.model, c.pretrain = shared.model, shared.pretrain
    c.task = dict(name="dhcd_digits.npz", options=dict(class_prefix="dhcd_digits/"))
    c.num_per_class = 100
    c.num_models = 16
    c.draws = dict(
        learning_rate=(1e-4, 3e-3), num_steps=(100, 200, 400), weight_decay=(0.0, 0.05, 0.3), label_smoothing=(0.0, 0.1)
    )
    c.batch_size = 64
    c.shifts = dict(
        turned_15=dict(name="rotate", options=dict(degrees=15.0)),
        turned_30=dict(name="rotate", options=dict(degrees=30.0)),
        noisy=dict(name="noise", options=dict(std=0.3)),
        occluded=dict(name="occlude", options=dict(size=10)),
        inverted=dict(name="invert", options=dict()),
    )
    c.soups = {
        "uniform": dict(method="uniform_soup", options=dict()),
        "greedy": dict(method="greedy_soup", options=dict()),
        "greedy, ties accepted": dict(method="greedy_soup", options=dict(accept_ties=True)),
        "best k": dict(method="best_k_soup", options=dict()),
        "learned, by model": dict(method="learned_soup", options=dict(per="model")),
        "learned, by leaf": dict(method="learned_soup", options=dict(per="leaf")),
    }
    c.num_validation, c.num_test = 800, 2000
    return c
