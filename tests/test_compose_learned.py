"""AdaRank, SyMerge, ScaLearn and the strength of LiNeS, beside loops in NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_tasks import Linear, add, draw, forward64, make_base, make_task, make_vectors, minimise, softmax, wide

from jaxtune.compose import ada_rank as ada_rank_module
from jaxtune.compose.ada_rank import matrix_shape, straight_through
from jaxtune.compose.registry import compose
from jaxtune.compose.sca_learn import Dropout
from jaxtune.compose.vectors import stack_vectors
from jaxtune.errors import ConfigError, DataError, UnknownNameError

BASE = make_base()
VECTORS = make_vectors(2)
EXPERTS = [add(BASE, [vector], [1.0]) for vector in VECTORS]
SAMPLES = [make_task(expert, seed=n, name=f"task {n}") for n, expert in enumerate(EXPERTS)]
MATRICES = ("block_0/kernel", "block_1/kernel")


def leaf(tree, path):
    block, name = path.split("/")
    return tree[block][name]


def accuracy(params, sample):
    return float((np.asarray(Linear()(params, sample.batch)).argmax(-1) == sample.batch["label"]).mean())


# --- AdaRank ---------------------------------------------------------------------------------------------------------


def rebuild(masks, scale):
    """Base and masked components, by a loop over components in float64."""
    params = wide(BASE)
    for t, vector in enumerate(map(wide, VECTORS)):
        params["block_0"]["bias"] = params["block_0"]["bias"] + scale * vector["block_0"]["bias"]
        for path in MATRICES:
            u, s, vt = np.linalg.svd(leaf(vector, path), full_matrices=False)
            for r in range(len(s)):
                if masks[path][t, r]:
                    block, name = path.split("/")
                    params[block][name] = params[block][name] + scale * s[r] * np.outer(u[:, r], vt[r])
    return params


def test_all_components_are_task_arithmetic_and_half_of_them_are_the_largest():
    for share in (1.0, 0.5, 0.0):
        found = compose("ada_rank", BASE, EXPERTS, SAMPLES, start_rank=share, num_steps=1, learning_rate=1e-9)
        masks = found.coefficients["mask"]
        counts = {path: int(np.ceil(share * min(leaf(BASE, path).shape))) for path in MATRICES}
        for path in MATRICES:
            np.testing.assert_array_equal(
                masks[path], np.arange(masks[path].shape[1])[None] < np.full((2, 1), counts[path])
            )
        expected = rebuild(masks, 0.3)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, dict(expected))
    whole = compose("ada_rank", BASE, EXPERTS, SAMPLES, num_steps=1, learning_rate=1e-9)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole.params, add(BASE, VECTORS, [0.3, 0.3]))


def test_what_is_given_back_is_the_network_of_the_masks():
    found = compose(
        "ada_rank", BASE, EXPERTS, SAMPLES, objective="expert", num_steps=20, learning_rate=0.02, is_scale_learned=False
    )  # fmt: skip
    expected = rebuild(found.coefficients["mask"], 0.3)
    assert 0 < found.info["kept"] < 1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, dict(expected))


def test_the_gradient_of_a_mask_is_that_of_its_component():
    """Straight through: d loss / d b at the hard mask, by central differences of a loop."""
    fixed = ada_rank_module.decompose(stack_vectors(BASE, EXPERTS), None)
    scale = {path: np.full(2, 0.3, np.float32) for path in (*MATRICES, "block_0/bias")}
    mask = {path: np.array([[0.7, 0.2, 0.55], [0.4, 0.9, 0.51]], np.float32) for path in MATRICES}
    mask["block_0/kernel"] = np.tile(mask["block_0/kernel"], (1, 2))
    image = SAMPLES[0].batch["image"]
    build = ada_rank_module.BuildRanks()

    def loss(mask):
        params = build({**fixed, "scale": scale}, {"mask": mask})
        return jnp.mean(jax.nn.logsumexp(Linear()(params, {"image": image}), axis=-1))

    gradient = jax.grad(loss)(mask)

    def loss64(soft):
        params = wide(add(BASE, VECTORS, [0.3, 0.3]))
        for path in MATRICES:
            block, name = path.split("/")
            params[block][name] = wide(BASE)[block][name]
            for t in range(2):
                u, s, vt = np.linalg.svd(leaf(wide(VECTORS[t]), path), full_matrices=False)
                params[block][name] = params[block][name] + 0.3 * (u * (soft[path][t] * s)) @ vt
        return np.log(np.exp(forward64(params, image)).sum(-1)).mean()

    hard = {path: (values >= 0.5).astype(float) for path, values in mask.items()}
    for path in MATRICES:
        for where in np.ndindex(hard[path].shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = {p: v.copy() for p, v in hard.items()}
                moved[path][where] += step
                values.append(loss64(moved))
            assert gradient[path][where] == pytest.approx((values[0] - values[1]) / 2e-5, abs=2e-5)


def test_straight_through_is_a_step_with_the_slope_of_a_line():
    values = jnp.array([-1.0, 0.49, 0.5, 2.0])
    np.testing.assert_array_equal(straight_through(values), [0, 0, 1, 1])
    np.testing.assert_array_equal(jax.grad(lambda x: straight_through(x).sum())(values), np.ones(4))


def test_components_that_hurt_are_dropped():
    """One expert's vector carries noise in small components; taught by the clean one, the mask loses noise first."""
    u, _, vt = np.linalg.svd(VECTORS[0]["block_0"]["kernel"])
    signal = (u[:, :2] * [3.0, 2.0]) @ vt[:2]
    noise = (u[:, 2:] * [1.5, 1.4, 1.3, 1.2]) @ vt[2:]
    zero = jax.tree.map(np.zeros_like, BASE)
    vector = {**zero, "block_0": {**zero["block_0"], "kernel": (signal + noise).astype(np.float32)}}
    clean = {**zero, "block_0": {**zero["block_0"], "kernel": signal.astype(np.float32)}}
    teacher, noisy = add(BASE, [clean], [1.0]), add(BASE, [vector], [1.0])
    from jaxtune.compose import objectives
    from jaxtune.compose.learning import learn

    fixed = ada_rank_module.decompose(stack_vectors(BASE, [noisy]), None)
    fixed["scale"] = {path: np.ones(1, np.float32) for path in (*MATRICES, "block_0/bias")}
    start = {"mask": {path: np.full((1, 6 if path == "block_0/kernel" else 3), 0.55, np.float32) for path in MATRICES}}
    sample = objectives.teach(make_task(teacher, size=200, labelled=False), teacher)
    found = learn(
        ada_rank_module.BuildRanks(), fixed, start, [sample], objective=objectives.expert, num_steps=150,
        learning_rate=0.01, batch_size=200,
    )  # fmt: skip
    kept = np.asarray(found.numbers["mask"]["block_0/kernel"])[0] >= 0.5
    np.testing.assert_array_equal(kept, [True, True, False, False, False, False])


