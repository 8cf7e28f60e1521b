"""Recipes whose numbers examples decide: through the command line, to files, and beside what trees give."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from kills import kill_behind

import jaxtune as jt
from jaxtune import checkpoint
from jaxtune.cli import main
from jaxtune.compose.registry import METHODS as LEARNED_METHODS
from jaxtune.compose.registry import compose
from jaxtune.deciding.learned import FEW, _with_weights
from jaxtune.errors import ConfigError
from jaxtune.merge.registry import METHODS as MERGE_METHODS
from jaxtune.merging import merge_recipe, plan_recipe
from jaxtune.models import mlp, registry
from jaxtune.recipes.examples import LEARNED
from jaxtune.recipes.reading import read_recipe
from jaxtune.sampling import make_sample
from jaxtune.tree import flatten

CONFIG = mlp.Config(image_shape=(4, 4, 1), widths=(9,), num_outputs=3)


def tune(params, seed, scale=0.5):
    draw = np.random.RandomState(seed)
    return jax.tree.map(lambda x: (x + scale * draw.normal(size=x.shape)).astype(np.float32), params)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A base, two fine-tunes and examples that each of them labels."""
    folder = tmp_path_factory.mktemp("case")
    base = jax.tree.map(np.asarray, registry.init(jax.random.key(0), CONFIG))
    trees = {"base": base, "a": tune(base, 1), "b": tune(base, 2)}
    for n, (name, params) in enumerate(trees.items()):
        jt.save(folder / name, params, config=registry.config_to_dict(CONFIG))
        arrays = {"class_names": np.array(["x", "y", "z"])}
        for m, split in enumerate(("train", "validation")):
            image = np.random.RandomState(10 + n + 100 * m).uniform(size=(60, 4, 4, 1)).astype(np.float32)
            label = np.asarray(registry.apply(CONFIG, params, {"image": image})).argmax(-1)
            arrays |= {f"{split}_x": image, f"{split}_y": label}
        np.savez(folder / f"{name}.npz", **arrays)
    return folder, trees


def write_recipe(case, method, parameters=None, sources=None, base="base", names="ab", **data):
    folder, _ = case
    recipe = {"merge_method": method}
    if base:
        recipe["base_model"] = str(folder / base)
    recipe["models"] = [{"model": str(folder / name)} for name in names]
    if parameters:
        recipe["parameters"] = parameters
    if sources is None:
        sources = {str(folder / name): f"{name}.npz" for name in names}  # beside the recipe
    recipe["data"] = {"samples": 40, "seed": 3, "sources": sources, **data}
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def compose_few(method, *arguments, **options):
    """With the settings that recipes have for few examples."""
    return compose(method, *arguments, seed=3, **{**FEW.get(method, {}), **options})


def samples_of(case, **how):
    folder, _ = case
    return [make_sample(CONFIG, folder / f"{name}.npz", num_examples=40, seed=3, **how) for name in "ab"]


def set_apart(samples, share, *, by_class=True):
    """[the rest of every sample], [its share]; labels are carried along where they are not to be looked at."""
    pairs = []
    for sample in samples:
        seen = {"row": np.arange(len(sample))} | ({"label": sample.batch["label"]} if by_class else {})
        parts = dataclasses.replace(sample, batch=seen).split(share, seed=3)
        pairs.append([sample.take(part.batch["row"]) for part in parts])
    return tuple(zip(*pairs, strict=True))


def accuracy(params, sample):
    return float((np.asarray(sample.forward(params, sample.batch)).argmax(-1) == sample.batch["label"]).mean())


def test_names_of_learned_methods_are_those_of_the_registry():
    """Recipes know them without loading what learns."""
    assert set(LEARNED) <= set(LEARNED_METHODS)
    assert not set(LEARNED) & set(MERGE_METHODS)


