"""What users of peers have met, from recipes to files: casts, counters, the place of the base, shards, memory."""

import json

import ml_dtypes
import numpy as np
import pytest

import jaxtune.merging
from jaxtune import checkpoint
from jaxtune.checkpoint import safetensors
from jaxtune.errors import JaxtuneError
from jaxtune.merging import merge_recipe
from jaxtune.tree import flatten, unflatten


def write(folder, tensors):
    checkpoint.save(folder, unflatten(tensors), config={"model_type": "made_up"})
    return str(folder)


def write_shards(folder, tensors, count):
    """The same tensors in `count` files, in the order in which they are given."""
    folder.mkdir()
    names = list(tensors)
    files = {f"model-{n + 1:05d}-of-{count:05d}.safetensors": names[n::count] for n in range(count)}
    for file, part in files.items():
        header = safetensors.make_header({name: tensors[name] for name in part}, {"format": "pt"})
        header.write(folder / file, tensors.__getitem__)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    return str(folder)


def merge(folder, method, models, **more):
    recipe = {"merge_method": method, "models": models, **more}
    report = merge_recipe(recipe, folder)
    return flatten(checkpoint.load(folder).params), report


@pytest.mark.parametrize(("keys", "expected"), [({"dtype": "bfloat16"}, 1000), ({"out_dtype": "bfloat16"}, 1004)])
def test_dtype_rounds_what_goes_in_and_out_dtype_what_comes_out(keys, expected, tmp_path):
    model = write(tmp_path / "model", {"w": np.full(4, 1.003, np.float32)})
    entry = {"model": model, "parameters": {"scale": 1000}}
    found, _ = merge(tmp_path / "out", "passthrough", [entry], **keys)
    assert found["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["w"].astype(np.float64), expected)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint32])
def test_counters_that_differ_by_one_beyond_what_float32_tells_are_refused(kind, tmp_path):
    counts = {name: np.array([2**24 + n], kind) for n, name in enumerate("ab")}
    models = [
        {"model": write(tmp_path / name, {"w": np.ones(3, np.float32), "steps": count})}
        for name, count in counts.items()
    ]
    with pytest.raises(JaxtuneError, match=r"'steps'.*copied and not merged"):
        merge(tmp_path / "out", "linear", models, dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    found, _ = merge(tmp_path / "same", "linear", [models[0]], dtype="bfloat16")
    np.testing.assert_array_equal(found["steps"], counts["a"])
    assert found["steps"].dtype == kind


@pytest.mark.parametrize("place", [0, 1, 2, None])
def test_the_base_counts_as_the_base_wherever_it_stands_in_the_list(place, tmp_path):
    base = write(tmp_path / "base", {"w": np.float32([1.0])})
    models = [
        {"model": write(tmp_path / name, {"w": np.float32([value])}), "parameters": {"weight": weight}}
        for name, value, weight in (("a", 3.0, 0.25), ("b", 5.0, 0.5))
    ]
    if place is not None:
        models.insert(place, {"model": base})
    found, _ = merge(tmp_path / "out", "task_arithmetic", models, base_model=base)
    assert found["w"] == 1 + 0.25 * 2 + 0.5 * 4


@pytest.mark.parametrize("method", ["dare_ties", "della", "ties", "linear"])
def test_files_and_their_order_do_not_change_a_bit(method, tmp_path):
    draw = np.random.default_rng(0)
    shapes = {f"layers.{n}.weight": (40, 30) for n in range(12)} | {"norm.weight": (30,)}
    trees = [{name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()} for _ in range(3)]
    found = []
    for count in (1, 2, 4, 8):
        names = list(shapes)
        draw.shuffle(names)
        folders = [
            write_shards(tmp_path / f"{count}_{n}", {name: tree[name] for name in names}, count)
            for n, tree in enumerate(trees)
        ]
        keys = {} if method == "linear" else {"base_model": folders[0], "parameters": {"density": 0.4, "weight": 0.5}}
        models = [{"model": folder} for folder in folders[bool(keys) :]]
        found.append(merge(tmp_path / f"out{count}", method, models, seed=3, **keys)[0])
    for other in found[1:]:
        for name, leaf in found[0].items():
            np.testing.assert_array_equal(other[name], leaf, err_msg=name)


def test_a_wrong_shape_in_the_last_of_a_thousand_tensors_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    tensors = {f"layers.{n}.weight": np.ones((2, 3), np.float32) for n in range(1000)}
    one = write(tmp_path / "one", tensors)
    other = write(tmp_path / "other", tensors | {"layers.999.weight": np.ones((2, 4), np.float32)})
    started = []
    monkeypatch.setattr(jaxtune.merging, "run_merge", lambda *given, **how: started.append(given))
    with pytest.raises(JaxtuneError, match=r"layers\.999\.weight: .*one \[2, 3\].*other \[2, 4\]"):
        merge(tmp_path / "out", "linear", [{"model": one}, {"model": other}])
    assert not started
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    draw = np.random.default_rng(0)
    size = 8 << 20  # 32 MB a model, and 512 MB of sixteen
    models = [
        {"model": write(tmp_path / f"{n}", {"w": draw.standard_normal(size, dtype=np.float32).reshape(2048, -1)})}
        for n in range(4)
    ]
    held = {}
    for count in (2, 16):
        some = [models[n % 4] if n < 4 else {"model": _link(tmp_path, n)} for n in range(count)]
        keys = {"base_model": models[0]["model"], "parameters": {"weight": 0.1}}
        how = {"merge_method": "task_arithmetic", "models": some[1:], **keys}
        report = merge_recipe(how, tmp_path / f"out{count}", num_workers=1)
        held[count] = report["cost"]["own_memory_bytes"]
    if None in held.values():
        pytest.skip("this system does not tell memory")
    # Fourteen more models, 450 MB of them: a run of each and its copy in float64 is 1 MB.
    assert held[16] - held[2] < 40 * 2**20


def _link(folder, n):
    place = folder / f"again{n}"
    if not place.exists():
        place.mkdir()
        for file in (folder / str(n % 4)).iterdir():
            (place / file.name).hardlink_to(file)
    return str(place)
