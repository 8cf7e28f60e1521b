"""Many models in one program against each of them alone, made and run in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import random_params
from sources import RecordSource

from jaxtune.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError
from jaxtune.evaluate import evaluate_classifier, many
from jaxtune.evaluate.candidates import combine_candidates, line_candidates, mix_candidates, stack_candidates
from jaxtune.evaluate.many import ClassScores, evaluate_many, score_many
from jaxtune.models import mlp
from jaxtune.sample import Sample
from jaxtune.sampling import Forward
from jaxtune.tree import flatten, map_leaves

CONFIG = mlp.Config(image_shape=(3, 3, 1), widths=(6,), num_outputs=4)
FORWARD = Forward(CONFIG)
NUM_EXAMPLES, NUM_MODELS = 23, 5
MODELS = [random_params(CONFIG, seed=seed, dtype=np.float32) for seed in range(NUM_MODELS)]
DRAW = np.random.default_rng(0)
SOURCE = RecordSource(
    DRAW.normal(size=(NUM_EXAMPLES, 3, 3, 1)).astype(np.float32), DRAW.integers(0, 4, NUM_EXAMPLES).astype(np.int32)
)


def losses_in_numpy(params):
    """Per example, float64, one at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    losses = []
    for image, label in zip(SOURCE.images.astype(np.float64), SOURCE.labels, strict=True):
        hidden = np.maximum(image.ravel() @ params["layer_0"]["kernel"] + params["layer_0"]["bias"], 0)
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    return np.array(losses)


def summed(base, vectors, coefficients):
    """`base + Σ c v` leaf by leaf; `coefficients` a list, or path -> list."""
    total = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(base).items()}
    for n, vector in enumerate(vectors):
        for path, leaf in flatten(vector).items():
            c = coefficients[path] if isinstance(coefficients, dict) else coefficients
            total[path] = total[path] + c[n] * np.asarray(leaf, np.float64)
    nested = {}
    for path, leaf in total.items():
        layer, name = path.split("/")
        nested.setdefault(layer, {})[name] = leaf
    return nested


def test_metrics_equal_a_loop_of_evaluations():
    found = evaluate_many(stack_candidates(MODELS), FORWARD, SOURCE, top_k=2)
    for one, params in zip(found, MODELS, strict=True):
        expected = dataclasses.asdict(evaluate_classifier(CONFIG, params, SOURCE, top_k=2))
        assert dataclasses.asdict(one) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"at_a_time": 3}, {"batch_size": 4, "memory": 1}])
