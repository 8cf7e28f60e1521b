"""The ladder on the package's own data: one small vision transformer, two pairs a rung, three tasks.

    python -m experiments.ladder --config=configs/ladder_small.py --workdir=runs/ladder_small

About three minutes on two CPU cores. The bases learn drawn digits and letters; the tasks are real handwritten digits,
letters turned by 90 degrees and letters never seen. Two pairs make no interval worth the name: this is to see the
machinery work and the direction of the numbers. configs/ladder.py is the measurement.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data_dir = ""
    c.only = ""
    c.split = "test"
    c.variants = {}
    c.num_pairs = 2
    c.models = dict(
        narrow=dict(
            model_type="jaxtune_vit",
            image_size=28,
            patch_size=7,
            width=64,
            depth=2,
            num_heads=4,
            mlp_width=128,
            num_outputs=64,
            channels=1,
        )
    )
    c.learning_rates = dict(narrow=4e-3)
    glyphs = dict(name="glyphs", eval_options=dict(num_records=2000))
    c.pretrain = dict(
        sources=(glyphs | dict(options=dict(classes="0123456789ABCDEFGH", num_records=20000)),),
        num_steps=500,
        batch_size=64,
    )
    c.rungs = dict(drift=(0.1,), release=(0.1, 1.0), branch=(0.0, 0.5), continued_rate=1e-3)
    c.tasks = dict(
        handwritten=dict(name="digits", options=dict(class_prefix="written/")),
        turned=glyphs
        | dict(
            options=dict(classes="ABCDEFGH", num_records=4000, class_prefix="turned/"),
            shifts=(dict(name="rotate", options=dict(degrees=90.0)),),
        ),
        unseen=glyphs | dict(options=dict(classes="KLMNPRTVXY", num_records=4000)),
    )
    c.finetune = dict(num_steps=100, batch_size=64, learning_rate=1e-3)
    c.num_test, c.num_support = 500, 500
    c.transition = dict(widths=(), num_steps=(), learning_rate=4e-3, num_pairs=1)
    return c