@pytest.mark.parametrize("how", [{"level": "task"}, {"objective": "expert", "learning_rate": 0.02}], ids=str)
def test_learned_coefficients_become_weights_of_stored_tensors(case, tmp_path, how):
    report = merge_recipe(write_recipe(case, "ada_merging", {"num_steps": 5, **how}), tmp_path / "out")
    _, trees = case
    given, judges = set_apart(samples_of(case), 0.125, by_class=False)  # a half of the share judges, the other chooses
    how = {**how, "num_steps": 5, "validation": 0.125 / 0.875}
    found = compose_few("ada_merging", trees["base"], [trees["a"], trees["b"]], given, **how)
    ours = flatten(jt.load(tmp_path / "out").params)
    for path, leaf in flatten(found.params).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    judged = report["data"]["validation"]
    for sample, one in zip(judges, judged["chosen"]["scores"], strict=True):
        assert one["accuracy"] == pytest.approx(accuracy(jt.load(tmp_path / "out").params, sample))
    assert (judged["examples"], judged["which"]) == ([5, 5], "kept apart")
    for name, c in found.coefficients.items():
        np.testing.assert_allclose(report["data"]["coefficients"][name], c, rtol=1e-6)


def test_a_name_that_is_part_of_another_does_not_take_its_weight():
    """The first filter that is part of a name decides, so the longer of two names stands first."""
    recipe = read_recipe(
        {
            "merge_method": "ada_merging",
            "base_model": "b",
            "models": [{"model": "a"}],
            "data": {"sources": {"a": "digits"}},
        }
    )
    names = {name: [name] for name in ("head/kernel", "text/head/kernel", "kernel")}
    models = SimpleNamespace(recipe=recipe, stored_names=lambda: names)
    learned = {name: np.array([n + 0.5]) for n, name in enumerate(names)}
    made = _with_weights(models, learned)
    (setting,) = made.models[0].parameters.values()
    for name, c in learned.items():
        assert next(one for one in setting.conditions if one.matches(name)).value == c[0]


def test_what_was_asked_for_and_found_stands_in_report_and_card(case, tmp_path):
    recipe = write_recipe(case, "ada_merging", {"num_steps": 2})
    assert main(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"] == yaml.safe_load(recipe.read_text())
    assert [one["path"].rsplit("/", 1)[-1] for one in report["inputs"]] == ["base", "a", "b"]
    assert set(report["data"]["examples"].values()) == {40}
    default = report["data"]["validation"]["default"]
    assert default["recipe"] == {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}}
    _, judges = set_apart(samples_of(case), 0.125, by_class=False)
    _, trees = case
    plain = jt.merge([trees["a"], trees["b"]], base=trees["base"], method="task_arithmetic", **{"lambda": 0.3})
    for sample, one in zip(judges, default["scores"], strict=True):
        assert one["accuracy"] == pytest.approx(accuracy(plain, sample))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ada_merging" in card
    assert "without examples" in card
    assert not list(tmp_path.glob(".jaxtune*"))
    again = merge_recipe(recipe, tmp_path / "again")
    assert again["output"] == report["output"]
    assert again["data"] == report["data"]


def test_options_are_searched_for_by_examples(case, tmp_path):
    grid = [0.1, 0.5, 0.9, 1.3]
    recipe = write_recipe(case, "task_arithmetic", search={"scale": grid})
    report = merge_recipe(recipe, tmp_path / "out")
    _, trees = case
    finetuned = [trees["a"], trees["b"]]
    samples, judges = set_apart(samples_of(case, split="validation"), 0.25)  # none that the models may be fitted to
    scores = []
    for scale in [1.0, *grid]:  # the recipe as it is goes first
        merged = jt.merge(finetuned, base=trees["base"], method="task_arithmetic", **{"lambda": scale})
        scores.append(np.mean([accuracy(merged, sample) for sample in samples]))  # the models know all of their labels
    tried = report["data"]["search"]
    assert [one["score"] for one in tried] == pytest.approx(scores)
    best = max(range(5), key=lambda n: (tried[n]["score"], -tried[n]["loss"]))
    options = [{}, *({"lambda": scale} for scale in grid)]
    assert [one["options"] for one in tried] == options
    assert report["data"]["options"] == options[best]
    merged = jt.merge(finetuned, base=trees["base"], method="task_arithmetic", **options[best])
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, merged)
    judged = report["data"]["validation"]
    assert (judged["which"], set(report["data"]["splits"].values())) == ("kept apart", {"validation"})
    for sample, one in zip(judges, judged["chosen"]["scores"], strict=True):
        assert one["accuracy"] == pytest.approx(accuracy(merged, sample))
    assert "on 20 examples of split validation (kept apart): mean accuracy" in report["notes"][-1]


