"""Adapters of PEFT, with PEFT as the oracle: what they add, moved to another base, written, read again."""

import json

import numpy as np
import pytest
from hub_decoders import draw_texts, make_model, run
from hub_models import assert_close, write_folder
from peft_models import (
    CASES,
    LLAMA,
    MIXTRAL,
    adapt,
    change_config,
    load_base,
    load_with_peft,
    logits_of,
    write_adapted,
    write_case,
    write_moved,
    write_tensors,
)
from small_models import difference

from jaxtune import symmetry, tree
from jaxtune.adapters import (
    adapter_task_vector,
    is_adapter,
    merge_adapter,
    move_adapter,
    read_adapter,
    write_adapter,
)
from jaxtune.adapters.folder import replace_tensors
from jaxtune.errors import SpecError
from jaxtune.models import registry
from jaxtune.symmetry import canonical

pytest.importorskip("transformers")
pytest.importorskip("peft")
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_the_task_vector_is_what_peft_merges(name, tmp_path):
    base, folder, adapted = write_case(tmp_path, name)
    expected = logits_of(adapted)
    stored, table = load_base(base)
    assert is_adapter(folder)
    assert not is_adapter(base)
    adapter = read_adapter(folder)
    vector = tree.flatten(adapter_task_vector(adapter, table, stored.params))
    merged = merge_adapter(adapter, table, stored.params)
    text, mask = draw_texts(37)
    ours = np.asarray(run(registry.config_from_dict(stored.config), merged, {"text": text, "mask": mask}))
    at = mask if ours.ndim == 3 else np.ones(len(text), bool)
    assert_close(ours[at], expected[at], 1e-5)
    if name == "llama, tied table":
        return  # PEFT would add the change twice, once for each name
    theirs = {n: t.numpy() for n, t in adapted.merge_and_unload().state_dict().items()}
    own = tree.flatten(stored.params)
    for row in table.rows:
        change = row.encode({path: np.asarray(vector[path]) for path in row.leaves})
        before = row.encode({path: np.asarray(own[path]) for path in row.leaves})
        for stored_name, delta in change.items():
            if stored_name in theirs:  # transformers holds experts in one tensor
                np.testing.assert_allclose(delta, theirs[stored_name] - before[stored_name], atol=2e-6)


