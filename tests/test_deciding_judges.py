"""Who judges a decision: examples that did nothing else, or it is said that they did; and of which split they are."""

import json

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune import composing
from jaxtune.compose.composition import Composition
from jaxtune.compose.registry import METHODS
from jaxtune.deciding import learned
from jaxtune.deciding.shares import CHOSE, KEPT, LEARNED, set_apart
from jaxtune.deciding.task_models import open_task_models
from jaxtune.errors import ConfigError, DataError
from jaxtune.merging import merge_recipe
from jaxtune.models import decoder, mlp, registry
from jaxtune.opening import open_examples
from jaxtune.recipes import examples
from jaxtune.recipes.reading import read_recipe
from jaxtune.sample import Sample

CONFIG = mlp.Config(image_shape=(2, 2, 1), widths=(5,), num_outputs=3)
READER = decoder.Config(vocab_size=8, width=8, depth=1, num_heads=1, num_kv_heads=1, head_width=8, mlp_width=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two models beside it, and examples that each labels, none of which is for validation."""
    folder = tmp_path_factory.mktemp("judges")
    base = jax.tree.map(np.asarray, registry.init(jax.random.key(0), CONFIG))
    for n, name in enumerate(("base", "a", "b")):
        draw = np.random.RandomState(n)
        params = jax.tree.map(lambda x, draw=draw: (x + draw.normal(size=x.shape)).astype(np.float32), base)
        jt.save(folder / name, params, config=registry.config_to_dict(CONFIG))
        image = draw.uniform(size=(64, 2, 2, 1)).astype(np.float32)
        label = np.asarray(registry.apply(CONFIG, params, {"image": image})).argmax(-1)
        names = np.array(["x", "y", "z"])
        np.savez(folder / f"{name}.npz", train_x=image, train_y=label, class_names=names)
        np.savez(folder / f"{name}_wrong.npz", train_x=image, train_y=(label + 1) % 3, class_names=names)
        np.savez(folder / f"{name}_images.npz", train_x=image, validation_x=image)
    return folder


def recipe_of(folder, method, sources=None, names="ab", parameters=None, **data):
    """Of the train split, if nothing is said about sources."""
    if sources is None:
        sources = {name: {"name": str(folder / f"{name}.npz"), "split": "train"} for name in names}
        if method in METHODS and METHODS[method].samples == "together":
            sources = sources["a"]
    elif isinstance(sources, str):
        sources = str(folder / sources)
    if isinstance(sources, dict) and "name" not in sources:
        sources = {str(folder / name): source for name, source in sources.items()}
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names],
        "data": {"sources": sources, **data},
    }
    return recipe | ({"parameters": parameters} if parameters else {})


def sample_of(size, **more):
    return Sample("s", {"row": np.arange(size), **more}, forward=lambda params, batch: None)


def rows_of(samples):
    return [set(sample.batch["row"].tolist()) for sample in samples]


def test_what_learns_and_chooses_does_not_judge():
    samples = [sample_of(64), sample_of(40)]
    both = set_apart(samples, 0.25, learns=True, chooses=True, seed=0)
    assert [len(one) for one in both.judges] == [8, 5]
    assert [round(both.own * len(one)) for one in both.given] == [8, 5]  # as many choose
    only = set_apart(samples, 0.25, learns=False, chooses=True, seed=0)
    assert ([len(one) for one in only.judges], only.own) == ([16, 10], 0)
    last = set_apart(samples, 0.25, learns=True, chooses=False, seed=0)
    assert ([len(one) for one in last.judges], last.own) == ([16, 10], 0)
    for shares in (both, only, last):
        assert shares.which == KEPT
        for given, judge, size in zip(rows_of(shares.given), rows_of(shares.judges), (64, 40), strict=True):
            assert not given & judge
            assert given | judge == set(range(size))


def test_too_few_examples_do_both_and_it_is_said():
    samples = [sample_of(64), sample_of(24)]  # 3 and 3 of the second
    both = set_apart(samples, 0.25, learns=True, chooses=True, seed=1)
    assert (both.which, both.own, [len(one) for one in both.given]) == (CHOSE, 0.25, [64, 24])
    assert rows_of(both.judges) == rows_of([one.split(0.25, seed=1)[1] for one in samples])  # those that choose
    only = set_apart([sample_of(12)], 0.25, learns=False, chooses=True, seed=1)
    assert (only.which, rows_of(only.judges)) == (CHOSE, [set(range(12))])
    for learns, which in ((True, LEARNED), (False, CHOSE)):
        none = set_apart(samples, 0.0, learns=learns, chooses=True, seed=1)
        assert (none.which, none.own, rows_of(none.judges)) == (which, 0, rows_of(samples))
    with pytest.raises(ConfigError, match=r"share of examples that is kept apart is 1\.0"):
        set_apart(samples, 1.0, learns=True, chooses=False, seed=1)


def test_labels_do_not_move_what_must_not_see_them():
    label = np.repeat(np.arange(4), 10)
    found = [
        set_apart([one], 0.25, learns=True, chooses=True, seed=2, by_class=False)
        for one in (sample_of(40), sample_of(40, label=label))
    ]
    assert rows_of(found[0].given) == rows_of(found[1].given)
    assert found[1].judges[0].is_labelled
    seen = set_apart([sample_of(40, label=label)], 0.2, learns=False, chooses=True, seed=2)
    assert np.bincount(seen.judges[0].batch["label"]).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("method", examples.LEARNED)
def test_no_learned_method_meets_its_judges(folder, tmp_path, monkeypatch, method):
    """So that it can be worse than the default on them, whatever it chose."""
    met = {}

    def choose(name, base, trees, samples, **options):
        met.update(samples=samples, options=options)
        return Composition(base, {})

    monkeypatch.setattr(learned, "compose", choose)
    models = open_task_models(read_recipe(recipe_of(folder, method, names="a" if method == "mergetune" else "ab")))
    _, _, facts = learned.learn_recipe(models, tmp_path)
    assert facts["chosen_by"] == KEPT
    for sample, given, judge in zip(models.samples, met["samples"], facts["held"], strict=True):
        images = [{image.tobytes() for image in one.batch["image"]} for one in (given, judge)]
        assert not images[0] & images[1]
        assert sum(map(len, images)) == len(sample)
    share = met["options"].get("validation", 0)
    assert bool(share) == (method in ("ada_merging", "ada_rank", "atlas", "atlas_few_shot", "atlas_negation",
                                      "learned_graft", "learned_soup", "sca_learn"))  # fmt: skip


def test_a_search_can_be_worse_than_what_it_began_with(folder, tmp_path, monkeypatch):
    """Here the two are taken for each other by those that judge, and the search has looked at others."""
    from jaxtune.deciding import decision

    real = decision.score_candidates
    monkeypatch.setattr(decision, "score_candidates", lambda models, samples: real(models, samples)[::-1])
    compare = decision.compare
    monkeypatch.setattr(decision, "compare", lambda before, after, *rest: compare(after, before, *rest))
    search = {"lambda": [-1.0, 0.5, 1.0]}
    recipe = recipe_of(folder, "task_arithmetic", parameters={"lambda": -1.0}, search=search)
    report = merge_recipe(recipe, tmp_path / "out")
    assert report["data"]["options"]["lambda"] > 0
    assert (
        "is WORSE than task_arithmetic (lambda -1.0) on 28 examples of split train (kept apart)" in report["notes"][-1]
    )


def test_too_few_examples_give_no_verdict(folder, tmp_path):
    recipe = recipe_of(folder, "task_arithmetic", search={"lambda": [0.5]}, samples=12)
    report = merge_recipe(recipe, tmp_path / "out")
    assert report["data"]["validation"]["which"] == CHOSE
    (note,) = [note for note in report["notes"] if note.startswith("data: ")]
    assert "beside task_arithmetic as it is on 24 examples of split train (those that chose)" in note
    assert note.endswith("this is no verdict: give more of them, or a share as validation")
    assert not [words for words in ("better than", "as good as", "WORSE", "not to be told from") if words in note]


def test_too_few_judges_of_what_only_learns_give_no_verdict(folder, tmp_path):
    report = merge_recipe(recipe_of(folder, "regmean", samples=8), tmp_path / "out")
    assert report["data"]["validation"]["which"] == LEARNED
    assert report["data"]["validation"]["examples"] == [8, 8]
    assert "this is no verdict" in report["notes"][-1]


def test_a_model_without_a_right_answer_of_its_own_is_named(folder, tmp_path):
    sources = {"a": {"name": str(folder / "a_wrong.npz"), "split": "train"}}
    sources["b"] = {"name": str(folder / "b.npz"), "split": "train"}
    report = merge_recipe(recipe_of(folder, "task_arithmetic", sources, search={"lambda": [0.5]}), tmp_path / "out")
    first, last = [note for note in report["notes"] if note.startswith("data: ")]
    assert f"{folder / 'a'} has none of these examples right itself; its accuracy counts as it is" in first
    assert "mean accuracy" in last
    assert all(0 <= one["score"] <= 3 for one in report["data"]["search"])


def test_images_alone_choose_nothing_and_give_no_verdict(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.sources: one source for all models, and no labels in it"):
        merge_recipe(recipe_of(folder, "task_arithmetic", "a_images.npz"), tmp_path / "out")
    recipe = recipe_of(folder, "atlas_test_time", "a_images.npz", parameters={"num_epochs": 1})
    note = merge_recipe(recipe, tmp_path / "out")["notes"][-1]
    assert "mean entropy" in note
    assert note.endswith("how sure a model is and not how right: no verdict without labels")
    assert not [words for words in ("better than", "as good as", "WORSE", "agreement") if words in note]


def test_what_only_chooses_does_so_by_validation_examples(folder, tmp_path):
    assert {name for name in examples.LEARNED if examples.default_split(name) == "validation"} == set(examples.CHOOSERS)
    assert set(examples.CHOOSERS) == set(composing.CHOOSERS) & set(examples.LEARNED)
    assert set(composing.CHOOSERS) <= set(METHODS)
    splits = {"ties": "validation", "fisher": "train", "regmean": "train", "ada_merging": "train"}
    assert {name: examples.default_split(name) for name in splits} == splits
    lacking = r"a\.npz: there is no validation split in it\. .* or name one yourself"
    for method in ("greedy_soup", "lines", "task_arithmetic"):
        sources = "a.npz" if method == "greedy_soup" else {name: str(folder / f"{name}.npz") for name in "ab"}
        with pytest.raises(ConfigError, match=lacking):
            merge_recipe(recipe_of(folder, method, sources), tmp_path / "out")
    for said in ({"split": "validation"}, {"validation_fraction": 0.25}):  # cut from train, because it is asked for
        recipe = read_recipe(recipe_of(folder, "greedy_soup", {"name": str(folder / "a.npz"), **said}))
        (sample,) = open_task_models(recipe).samples
        assert sample.name == "a (validation)"
        assert len(sample) < 32
    soup = merge_recipe(recipe_of(folder, "greedy_soup"), tmp_path / "out")
    assert soup["data"]["splits"] == {"": "train"}
    assert "14 examples of split train (kept apart)" in soup["notes"][-1]


def test_compositions_in_python_have_the_same_default(folder, tmp_path):
    models = [folder / "a", folder / "b"]
    with pytest.raises(DataError, match=r"a\.npz: there is no validation split in it"):
        jt.compose("greedy_soup", folder / "base", models, folder / "a.npz")
    found = jt.compose("greedy_soup", folder / "base", models, folder / "a.npz", split="train")
    assert found.coefficients[0] == max(found.coefficients)
    texts = tmp_path / "x.jsonl"
    texts.write_text("\n".join(json.dumps({"split": "train", "text": "a b", "label": n % 2}) for n in range(40)))
    with pytest.raises(DataError, match=r"x\.jsonl: there is no validation split in it"):
        open_examples(READER, texts, split="validation", is_cut_refused=True)
