"""ResNet-20 on CIFAR-10, plain logits: a network with batch statistics.

    python -m experiments.pretrain --config=configs/pretrain_resnet20.py --workdir=runs/resnet20

Needs the extra `tfds`. Not measured: the recipe of He et al. 2016 (arXiv:1512.03385, section 4.2: 64,000 steps of
128, SGD) with a cosine in the place of its two drops, and without its random crops and flips.
"""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()
    c.seed = 0

    c.data = dict(name="tfds:cifar10", options=dict(), eval_options=dict(), classes=(), shifts=())
    c.model = dict(model_type="jaxtune_resnet", depth=20, channels=3, num_outputs=10)
    c.frozen_read_out = False

    c.batch_size = 128
    c.num_steps = 64_000
    c.learning_rate = 0.1
    c.schedule = dict(schedule="cosine", num_warmup_steps=400, final_fraction=0.0)
    c.optimizer = dict(name="sgd", momentum=0.9, weight_decay=1e-4, clip_norm=None)
    c.label_smoothing = 0.0

    c.log_every = 100
    c.evaluate_every = 2_000
    c.save_every = 2_000
    c.num_kept = 3
    c.eval_batch_size = 500
    return c


def get_sweep():
    return [{"seed": seed} for seed in range(3)]
