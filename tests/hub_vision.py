"""What every test of a stored vision or text tower does: write, read, compare with the oracle, move by symmetries."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from hub_models import assert_close, randomise
from small_models import FAST, difference

from jaxtune import symmetry
from jaxtune.errors import TreeMismatchError
from jaxtune.loading import load, network_of
from jaxtune.models import registry
from jaxtune.rng import named_key
from jaxtune.tree import flatten, map_leaves, unflatten

EXACT64, EXACT32, SEEN = 1e-9, 1e-4, 1e-3

TOWER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "image_size": 8, "patch_size": 4, "num_channels": 2,
}  # fmt: skip


@partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _run(config, params, batch):
    outputs = registry.apply(config, params, batch)
    return outputs, registry.as_matrix(config, outputs)


def write_model(folder, model, *, seed=0, bfloat16=False):
    """A model with random weights and the folder that `save_pretrained` makes of it."""
    import torch

    torch.set_num_threads(1)
    randomise(model, seed)
    (model.to(torch.bfloat16) if bfloat16 else model).save_pretrained(folder)
    return folder


def open_model(folder):
    """(config, checkpoint) as a user's call sees them."""
    stored = load(folder)
    return network_of(stored), stored


def images(config, *, seed=0, size=3):
    """float32[N, H, W, C] of a vision config."""
    shape = (size, config.image_size, config.image_size, config.channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(image):
    """The layout of torch: channels before rows and columns."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def outputs_of(config, params, batch):
    """Whatever `apply` gives, as NumPy."""
    return jax.tree.map(np.asarray, _run(config, params, batch)[0])


def check_outputs(config, params, batch, want):
    """Ours against the oracle's: one array, or a dict of some of ours."""
    got = outputs_of(config, params, batch)
    if not isinstance(want, dict):
        got, want = {"": got["features"] if isinstance(got, dict) else got}, {"": want}
    for name, leaf in want.items():
        assert_close(got[name], leaf.detach().float().numpy())


def check_round_trip(folder):
    """Every stored tensor comes back byte for byte from our tree."""
    import safetensors.torch
    import torch

    _, stored = open_model(folder)
    tensor_of = stored.layout.codec.encoder(stored.params)
    names = stored.layout.tensors
    wanted = {}
    for file in stored.layout.files:
        wanted |= safetensors.torch.load_file(folder / file.name)
    assert wanted.keys() == names.keys()
    for name, tensor in wanted.items():
        again = np.asarray(tensor_of(name))
        assert tuple(tensor.shape) == again.shape, name
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == again.tobytes(), name


def check_names(folder):
    """A tensor too many and one too few are refused by name."""
    import safetensors.torch

    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    gone = next(name for name in tensors if name.endswith("norm1.weight") or "layernorm_before" in name)
    safetensors.torch.save_file({**tensors, "stranger": tensors[gone].clone()}, file)
    with pytest.raises(TreeMismatchError, match="stranger: in the file, not known"):
        load(folder)
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(TreeMismatchError, match=f"{gone}: expected, not in the file"):
        load(folder)


def change(config, before, after, batch):
    """Relative difference of what two sets of weights compute."""
    return difference(*(np.asarray(_run(config, params, batch)[1]) for params in (before, after)))


def check_invariance(config, params, batch, *, seed=0):
    """A random element of the declared group moves every leaf that it owns and changes nothing that comes out."""
    key = named_key(jax.random.key(seed), "element")
    spec = registry.symmetry_of(config)
    spec.check(params)
    with jax.enable_x64(True):
        wide = map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), params)
        moved = symmetry.apply(spec, symmetry.random(key, spec), wide)
        flat = flatten(wide)
        still = [
            path for path, leaf in flatten(moved).items() if any(spec.axes[path]) and np.array_equal(leaf, flat[path])
        ]
        assert not still
        assert change(config, wide, moved, batch) < EXACT64
    narrow = map_leaves(lambda _, leaf: np.asarray(leaf, np.float32), params)
    moved = symmetry.apply(spec, symmetry.random(key, spec), narrow)
    assert change(config, narrow, moved, batch) < EXACT32


def check_skipped(config, params, batch, path, *, seed=0):
    """Moving everything but the leaf at `path` is seen: a gain, a token, one side of a pair."""
    spec = registry.symmetry_of(config)
    with jax.enable_x64(True):
        wide = map_leaves(lambda _, leaf: np.asarray(leaf, np.float64), params)
        moved = flatten(symmetry.apply(spec, symmetry.random(jax.random.key(seed), spec), wide))
        moved[path] = flatten(wide)[path]
        assert change(config, wide, unflatten(moved), batch) > SEEN, path


def check_mixed_heads(config, params, batch, path, num_heads):
    """Units of one head in the slots of another are seen, though every leaf of the attention moves alike."""
    flat = flatten(params)
    units = flat[f"{path}/q/kernel"].shape[-1]
    order = np.random.default_rng(1).permutation(num_heads * units)

    def mix(leaf, first):
        merged = leaf.reshape(*leaf.shape[:first], num_heads * units, *leaf.shape[first + 2 :])
        return merged.take(order, axis=first).reshape(leaf.shape)

    changed = {}
    for leaf_path, leaf in flat.items():
        if leaf_path.startswith(f"{path}/") and leaf_path != f"{path}/out/bias":
            first = 0 if leaf_path.endswith(("bias", "out/kernel")) else 1
            changed[leaf_path] = mix(np.asarray(leaf, np.float32), first)
    assert change(config, params, unflatten({**flat, **changed}), batch) > SEEN


def check_one_junction(config, params, batch, name):
    """A new order at one junction alone, the others as they were, is seen."""
    spec = registry.symmetry_of(config, junctions="each")
    element = dict(symmetry.identity(spec))
    element[name] = np.roll(element[name], 1)
    assert change(config, params, symmetry.apply(spec, element, params), batch) > SEEN


def check_illegal_sign(config, params, batch, group, marks):
    """A sign on units that do not bear one is seen: `group` made a signed group, `marks` the owners of its leaves."""
    own = registry.symmetry_of(config)
    groups = [replace(g, kind="signed_permutation") if g.name == group else g for g in own.groups.values()]
    axes = {path: tuple(axis and axis.mark for axis in row) for path, row in own.axes.items()} | marks
    spec = symmetry.make_spec(groups, axes)
    element = dict(symmetry.identity(spec))
    element[group][1] = -1.0
    assert change(config, params, symmetry.apply(spec, element, params), batch) > SEEN