def test_two_options_of_a_random_method_are_searched_for_to_the_bit(case, tmp_path):
    recipe = write_recipe(case, "dare_ties", search={"density": [0.3, 0.9], "lambda": [0.5, 1.0]})
    report = merge_recipe(recipe, tmp_path / "out")
    tried = [one["options"] for one in report["data"]["search"]]
    assert tried == [{}, *({"density": d, "lambda": s} for d in (0.3, 0.9) for s in (0.5, 1.0))]
    plain = yaml.safe_load(recipe.read_text())
    del plain["data"]
    plain["parameters"] = report["data"]["options"]
    merge_recipe(plain, tmp_path / "plain")
    for path, leaf in flatten(checkpoint.load(tmp_path / "plain").params).items():
        np.testing.assert_array_equal(flatten(checkpoint.load(tmp_path / "out").params)[path], leaf)


def test_an_option_without_a_default_is_searched_for_too(case, tmp_path):
    path = write_recipe(case, "slerp", base="a", names="b", search={"t": [0.0, 0.5]}, sources={})
    recipe = yaml.safe_load(path.read_text())
    folder, trees = case
    recipe["data"]["sources"] = str(folder / "b.npz")
    assert len(plan_recipe(recipe)) == 1
    report = merge_recipe(recipe, tmp_path / "out")
    assert [one["options"] for one in report["data"]["search"]] == [{"t": 0.0}, {"t": 0.5}]
    assert report["data"]["validation"]["default"]["recipe"]["parameters"] == {"t": 0.0}
    sample = make_sample(CONFIG, folder / "b.npz", split="validation", num_examples=40, seed=3)
    ((sample,), _) = set_apart([sample], 0.25)
    assert report["data"]["search"][0]["score"] == pytest.approx(accuracy(trees["a"], sample))


def test_examples_without_labels_choose_by_what_the_models_say(case, tmp_path):
    folder, _ = case
    for name in "ab":
        image = np.load(folder / f"{name}.npz")["train_x"]
        np.savez(tmp_path / f"{name}.npz", validation_x=image)
    sources = {str(folder / name): str(tmp_path / f"{name}.npz") for name in "ab"}
    report = merge_recipe(write_recipe(case, "task_arithmetic", sources=sources), tmp_path / "out")
    labelled = merge_recipe(write_recipe(case, "task_arithmetic", samples=None), tmp_path / "labelled")
    assert "accuracy" not in report["data"]["validation"]["chosen"]["scores"][0]
    assert "agreement" in report["notes"][-1]
    assert len(report["data"]["search"]) == 1 + 15  # lambda, where nothing is said
    assert labelled["data"]["examples"] == dict.fromkeys(sources, 60)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_what_a_method_needs_beside_weights_is_estimated(case, tmp_path, method):
    report = merge_recipe(write_recipe(case, method), tmp_path / "out")
    from jaxtune.evaluate.fisher import estimate_fisher
    from jaxtune.evaluate.grams import stored_grams
    from jaxtune.moments import gather_grams

    folder, _ = case
    models = [jt.load(folder / name) for name in "ab"]
    parts, judges = set_apart(samples_of(case), 0.25 if method == "regmean" else 0.125)
    if method == "fisher":  # whose weights are chosen
        parts, _ = set_apart(parts, 0.125 / 0.875)
    extras = []
    for model, part in zip(models, parts, strict=True):
        if method == "fisher":
            extras.append(estimate_fisher(model.params, part))
        else:
            found = stored_grams(gather_grams(model.params, part), model)
            from jaxtune.tree import unflatten

            extras.append(unflatten({path: gram.astype(np.float32) for path, gram in found.items()}))
    from jaxtune.merge.arrays import merge_trees

    options = report["data"].get("options", {})
    if method == "fisher":
        assert len(report["data"]["search"]) == 51  # weights of two models on a grid, by what was kept apart
        best = max(report["data"]["search"], key=lambda one: (one["score"], -one["loss"]))
        assert options == best["options"]
    expected = merge_trees(MERGE_METHODS[method], [model.params for model in models], extras=extras, **options)
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(
            flatten(jt.load(tmp_path / "out").params)[path], leaf, rtol=2e-5, atol=1e-6, err_msg=path
        )
    assert report["data"]["validation"]["default"]["recipe"]["merge_method"] == "linear"
    judged = report["data"]["validation"]
    assert (judged["examples"], judged["which"]) == ([len(sample) for sample in judges], "kept apart")