def test_leaves_are_read_as_matrices_near_to_squares():
    assert matrix_shape((64, 4, 16)) == (64, 64)
    assert matrix_shape((4, 16, 64)) == (64, 64)
    assert matrix_shape((7, 7, 1, 64)) == (49, 64)
    assert matrix_shape((5,)) is None
    assert matrix_shape((3, 0)) is None


# --- SyMerge ---------------------------------------------------------------------------------------------------------


def test_every_task_has_its_layer_and_shares_the_trunk():
    found = compose("sy_merge", BASE, EXPERTS, SAMPLES, layer="block_1/*", num_steps=30, learning_rate=0.02)
    assert found.info["own"] == ["block_1/kernel"]
    first, second = found.per_task
    np.testing.assert_array_equal(first["block_0"]["kernel"], second["block_0"]["kernel"])
    assert (first["block_1"]["kernel"] != second["block_1"]["kernel"]).any()
    shares = [{path: c[n] for path, c in found.coefficients.items()} for n in range(2)]
    expected = add(BASE, VECTORS, shares)
    np.testing.assert_allclose(first["block_0"]["kernel"], expected["block_0"]["kernel"], atol=1e-6)
    start, learned = ([one["divergence"] for one in found.info["validation"][w]] for w in ("start", "learned"))
    assert sum(learned) < sum(start)
    for model, sample, one in zip(found.per_task, SAMPLES, found.info["validation"]["learned"], strict=True):
        assert one["accuracy"] == pytest.approx(accuracy(model, sample.split(0.25, by_class=False)[1]))


