"""The barrier between networks of other seeds: two sizes of vision transformer, a small GPT on Shakespeare.

    python -m experiments.barrier --config=configs/barrier.py --workdir=runs/barrier --config.data_dir=DIR

DIR holds mnist.npz and dhcd_digits.npz, and tiny_shakespeare.jsonl.gz. The vision bases are those of configs/ladder.py:
--config.networks=runs/ladder/checkpoints takes them from there.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data_dir = ""
    c.networks = ""
    c.num_pairs = 3
    vit = dict(model_type="jaxtune_vit", image_size=28, patch_size=7, depth=2, num_heads=4, num_outputs=64, channels=1)
    digits = dict(
        sources=(
            dict(name="mnist.npz", options=dict(class_prefix="mnist/")),
            dict(name="dhcd_digits.npz", options=dict(class_prefix="dhcd/")),
        ),
        num_steps=1500,
        batch_size=64,
    )
    c.vision = dict(
        narrow=dict(model=vit | dict(width=64, mlp_width=128), learning_rate=6e-3, **digits),
        wide=dict(model=vit | dict(width=128, mlp_width=256), learning_rate=4e-3, **digits),
    )
    gpt = dict(
        model_type="jaxtune_decoder",
        vocab_size=259,
        depth=3,
        num_heads=4,
        num_kv_heads=4,
        activation="gelu",
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        num_positions=64,
        tied=False,  # folded, a tied table is two leaves: no such network lies on the line
    )
    plays = dict(
        data=dict(name="tiny_shakespeare.jsonl.gz", options=dict(tokens="bytes", windows=64)),
        num_steps=1500,
        batch_size=32,
        learning_rate=3e-3,
    )
    c.language = dict(
        gpt=dict(model=gpt | dict(width=64, head_width=16, mlp_width=256), **plays),
    )
    c.alignments = {
        "permutation": dict(method="weights", options=dict(), num_inputs=0),
        "full": dict(method="full", options=dict(), num_inputs=0),
        "learned, 64 inputs": dict(method="learned", options=dict(), num_inputs=64),
        "learned, 512 inputs": dict(method="learned", options=dict(), num_inputs=512),
    }
    c.num_test = 500
    return c
