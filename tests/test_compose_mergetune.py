"""MERGETUNE against SciPy on a convex problem, its laws, and what it refuses."""

import jax
import jax.numpy as jnp
import linear_task as task
import numpy as np
import pytest
import scipy.optimize

from jaxtune.compose.fitting import Recipe, fit, join, split, supervised
from jaxtune.compose.mergetune import POINTS, Loss, mergetune
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.models import mlp
from jaxtune.sample import Sample
from jaxtune.sampling import Forward, Frozen
from jaxtune.train.checkpoints import StateSeries

SAMPLE = task.draw_sample()
BASE, TUNED = task.draw_params(seed=1, scale=0.5), task.draw_params(seed=2, scale=0.5)
WHOLE = {"batch_size": 48, "num_steps": 400, "learning_rate": 0.1}


def objective_in_numpy(vector, *, pull, line, metric=1.0):
    """MERGETUNE's loss and gradient, one point of the line after the other."""
    first, second = task.to_vector(BASE), task.to_vector(TUNED)
    loss, gradient = task.loss_of(vector, SAMPLE)
    loss += pull * 0.5 * np.sum(metric * (vector - first) ** 2)
    gradient = gradient + pull * metric * (vector - first)
    for t in POINTS:
        there, slope = task.loss_of(second + t * (vector - second), SAMPLE)
        loss, gradient = loss + line * there / len(POINTS), gradient + line * t * slope / len(POINTS)
    return loss, gradient


