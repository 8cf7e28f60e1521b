"""The ladder: its rungs are what they say, its numbers are what a plain loop gives, and it goes on where it stopped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from config_files import CONFIGS, read_module

from experiments.ladder import FIELDS, climb
from experiments.rungs.measure import ask_other_width
from experiments.rungs.networks import Networks, Schedule
from experiments.rungs.pairs import Rungs, build_pairs
from experiments.rungs.results import dump_result
from experiments.rungs.summary import bootstrap, judge_verdict, summarise_pair
from jaxtune.data import Loader, open_source
from jaxtune.errors import ConfigError, UnknownNameError
from jaxtune.models import registry, vit
from jaxtune.models.readout import class_embeddings, read_out
from jaxtune.rng import named_key
from jaxtune.transport.registry import without_data
from jaxtune.tree import flatten

VIT = vit.Config(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, mlp_width=24, num_outputs=16, channels=1)
SCHEDULE = Schedule(num_steps=12, learning_rate=3e-3, batch_size=16)


def read_config(name):
    return read_module(name).get_config()


def tiny_config(**changes):
    """The small ladder at a size for tests."""
    config = read_config("ladder_small").to_dict()
    digits = {"name": "digits", "options": {"size": 16, "margin": 1}}
    config |= {
        "models": {"tiny": registry.config_to_dict(VIT)},
        "learning_rates": {"tiny": 3e-3},
        "pretrain": {"sources": (digits,), "num_steps": 12, "batch_size": 16},
        "rungs": {"drift": (0.5,), "release": (), "branch": (0.5,), "continued_rate": 1e-3},
        "tasks": {"turned": digits | {"shifts": ({"name": "rotate", "options": {"degrees": 90.0}},)}},
        "finetune": {"num_steps": 8, "batch_size": 16, "learning_rate": 1e-3},
        "num_test": 60,
        "num_support": 60,
        "transition": {"widths": (16,), "num_steps": (4,), "learning_rate": 3e-3, "num_pairs": 1},
    }
    return ml_collections.ConfigDict(config | changes)


def outputs(params, seed=5):
    images = np.random.default_rng(seed).random((8, 16, 16, 1), np.float32)
    return np.asarray(registry.apply(VIT, params, {"image": jnp.asarray(images)}))


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    """Rung -> (pair, source, target) of pair 0, and the networks."""
    networks = Networks(VIT, tmp_path_factory.mktemp("networks"))
    source = open_source("digits", "train", size=16, margin=1)
    built = build_pairs(
        networks, source, SCHEDULE, Rungs(True, (0.5,), (0.25,), (0.0, 1.0), 1e-3, True), num_pairs=2, seed=3
    )
    return {pair.rung: (pair, a, b) for pair, a, b in built if pair.index == 0}, networks


def test_every_rung_is_what_it_says(rungs):
    rungs, _ = rungs
    assert list(rungs) == [
        "L0 planted", "L1 drift 0.5", "L2 release 0.25", "L3 branch 0", "L3 branch 1", "L4 seed", "L5 seed+data",
    ]  # fmt: skip
    old = rungs["L0 planted"][1]
    apart = {}
    for rung, (pair, source, target) in rungs.items():
        jax.tree.map(np.testing.assert_array_equal, source, old)
        assert pair.is_equivalent == (rung == "L0 planted")
        apart[rung] = np.abs(outputs(target) - outputs(source)).max()
    # Planted: the same function in other weights. A branch after the last step: the same weights.
    assert apart["L0 planted"] < 1e-4 * np.abs(outputs(old)).max()
    assert apart["L3 branch 1"] == 0
    kernels = [flatten(rungs[rung][2])["block_0/mlp/up/kernel"] for rung in ("L0 planted", "L3 branch 1")]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    assert min(apart["L1 drift 0.5"], apart["L2 release 0.25"]) > 0
    # From one start, kin after a dozen steps; from another, strangers.
    assert 0 < apart["L3 branch 0"] < 0.5 * min(apart["L4 seed"], apart["L5 seed+data"])


def test_networks_are_trained_once_and_found_again(rungs):
    _, networks = rungs
    again = networks.get("base_0", lambda: pytest.fail("it is on disk"))
    assert flatten(again)["block_0/mlp/up/kernel"].dtype == np.float32


def test_training_is_plain_adamw_in_chunks(tmp_path):
    """Against a loop of single steps written here."""
    source = open_source("digits", "train", size=16, margin=1)
    schedule = Schedule(num_steps=30, learning_rate=1e-3, batch_size=8, weight_decay=0.0)
    start = registry.init(named_key(jax.random.key(0), "init"), VIT)
    ours = Networks(VIT, tmp_path).train("net", lambda: start, source, schedule, seed=4, branch=(10, 5))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 3, 30, 5e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    embeddings = jnp.asarray(class_embeddings(source.class_names, 16))

    @jax.jit
    def step(params, state, batch):
        def loss_of(params):
            logits = read_out(registry.apply(VIT, params, batch), embeddings)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    first, second = (iter(Loader(source, 8, seed=seed)) for seed in (4, 5))
    for n in range(30):
        params, state = step(params, state, next(first if n < 10 else second))
    for path, leaf in flatten(ours).items():
        if not path.endswith("attn/k/bias"):  # softmax is blind to it: its gradient is rounding, which Adam enlarges
            np.testing.assert_allclose(leaf, flatten(params)[path], atol=2e-4, err_msg=path)


def test_another_width_is_refused_by_every_method():
    source = registry.init(jax.random.key(1), VIT)
    answers = ask_other_width(VIT, dataclasses.replace(VIT, width=24), source, source)
    assert set(answers) == set(without_data())
    assert all(answer.startswith("TreeMismatchError") for answer in answers.values()), answers


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("ladder")
    assert climb(tiny_config(), path) is None
    return path


@pytest.mark.slow
def test_a_whole_ladder(climbed):
    result = json.loads((climbed / "ladder.json").read_text())
    assert list(result["rungs"]["tiny"]) == ["L0 planted", "L1 drift 0.5", "L3 branch 0.5", "L4 seed", "L5 seed+data"]
    assert len(result["pairs"]) == 10
    assert {pair["index"] for pair in result["pairs"]} == {0, 1}
    controls = {"random element", "random vector of the same norms", "full with its layers shuffled"}
    for row in result["rows"]:
        assert 0 <= row["accuracy"] <= 1
    for pair in result["pairs"]:
        methods = {row["method"] for row in result["rows"] if row["rung"] == pair["rung"]}
        assert set(without_data()) | controls | {"base", "ceiling"} <= methods
        assert ("2 shots a class" in methods) == (pair["rung"] != "L0 planted")
        assert set(pair["middle"]) == {"identity", "permutation", "full"}
    planted = {row["method"]: row for row in result["rows"] if row["rung"] == "L0 planted" and row["index"] == 0}
    assert planted["full"]["accuracy"] == planted["ceiling"]["accuracy"]
    assert {pair["chosen"] for pair in result["pairs"] if pair["rung"] == "L0 planted"} == {"full"}
    assert all(answer.startswith("TreeMismatchError") for answer in result["other_width"]["tiny"].values())
    assert [(cell["width"], cell["num_steps"]) for cell in result["transition"]] == [(16, 4)]
    page = (climbed / "ladder.md").read_text()
    assert "### tiny" in page
    assert "L5 seed+data" in page
    assert "no method" in page
    assert {"ladder_tiny.svg", "transition_recovered.svg"} <= {file.name for file in climbed.iterdir()}


@pytest.mark.slow
def test_the_same_command_measures_nothing_twice(climbed, monkeypatch):
    monkeypatch.setattr("experiments.ladder.measure_pair", lambda *_, **__: pytest.fail("it is on disk"))
    before = (climbed / "ladder.json").read_bytes()
    assert climb(tiny_config(), climbed) is None
    assert (climbed / "ladder.json").read_bytes() == before
    config = tiny_config()
    config.pretrain.num_steps = 13
    with pytest.raises(ConfigError, match=r"pretrain.num_steps: began with 12, now 13"):
        climb(config, climbed)


def test_the_file_of_all_numbers_reads_pair_by_pair():
    result = {"config": {"a": 1}, "pairs": [{"x": 1 / 3}, {"x": None}], "rows": []}
    text = dump_result(result)
    assert json.loads(text) == {**result, "pairs": [{"x": 0.333333}, {"x": None}]}
    assert '  {"x": 0.333333},\n  {"x": null}\n' in text
    with pytest.raises(ValueError, match="JSON"):
        dump_result({"config": {}, "pairs": [{"x": float("nan")}], "rows": []})


def test_what_a_config_may_not_say(tmp_path):
    with pytest.raises(UnknownNameError, match=r"config\.only"):
        climb(tiny_config(only="tinny"), tmp_path)
    with pytest.raises(ConfigError, match="data_dir"):
        climb(tiny_config(tasks={"a": {"name": "mnist.npz"}}), tmp_path)
    with pytest.raises(ConfigError, match="fields are"):
        climb(tiny_config(tasks={"a": {"name": "digits", "shift": ()}}), tmp_path)
    for name in (path.stem for path in CONFIGS.glob("ladder*.py")):
        for model in read_config(name).models.values():
            registry.config_from_dict(model.to_dict())
        assert {field.split(".")[0] for field in FIELDS} == set(read_config(name).to_dict())


def test_shares_divide_means_and_not_tasks():
    rows = [
        {"task": task, "method": method, "accuracy": accuracy, **({"support": 0.5} if method == "full" else {})}
        for task, accuracies in {"a": (0.2, 0.8, 0.5), "b": (0.7, 0.8, 0.7)}.items()
        for method, accuracy in zip(("base", "ceiling", "full"), accuracies, strict=True)
    ]
    summary = summarise_pair(rows)
    assert summary["full"]["recovered"] == pytest.approx((0.6 - 0.45) / (0.8 - 0.45))
    assert (summary["base"]["recovered"], summary["ceiling"]["recovered"]) == (0, 1)
    assert summary["full"]["support"] == 0.5
    assert summary["base"]["support"] is None
    small = [row | {"accuracy": 0.7 + 0.05 * (row["method"] == "ceiling")} for row in rows]
    assert summarise_pair(small)["full"]["recovered"] is None


def test_the_interval_is_that_of_a_mean():
    draw = np.random.default_rng(0)
    values = draw.normal(size=400)
    mean, low, high = bootstrap(values)
    assert mean == pytest.approx(values.mean())
    assert high - mean == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert mean - low == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap([0.3]) == (pytest.approx(0.3),) * 3


def test_the_verdicts_worth_counts_wrong_advice():
    def pair(verdict, recovered, residual):
        return {
            "methods": {"auto": {"recovered": recovered}},
            "verdict": {"verdict": verdict},
            "residuals": {"identity": residual},
            "chosen": "identity",
            "cosine": {"identity": 0.5},
            "middle": {"identity": {"barrier": 1.0}},
        }

    judged = judge_verdict(
        [
            pair("related", 0.9, 0.1),
            pair("related", 0.2, 0.6),
            pair("unrelated", 0.1, 0.9),
            pair("unrelated", 0.6, 0.3),
            pair("same", None, 0.0),
        ]
    )
    assert (judged["num_pairs"], judged["num_kin"]) == (4, 2)
    assert (judged["kin_but_not_worth"], judged["unrelated_but_worth"]) == (1, 1)
    assert judged["wrong_advice"] == {"lineage": 0.5, "residual": 0.0}
    assert judged["rank_correlation"]["cosine after the chosen alignment"] == pytest.approx(1.0)
    assert judged["rank_correlation"]["cosine in place"] is None  # the same for all