def test_layers_and_coefficients_take_the_steps_of_a_loop_in_numpy():
    found = compose(
        "sy_merge", BASE, EXPERTS, SAMPLES, layer="block_1/*", num_steps=2, learning_rate=0.05, batch_size=60,
        validation=0.0,
    )  # fmt: skip
    paths = ("block_0/bias", "block_0/kernel")
    heads = np.stack([expert["block_1"]["kernel"] for expert in EXPERTS]).astype(np.float64)

    def loss(numbers):
        c, own, total = numbers[:4].reshape(2, 2), numbers[4:].reshape(heads.shape), 0.0
        params = wide(BASE)
        for vector, row in zip(map(wide, VECTORS), c, strict=True):
            for n, path in enumerate(paths):
                block, name = path.split("/")
                params[block][name] = params[block][name] + row[n] * vector[block][name]
        for sample, expert, head in zip(SAMPLES, map(wide, EXPERTS), own, strict=True):
            p = softmax(forward64({**params, "block_1": {"kernel": head}}, sample.batch["image"]))
            q = softmax(forward64(expert, sample.batch["image"]))
            total += (q * (np.log(q) - np.log(p))).sum(-1).mean()
        return total

    numbers = minimise(loss, np.concatenate([np.full(4, 0.3), heads.ravel()]), 2, 0.05)
    np.testing.assert_allclose(
        np.stack([found.coefficients[path] for path in paths], axis=1), numbers[:4].reshape(2, 2), atol=1e-4
    )
    own = np.stack([model["block_1"]["kernel"] for model in found.per_task])
    np.testing.assert_allclose(own, numbers[4:].reshape(heads.shape), atol=1e-4)
    np.testing.assert_allclose(found.coefficients["block_1/kernel"], [0.3, 0.3])  # what no task reads is not moved


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"layer= 'head/\*' matches 0 of 3 leaves"):
        compose("sy_merge", BASE, EXPERTS, SAMPLES)


# --- ScaLearn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count"),
    [({}, 2 * (6 + 6 + 3)), ({"is_uniform": True}, 2 * 3), ({"is_uniform": True, "is_shared": True}, 2)],
    ids=["rows", "uniform", "uniform++"],
)
def test_rows_are_weighted_each_for_itself(how, count):
    found = compose("sca_learn", BASE, EXPERTS, SAMPLES[:1], num_epochs=1, dropout=0.0, validation=0.0, **how)
    assert sum(c.size for c in found.coefficients.values()) == count
    for path in ("block_0/kernel", "block_0/bias", "block_1/kernel"):
        expected = leaf(BASE, path).astype(np.float64)
        numbers = found.coefficients["all" if how.get("is_shared") else path]
        for vector, omega in zip(VECTORS, numbers, strict=True):
            for output in range(expected.shape[-1]):
                expected[..., output] += omega[output if len(omega) > 1 else 0] * leaf(vector, path)[..., output]
        np.testing.assert_allclose(leaf(found.params, path), expected, atol=1e-5)


def test_planted_rows_are_found_again():
    """The teacher's network lies in the space: KL 0 is reached at its rows."""
    from jaxtune.compose import objectives
    from jaxtune.compose.learning import learn
    from jaxtune.compose.sca_learn import BuildRows

    build = BuildRows({path: (path, leaf(BASE, path).shape[-1], 1) for path in (*MATRICES, "block_0/bias")})
    planted = {path: 0.5 + draw(2, size, seed=n, scale=0.3) for n, (path, size) in enumerate(build.sizes().items())}
    fixed = stack_vectors(BASE, EXPERTS)
    teacher = build(fixed, planted)
    sample = objectives.teach(make_task(teacher, size=300, labelled=False), teacher)
    start = {path: np.ones((2, size), np.float32) for path, size in build.sizes().items()}
    found = learn(
        build, fixed, start, [sample], objective=objectives.expert, num_steps=800, learning_rate=0.05,
        schedule="cosine", batch_size=300,
    )  # fmt: skip
    for path in MATRICES:  # of a bias two numbers make one, and only their sum is there to be found
        np.testing.assert_allclose(found.numbers[path], planted[path], atol=0.02, err_msg=path)
    found = build(fixed, found.numbers)
    np.testing.assert_allclose(found["block_0"]["bias"], teacher["block_0"]["bias"], atol=0.02)


def test_first_numbers_are_near_two_over_s():
    found = compose("sca_learn", BASE, EXPERTS, SAMPLES[:1], num_epochs=1, learning_rate=1e-9, validation=0.0)
    values = np.concatenate([c.ravel() for c in found.coefficients.values()])
    assert abs(values.mean() - 1.0) < 1e-3
    assert 3e-4 < values.std() < 3e-3


def test_dropout_keeps_the_mean():
    numbers = {"a": jnp.ones((40, 50)), "b": jnp.ones(2000)}
    dropped = Dropout(0.3)(numbers, jax.random.key(0))
    for values in dropped.values():
        np.testing.assert_allclose(np.unique(values), [0, 1 / 0.7], rtol=1e-6)
        assert abs(float(jnp.mean(values)) - 1) < 0.05
    assert (np.asarray(dropped["a"]).ravel() != np.asarray(dropped["b"])).any()


