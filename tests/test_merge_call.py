"""`jaxtune.merge`: trees, checkpoints and paths in, one tree out."""

import numpy as np
import pytest
from hub_models import make_model, randomise, write_folder

import jaxtune as jt
from jaxtune import checkpoint
from jaxtune.errors import ConfigError, TreeMismatchError, UnknownNameError
from jaxtune.merging import merge_recipe
from jaxtune.tree import flatten


def write_three(folder, **changes):
    for seed, name in enumerate(("base", "a", "b")):
        model = make_model("llama", **changes)
        randomise(model, seed)
        write_folder(folder / name, model)
    return [folder / name for name in ("base", "a", "b")]


def test_checkpoints_merge_as_they_are_stored(tmp_path):
    """Rows are rows of the files: by rows of our kernels `della` would thin other elements."""
    base, *others = write_three(tmp_path)
    params = jt.merge(others, base=base, method="della", density=0.5)
    jt.save(tmp_path / "memory", params, like=jt.load(base))
    recipe = {
        "merge_method": "della",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"density": 0.5}} for path in others],
    }
    merge_recipe(recipe, tmp_path / "files")
    found = flatten(checkpoint.load(tmp_path / "memory").params)
    for name, leaf in flatten(checkpoint.load(tmp_path / "files").params).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_other_architectures_methods_and_trees_are_refused(tmp_path):
    tree, other = {"a": np.ones((2, 3), np.float32)}, {"a": np.ones((3, 2), np.float32)}
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        jt.merge([tree, tree], method="liner")
    with pytest.raises(UnknownNameError, match="'densty'"):
        jt.merge([tree], base=tree, method="ties", densty=0.5)
    with pytest.raises(ConfigError, match="needs a base"):
        jt.merge([tree, tree], method="ties")
    with pytest.raises(TreeMismatchError, match=r"a: .*\[2, 3\].*\[3, 2\]"):
        jt.merge([tree, other])


def test_an_unlike_number_of_weights_is_refused():
    tree = {"a": np.ones((2, 3), np.float32)}
    with pytest.raises(ConfigError, match="expected one value or 2, got 3"):
        jt.merge([tree, tree], weight=[1, 2, 3])