def test_scores_equal_numpy_whatever_is_shared(how):
    base, *vectors = MODELS[:4]
    coefficients = np.random.default_rng(1).normal(size=(7, 3))
    weights = np.random.default_rng(2).dirichlet(np.ones(5), 3)  # more models than are added one by one
    cases = [
        (combine_candidates(base, vectors, coefficients), [summed(base, vectors, c) for c in coefficients]),
        (mix_candidates(MODELS, weights), [summed(map_leaves(lambda _, x: 0 * x, base), MODELS, w) for w in weights]),
        (stack_candidates(MODELS), MODELS),
    ]
    for candidates, expected in cases:
        scores = score_many(candidates, ClassScores(FORWARD), SOURCE, **how)
        assert scores["loss"].shape == (len(expected), NUM_EXAMPLES)
        # float32 against float64.
        np.testing.assert_allclose(scores["loss"], [losses_in_numpy(p) for p in expected], rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(scores["label"], np.tile(SOURCE.labels, (len(expected), 1)))


def test_every_leaf_or_block_may_have_coefficients_of_its_own():
    base, *vectors = MODELS[:3]
    paths = list(flatten(base))
    each = np.random.default_rng(1).normal(size=(2, 2, len(paths)))
    expected = [summed(base, vectors, {path: c[:, n] for n, path in enumerate(paths)}) for c in each]
    found = score_many(combine_candidates(base, vectors, each), ClassScores(FORWARD), SOURCE)["loss"]
    np.testing.assert_allclose(found, [losses_in_numpy(p) for p in expected], rtol=2e-4, atol=1e-5)
    blocks = {path: int(path.startswith("head")) for path in paths}
    expected = [summed(base, vectors, {path: c[:, n] for path, n in blocks.items()}) for c in each]
    candidates = combine_candidates(base, vectors, each[:, :, :2], blocks=blocks)
    found = score_many(candidates, ClassScores(FORWARD), SOURCE)["loss"]
    np.testing.assert_allclose(found, [losses_in_numpy(p) for p in expected], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_a_line_ends_bit_for_bit_at_its_models(dtype):
    first, second = (
        {**map_leaves(lambda _, x: x.astype(dtype), m), "step": np.int32(n)} for n, m in enumerate(MODELS[:2])
    )
    line = line_candidates(first, second, [0.0, 0.5, 1.0])
    for index, end in ((0, first), (2, second)):
        taken = line.take(index)
        assert int(taken.pop("step")) == 0  # a leaf without a line is the first's
        for path, leaf in flatten(taken).items():
            np.testing.assert_array_equal(leaf, flatten(end)[path])
    middle = flatten(line.take(1))["head/kernel"]
    ends = (np.float32(x["head"]["kernel"]) for x in (first, second))
    np.testing.assert_array_equal(middle, (sum(ends) * np.float32(0.5)).astype(dtype))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_neighbours_change_nothing_on_a_cpu(num_devices, monkeypatch):
    """One device is shared by threads, two have a part of the models each."""
    devices = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(many.os, "sched_getaffinity", lambda _: {0, 1})
    everyone = score_many(stack_candidates(MODELS), ClassScores(FORWARD), SOURCE)
    for n in range(NUM_MODELS):
        alone = score_many(stack_candidates(MODELS).select([n]), ClassScores(FORWARD), SOURCE)
        for name, values in alone.items():
            np.testing.assert_array_equal(values[0], everyone[name][n])


def test_a_variance_is_held_at_zero_where_asked():
    base, vector = MODELS[:2]
    candidates = combine_candidates(base, [vector], [[-9.0]], nonnegative=["head/bias"])
    expected = np.maximum(summed(base, [vector], [-9.0])["head"]["bias"], 0)
    assert (expected == 0).any()
    assert (expected > 0).any()
    np.testing.assert_allclose(candidates.take(0)["head"]["bias"], expected, rtol=1e-5)


def test_a_program_is_compiled_once():
    many._compile.cache_clear()
    for scales in ([0.0, 0.1, 0.2], [0.3, 0.4, 0.5]):
        score_many(combine_candidates(MODELS[0], MODELS[1:2], np.array(scales)[:, None]), ClassScores(FORWARD), SOURCE)
    assert many._compile.cache_info().misses == 1


def test_settings_of_the_caller_hold_in_the_program():
    base, vector = (map_leaves(lambda _, x: x.astype(np.float64), model) for model in MODELS[:2])
    with jax.enable_x64(True):
        candidates = combine_candidates(base, [vector], [[1.0], [0.3]])
        assert candidates.take(1)["head"]["kernel"].dtype == np.float64
        scores = score_many(candidates, ClassScores(FORWARD), SOURCE)
    expected = [losses_in_numpy(summed(base, [vector], [c])) for c in (1.0, 0.3)]
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)


def test_models_stand_side_by_side_as_memory_allows(monkeypatch):
    """As on an accelerator, with the memory that the compiler says its programs take."""
    monkeypatch.setattr(many, "_is_cpu", lambda: False)
    sizes, compiled = [], many._compile

    def spy(score, build, at_a_time, *rest):
        program = compiled(score, build, at_a_time, *rest)
        sizes.append((at_a_time, program.memory_analysis().temp_size_in_bytes))
        return program

    monkeypatch.setattr(many, "_compile", spy)
    expected = score_many(stack_candidates(MODELS), ClassScores(FORWARD), SOURCE)["loss"]
    most, used = sizes[-1]
    assert most == 3  # 5 on two devices
    sizes.clear()
    found = score_many(stack_candidates(MODELS), ClassScores(FORWARD), SOURCE, memory=used - 1)["loss"]
    assert sizes[-1][0] < 3
    assert sizes[-1][1] < used
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_stacked_models_reach_a_device_as_memory_allows(monkeypatch):
    shapes, run = [], many._run

    def spy(plan, *rest):
        shapes.append(plan.rows.shape)
        return run(plan, *rest)

    monkeypatch.setattr(many, "_run", spy)
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(MODELS[0]))
    for memory in (10**9, 4 * one):
        score_many(stack_candidates(MODELS * 4), ClassScores(FORWARD), SOURCE, memory=memory)
    assert shapes[0] == (2, 10 * 1)  # two devices, each with one worker
    assert shapes[-1][0] >= 10  # 20 models on two devices, those of two calls within half of the memory


def test_a_sample_is_taken_as_a_source_is():
    sample = Sample("noise", {"image": SOURCE.images, "label": SOURCE.labels}, FORWARD)
    found = score_many(stack_candidates(MODELS[:2]), ClassScores(sample.forward), sample)
    expected = score_many(stack_candidates(MODELS[:2]), ClassScores(FORWARD), SOURCE)
    np.testing.assert_array_equal(found["loss"], expected["loss"])


def test_what_cannot_be_evaluated_is_refused():
    base, vector = MODELS[:2]
    for coefficients in ([1.0], [[1.0, 2.0]], np.zeros((0, 1)), np.zeros((1, 1, 3))):
        with pytest.raises(ConfigError, match="coefficients have shape"):
            combine_candidates(base, [vector], coefficients)
    with pytest.raises(ConfigError, match="those of candidate 1 are not"):
        combine_candidates(base, [vector], [[1.0], [np.inf]])
    with pytest.raises(ConfigError, match="names every float leaf"):
        combine_candidates(base, [vector], np.ones((1, 1, 1)), blocks={"head/bias": 0})
    with pytest.raises(ConfigError, match="no model"):
        stack_candidates([])
    with pytest.raises(TreeMismatchError, match="head"):
        mix_candidates([base, {"layer_0": base["layer_0"]}], [[0.5, 0.5]])
    candidates = stack_candidates(MODELS)
    with pytest.raises(ConfigError, match="memory is 0"):
        score_many(candidates, ClassScores(FORWARD), SOURCE, memory=0)
    with pytest.raises(ConfigError, match="top_k is 0"):
        evaluate_many(candidates, FORWARD, SOURCE, top_k=0)
    with pytest.raises(DataError, match="no examples"):
        evaluate_many(candidates, FORWARD, RecordSource(SOURCE.images[:0], SOURCE.labels[:0]))
    with pytest.raises(DataError, match="example 0 has a label"):
        evaluate_many(candidates, FORWARD, RecordSource(SOURCE.images[:1], np.array([4], np.int32)))
    burst = stack_candidates([base, map_leaves(lambda _, x: x * np.float32(np.nan), base)])
    with pytest.raises(NonFiniteError, match="first for example 0"):
        evaluate_many(burst, FORWARD, SOURCE)
    with pytest.raises(IndexError, match="candidate 5 of 5"):
        candidates.take(5)
