"""The engine gives what arrays in memory give, to the bit, whatever the blocks, threads, devices or interruptions."""

import ml_dtypes
import numpy as np
import pytest

from jaxtune import checkpoint
from jaxtune.errors import NonFiniteError, TreeMismatchError
from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.method import REQUIRED
from jaxtune.merge.options import check_options
from jaxtune.merge.registry import METHODS
from jaxtune.recipes.jobs import MergeJobs, Source, TensorJob
from jaxtune.stream import engine, run
from jaxtune.stream.device import DeviceMerge
from jaxtune.stream.files import lay_out
from jaxtune.tree import flatten

GIVEN = {"t": 0.3, "task": 1, "decay": 0.9, "alpha": 0.5}
SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (64, 48), "norm": (1,), "scalar": ()}


def write_models(folder, count, dtype=np.float32, seed=0, change=lambda n, tensors: None):
    draw = np.random.default_rng(seed)
    base = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    models = []
    for n in range(count + 1):
        tensors = {
            name: (leaf + (0.1 * draw.standard_normal(leaf.shape) if n else 0)).astype(dtype)
            for name, leaf in base.items()
        } | {"steps": np.arange(5)}
        change(n, tensors)
        checkpoint.save(folder / f"{n}", tensors, config={"model_type": "none"})
        models.append(checkpoint.load(folder / f"{n}"))
    return models


def count_of(name):
    least, most = METHODS[name].num_models
    return min(max(least, 3), most or 3)


def make_jobs(name, models, seed=0, **options):
    """Jobs as a recipe of one method over whole models has them; the first model is the base."""
    method = METHODS[name]
    options |= {option: GIVEN[option] for option, value in method.options.items() if value is REQUIRED}
    has_base = method.base == "needs"
    options = check_options(method, options, len(models) - 1, has_base=has_base, name=name)
    jobs = []
    for tensor, info in models[0].layout.tensors.items():
        sources = tuple(Source(n, tensor) for n in range(1, len(models)))
        base = Source(0, tensor) if has_base else None
        is_float = info.dtype.kind not in "iub"
        jobs.append(
            TensorJob(tensor, info.shape, None, info.dtype, name if is_float else "copy", sources, base, options)
        )
    return MergeJobs(tuple(models), tuple(jobs), {}, {}, seed=seed)


def merge(jobs, folder, **how):
    files = lay_out(jobs.models[0].layout.tensors, jobs.models[0])
    merged = run.run_merge(jobs, files, folder, sync=False, **how)
    (path,) = merged.paths.values()
    return {name: np.array(leaf) for name, leaf in checkpoint.safetensors.read_tensors(path)[1].items()}


def expect(name, models, seed=0, **options):
    method = METHODS[name]
    given = {option: GIVEN[option] for option, value in method.options.items() if value is REQUIRED}
    base, *others = [model.params for model in models]
    merged = merge_trees(
        method, others, base if method.base == "needs" else None, seed=seed, input_axis=-1, **given, **options
    )
    return flatten(merged)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, np.asarray(expected[name]), err_msg=name)


@pytest.fixture
def small_pieces(monkeypatch):
    """Blocks and spans that cut every tensor of these tests."""
    monkeypatch.setattr(engine, "BLOCK", 100)
    monkeypatch.setattr(engine, "SPAN", 700)


DATALESS = [name for name, method in METHODS.items() if method.data == "none"]


@pytest.mark.parametrize("name", DATALESS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_files_merge_to_the_bits_of_arrays_in_memory(name, dtype, tmp_path, small_pieces):
    models = write_models(tmp_path, count_of(name), dtype)
    found = merge(make_jobs(name, models, seed=3), tmp_path / "work", num_workers=3)
    assert_equal(found, expect(name, models, seed=3))


@pytest.mark.parametrize("name", DATALESS)
def test_devices_give_what_one_device_gives(name, tmp_path):
    import jax

    models = write_models(tmp_path, count_of(name))
    jobs = make_jobs(name, models, seed=3)
    one = merge(jobs, tmp_path / "one", merge_span=DeviceMerge(jax.local_devices()[:1], run=512))
    all_of_them = merge(jobs, tmp_path / "all", merge_span=DeviceMerge(run=512))
    assert len(jax.local_devices()) > 1
    assert_equal(all_of_them, one)
    for tensor, leaf in expect(name, models, seed=3).items():
        # XLA's tanh and exp are other ones, and a score that is a quotient of small numbers shows it.
        np.testing.assert_allclose(one[tensor], leaf, rtol=3e-7, atol=1e-6, err_msg=tensor)


def test_a_tensor_that_holds_nan_is_named(tmp_path):
    def spoil(n, tensors):
        if n == 2:
            tensors["b.weight"][3, 4] = np.nan

    models = write_models(tmp_path, 2, change=spoil)
    with pytest.raises(NonFiniteError, match=r"'b.weight'.*NaN or Inf in .*/2"):
        merge(make_jobs("linear", models), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*.safetensors"))


def test_integers_that_differ_are_refused(tmp_path):
    models = write_models(tmp_path, 2, change=lambda n, tensors: tensors.update(steps=np.arange(5) + (n == 2)))
    with pytest.raises(TreeMismatchError, match=r"'steps'.*copied and not merged"):
        merge(make_jobs("linear", models), tmp_path / "work")


def test_a_finished_file_is_kept_and_a_changed_one_made_again(tmp_path, monkeypatch):
    models = write_models(tmp_path, 2)
    jobs, work = make_jobs("task_arithmetic", models), tmp_path / "work"
    expected = merge(jobs, work)
    files = lay_out(models[0].layout.tensors, models[0])
    assert run.run_merge(jobs, files, work).num_kept == 1
    (path,) = work.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert run.run_merge(jobs, files, work).num_kept == 0
    assert_equal(merge(jobs, work), expected)
