"""Examples decide on what a recipe names in other words than a folder: a model with an adapter, or of another base."""

import json

import jax
import numpy as np
import pytest
import yaml
from recipe_oracle import model_folder

import jaxtune as jt
from jaxtune import checkpoint
from jaxtune.merging import merge_recipe
from jaxtune.recipes import carry as carrying
from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe
from jaxtune.tree import flatten

ADA_MERGING = {"objective": "expert", "num_steps": 4, "learning_rate": 0.02}


def write_examples(folder, name, model, seed):
    """Images that a model labels."""
    stored = jt.load(model)
    size, channels = stored.network.image_size, stored.network.channels
    arrays = {"class_names": np.array(list("vwxyz"))}
    for n, split in enumerate(("train", "validation")):
        draw = np.random.RandomState(seed + 100 * n)
        image = draw.uniform(size=(24, size, size, channels)).astype(np.float32)
        logits = jt.models.registry.apply(stored.network, stored.params, {"image": image})
        arrays |= {f"{split}_x": image, f"{split}_y": np.asarray(logits).argmax(-1)}
    np.savez(folder / f"{name}.npz", **arrays)
    return str(folder / f"{name}.npz")


def write_recipe(place, method, base, entries, sources, parameters=None, **data):
    recipe = {"merge_method": method, "models": entries, "data": {"samples": 16, "seed": 3, "sources": sources, **data}}
    recipe |= {"base_model": str(base)} if base else {}
    recipe |= {"parameters": parameters} if parameters else {}
    place.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return place


def tensors(folder):
    return flatten(checkpoint.load(folder).params)


def assert_same(ours, theirs, **tolerance):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, err_msg=name, **tolerance)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away"]


