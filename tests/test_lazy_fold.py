"""Folding leaf by leaf: of lazy checkpoints the same bits as of whole ones, with nothing read that is not needed."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hub_models import MODELS, make_model, write_folder

import jaxtune as jt
from jaxtune import loading, symmetry, tree
from jaxtune.cli import main
from jaxtune.commands import transport_plan
from jaxtune.errors import SpecError
from jaxtune.lazy import LazyLeaf, is_lazy
from jaxtune.loading import load, network_of
from jaxtune.models import decoder, registry
from jaxtune.symmetry import canonical, folding
from jaxtune.tree import flatten

pytest.importorskip("transformers")


@pytest.fixture
def small_parts(monkeypatch):
    """Leaves of the tests are cut as large ones are."""
    monkeypatch.setattr(folding, "PART_VALUES", 1 << 10)


def assert_same_bits(lazy, whole):
    lazy, whole = flatten(lazy), flatten(whole)
    assert lazy.keys() == whole.keys()
    for path, leaf in whole.items():
        assert is_lazy(lazy[path]), path
        assert (lazy[path].shape, lazy[path].dtype) == (leaf.shape, leaf.dtype), path
        np.testing.assert_array_equal(lazy[path].read(), leaf, err_msg=path)


def spoil(params, path):
    """Makes a gain zero and another nearly zero, in place."""
    *parents, name = path.split("/")
    for parent in parents:
        params = params[parent]
    gain = np.array(params[name])
    gain[3], gain[5] = 0, 1e-4
    params[name] = LazyLeaf(gain.shape, gain.dtype, gain.copy) if is_lazy(params[name]) else gain


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", MODELS)
def test_lazy_leaves_fold_and_unfold_to_the_same_bits(name, tmp_path):
    folders = [write_folder(tmp_path / str(seed), make_model(name, seed=seed)) for seed in range(3)]
    stored = load(folders[0])
    spec = registry.symmetry_of(network_of(stored))
    if spec.form is None:
        with pytest.raises(SpecError, match="no canonical form"):
            canonical.fold(spec, load(folders[0], lazy=True).params)
        return
    whole, lazy = ([load(folder, lazy=lazy).params for folder in folders] for lazy in (False, True))
    first = spec.form.norms[0]
    if not first.keeps_offset and not first.counts_from_one:  # rows that the base cannot take are counted in parts too
        for _, _, base in (whole, lazy):
            spoil(base, first.scale)
    for dtype in (np.float32, np.float64):
        moved = []
        for source, tuned, base in (whole, lazy):
            folded = [canonical.fold(spec, params, dtype=dtype) for params in (source, tuned)]
            change = tree.task_vector(*folded)
            moved.append((folded[0], change, canonical.unfold(spec, change, base, dtype=dtype)))
        for of_whole, of_lazy in zip(*moved, strict=True):
            if isinstance(of_whole, canonical.Unfolded):
                assert of_lazy.lost == of_whole.lost
                of_whole, of_lazy = of_whole.task_vector, of_lazy.task_vector
            assert_same_bits(of_lazy, of_whole)
        if canonical.can_realise(spec.form):
            again, expected = (canonical.realise(spec, found[0], stored.params) for found in reversed(moved))
            for path, leaf in flatten(expected).items():
                np.testing.assert_array_equal(np.asarray(flatten(again)[path]), leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "path", "needed"),
    [
        ("llama", "block_1/attn/v/kernel", {"block_1/attn/v/kernel", "block_1/norm1/scale"}),
        ("llama", "block_1/attn/out/kernel", {"block_1/attn/out/kernel"}),
        ("gpt2", "head/kernel", {"embed/token", "final_norm/scale"}),
        ("gpt2", "block_0/mlp/up/bias", {"block_0/mlp/up/bias", "block_0/mlp/up/kernel", "block_0/norm2/bias"}),
    ],
)
def test_a_folded_leaf_reads_what_lies_in_it_and_nothing_else(name, path, needed, tmp_path):
    stored, reads = load(write_folder(tmp_path / name, make_model(name))), []

    def watch(path, leaf):
        return LazyLeaf(leaf.shape, leaf.dtype, lambda: reads.append(path) or np.array(leaf))

    folded = canonical.fold(registry.symmetry_of(network_of(stored)), tree.map_leaves(watch, stored.params))
    assert all(path.endswith("scale") for path in reads)  # gains, which must not be zero before some readers
    reads.clear()
    flatten(folded)[path].read()
    assert set(reads) == needed


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A Llama in bfloat16, its fine-tune, and the old base turned by an element of the whole group, with noise."""
    folder, draw = tmp_path_factory.mktemp("llamas"), np.random.default_rng(0)
    stored = load(write_folder(folder / "made", make_model("llama").bfloat16()))
    spec = registry.symmetry_of(network_of(stored))
    whole = canonical.canonical_spec(spec)
    turned = symmetry.apply(whole, symmetry.random(jax.random.key(1), whole), canonical.fold(spec, stored.params))

    def write(name, params, noise):
        def add(_, leaf):
            wide = leaf.astype(np.float32)
            return (wide + noise * wide.std() * draw.normal(size=leaf.shape)).astype(ml_dtypes.bfloat16)

        return jt.save(folder / name, tree.map_leaves(add, params), like=stored)

    return {
        "source": write("old", stored.params, 0.0),
        "finetuned": write("tuned", stored.params, 0.02),
        "target": write("new", canonical.realise(spec, turned, stored.params), 0.1),
    }


