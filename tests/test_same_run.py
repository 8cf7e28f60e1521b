"""States of a run: taken up by a call with the same arguments, refused by every other."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import linear_task as task
import numpy as np
import pytest
from toy_tasks import Linear, add, make_base, make_task, make_vectors

from jaxtune.compose.bang import bang
from jaxtune.compose.fewshot import tune_few
from jaxtune.compose.fitting import Recipe, fit, split, supervised
from jaxtune.compose.learning import learn
from jaxtune.compose.objectives import cross_entropy, entropy
from jaxtune.compose.registry import METHODS, compose
from jaxtune.compose.sparse_tuning import tune_sparse
from jaxtune.compose.vectors import build_tasks, stack_vectors
from jaxtune.errors import ConfigError
from jaxtune.models import mlp
from jaxtune.sampling import Forward, Frozen
from jaxtune.teach.descent import Aim, descend
from jaxtune.teach.distill import distill
from jaxtune.teach.on_policy import distill_on_policy
from jaxtune.teach.weights import whole_weights
from jaxtune.train.checkpoints import StateSeries
from jaxtune.train.same_run import STATES, describe

BASE = make_base()
EXPERTS = [add(BASE, [vector], [1.0]) for vector in make_vectors(3)]
SAMPLES = [make_task(expert, seed=n, name=f"task {n}") for n, expert in enumerate(EXPERTS)]


@pytest.fixture
def series(tmp_path):
    with StateSeries(tmp_path / "states") as opened:
        yield opened


def changed(sample):
    """One example is another."""
    image = sample.batch["image"].copy()
    image[-1] += 1
    return replace(sample, batch={**sample.batch, "image": image})


def test_a_composition_of_other_options_models_or_examples_is_not_taken_up(series):
    how = {"num_steps": 2, "objective": "expert", "start": 0.9, "is_best_kept": True}
    first = compose("ada_merging", BASE, EXPERTS[:2], SAMPLES[:2], series=series, **how)
    for models, samples, others, words in (
        (EXPERTS[:2], SAMPLES[:2], {"start": 0.3}, "a run with start 0.9; this one has start 0.3"),
        (EXPERTS[:2], SAMPLES[:2], {"objective": "entropy"}, "with objective expert; this one has objective entropy"),
        (EXPERTS[:2], SAMPLES[:2], {"confidence": 0.1}, "a run with confidence 0.0; this one has confidence 0.1"),
        (EXPERTS[1:], SAMPLES[:2], {}, "a run with finetuned"),
        (EXPERTS[:2], [changed(SAMPLES[0]), SAMPLES[1]], {}, "a run with samples"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose("ada_merging", BASE, models, samples, series=series, **how | others)
    renamed = [replace(sample, name="moved") for sample in SAMPLES[:2]]
    copies = jax.tree.map(jnp.asarray, EXPERTS[:2])
    again = compose("ada_merging", BASE, copies, renamed, series=series, **how)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.info == again.info


def test_a_student_of_another_teacher_is_not_taken_up(series):
    base, teachers = task.draw_params(seed=0), [task.draw_params(seed=n) for n in (1, 2)]
    sample = task.draw_sample(24)
    how = {"num_steps": 2, "learning_rate": 1e-2, "held_out": 0.0}
    first = distill(sample, teachers[0], base, series=series, **how)
    for teacher, others, words in (
        (teachers[1], {}, "with teacher"),
        (teachers[0], {"temperature": 4.0}, r"temperature 1\.0; this one has temperature 4\.0"),
        (teachers[0], {"anchor": 1.0}, r"anchor 0\.0; this one has anchor 1\.0"),
        (teachers[0], {"key": jax.random.key(5)}, "with key None; this one has key"),
        (teachers[0], {"support": sample}, "with support None"),
    ):
        with pytest.raises(ConfigError, match=words):
            distill(sample, teacher, base, series=series, **how | others)
    again = distill(sample, teachers[0], base, series=series, **how)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_what_is_only_reported_may_change(series):
    base, sample, recipe = task.draw_params(seed=1, scale=0.1), task.draw_sample(40), Recipe(3, 0.1, 20)
    whole = bang(base, sample, recipe=recipe, series=series)
    other = bang(base, sample, recipe=recipe, series=series, weight=1.0, reports=[sample])
    jax.tree.map(np.testing.assert_array_equal, whole.coefficients, other.params)
    with pytest.raises(ConfigError, match=r"recipe .*'num_steps': 3.*; this one has .*'momentum': 0\.5"):
        bang(base, sample, recipe=replace(recipe, momentum=0.5), series=series)


def test_the_loops_themselves_know_what_they_minimise(tmp_path):
    base, sample = task.draw_params(seed=1), task.draw_sample(20)
    moving, still = split(base, sample)
    with StateSeries(tmp_path / "fit") as series:
        fit(supervised, moving, still, sample, recipe=Recipe(1), series=series)
        with pytest.raises(ConfigError, match="with start"):
            fit(supervised, split(task.draw_params(seed=2), sample)[0], still, sample, recipe=Recipe(1), series=series)
    how = {"key": jax.random.key(0), "num_steps": 1, "batch_size": 20, "learning_rates": [1e-3]}
    with StateSeries(tmp_path / "descend") as series:
        aim = Aim(LossTimes(1.0))
        descend(whole_weights(base), aim, sample, series=series, **how)
        with pytest.raises(ConfigError, match="with aim"):
            descend(whole_weights(base), Aim(LossTimes(2.0)), sample, series=series, **how)
        with pytest.raises(ConfigError, match="with key"):
            descend(whole_weights(base), aim, sample, series=series, **how | {"key": jax.random.key(1)})
    fixed, first = stack_vectors(BASE, EXPERTS[:2]), np.full(2, 0.3, np.float32)
    how = {"num_steps": 1, "learning_rate": 1e-2}
    with StateSeries(tmp_path / "learn") as series:
        learn(build_tasks, fixed, first, SAMPLES[:2], objective=entropy, series=series, **how)
        with pytest.raises(ConfigError, match="with objective"):
            learn(build_tasks, fixed, first, SAMPLES[:2], objective=cross_entropy, series=series, **how)


class LossTimes:
    """Cross-entropy times a factor; hashable as objects are."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, params, batch):
        logits = task.forward(params, {"image": batch["image"]})
        on_label = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None].astype(jnp.int32), axis=-1)
        return -self.factor * on_label[:, 0]


