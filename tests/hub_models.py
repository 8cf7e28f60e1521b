"""Checkpoints of the Hugging Face families with random weights, made from their own configs, for parity tests."""

from pathlib import Path

import numpy as np

from jaxtune import checkpoint
from jaxtune.models import registry
from jaxtune.tree import flatten


def randomise(model, seed):
    """Every parameter with signal: no zero biases, no equal gains. In place; returns the model in eval mode."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=draw, dtype=torch.float32).to(leaf.dtype)
            if leaf.ndim < 2:
                is_gain = "norm" in name.lower() or "ln" in name.lower()
                leaf.copy_((1.0 if is_gain and name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                leaf.copy_(noise / np.sqrt(leaf.shape[-1]))
    return model.eval()


def write_folder(folder, model, **options):
    """`save_pretrained` of a model; returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder, **options)
    return folder


def read_folder(folder):
    """(config, params, checkpoint) of a folder, through the family's key table."""
    stored = checkpoint.load(folder)
    tensors = flatten(stored.params)
    config, table = registry.read_stored(stored.config, tensors)
    return config, table.decode(tensors), stored


def assert_close(ours, theirs, tolerance=1e-4):
    """Largest difference over the root mean square of the oracle's outputs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.sqrt(np.mean(theirs**2))


def assert_round_trip(folder):
    """Every stored tensor comes back byte for byte."""
    stored = checkpoint.load(folder)
    tensors = flatten(stored.params)
    _, table = registry.read_stored(stored.config, tensors)
    params = table.decode(tensors)
    tensor_of = table.encoder(params, tensors)
    for name, tensor in tensors.items():
        again = tensor_of(name)
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape), name
        assert np.ascontiguousarray(again).tobytes() == np.ascontiguousarray(tensor).tobytes(), name
