"""Eight tasks of glyphs and drawings from one base: every merge method, three seeds, plain and under stress.

    python -m experiments.merge --config=configs/merge_glyphs.py --workdir=runs/merge_glyphs --config.data_dir=DIR

DIR holds 28x28 image sets as .npz: mnist, dhcd_digits, dhcd_cons_a, dhcd_cons_b, dhcd_cons_c, thai_digits, quickdraw6,
fashion_tiny. The base has seen drawn letters and digits only.
"""

import ml_collections

TASKS = (
    "mnist",
    "dhcd_digits",
    "dhcd_cons_a",
    "dhcd_cons_b",
    "dhcd_cons_c",
    "thai_digits",
    "quickdraw6",
    "fashion_tiny",
)
# Methods for any number of models whose defaults are those of their papers.
PLAIN = (
    *("linear", "task_arithmetic", "bitdelta", "magmax", "metagpt", "pcb", "consensus", "multislerp", "karcher"),
    *("model_stock", "ram", "ramplus_tl", "sce", "half_reset"),
    *("tsv_m", "iso_c", "iso_cts", "star", "cart", "calibration", "subspace_boosting", "wudi", "ace"),
)


def get_config():
    c = ml_collections.ConfigDict()
    c.seeds = (0, 1, 2)
    c.data_dir = ""
    c.model = dict(
        model_type="jaxtune_vit",
        image_size=28,
        patch_size=7,
        channels=1,
        width=64,
        depth=4,
        num_heads=4,
        mlp_width=128,
        num_outputs=64,
    )
    c.pretrain = dict(
        sources=(dict(name="glyphs", options=dict(num_records=192_000, class_prefix="glyph/")),),
        num_steps=3000,
        batch_size=64,
        learning_rate=2e-3,
    )
    c.tasks = {name: dict(name=f"{name}.npz", options=dict(class_prefix=f"{name}/")) for name in TASKS}
    c.finetune = dict(num_steps=400, batch_size=64, learning_rate=5e-4)
    c.scenarios = ("plain", "stress")
    # Up to 8, since a mean of eight task vectors is an eighth of their sum.
    c.scales = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2, 4.0, 6.0, 8.0)
    c.methods = merge_methods()
    c.composed = composed_methods()
    c.num_samples = 64
    c.num_validation, c.num_test = 300, 1000
    return c


def merge_methods():
    """Every method for any number of models, with the options of its paper where it has no default."""
    rows = {name: dict(method=name, options=dict()) for name in PLAIN}
    rows["ties"] = dict(method="ties", options=dict(density=0.2))
    rows["ties, whole model"] = dict(method="ties", options=dict(density=0.2, scope="model"))
    rows["graft"] = dict(method="graft", options=dict(share=0.1))
    rows["emr (unified)"] = dict(method="emr", options=dict())
    for name in ("dare_linear", "dare_ties", "della", "della_linear"):
        rows[name] = dict(method=name, options=dict(density=0.5))
    for name in ("breadcrumbs", "breadcrumbs_ties"):
        rows[name] = dict(method=name, options=dict(density=0.9, gamma=0.01))
    rows["knots, ties inside"] = dict(method="knots", options=dict(inside="ties"))
    rows["core space, ties inside"] = dict(method="core_space", options=dict(inside="ties"))
    rows["wudi, 300 steps"] = dict(method="wudi", options=dict(solver="iterative"))
    return rows


def composed_methods():
    """What learns on 64 examples a task; names are those of `jaxtune methods`."""

    def row(method, is_labelled=False, **options):
        return dict(method=method, is_labelled=is_labelled, options=options)

    experts = dict(objective="expert", learning_rate=1e-2, num_steps=300, is_best_kept=True)
    return {
        "AdaMerging by entropy": row("ada_merging"),
        "AdaMerging by the experts": row("ada_merging", **experts),
        "AdaRank by the experts": row("ada_rank", **experts),
        "aTLAS": row("atlas", True, start=0.3, learning_rate=1e-2, num_epochs=60),
        "ScaLearn": row("sca_learn", True, mean=0.3, num_epochs=20),
        "LiNeS": row("lines", True),
        "Fisher, weights searched": row("fisher", True),
        "RegMean": row("regmean"),
        "RegMean++": row("regmean_plus"),
        "LOT": row("lot"),
    }