@pytest.mark.parametrize("method", ["full", "auto"])
def test_a_decoder_read_leaf_by_leaf_gives_the_same_folder_to_the_byte(method, llamas, tmp_path, monkeypatch):
    words = [f"--{role}={folder}" for role, folder in llamas.items()]
    for name, least in (("whole", 1 << 30), ("lazy", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "LAZY_BYTES", least)
            assert main(["transport", *words, f"--out={tmp_path / name}", f"--method={method}"]) == 0
    whole, lazy = ({file.name: file for file in (tmp_path / name).iterdir()} for name in ("whole", "lazy"))
    reports = [json.loads(files.pop("report.json").read_text()) for files in (whole, lazy)]
    for files in (whole, lazy):  # a page of the report; a manifest with the date
        files.pop("report.html"), files.pop("manifest.json")
    assert {"config.json", "model.safetensors"} <= whole.keys() == lazy.keys()
    for name, file in whole.items():
        assert lazy[name].read_bytes() == file.read_bytes(), name
    for report in reports:
        assert report["equivalence"]["is_exact"]
        for name in ("cost", "host", "equivalence"):  # which runs fewer examples where weights are lazy
            report.pop(name)
    assert reports[1] == reports[0]
    assert method == "full" or reports[0]["info"]["chosen"] == "full"


# The command line, with models of any size taken for large; what it holds at the peak goes with the result.
PROGRAM = "import sys; from jaxtune import cli, loading; loading.LAZY_BYTES = 0; sys.exit(cli.main())"


@pytest.mark.slow
def test_the_peak_stays_below_what_the_plan_says(tmp_path):
    """Of a tied table, whose way back holds more at once than any other leaf's."""
    config = decoder.Config(
        vocab_size=1 << 16, width=256, depth=1, num_heads=4, num_kv_heads=2, head_width=64, mlp_width=512,
        norm="rms", qkv_bias=False, out_bias=False, mlp_bias=False, tied=True,
    )  # fmt: skip
    draw, base = np.random.default_rng(0), registry.init(jax.random.key(0), config)
    for name in ("old", "tuned", "new"):
        params = tree.map_leaves(
            lambda _, leaf: np.asarray(leaf + 0.02 * draw.standard_normal(leaf.shape, np.float32), ml_dtypes.bfloat16),
            base,
        )
        jt.save(tmp_path / name, params, config=registry.config_to_dict(config))
    stored = {name: load(tmp_path / name, lazy=True) for name in ("old", "tuned", "new")}
    leaves, spec = flatten(stored["new"].params).values(), registry.symmetry_of(config)
    needed, how = transport_plan.count_leaf_by_leaf(leaves, "full", spec)
    assert how.startswith("leaf by leaf: 8 of 64.0 MiB")
    roles = zip(("source", "finetuned", "target"), stored, strict=True)
    words = [f"--{role}={tmp_path / name}" for role, name in roles]
    command = [sys.executable, "-c", PROGRAM, "transport", *words, f"--out={tmp_path / 'out'}", "--method=full"]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cost"]["peak_memory_bytes"] < transport_plan.RUNTIME_BYTES + needed
    assert report["equivalence"]["is_exact"]
