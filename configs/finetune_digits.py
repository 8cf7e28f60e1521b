"""Fine-tunes a glyph base on real handwritten digits: the task vector that the demos carry to another base.

    python -m experiments.finetune --config=configs/finetune_digits.py --workdir=runs/digits \\
        --config.base=runs/glyphs/model

With `--config.lora.rank=4` only factors are trained, and adapter/ holds them.

Measured on two shared CPU cores, seed 0, 13 to 25 seconds each with start-up; accuracy on 359 test digits: the base
(configs/pretrain_glyphs.py, seed 0) 0.632; all 142,528 weights 0.997; rank 4 (14,336 weights) 0.994; rank 16 0.992.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.base = config_dict.placeholder(str)

    c.data = dict(name="digits", options=dict(), eval_options=dict(), classes=(), shifts=())
    c.frozen_read_out = True
    c.lora = dict(
        rank=config_dict.placeholder(int),  # None trains all weights
        alpha=8.0,
        is_rank_stabilised=False,
        patterns=("*/attn/*/kernel", "*/mlp/*/kernel"),
        merge=True,
    )

    c.batch_size = 64
    c.num_steps = 400
    c.learning_rate = 3e-4
    c.schedule = dict(schedule="cosine", num_warmup_steps=40, final_fraction=0.0)
    c.optimizer = dict(name="adamw", weight_decay=0.0, clip_norm=1.0)
    # Both make a fine-tune less sure of itself, as models that are to be averaged with their base should be (BANG).
    c.label_smoothing = 0.0
    c.mixup = 0.0
    c.half = dict(level=config_dict.placeholder(str), stage=0)  # "category", "layer" or "leaf": half fine-tuning

    c.log_every = 20
    c.evaluate_every = 100
    c.save_every = 200
    c.num_kept = 2
    c.eval_batch_size = 256
    return c


def get_sweep():
    """All weights and two ranks, three seeds each."""
    return [{"seed": seed, "lora.rank": rank} for rank in (None, 4, 16) for seed in range(3)]
