"""A chain of releases of a glyph base, and a fine-tune on real handwritten digits that is carried along it.

python -m experiments.versions --config=configs/versions.py --workdir=runs/versions
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.num_seeds = 3
    c.model = dict(
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
    glyphs = dict(name="glyphs", eval_options=dict(num_records=500))
    classes = "0123456789ABCDEFGH"
    # The first release is trained from scratch; each other goes on from the one before, with more and stronger warps.
    c.releases = (
        dict(
            data=glyphs | dict(options=dict(classes=classes, num_records=32_000)),
            schedule=dict(num_steps=500, learning_rate=4e-3, batch_size=64),
        ),
        dict(
            data=glyphs | dict(options=dict(classes=classes, num_records=32_000, seed=1, warp=1.2)),
            schedule=dict(num_steps=250, learning_rate=1e-3, batch_size=64),
        ),
        dict(
            data=glyphs | dict(options=dict(classes=classes, num_records=32_000, seed=2, warp=1.4)),
            schedule=dict(num_steps=250, learning_rate=1e-3, batch_size=64),
        ),
    )
    # Upright strokes are what the glyphs teach already; turned ones have to be learned.
    c.task = dict(
        name="digits",
        options=dict(class_prefix="written/"),
        eval_options=dict(),
        classes=(),
        shifts=(dict(name="rotate", options=dict(degrees=90.0)),),
    )
    c.finetune = dict(num_steps=100, learning_rate=1e-3, batch_size=64)
    c.short_steps = (0, 5, 10, 20, 40)  # of training again on a later release
    return c
