"""The ladder of base pairs: two sizes of vision transformer, six rungs, five pairs, four tasks.

    python -m experiments.ladder --config=configs/ladder.py --workdir=runs/ladder --config.data_dir=DIR

DIR holds 28x28 image sets as .npz (train_x, train_y, test_x, test_y, class_names): mnist, dhcd_digits, thai_digits,
dhcd_cons_c, quickdraw6. The bases learn Latin and Devanagari digits; the tasks are Latin digits turned by 90 degrees,
Thai digits, Devanagari consonants and drawings.

About two hours on two CPU cores, a process each (`--config.only`), most of it training; results in docs/ladder.md.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data_dir = ""
    c.only = ""
    c.split = "test"
    c.num_pairs = 5
    vit = dict(model_type="jaxtune_vit", image_size=28, patch_size=7, depth=2, num_heads=4, num_outputs=64, channels=1)
    c.models = dict(
        narrow=vit | dict(width=64, mlp_width=128),
        wide=vit | dict(width=128, mlp_width=256),
    )
    c.learning_rates = dict(narrow=6e-3, wide=4e-3)
    c.pretrain = dict(
        sources=(
            dict(name="mnist.npz", options=dict(class_prefix="mnist/")),
            dict(name="dhcd_digits.npz", options=dict(class_prefix="dhcd/")),
        ),
        num_steps=1500,
        batch_size=64,
    )
    c.rungs = dict(drift=(0.1,), release=(0.01, 0.1, 1.0), branch=(0.0, 0.1, 0.5), continued_rate=1e-3)
    c.tasks = dict(
        turned_digits=dict(
            name="mnist.npz",
            options=dict(class_prefix="mnist/"),
            shifts=(dict(name="rotate", options=dict(degrees=90.0)),),
        ),
        thai_digits=dict(name="thai_digits.npz", options=dict(class_prefix="thai/")),
        consonants=dict(name="dhcd_cons_c.npz", options=dict(class_prefix="consonant/")),
        drawings=dict(name="quickdraw6.npz", options=dict(class_prefix="drawing/")),
    )
    c.variants = {
        "full, unit weights": dict(method="full", options=dict(weighting="unit")),
        "full, agreement weights": dict(method="full", options=dict(weighting="agreement")),
        "full, trust 1": dict(method="full", options=dict(trust=1.0)),
    }
    c.finetune = dict(num_steps=150, batch_size=64, learning_rate=1e-3)
    c.num_test, c.num_support = 1000, 500
    c.transition = dict(widths=(32, 64, 128, 256), num_steps=(200, 600, 1800), learning_rate=4e-3, num_pairs=2)
    return c
