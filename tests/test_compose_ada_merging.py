"""Coefficients learned from unlabelled inputs, beside a loop in NumPy and where the optimum is known."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_tasks import Linear, add, forward64, make_base, make_task, make_vectors, minimise, softmax, wide

import jaxtune as jt
from jaxtune.compose import objectives, registry
from jaxtune.compose.registry import compose
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.sample import Sample
from jaxtune.train.checkpoints import StateSeries

BASE = make_base()
VECTORS = make_vectors(2)
EXPERTS = [add(BASE, [vector], [1.0]) for vector in VECTORS]
SAMPLES = [make_task(expert, seed=n, name=f"task {n}") for n, expert in enumerate(EXPERTS)]


def loss64(objective, coefficients):
    """Mean loss over all inputs of both tasks, by NumPy; coefficients: [T] or [T, leaves]."""
    paths = ["block_0/bias", "block_0/kernel", "block_1/kernel"]
    base, total = wide(BASE), 0.0
    for vector, c in zip(map(wide, VECTORS), coefficients, strict=True):
        for n, path in enumerate(paths):
            block, name = path.split("/")
            base[block][name] = base[block][name] + (c if np.ndim(c) == 0 else c[n]) * vector[block][name]
    for sample, expert in zip(SAMPLES, map(wide, EXPERTS), strict=True):
        p = softmax(forward64(base, sample.batch["image"].astype(np.float64)))
        if objective == "entropy":
            total += -(p * np.log(p)).sum(-1).mean()
        else:
            q = softmax(forward64(expert, sample.batch["image"].astype(np.float64)))
            total += (q * (np.log(q) - np.log(p))).sum(-1).mean()
    return total


@pytest.mark.parametrize("level", ["task", "layer"])
@pytest.mark.parametrize("objective", ["entropy", "expert"])
def test_steps_are_those_of_a_loop_in_numpy(level, objective):
    found = compose(
        "ada_merging", BASE, EXPERTS, SAMPLES, level=level, objective=objective, num_steps=4, learning_rate=0.05,
        batch_size=60, validation=0.0,
    )  # fmt: skip
    start = np.full(2 if level == "task" else (2, 3), 0.3)
    expected = minimise(lambda c: loss64(objective, c), start, 4, 0.05)
    if level == "task":
        np.testing.assert_allclose(found.coefficients[""], expected, atol=2e-5)
    else:
        paths = ["block_0/bias", "block_0/kernel", "block_1/kernel"]
        np.testing.assert_allclose(np.stack([found.coefficients[p] for p in paths], 1), expected, atol=2e-5)
    # The first loss that was met is that of the start; the network is that of the last coefficients.
    np.testing.assert_allclose(sum(found.info["loss"][0]), loss64(objective, start), rtol=1e-5)
    shares = [{p: c[n] for p, c in found.coefficients.items()} for n in range(2)] if level == "layer" else expected
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found.params, add(BASE, VECTORS, shares))


def test_an_expert_that_is_a_mixture_is_found_again():
    """Both samples are taught by networks whose coefficients are known: KL 0 is reached there and nowhere else."""
    planted = {"block_0/kernel": (0.7, 0.2), "block_0/bias": (0.1, 0.9), "block_1/kernel": (0.5, -0.3)}
    teacher = add(BASE, VECTORS, [{path: c[n] for path, c in planted.items()} for n in range(2)])
    vectors = [VECTORS[0], VECTORS[1]]
    samples = [make_task(teacher, seed=n, size=200, labelled=False) for n in range(2)]
    from jaxtune.compose.learning import learn
    from jaxtune.compose.vectors import build_blocks, stack_vectors

    fixed = stack_vectors(BASE, [add(BASE, [vector], [1.0]) for vector in vectors])
    start = {path: np.full(2, 0.3, np.float32) for path in planted}
    taught = [objectives.teach(sample, teacher) for sample in samples]
    found = learn(
        build_blocks, fixed, start, taught, objective=objectives.expert, num_steps=600, learning_rate=0.02,
        schedule="cosine", batch_size=200,
    )  # fmt: skip
    for path, c in planted.items():
        np.testing.assert_allclose(found.numbers[path], c, atol=0.02)


def test_what_is_reported_was_not_learned_on():
    held = [sample.split(0.25, by_class=False)[1] for sample in SAMPLES]
    found = compose("ada_merging", BASE, EXPERTS, SAMPLES, num_steps=3, batch_size=8)
    for one, sample in zip(found.info["validation"]["learned"], held, strict=True):
        logits = np.asarray(Linear()(found.params, sample.batch))
        assert one["accuracy"] == pytest.approx((logits.argmax(-1) == sample.batch["label"]).mean())
    changed = [
        dataclasses.replace(s, batch={"image": s.batch["image"].copy(), "label": s.batch["label"]}) for s in SAMPLES
    ]
    for sample, part in zip(changed, held, strict=True):
        is_held = (sample.batch["image"][:, None] == part.batch["image"][None]).all(-1).any(-1)
        sample.batch["image"][is_held] *= -1
    other = compose("ada_merging", BASE, EXPERTS, changed, num_steps=3, batch_size=8)
    jax.tree.map(np.testing.assert_array_equal, found.coefficients, other.coefficients)
    assert found.info["validation"] != other.info["validation"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ada_merging", {"is_best_kept": True}),
        ("ada_rank", {}),
        ("sy_merge", {"layer": "block_1/*"}),
        ("atlas_test_time", {"num_epochs": 1, "objective": "entropy"}),
    ],
)
def test_labels_change_nothing_but_the_report(method, options):
    """Nor which examples are learned on: a split class by class would let them in by the back door."""
    if method != "atlas_test_time":
        options = {"num_steps": 3, **options}
    samples = SAMPLES[:1] if method == "atlas_test_time" else SAMPLES
    unlabelled = [sample.without_labels() for sample in samples]
    with_labels, without = (compose(method, BASE, EXPERTS, given, **options) for given in (samples, unlabelled))
    jax.tree.map(np.testing.assert_array_equal, with_labels.coefficients, without.coefficients)
    assert "accuracy" in with_labels.info["validation"]["learned"][0]
    assert "accuracy" not in without.info["validation"]["learned"][0]


def test_the_kept_numbers_are_never_behind_the_start():
    found = compose(
        "ada_merging", BASE, EXPERTS, SAMPLES, num_steps=30, learning_rate=2.0, score_every=10, is_best_kept=True
    )
    start, learned = ([one["agreement"] for one in found.info["validation"][w]] for w in ("start", "learned"))
    assert np.mean(learned) >= np.mean(start)


def test_unsure_examples_are_left_out():
    sure = compose("ada_merging", BASE, EXPERTS, SAMPLES, objective="expert", confidence=0.8, num_steps=2,
                   validation=0.0, batch_size=60)  # fmt: skip
    kept = []
    for sample, expert in zip(SAMPLES, EXPERTS, strict=True):
        top = softmax(forward64(wide(expert), sample.batch["image"])).max(-1)
        kept.append(sample.take(np.flatnonzero(top >= 0.8)))
    assert 0 < len(kept[0]) < 60
    same = compose("ada_merging", BASE, EXPERTS, kept, objective="expert", num_steps=2, validation=0.0, batch_size=60)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), sure.coefficients, same.coefficients)
    with pytest.raises(ConfigError, match=r"task 0: its expert is sure of no example"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES, objective="expert", confidence=1.1, num_steps=1)


def test_padding_says_nothing_about_how_sure_an_expert_is():
    """The first text is foretold surely and is mostly padding; the second the other way round."""
    logits = np.zeros((2, 4, 3), np.float32)
    logits[0, :1, 0] = logits[1, 1:, 0] = 9.0
    valid = np.array([[1, 0, 0, 0]] * 2, bool)
    sample = Sample("texts", {"logits": logits, "valid": valid}, lambda params, batch: batch["logits"] + params["x"])
    taught = objectives.teach(sample, {"x": np.float32(0)}, confidence=0.9)
    np.testing.assert_array_equal(taught.batch["weight"], [1.0, 0.0])


def test_leaves_of_one_group_share_their_coefficients():
    groups = {"block_0/kernel": "first", "block_0/bias": "first", "block_1/kernel": "last"}
    found = compose("ada_merging", BASE, EXPERTS, SAMPLES, groups=groups, num_steps=2)
    assert found.coefficients.keys() == {"first", "last"}
    shares = [{path: found.coefficients[group][n] for path, group in groups.items()} for n in range(2)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.params, add(BASE, VECTORS, shares))
    with pytest.raises(ConfigError, match="differ in 1 leaves: block_1/kernel"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES, groups=dict.fromkeys(list(groups)[:2], "all"), num_steps=2)


def test_an_interrupted_run_gives_the_bits_of_one_that_was_not(tmp_path, monkeypatch):
    how = {"num_steps": 6, "batch_size": 7, "is_best_kept": True, "score_every": 2}
    whole = compose("ada_merging", BASE, EXPERTS, SAMPLES, **how)
    from jaxtune.compose import learning

    real, count = learning._update, []

    def killed(*arguments):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(learning, "SAVE_EVERY", 2)
    with StateSeries(tmp_path / "states") as series:
        monkeypatch.setattr(learning, "_update", killed)
        with pytest.raises(KeyboardInterrupt):
            compose("ada_merging", BASE, EXPERTS, SAMPLES, **how, series=series)
        assert series.latest_step == 4
        monkeypatch.setattr(learning, "_update", real)
        resumed = compose("ada_merging", BASE, EXPERTS, SAMPLES, **how, series=series)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert whole.info == resumed.info


def test_bfloat16_is_rounded_once_and_integers_stay():
    import ml_dtypes

    def half(tree):
        return {**jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tree), "count": np.arange(3)}

    found = compose("ada_merging", half(BASE), [half(e) for e in EXPERTS], SAMPLES, num_steps=1)
    assert found.params["block_0"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.params["count"], np.arange(3))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="Did you mean 'ada_merging'"):
        compose("adamerging", BASE, EXPERTS, SAMPLES)
    with pytest.raises(UnknownNameError, match="Did you mean 'num_steps'"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES, num_step=3)
    with pytest.raises(UnknownNameError, match="level"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES, level="leaf")
    with pytest.raises(ConfigError, match="2 models and 1 samples"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES[:1])
    with pytest.raises(DataError, match=r"task 0: a share of 0\.001"):
        compose("ada_merging", BASE, EXPERTS, SAMPLES, validation=0.001)
    with pytest.raises(DataError, match="task 1: there are no examples"):
        compose("ada_merging", BASE, EXPERTS, [SAMPLES[0], SAMPLES[1].take([])])
    with pytest.raises(ConfigError, match="no fine-tuned model"):
        compose("ada_merging", BASE, [], [])


def test_every_method_is_described():
    for name, method in registry.METHODS.items():
        assert "" not in (method.summary, method.reference), name
        assert method.samples in ("a model", "together", "target and control", "any"), name
        assert method.data in ("labelled examples", "unlabelled inputs"), name
        assert "seed" in method.options, name
        assert "series" not in method.options, name


def test_the_call_of_the_package_takes_ready_samples():
    found = jt.compose("ada_merging", BASE, EXPERTS, SAMPLES, num_steps=1)
    assert found.params.keys() == BASE.keys()
