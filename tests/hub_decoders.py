"""What every decoder family of transformers is held to: the oracle's outputs, tensors byte for byte, symmetry."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hub_models import assert_close, assert_round_trip, randomise, write_folder
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


def write(folder, variant, **options):
    """Writes the model of a variant, (class, fields of its config); returns (folder, model)."""
    name, fields = variant
    model = make_model(name, **fields, **options)
    return write_folder(folder / "model", model), model


def stored_fixture(variants):
    """A fixture (folder, model) for a test module, once for every variant."""

    @pytest.fixture(scope="module", params=variants)
    def stored(request, tmp_path_factory):
        return write(tmp_path_factory.mktemp("stored"), variants[request.param])

    return stored


def check_parity(folder, model, *, tolerance=1e-4):
    """Compares what we read from a folder with what the model that wrote it computes, on real tokens."""
    config, params = read(folder)
    text, mask = draw_texts(config.vocab_size)
    ours = np.asarray(run(config, params, {"text": text, "mask": mask}))
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all(), "padding must not give NaN"
    theirs = outputs_of_oracle(model, text, mask)
    at = mask if ours.ndim == 3 else np.ones(len(text), bool)
    assert_close(ours[at], theirs[at], tolerance)


def check_bytes(folder, variant):
    """Every tensor of a float32 and of a bfloat16 folder comes back byte for byte."""
    for dtype in (None, "bfloat16"):
        assert_round_trip(write(folder / str(dtype), variant, dtype=dtype)[0])


def check_symmetry(folder):
    """A random element leaves the function of a folder alone, in float32 and in float64."""
    config, params = read(folder)
    check_invariance(config, params, dtype=np.float32, tolerance=1e-4)
    with jax.enable_x64(True):
        check_invariance(config, params, dtype=np.float64, tolerance=1e-9)


def check_defaults(name, **sizes):
    """A config.json with the sizes alone means to us what it means to transformers."""
    import transformers

    theirs = getattr(transformers, name)
    sizes = {"model_type": theirs.model_type, **sizes}
    ours = registry.config_from_dict(sizes)
    assert ours == registry.config_from_dict(theirs.from_dict(sizes).to_dict())


def check_invariance(config, params, *, dtype, tolerance):
    """A random element of the declared symmetry moves every leaf that it owns and leaves the outputs alone."""
    spec = registry.symmetry_of(config)
    params = tree.map_leaves(lambda _, leaf: np.asarray(leaf, dtype), params)
    element = symmetry.random(jax.random.key(3), spec)
    before, after = tree.flatten(params), tree.flatten(symmetry.apply(spec, element, params))
    assert not [p for p in before if any(spec.axes[p]) and np.array_equal(before[p], after[p])]
    assert difference_made(config, params, spec, element) <= tolerance


def difference_made(config, params, spec, element):
    """How much an element changes the outputs, padding included, over their root mean square."""
    text, mask = draw_texts(config.vocab_size)
    batch = {"text": text, "mask": mask}
    first, second = (np.asarray(run(config, p, batch)) for p in (params, symmetry.apply(spec, element, params)))
    assert first.dtype == np.float32 or jax.config.jax_enable_x64
    return difference(first, second)


def with_kind(spec, group, kind):
    """The spec with one group declared as another kind, for elements that its own does not allow."""
    groups = [replace(own, kind=kind) if own.name == group else own for own in spec.groups.values()]
    return symmetry.make_spec(groups, {path: [axis and axis.mark for axis in row] for path, row in spec.axes.items()})