def write_texts(folder, name, seed):
    """Texts of random words with labels that go by their first word."""
    draw, lines = np.random.RandomState(seed), []
    for split in ("train", "validation"):
        for _ in range(24):
            words = draw.randint(len(WORDS), size=draw.randint(2, 9))
            text = " ".join(WORDS[word] for word in words)
            lines.append({"split": split, "text": text, "label": int(words[0]) % 5})
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(folder, base, two adapters, the same two merged into it), and texts of a task for each."""
    pytest.importorskip("peft")
    tokenizers = pytest.importorskip("tokenizers")
    from peft_models import adapt, write_adapted
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("adapted")
    base = model_folder(folder, "bert")
    vocabulary = {word: at + 2 for at, word in enumerate(WORDS)} | {"[UNK]": 1, "[PAD]": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    adapters, whole = [], []
    for n in range(2):
        model = BertForSequenceClassification.from_pretrained(base)
        tuned = adapt(model, seed=n, r=4, target_modules=["query", "value", "dense"])
        adapters.append(write_adapted(folder / f"adapter_{n}", tuned))
        recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapters[-1]}"}]}
        whole.append(folder / f"whole_{n}")
        merge_recipe(recipe, whole[-1])
        write_texts(folder, f"task_{n}", seed=n)
    return folder, base, adapters, whole


@pytest.mark.parametrize(
    ("method", "parameters", "data"),
    [
        ("ada_merging", ADA_MERGING, {}),
        ("ties", {"density": 0.5}, {"search": {"lambda": [0.3, 0.8, 1.2]}}),
        ("fisher", None, {}),
        ("sca_learn", {"num_epochs": 2}, {}),
    ],
)
def test_an_adapter_decides_as_the_model_that_it_makes(adapted, tmp_path, method, parameters, data):
    folder, base, adapters, whole = adapted
    out, reports = [], []
    for names in ([f"{base}+{adapter}" for adapter in adapters], [str(one) for one in whole]):
        sources = {name: str(folder / f"task_{n}.jsonl") for n, name in enumerate(names)}
        entries = [{"model": name} for name in names]
        recipe = write_recipe(tmp_path / "recipe.yml", method, base, entries, sources, parameters, **data)
        out.append(tmp_path / str(len(out)))
        reports.append(merge_recipe(recipe, out[-1]))
    assert_same(*out, rtol=1e-4, atol=1e-5)
    ours, theirs = (report["data"] for report in reports)
    assert ours.get("options") == theirs.get("options")
    for one, other in zip(
        ours["validation"]["chosen"]["scores"], theirs["validation"]["chosen"]["scores"], strict=True
    ):
        assert one == pytest.approx(other, rel=1e-4)
    read = {entry["path"] for entry in reports[0]["inputs"]}
    assert {str(base), *map(str, adapters)} == read
    assert json.loads((out[0] / "report.json").read_text())["inputs"] == reports[0]["inputs"]


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """(folder, new base, old base, a fine-tune of each, the old one carried over)."""
    folder = tmp_path_factory.mktemp("carried")
    old, new = (model_folder(folder, "vit", seed) for seed in range(2))
    tuned = {}
    for n, (name, base) in enumerate({"old_tuned": old, "new_tuned": new}.items()):
        stored, draw = jt.load(base), np.random.RandomState(n)
        params = jax.tree.map(lambda x, d=draw: x + 0.05 * d.normal(size=x.shape).astype(x.dtype), stored.params)
        jt.save(folder / name, params, like=stored)
        tuned[name] = folder / name
    moved = jt.transport(old, tuned["old_tuned"], new, method="permutation", verify=False)
    jt.save(folder / "moved", moved.params, like=jt.load(new))
    for n, name in enumerate(("moved", "new_tuned")):
        write_examples(folder, f"task_{n}", folder / name, seed=n)
    return folder, new, old, tuned


@pytest.mark.parametrize(
    ("method", "how", "data"),
    [("ada_merging", ADA_MERGING, {}), ("task_arithmetic", None, {"search": {"lambda": [0.3, 0.7, 1.0]}})],
)
def test_a_fine_tune_of_another_base_decides_as_what_it_becomes(carried, tmp_path, monkeypatch, method, how, data):
    folder, new, old, tuned = carried
    made = []
    prepare = carrying.prepare_transport
    monkeypatch.setattr(carrying, "prepare_transport", lambda *a, **k: made.append(1) or prepare(*a, **k))
    step = {"base": str(old), "method": "permutation"}
    out = []
    for first, entry in (
        (tuned["old_tuned"], {"model": str(tuned["old_tuned"]), "transport": step}),
        (folder / "moved", {"model": str(folder / "moved")}),
    ):
        sources = {str(first): str(folder / "task_0.npz"), str(tuned["new_tuned"]): str(folder / "task_1.npz")}
        entries = [entry, {"model": str(tuned["new_tuned"])}]
        recipe = write_recipe(tmp_path / "recipe.yml", method, new, entries, sources, how, **data)
        out.append(tmp_path / str(len(out)))
        report = merge_recipe(recipe, out[-1])
        if entry.get("transport"):
            assert len(made) == 2  # to decide on, and to merge; not once a candidate
            read = {one["path"] for one in report["inputs"]}
            assert {str(place) for place in (new, old, *tuned.values())} == read
    assert_same(*out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fisher", "regmean", "greedy_soup"])
def test_what_has_no_base_carries_nothing_over(carried, tmp_path, method):
    folder, new, old, tuned = carried
    entry = {"model": str(tuned["old_tuned"]), "transport": {"base": str(old)}}
    examples = str(folder / "task_0.npz")
    sources = examples if method == "greedy_soup" else {str(tuned["old_tuned"]): examples}
    recipe = write_recipe(tmp_path / "recipe.yml", method, new, [entry], sources)
    with pytest.raises(RecipeError, match=rf"{method} has no base that a model could be carried to"):
        merge_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused_before_anything_is_learned(adapted, tmp_path):
    folder, base, *_ = adapted
    other = model_folder(tmp_path, "deit")
    name = f"{other}+{base}"
    entries = [{"model": name}]
    recipe = write_recipe(tmp_path / "recipe.yml", "ada_merging", base, entries, {name: str(folder / "task_0.jsonl")})
    with pytest.raises(RecipeError, match="is no adapter"):
        merge_recipe(recipe, tmp_path / "out")
    read_recipe(recipe)  # in itself it is well formed