# --- LiNeS -----------------------------------------------------------------------------------------------------------


def scaled(vector, alpha, beta):
    return add(BASE, [vector], [{"block_0/kernel": alpha, "block_0/bias": alpha, "block_1/kernel": alpha + beta}])


def test_one_task_is_searched_beside_a_control():
    control = make_task(BASE, seed=5, name="control")
    found = compose("lines", BASE, EXPERTS[:1], [SAMPLES[0], control])
    scores = {}
    for n in range(11):
        alpha = n / 10
        model = scaled(VECTORS[0], alpha, 1 - alpha)
        scores[alpha] = 2 * accuracy(model, SAMPLES[0]) / 1.0 + accuracy(model, control) / 1.0
    assert found.info["scores"] == pytest.approx(scores)
    alpha = max(scores, key=scores.get)
    assert found.coefficients == pytest.approx({"alpha": alpha, "beta": 1 - alpha})
    expected = scaled(VECTORS[0], alpha, 1 - alpha)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.params, expected)
    assert found.info["validation"]["start"][0]["accuracy"] == accuracy(EXPERTS[0], SAMPLES[0])


def test_outside_both_the_whole_head_moves_as_the_last_layer():
    """BERT's and RoBERTa's heads have folders of their own, whose names say nothing."""
    head = {"dense": {"kernel": draw(6, 3, seed=1)}, "norm": {"scale": draw(3, seed=2)}, "bias": draw(3, seed=3)}
    base = {"embed": {"kernel": draw(6, 6, seed=4)}, "text": {"final_norm": {"scale": draw(6, seed=5)}}, "head": head}

    def forward(params, batch):
        hidden = batch["image"] @ params["embed"]["kernel"] * params["text"]["final_norm"]["scale"][None]
        head = params["head"]
        return hidden @ head["dense"]["kernel"] * head["norm"]["scale"][None] + head["bias"][None]

    sample = replace(SAMPLES[0], forward=forward)
    found = compose(
        "lines", base, [jax.tree.map(lambda x: x + 1, base)], [sample, sample], strengths=[0.25], outside="both"
    )
    moved = jax.tree.map(lambda x, y: float(np.mean(x - y)), found.params, base)
    assert moved["embed"]["kernel"] == pytest.approx(0.25, abs=1e-6)
    del moved["embed"]
    assert jax.tree.leaves(moved) == pytest.approx([1.0] * 4, abs=1e-6)


def test_several_tasks_have_their_first_scale_from_norms():
    found = compose("lines", BASE, EXPERTS, SAMPLES)
    assert found.coefficients["alpha"] == pytest.approx(0.5, rel=1e-6)  # a sum at scale 1: 1 / T
    summed = jax.tree.map(np.add, *VECTORS)
    scores = [
        np.mean([accuracy(scaled(summed, 0.5, n / 10), sample) for sample in SAMPLES]) for n in range(11)
    ]  # fmt: skip
    assert list(found.info["scores"].values()) == pytest.approx(scores)
    assert found.coefficients["beta"] == pytest.approx(np.argmax(scores) / 10)
    other = compose("lines", BASE, EXPERTS, SAMPLES, merge_method="ties", options={"density": 0.3})
    kept = np.concatenate([np.abs(x - y).ravel() for x, y in zip(
        jax.tree.leaves(jax.tree.map(np.float64, other.params)), jax.tree.leaves(BASE), strict=True)])  # fmt: skip
    assert (kept == 0).mean() > 0.3  # what TIES trimmed stays the base's


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(UnknownNameError, match="objective"):
        compose("ada_rank", BASE, EXPERTS, SAMPLES, objective="experts")
    with pytest.raises(ConfigError, match=r"start_rank is 1\.5"):
        compose("ada_rank", BASE, EXPERTS, SAMPLES, start_rank=1.5)
    with pytest.raises(ConfigError, match="dropout is 1"):
        compose("sca_learn", BASE, EXPERTS, SAMPLES, dropout=1.0)
    with pytest.raises(DataError, match="task 0: the examples have no labels"):
        compose("sca_learn", BASE, EXPERTS, SAMPLES[0].without_labels())
    with pytest.raises(ConfigError, match="its task's and a control's; got 1"):
        compose("lines", BASE, EXPERTS[:1], SAMPLES[:1])
    with pytest.raises(UnknownNameError, match="'task_arithmetic'"):
        compose("lines", BASE, EXPERTS, SAMPLES, merge_method="task_arithmetics")