def test_the_objective_and_its_gradient_are_those_of_a_loop():
    start, still = split(task.draw_params(seed=3), SAMPLE)
    metric = {path: np.abs(np.asarray(leaf)) for path, leaf in split(task.draw_params(seed=9), SAMPLE)[0].items()}
    fixed = {
        "still": still,
        "first": split(BASE, SAMPLE)[0],
        "second": split(TUNED, SAMPLE)[0],
        "metric": metric,
        "pull": np.float32(0.3),
        "line": np.float32(0.7),
    }
    loss = Loss("weights", POINTS)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: loss(task.forward, w, fixed, SAMPLE.batch, None)))(start)
    expected, slope = objective_in_numpy(
        task.to_vector(join(start, still)), pull=0.3, line=0.7, metric=task.to_vector(join(metric, {}))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(task.to_vector(join(gradient, {})), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pull", "line"), [(0.5, 0.0), (0.1, 1.0)])
def test_it_finds_the_minimum_that_scipy_finds(pull, line):
    best = scipy.optimize.minimize(
        lambda w: objective_in_numpy(w, pull=pull, line=line), task.to_vector(TUNED), jac=True, tol=1e-12
    )
    found = mergetune(BASE, [TUNED], [SAMPLE], pull=pull, line=line, **WHOLE)
    np.testing.assert_allclose(task.to_vector(found.params), best.x, atol=2e-3)  # of 400 steps
    assert found.info["loss"][-1] == pytest.approx(best.fun, rel=1e-4)


def test_its_limits():
    alone = mergetune(BASE, [TUNED], [SAMPLE], pull=0.0, line=0.0, **WHOLE)
    start, still = split(TUNED, SAMPLE)
    plain = fit(supervised, start, still, SAMPLE, recipe=Recipe(400, 0.1, 48, "sgd"))
    np.testing.assert_allclose(task.to_vector(alone.params), task.to_vector(join(plain.numbers, {})), atol=1e-4)
    pulled = mergetune(BASE, [TUNED], [SAMPLE], pull=30.0, line=0.0, batch_size=48, num_steps=300, learning_rate=0.01)
    np.testing.assert_allclose(task.to_vector(pulled.params), task.to_vector(BASE), atol=0.05)
    for info in (alone.info, pulled.info):
        assert {"barrier_to_base", "barrier_to_finetuned", "barrier_of_parents", "barrier_to_base_at"} < set(info)
    assert pulled.info["barrier_to_base"] < 1e-3


@pytest.fixture(scope="module")
def images():
    """A perceptron read out through a frozen head."""
    config = mlp.Config(image_shape=(2, 2, 1), widths=(6,), num_outputs=5)
    draw = np.random.default_rng(0)
    batch = {"image": draw.uniform(size=(24, 2, 2, 1)).astype(np.float32), "label": np.arange(24, dtype=np.int32) % 3}
    forward = Forward(config, Frozen(draw.normal(size=(3, 5)).astype(np.float32)))
    models = [mlp.init(jax.random.key(seed), config) for seed in (0, 1)]
    return Sample("tiles", batch, forward), models


def test_in_features_the_line_is_between_features(images):
    sample, (base, tuned) = images
    start, still = split(jax.tree.map(lambda x: x + 0.1, tuned), sample)
    first, second = split(base, sample)[0], split(tuned, sample)[0]
    fixed = {
        "still": still,
        "first": first,
        "first_still": still,
        "second": second,
        "pull": np.float32(2.0),
        "line": np.float32(0.5),
    }
    loss = Loss("features", (0.25, 0.75))
    value = jax.jit(loss, static_argnums=0)(sample.forward, start, fixed, sample.batch, None)
    ours, old, pretrained = (
        np.asarray(mlp.apply(sample.forward.config, join(one, still), sample.batch), np.float64)
        for one in (start, second, first)
    )

    def loss_at(features):
        units = features / np.linalg.norm(features, axis=1, keepdims=True)
        logits = units @ sample.forward.embeddings.array.T / 0.07
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(24), sample.batch["label"]]).mean()

    cosine = np.sum(ours * pretrained, 1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(pretrained, axis=1)
    expected = loss_at(ours) + 2.0 * (1 - cosine.mean())
    expected += 0.5 * np.mean([loss_at(old + t * (ours - old)) for t in (0.25, 0.75)])
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    found = mergetune(base, [tuned], [sample], space="features", num_steps=30, learning_rate=0.05)
    assert found.info["pull"] == 10.0
    assert found.info["loss"][-1] < found.info["loss"][0]


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.compose.fitting.SAVE_EVERY", 5)
    options = {"num_steps": 12, "batch_size": 16, "seed": 4}
    whole = mergetune(BASE, [TUNED], [SAMPLE], **options)

    def die(at):
        calls = iter(range(100))
        real = StateSeries.save

        def save(self, *args):
            real(self, *args)
            if next(calls) == at:
                raise KeyboardInterrupt

        return save

    with StateSeries(tmp_path / "states") as series:
        with monkeypatch.context() as patch:
            patch.setattr(StateSeries, "save", die(1))
            with pytest.raises(KeyboardInterrupt):
                mergetune(BASE, [TUNED], [SAMPLE], series=series, **options)
        assert series.latest_step == 10
        resumed = mergetune(BASE, [TUNED], [SAMPLE], series=series, **options)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert whole.info == resumed.info


def test_refusals():
    with pytest.raises(UnknownNameError, match=r"space 'weight'.*Did you mean 'weights'"):
        mergetune(BASE, [TUNED], [SAMPLE], space="weight")
    with pytest.raises(ConfigError, match="one model on one sample, got 2 and 1"):
        mergetune(BASE, [TUNED, TUNED], [SAMPLE])
    with pytest.raises(ConfigError, match=r"points \(1\.0,\) must lie in \(0, 1\)"):
        mergetune(BASE, [TUNED], [SAMPLE], points=(1,))
    with pytest.raises(ConfigError, match="negative or not finite"):
        mergetune(BASE, [TUNED], [SAMPLE], fisher=jax.tree.map(lambda x: jnp.full_like(x, -1.0), BASE))
    with pytest.raises(DataError, match="planes: mergetune needs labelled examples"):
        mergetune(BASE, [TUNED], [SAMPLE.without_labels()])