@pytest.mark.parametrize("method", ["ada_rank", "lines"])
def test_what_is_no_weighted_sum_becomes_a_model_in_the_layout_of_the_base(case, tmp_path, method):
    parameters = {"num_steps": 3, "objective": "expert"} if method == "ada_rank" else None
    report = merge_recipe(write_recipe(case, method, parameters), tmp_path / "out")
    _, trees = case
    if method == "ada_rank":
        given, _ = set_apart(samples_of(case), 0.125, by_class=False)
        options = {**parameters, "validation": 0.125 / 0.875}
    else:
        (given, _), options = set_apart(samples_of(case, split="validation"), 0.25), {}
    found = compose_few(method, trees["base"], [trees["a"], trees["b"]], given, **options)
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, found.params)
    assert [one["path"].rsplit("/", 1)[-1] for one in report["inputs"]] == ["base", "a", "b"]
    assert not list(tmp_path.glob(".jaxtune*"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("lot", None),
        ("regmean_plus", None),
        ("learned_graft", {"num_passes": 1, "share": 0.2}),
        ("mergetune", {"num_steps": 3}),
    ],
)
def test_methods_that_were_not_made_for_recipes_go_through_them(case, tmp_path, method, parameters):
    _, trees = case
    names = "a" if method == "mergetune" else "ab"  # which tunes one model on
    merge_recipe(write_recipe(case, method, parameters, names=names), tmp_path / "out")
    has_share = method == "learned_graft"
    share, is_labelled = 0.125 if has_share else 0.25, LEARNED_METHODS[method].data == "labelled examples"
    given, _ = set_apart(samples_of(case)[: len(names)], share, by_class=is_labelled)
    options = (parameters or {}) | ({"validation": 0.125 / 0.875} if has_share else {})
    found = compose_few(method, trees["base"], [trees[name] for name in names], given, **options)
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, dict(found.params))


def test_a_task_that_is_lost_is_better_lost(case, tmp_path):
    """What is said compares the control less the task, and not the mean of both, beside minus the task vector."""
    _, trees = case
    recipe = write_recipe(case, "atlas_negation", {"num_epochs": 6, "learning_rate": 0.1})
    report = merge_recipe(recipe, tmp_path / "out")
    made = jt.load(tmp_path / "out").params
    free = jax.tree.map(lambda b, a: b - np.float32(0.3) * (a - b), trees["base"], trees["a"])
    margins = []
    for params, key in ((free, "default"), (made, "chosen")):
        lost, control = (accuracy(params, sample) for sample in set_apart(samples_of(case), 0.125)[1])
        scores = report["data"]["validation"][key]["scores"]
        np.testing.assert_allclose([one["accuracy"] for one in scores], [lost, control])
        margins.append(control - lost)
    (note,) = [note for note in report["notes"] if note.startswith("data: ")]
    words = ("WORSE than", "as good as", "better than")[int(np.sign(round(margins[1] - margins[0], 9))) + 1]
    assert f"is {words} task_arithmetic" in note
    assert f"less that on the task to lose {margins[1]:.4f}; without examples {margins[0]:.4f}" in note


def test_one_source_is_for_a_new_task(case, tmp_path):
    folder, trees = case
    parameters = {"num_epochs": 1}
    report = merge_recipe(
        write_recipe(case, "atlas_few_shot", parameters, sources=str(folder / "base.npz")), tmp_path / "out"
    )
    assert list(report["data"]["examples"]) == [""]
    assert report["data"]["validation"]["models"] is None
    sample = make_sample(CONFIG, folder / "base.npz", num_examples=40, seed=3)
    ((sample,), _) = set_apart([sample], 0.125)
    found = compose(
        "atlas_few_shot", trees["base"], [trees["a"], trees["b"]], sample, num_epochs=1, seed=3, validation=1 / 7
    )
    for path, leaf in flatten(found.params).items():
        np.testing.assert_allclose(flatten(jt.load(tmp_path / "out").params)[path], leaf, rtol=1e-5, atol=1e-6)


def test_settings_for_few_examples_give_way_to_the_papers_own(case, tmp_path):
    path = write_recipe(case, "ada_merging", {"num_steps": 2})
    few = merge_recipe(path, tmp_path / "few")
    assert few["data"]["options"] == {**FEW["ada_merging"], "num_steps": 2, "validation": 0.25}
    plain = yaml.safe_load(path.read_text()) | {"preset": "paper"}
    plain["data"]["sources"] = {str(case[0] / name): str(case[0] / f"{name}.npz") for name in "ab"}
    paper = merge_recipe(plain, tmp_path / "paper")
    assert paper["data"]["options"] == {"num_steps": 2, "validation": 0.25}
    assert few["data"]["coefficients"] != paper["data"]["coefficients"]
    with pytest.raises(ConfigError, match=r"preset: ada_merging has no preset 'peft'\. Known: paper"):
        merge_recipe(plain | {"preset": "peft"}, tmp_path / "out")


