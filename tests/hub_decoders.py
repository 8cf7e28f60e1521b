"""What every decoder family of transformers is held to: the oracle's outputs, its tensors byte for byte, its symmetry."""

import jax
import numpy as np
from hub_models import assert_close, randomise, write_folder
from small_models import FAST, difference

from jaxtune import symmetry, tree
from jaxtune.loading import load
from jaxtune.models import registry

LENGTH = 11
SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

run = jax.jit(registry.apply, static_argnums=0, compiler_options=FAST)


def make_model(name, *, seed=0, dtype=None, **fields):
    """A model of transformers in eval mode, with random weights.

    Args:
        name: Of the class, for instance "LlamaForCausalLM".
        seed: Of the weights.
        dtype: Of the weights; None for float32.
        **fields: Of its config.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    made = getattr(transformers, name)
    model = randomise(made(made.config_class(**fields)), seed)
    return model if dtype is None else model.to(getattr(torch, dtype))


def draw_texts(vocab_size, *, num_texts=4, length=LENGTH):
    """(text, mask): whole, padded behind, padded in front, and one token alone; id 0 is padding and nothing else."""
    draw = np.random.default_rng(0)
    text = draw.integers(1, vocab_size, size=(num_texts, length)).astype(np.int32)
    mask = np.ones(text.shape, bool)
    mask[1, 7:] = False
    mask[2, :4] = False
    mask[3, 1:] = False
    return np.where(mask, text, 0), mask


def outputs_of_oracle(model, text, mask):
    """Logits, or the stream of a model without a head."""
    import torch

    with torch.no_grad():
        outputs = model(input_ids=torch.tensor(text).long(), attention_mask=torch.tensor(mask).long())
    return (outputs.logits if "logits" in outputs else outputs.last_hidden_state).numpy()


def read(folder):
    """(config, params) of a folder."""
    stored = load(folder)
    return registry.config_from_dict(stored.config), stored.params


def check_parity(folder, model, *, tolerance=1e-4, **options):
    """Writes the model and compares what we read with what it computes, on real tokens; returns what was read."""
    config, params = read(write_folder(folder, model, **options))
    text, mask = draw_texts(config.vocab_size)
    ours = np.asarray(run(config, params, {"text": text, "mask": mask}))
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all(), "padding must not give NaN"
    theirs = outputs_of_oracle(model, text, mask)
    at = mask if ours.ndim == 3 else np.ones(len(text), bool)
    assert_close(ours[at], theirs[at], tolerance)
    return config, params


def check_invariance(config, params, *, dtype, tolerance):
    """A random element of the declared symmetry moves every leaf that it owns and leaves the outputs alone."""
    spec = registry.symmetry_of(config)
    params = tree.map_leaves(lambda _, leaf: np.asarray(leaf, dtype), params)
    moved = symmetry.apply(spec, symmetry.random(jax.random.key(3), spec), params)
    before, after = tree.flatten(params), tree.flatten(moved)
    assert not [p for p in before if any(spec.axes[p]) and np.array_equal(before[p], after[p])]
    text, mask = draw_texts(config.vocab_size)
    first, second = (np.asarray(run(config, p, {"text": text, "mask": mask})) for p in (params, moved))
    assert first.dtype == dtype
    assert difference(first, second) <= tolerance
