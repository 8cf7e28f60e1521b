"""Nine domains of intents from one text encoder: every merge method, three seeds, plain and under stress.

    python -m experiments.merge --config=configs/merge_intents.py --workdir=runs/merge_intents --config.data_dir=DIR

DIR holds texts as .jsonl.gz (task, split, text, label, label_name): clinc_domains, banking77, snips. The base has
learnt to tell the intents of banking77 and snips; the tasks are the nine domains of CLINC150, fifteen intents each.
"""

import importlib.util
from pathlib import Path

import ml_collections

TASKS = (
    "clinc_auto_and_commute",
    "clinc_banking",
    "clinc_credit_cards",
    "clinc_home",
    "clinc_meta",
    "clinc_small_talk",
    "clinc_travel",
    "clinc_utility",
    "clinc_work",
)
FILES = ("clinc_domains.jsonl.gz", "banking77.jsonl.gz", "snips.jsonl.gz")
TEXTS = dict(length=24, vocab_size=4096, vocabulary=FILES)


def get_config():
    glyphs = _read_neighbour("merge_glyphs")
    c = ml_collections.ConfigDict()
    c.seeds = (0, 1, 2)
    c.data_dir = ""
    c.model = dict(
        model_type="jaxtune_encoder",
        vocab_size=4096,
        num_positions=24,
        width=64,
        depth=3,
        num_heads=4,
        mlp_width=128,
        head="sequence",
        head_dense="tanh",
        num_outputs=64,
    )
    c.pretrain = dict(
        sources=tuple(
            dict(name=f"{name}.jsonl.gz", options=dict(class_prefix=f"{name}/", **TEXTS))
            for name in ("banking77", "snips")
        ),
        num_steps=2000,
        batch_size=64,
        learning_rate=2e-3,
    )
    c.tasks = {name: dict(name=FILES[0], options=dict(task=name, class_prefix=f"{name}/", **TEXTS)) for name in TASKS}
    c.finetune = dict(num_steps=300, batch_size=64, learning_rate=1e-3)
    c.scenarios = ("plain", "stress")
    c.scales = glyphs.get_config().scales
    c.methods = glyphs.merge_methods()
    c.composed = glyphs.composed_methods()
    c.num_samples = 64
    c.num_validation, c.num_test = 300, 450
    return c


def _read_neighbour(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