def test_soups_of_models_of_one_task_need_no_base(case, tmp_path):
    folder, trees = case
    recipe = write_recipe(case, "greedy_soup", sources=str(folder / "a.npz"), base=None)
    report = merge_recipe(recipe, tmp_path / "out")
    sample = make_sample(CONFIG, folder / "a.npz", split="validation", num_examples=40, seed=3)
    ((sample,), (judge,)) = set_apart([sample], 0.25)
    found = compose("greedy_soup", trees["a"], [trees["a"], trees["b"]], sample)
    jax.tree.map(np.testing.assert_array_equal, jt.load(tmp_path / "out").params, found.params)
    assert report["data"]["validation"]["which"] == "kept apart"
    default = report["data"]["validation"]["default"]
    assert default["recipe"]["merge_method"] == "linear"
    mean = jax.tree.map(lambda x, y: (x + y) / np.float32(2), trees["a"], trees["b"])
    assert default["scores"][0]["accuracy"] == pytest.approx(accuracy(mean, judge))


def test_a_plan_asks_no_examples(case, capsys):
    recipe = write_recipe(case, "ada_merging")
    assert main(["merge", str(recipe), "--plan"]) == 0
    assert "examples decide first" in capsys.readouterr().out
    assert len(plan_recipe(write_recipe(case, "fisher"))) == 1


def test_a_search_that_was_killed_while_it_learned_goes_on(case, tmp_path, monkeypatch):
    from jaxtune.compose import learning

    recipe = write_recipe(case, "ada_merging", {"num_steps": 6, "objective": "expert"})
    whole = merge_recipe(recipe, tmp_path / "whole")
    real, count = learning._update, []

    def killed(*arguments):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(learning, "SAVE_EVERY", 2)
    monkeypatch.setattr(learning, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_recipe(recipe, tmp_path / "out")
    resumed = merge_recipe(recipe, tmp_path / "out")  # the fifth call is behind it
    assert len(count) == 5 + 2
    assert resumed["output"] == whole["output"]
    assert resumed["data"] == whole["data"]


def test_a_graft_that_was_killed_in_its_second_search_goes_on(case, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.compose.fitting.SAVE_EVERY", 2)
    recipe = write_recipe(case, "learned_graft", {"num_passes": 3, "share": 0.2})
    whole = merge_recipe(recipe, tmp_path / "whole")
    kill_behind(3, lambda: merge_recipe(recipe, tmp_path / "out"))  # three steps a model, two saves
    from jaxtune.compose import fitting

    real, steps = fitting._update, []
    monkeypatch.setattr(fitting, "_update", lambda *arguments: steps.append(1) or real(*arguments))
    resumed = merge_recipe(recipe, tmp_path / "out")
    assert len(steps) == 1
    assert resumed["output"] == whole["output"]
    assert resumed["data"] == whole["data"]


def test_refusals_name_the_line_and_the_key(case, tmp_path):
    folder, _ = case

    def refuse(match, method="ada_merging", parameters=None, **how):
        path = write_recipe(case, method, parameters, **how)
        with pytest.raises(ConfigError, match=match):
            merge_recipe(path, tmp_path / "out")

    place = r"\w+\.yml, line \d+, column \d+: "
    alone = {"names": "a", "sources": {str(folder / "a"): "a.npz"}}
    refuse(place + r"data\.sources: no examples of .*/b\.", sources={str(folder / "a"): "a.npz"})
    refuse(place + r"parameters\.num_step: unknown parameter 'num_step' of ada_merging\. Did you mean 'num_steps'",
           parameters={"num_step": 3})  # fmt: skip
    refuse(r"data\.sources\..*/a: .*missing\.npz", sources={str(folder / n): "missing.npz" for n in "ab"})
    refuse(r"data\.sources\.elsewhere: no model of this recipe", sources={"elsewhere": "a.npz"})
    refuse("takes one source for all models", "atlas_few_shot")
    refuse("takes a source for each model", "ada_merging", sources=str(folder / "a.npz"))
    refuse("ada_merging needs base_model", "ada_merging", base=None)
    refuse("nothing to decide: linear learns nothing from examples", "linear", base=None)
    refuse(r"data\.validation: expected a share", validation=1)
    refuse("at least 1 example", samples=0)
    refuse(r"data\.seed: expected a seed of at least 0 and below 4294967296, found 4294967296", seed=2**32)
    refuse(place + r"parameters\.start: .*one value for the whole model here, and no gradient",
           parameters={"start": [0.1, 0.4]})  # fmt: skip
    refuse(place + r"parameters\.start: .*one value for the whole model here, and no filters",
           parameters={"start": [{"filter": "dense", "value": 0.1}, {"value": 0.3}]})  # fmt: skip
    refuse(place + r"parameters\.ridge: .*no gradient", "regmean", {"ridge": [1e-3, 1e-2]}, base=None)
    refuse(place + r"parameters\.floor: .*no gradient", "fisher", {"floor": [1e-3, 1e-2]}, base=None)
    refuse(place + r"parameters\.k: expected a whole number, found 'two'", "best_k_soup", {"k": "two"},
           sources=str(folder / "a.npz"))  # fmt: skip
    refuse(place + r"parameters\.points: expected a list of numbers, found 0\.5", "mergetune", {"points": 0.5}, **alone)
    refuse(r"unknown parameter 'fisher' of mergetune", "mergetune", {"fisher": "f.safetensors"}, **alone)
    refuse("score_every is -3; it must be at least 1", parameters={"score_every": -3})
    refuse("share of examples that is kept apart is 1.5", parameters={"validation": 1.5})
    refuse("batch_size is 0; it must be at least 1", "atlas", {"batch_size": 0})
    refuse("takes two models: of the task to lose, and a control", "atlas_negation", **alone)
    refuse("arcee_fusion learns nothing from examples, and has no options", "arcee_fusion", **alone)
    refuse("is learned and has no values to search", search={"lambda": [1]})
    refuse(r"data\.search\.lamda: unknown option 'lamda' of ties. Did you mean 'lambda'", "ties", search={"lamda": [1]})
    with pytest.raises(ConfigError, match="ada_merging is learned from examples: write data"):
        read_recipe({"merge_method": "ada_merging", "models": [{"model": "a"}]})
    with pytest.raises(ConfigError, match="Did you mean 'ada_merging'"):
        read_recipe({"merge_method": "ada_mergin", "models": [{"model": "a"}]})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".jaxtune*"))