def test_states_that_say_nothing_of_their_arguments_are_refused(series):
    class Old:
        """As states were kept before arguments stood beside them."""

        latest_step = 1

        def restore(self, like):
            return like, {"num_steps": 2}

    with pytest.raises(ConfigError, match="do not say which arguments they are of"):
        compose("ada_merging", BASE, EXPERTS[:1], SAMPLES[:1], num_steps=2, series=Old())


def test_everything_that_keeps_states_is_marked():
    kept = [method.run for method in METHODS.values() if set(STATES) & set(method.run.__kwdefaults__ or {})]
    kept = [run for run in kept if not hasattr(run, "__wrapped__")]
    others = [bang, tune_few, tune_sparse, distill, distill_on_policy, learn, fit, descend]
    assert not kept
    assert all(hasattr(function, "__wrapped__") for function in others)


SCRIPT = """
import numpy as np
from jaxtune.models import mlp
from jaxtune.sampling import Forward, Frozen
from jaxtune.sample import Sample, example_losses
from jaxtune.train.same_run import describe
config = mlp.Config(image_shape=(4, 4, 1), widths=(6,), num_outputs=3)
table = Frozen(np.ones((3, 3), np.float32))
print(describe({"forward": Forward(config, table), "loss": example_losses, "set": [np.arange(3), 1.5, None]}))
"""


def test_a_digest_is_the_same_in_another_process_and_another_for_other_bits():
    made = [
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    ]
    assert made[0] == made[1] != ""
    config = mlp.Config(image_shape=(4, 4, 1), widths=(6,), num_outputs=3)
    forwards = [Forward(config), Forward(replace(config, widths=(5,))), Forward(config, Frozen(np.ones((3, 3))))]
    assert len({describe(forward) for forward in forwards}) == 3
    assert describe(Linear()) == describe(Linear())
    x = np.arange(4, dtype=np.float32)
    assert describe(x) == describe(jnp.asarray(x)) != describe(x.astype(np.int32))
    assert describe(x) != describe(x.reshape(2, 2))
    assert describe({"a": {"b": x}}) != describe({"a": {"c": x}})
    assert describe((1, 2.0, "x", None, np.float32(0.5))) == [1, 2.0, "x", None, 0.5]
    assert describe(float("inf")) == "inf"
    assert describe(x.astype(jnp.bfloat16)) != describe(x.astype(np.float16))
