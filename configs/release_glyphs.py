"""A newer release of a glyph base: the same run goes on, on other draws and stronger warps.

    python -m experiments.finetune --config=configs/release_glyphs.py --workdir=runs/release \\
        --config.base=runs/glyphs/model

Measured on two CPU cores: 1 minute; accuracy on 3,600 test glyphs of the stronger warp 0.884.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.base = config_dict.placeholder(str)

    c.data = dict(
        name="glyphs",
        options=dict(num_records=128_000, seed=1, warp=1.2),
        eval_options=dict(num_records=3_600),
        classes=(),
        shifts=(),
    )
    c.frozen_read_out = True
    c.lora = dict(
        rank=config_dict.placeholder(int),
        alpha=8.0,
        is_rank_stabilised=False,
        patterns=("*/attn/*/kernel", "*/mlp/*/kernel"),
        merge=True,
    )

    c.batch_size = 64
    c.num_steps = 2_000
    c.learning_rate = 2e-3
    c.schedule = dict(schedule="cosine", num_warmup_steps=200, final_fraction=0.0)
    c.optimizer = dict(name="adamw", weight_decay=0.05, clip_norm=1.0)
    c.label_smoothing = 0.0

    c.log_every = 50
    c.evaluate_every = 1_000
    c.save_every = 1_000
    c.num_kept = 3
    c.eval_batch_size = 400
    return c