@pytest.mark.slow
def test_leaves_of_one_stored_tensor_have_one_weight(tmp_path):
    """Queries, keys and values are one tensor of timm; the filters of a recipe know stored names alone."""
    from vision_oracles import import_oracle

    timm, torch = import_oracle("timm"), pytest.importorskip("torch")
    torch.set_num_threads(1)
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_base_patch16_224", **tiny)
    timm.models.save_for_hf(model, tmp_path / "base", safe_serialization=True)
    base = jt.load(tmp_path / "base")
    recipe = {"merge_method": "ada_merging", "base_model": str(tmp_path / "base"), "models": []}
    for n, name in enumerate("ab"):
        jt.save(tmp_path / name, tune(base.params, n, scale=0.1), like=base)
        recipe["models"].append({"model": str(tmp_path / name)})
        image = np.random.RandomState(n).uniform(size=(20, 8, 8, 3)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", train_x=image)
    recipe["parameters"] = {"num_steps": 2, "learning_rate": 0.05, "is_best_kept": False}
    recipe["data"] = {"sources": {str(tmp_path / name): str(tmp_path / f"{name}.npz") for name in "ab"}}
    report = merge_recipe(recipe, tmp_path / "out")
    coefficients = report["data"]["coefficients"]
    stored, a, b, out = (flatten(checkpoint.load(tmp_path / name).params) for name in ("base", "a", "b", "out"))
    assert coefficients.keys() == stored.keys() >= {"blocks.0.attn.qkv.weight"}
    for name, leaf in stored.items():
        c = np.float64(coefficients[name])
        expected = leaf + c[0] * (np.float64(a[name]) - leaf) + c[1] * (np.float64(b[name]) - leaf)
        np.testing.assert_allclose(out[name], expected, atol=1e-6, err_msg=name)
    assert len({tuple(c) for c in coefficients.values()}) > len(stored) // 2
