"""Merges of one file that go into each other: adapters, transports and tokenizers on top of what is not made yet."""

import numpy as np
import peft_models
import pytest
import yaml
from recipe_oracle import model_folder
from test_recipes_tokenizers import WORDS, write_model

from jaxtune import checkpoint
from jaxtune.checkpoint.vocabulary import read_tokens
from jaxtune.cli import main
from jaxtune.errors import JaxtuneError
from jaxtune.merging import merge_recipe, plan_recipe
from jaxtune.tree import flatten

pytest.importorskip("peft")


def write_both(folder, first, second, name="between"):
    """A file of two merges, and one file of each, the second of which reads the first one's folder."""
    path = folder / "both.yml"
    path.write_text(yaml.safe_dump_all([second, {**first, "name": name}], sort_keys=False))
    return path


def assert_same_tensors(one, other):
    ours, theirs = (flatten(checkpoint.load(folder).params) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)


def in_two_steps(folder, first, second, name="between"):
    """What two commands give."""
    merge_recipe(first, folder / name)
    text = yaml.safe_dump(second).replace(name, str(folder / name))
    merge_recipe(text, folder / "expected")
    return folder / "expected"


def test_an_adapter_on_top_of_an_earlier_merge(tmp_path, capsys):
    base, adapter, _ = peft_models.write_case(tmp_path, "llama, every linear")
    first = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": f"{base}+{adapter}"}]}
    second = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": f"between+{adapter}"}]}
    path = write_both(tmp_path, first, second)
    assert main(["merge", str(path), "--plan"]) == 0
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert_same_tensors(tmp_path / "out", in_two_steps(tmp_path, first, second))


def test_an_adapter_that_does_not_fit_is_told_before_anything_is_made(tmp_path):
    adapter = peft_models.write_case(tmp_path, "llama, every linear")[1]
    narrow = str(model_folder(tmp_path, "llama", 5, hidden_size=32, head_dim=8))
    first = {"merge_method": "linear", "models": [{"model": narrow}]}
    second = {"merge_method": "linear", "models": [{"model": f"between+{adapter}"}]}
    with pytest.raises(JaxtuneError, match=r"shape|does not fit|expected"):
        plan_recipe(write_both(tmp_path, first, second))


@pytest.mark.parametrize("role", ["finetuned", "base", "target"])
def test_a_transport_takes_earlier_merges_in_any_role(role, tmp_path):
    old, tuned, new, other = (str(model_folder(tmp_path, "llama", seed)) for seed in range(4))
    places = {"finetuned": tuned, "base": old, "target": new}
    first = {"merge_method": "linear", "models": [{"model": places[role]}, {"model": other}]}
    places[role] = "between"
    carried = {"base": places["base"], "method": "identity"}
    second = {
        "merge_method": "task_arithmetic",
        "base_model": places["target"],
        "models": [{"model": places["finetuned"], "transport": carried}],
    }
    path = write_both(tmp_path, first, second)
    assert len(plan_recipe(path)) == 2
    merge_recipe(path, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", in_two_steps(tmp_path, first, second))


def test_a_transport_onto_an_earlier_merge_of_another_depth_is_told_before_anything_is_made(tmp_path):
    old, tuned, new = (str(model_folder(tmp_path, "llama", seed)) for seed in range(3))
    first = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": new, "layer_range": [0, 2]}]}] * 2,
    }
    second = {
        "merge_method": "task_arithmetic",
        "base_model": "between",
        "models": [{"model": tuned, "transport": {"base": old, "method": "identity"}}],
    }
    with pytest.raises(JaxtuneError, match=r"models\[0\]\.transport: (?s:.*)depth: its former base 2, base_model 4"):
        plan_recipe(write_both(tmp_path, first, second))


def test_a_tokenizer_over_an_earlier_merge_with_tokens_of_its_own(tmp_path):
    base = write_model(tmp_path / "base", WORDS)
    more = write_model(tmp_path / "more", WORDS, added=[("<chat>", True)], seed=1, template="B{{ messages }}")
    last = write_model(tmp_path / "last", WORDS, added=[("new", False)], seed=2)
    first = {
        "merge_method": "linear",
        "models": [{"model": str(base)}, {"model": str(more)}],
        "tokenizer_source": "union",
        "chat_template": "auto",
    }
    second = {
        "merge_method": "linear",
        "models": [{"model": "between"}, {"model": str(last)}],
        "tokenizer_source": "union",
        "chat_template": "auto",
    }
    path = write_both(tmp_path, first, second)
    merge_recipe(path, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", in_two_steps(tmp_path, first, second))
    tokens = read_tokens(checkpoint.load(tmp_path / "out").side_files)
    assert tokens.keys() == {*WORDS, "<chat>", "new"}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "B{{ messages }}"