@EVERY
def test_the_moved_adapter_is_the_old_one_on_the_moved_base(name, tmp_path, key):
    base, folder, adapted = write_case(tmp_path, name)
    expected = logits_of(adapted)
    stored, table = load_base(base)
    spec = registry.symmetry_of(registry.config_from_dict(stored.config))
    element = symmetry.random(key, spec)
    target = symmetry.apply(spec, element, stored.params)
    moved_base = write_moved(tmp_path / "moved", stored, target)
    adapter = read_adapter(folder)
    moved = move_adapter(
        adapter, table, source=stored.params, target=target, spec=spec, element=element, base=str(moved_base)
    )
    out = write_adapter(tmp_path / "moved_adapter", moved)
    for own, tensor in moved.tensors.items():
        assert tensor.shape == adapter.tensors[own].shape, "rank and names stay"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved_base)
    unchanged = set(config) - {"base_model_name_or_path", "revision"}
    assert {field: config[field] for field in unchanged} == {field: adapter.config[field] for field in unchanged}
    text, mask = draw_texts(37)
    again = logits_of(load_with_peft(moved_base, out))
    at = mask if again.ndim == 3 else np.ones(len(text), bool)
    assert_close(again[at], expected[at], 1e-4)
    # The same as the dense change, moved.
    dense = symmetry.apply(spec, element, adapter_task_vector(adapter, table, stored.params))
    factors = tree.flatten(adapter_task_vector(read_adapter(out), table, target))
    for path, leaf in tree.flatten(dense).items():
        np.testing.assert_allclose(np.asarray(factors[path]), np.asarray(leaf), atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", ["llama", "llama, biases, saved modules", "gpt2"])
def test_the_adapter_copied_onto_a_base_is_byte_for_byte_itself(name, tmp_path):
    base, folder, _ = write_case(tmp_path, name, dtype="bfloat16")
    stored, table = load_base(base)
    adapter = read_adapter(folder)
    out = write_adapter(
        tmp_path / "copy", move_adapter(adapter, table, source=stored.params, target=stored.params, base="there")
    )
    assert (out / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert (out / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert read_adapter(out).config == {**adapter.config, "base_model_name_or_path": "there"}


def test_a_scale_multiplies_the_whole_change(tmp_path):
    base, folder, _ = write_case(tmp_path, "llama, biases, saved modules")
    stored, table = load_base(base)
    adapter = read_adapter(folder)
    half = move_adapter(adapter, table, source=stored.params, target=stored.params, scale=0.5)
    whole, halved = (tree.flatten(adapter_task_vector(a, table, stored.params)) for a in (adapter, half))
    for path, leaf in whole.items():
        np.testing.assert_allclose(np.asarray(halved[path]), 0.5 * np.asarray(leaf), atol=1e-6, err_msg=path)


def test_on_another_base_what_is_replaced_becomes_the_targets_own_plus_the_change(tmp_path, key):
    base, folder, _ = write_case(tmp_path, "llama, biases, saved modules")
    stored, table = load_base(base)
    adapter = read_adapter(folder)
    other = tree.map_leaves(lambda _, leaf: np.asarray(leaf) * np.float32(1.5), stored.params)
    moved = move_adapter(adapter, table, source=stored.params, target=other)
    name = "base_model.model.model.norm.weight"
    change = adapter.tensors[name] - np.asarray(stored.params["final_norm"]["scale"])
    np.testing.assert_allclose(moved.tensors[name], other["final_norm"]["scale"] + change, rtol=1e-6)
    same = [own for own in adapter.tensors if "lora_" in own]
    for own in same:
        np.testing.assert_array_equal(moved.tensors[own], adapter.tensors[own])


@pytest.mark.parametrize("left", ["lora_A", "lora_B"])
def test_a_factor_that_stays_behind_changes_the_function(left, tmp_path, key):
    base, folder, adapted = write_case(tmp_path, "llama, every linear")
    expected = logits_of(adapted)
    stored, table = load_base(base)
    config = registry.config_from_dict(stored.config)
    spec = registry.symmetry_of(config)
    element = symmetry.random(key, spec)
    target = symmetry.apply(spec, element, stored.params)
    adapter = read_adapter(folder)
    moved = move_adapter(adapter, table, source=stored.params, target=target, spec=spec, element=element)
    illegal = replace_tensors(moved, {n: t for n, t in adapter.tensors.items() if left in n}, base=None)
    text, mask = draw_texts(37)
    ours, wrong = (
        np.asarray(run(config, merge_adapter(a, table, target), {"text": text, "mask": mask}))[mask]
        for a in (moved, illegal)
    )
    assert_close(ours, expected[mask], 1e-4)
    assert difference(expected[mask], wrong) > 1e-2


def test_torch_files_are_read_without_torch(tmp_path):
    torch = pytest.importorskip("torch")
    _, folder, adapted = write_case(tmp_path, "llama")
    import peft

    (folder / "adapter_model.safetensors").unlink()
    torch.save(peft.get_peft_model_state_dict(adapted), folder / "adapter_model.bin")
    adapter = read_adapter(folder)
    out = write_adapter(tmp_path / "again", adapter)
    assert read_adapter(out).tensors.keys() == adapter.tensors.keys()
    assert not (out / "adapter_model.bin").exists()


def test_an_adapter_of_a_network_without_its_head_finds_the_tensors_behind_their_prefix(tmp_path):
    base, _, _ = write_case(tmp_path / "a", "llama")
    stored, table = load_base(base)
    write_adapted(tmp_path / "b", adapt(make_model("LlamaModel", **LLAMA[1]), r=2, target_modules=["q_proj"]))
    vector = tree.flatten(adapter_task_vector(read_adapter(tmp_path / "b"), table, stored.params))
    assert {path for path, leaf in vector.items() if np.any(np.asarray(leaf))} == {
        "block_0/attn/q/kernel",
        "block_1/attn/q/kernel",
    }


class TestExperts:
    """Factors of experts one by one, as PEFT wrote them before transformers kept all experts in one tensor."""

    @pytest.fixture
    def case(self, tmp_path):
        """(stored base, key table, adapter folder)."""
        cls, fields = MIXTRAL
        stored, table = load_base(write_folder(tmp_path / "base", make_model(cls, **fields)))
        folder = write_adapted(tmp_path / "adapter", adapt(make_model(cls, **fields), r=2, target_modules=["q_proj"]))
        draw, tensors = np.random.default_rng(0), dict(read_adapter(folder).tensors)
        for layer in range(2):
            for expert in range(4):
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
                for part, (num_in, num_out) in {"w1": (24, 20), "w3": (24, 20), "w2": (20, 24)}.items():
                    for half, shape in (("A", (2, num_in)), ("B", (num_out, 2))):
                        noise = draw.normal(size=shape) * 0.3 / np.sqrt(shape[1])
                        tensors[f"{module}.{part}.lora_{half}.weight"] = noise.astype(np.float32)
        write_tensors(folder, tensors)
        change_config(folder, target_modules=["q_proj", "w1", "w2", "w3"])
        return stored, table, folder

    def test_the_task_vector_is_what_peft_computes(self, case, tmp_path):
        stored, table, folder = case
        merged = merge_adapter(read_adapter(folder), table, stored.params)
        text, mask = draw_texts(37)
        ours = np.asarray(run(registry.config_from_dict(stored.config), merged, {"text": text, "mask": mask}))
        assert_close(ours[mask], logits_of(load_with_peft(tmp_path / "base", folder))[mask], 1e-5)

    def test_they_change_places_with_their_experts(self, case, tmp_path, key):
        stored, table, folder = case
        expected = logits_of(load_with_peft(tmp_path / "base", folder))
        spec = registry.symmetry_of(registry.config_from_dict(stored.config))
        element = symmetry.random(key, spec)
        target = symmetry.apply(spec, element, stored.params)
        moved_base = write_moved(tmp_path / "moved", stored, target)
        moved = move_adapter(
            read_adapter(folder), table, source=stored.params, target=target, spec=spec, element=element
        )
        out = write_adapter(tmp_path / "moved_adapter", moved)
        _, mask = draw_texts(37)
        assert_close(logits_of(load_with_peft(moved_base, out))[mask], expected[mask], 1e-4)

    def test_they_take_in_the_gain_of_their_norm_with_folded_weights(self, case, key):
        stored, table, folder = case
        adapter, spec = read_adapter(folder), registry.symmetry_of(registry.config_from_dict(stored.config))
        folded = canonical.canonical_spec(spec)
        element = symmetry.random(key, folded)
        sizes = dict(source=stored.params, target=stored.params, spec=folded, element=element, folded=spec)
        moved = tree.flatten(adapter_task_vector(move_adapter(adapter, table, **sizes), table, stored.params))
        tuned = merge_adapter(adapter, table, tree.map_leaves(lambda _, x: np.asarray(x, np.float64), stored.params))
        change = tree.task_vector(*(canonical.fold(spec, params) for params in (stored.params, tuned)))
        wanted = canonical.unfold(spec, symmetry.apply(folded, element, change), stored.params).task_vector
        for path, leaf in tree.flatten(wanted).items():
            np.testing.assert_allclose(np.asarray(moved[path]), leaf, atol=1e-5, err_msg=path)

    def test_an_expert_without_factors_has_nothing_to_change_places_with(self, case, key):
        stored, table, folder = case
        tensors = {
            name: t for name, t in read_adapter(folder).tensors.items() if "layers.1" not in name or "3.w2" not in name
        }
        write_tensors(folder, tensors)
        spec = registry.symmetry_of(registry.config_from_dict(stored.config))
        sizes = dict(source=stored.params, target=stored.params, spec=spec, element=symmetry.random(key, spec))
        with pytest.raises(SpecError, match=r"and model.layers.1.block_sparse_moe.experts.3.w2.weight has none"):
            move_adapter(read_adapter(folder), table, **sizes)
        vector = tree.flatten(adapter_task_vector(read_adapter(folder), table, stored.params))
        change = np.asarray(vector["block_1/mlp/experts/down/kernel"])
        assert np.any(change[2])
        assert not np.any(change[3])
