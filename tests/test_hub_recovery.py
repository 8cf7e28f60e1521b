"""The main job on real folders: a planted new base takes the fine-tune whole, as the oracle library sees it.

B = g(A) for a random element of everything the family declares, written as a folder; `transport --method auto` of the
fine-tune must then give a folder whose outputs in transformers are those of the fine-tune itself.
"""

import jax
import numpy as np
import pytest
from hub_models import MODELS, make_model

import jaxtune as jt
from jaxtune import symmetry
from jaxtune.loading import load, network_of
from jaxtune.models import registry
from jaxtune.rng import named_key

pytest.importorskip("transformers")

# The softest units of a small random network, which noise of a fine-tune's size already moves.
TOLERANCE = 1e-3


def write(folder, model):
    model.save_pretrained(folder)
    return folder


def draw_inputs(model):
    """Inputs that fit, as torch tensors: what the oracle's forward takes."""
    import inspect

    import torch

    generator = torch.Generator().manual_seed(3)
    takes, config = inspect.signature(model.forward).parameters, model.config
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    inputs = {}
    if "input_ids" in takes:
        inputs["input_ids"] = torch.randint(3, text.vocab_size, (3, 10), generator=generator)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.randint(3, text.vocab_size, (3, 6), generator=generator)
    if "pixel_values" in takes:
        side = getattr(vision, "image_size", 32)
        inputs["pixel_values"] = torch.randn(3, 3, side, side, generator=generator)
    return inputs


def outputs_of(folder, name, inputs):
    import torch
    import transformers

    torch.set_num_threads(1)
    model = getattr(transformers, MODELS[name][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(**inputs)
    return (out.logits_per_image if "logits_per_image" in out else out.logits).numpy()


def move(folder, out, element, spec):
    """The network of a folder moved by an element, as a folder."""
    stored = load(folder)
    return jt.save(out, symmetry.apply(spec, element, stored.params), like=stored)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_base_takes_the_fine_tune_whole(name, tmp_path):
    import torch

    model = make_model(name, seed=0)
    old = write(tmp_path / "old", model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, leaf in model.named_parameters():
            leaf.add_(0.1 * leaf.std(correction=0) * torch.randn(leaf.shape, generator=generator))
    tuned = write(tmp_path / "tuned", model)
    inputs = draw_inputs(model)

    spec = registry.symmetry_of(network_of(load(old)))
    element = symmetry.random(named_key(jax.random.key(0), "planted"), spec)
    new = move(old, tmp_path / "new", element, spec)
    scale = np.sqrt(np.mean(outputs_of(tuned, name, inputs) ** 2))
    apart = np.abs(outputs_of(new, name, inputs) - outputs_of(old, name, inputs)).max()
    assert apart < TOLERANCE * scale  # the planted base computes what the old one does

    found = jt.transport(old, tuned, new)
    assert found.prepared.info["chosen"] != "identity"
    assert found.equivalence is None or found.equivalence.is_exact
    result = jt.save(tmp_path / "result", found.params, like=load(new))
    ours, theirs = outputs_of(result, name, inputs), outputs_of(tuned, name, inputs)
    moved = np.abs(theirs - outputs_of(old, name, inputs)).max()
    assert moved > 20 * TOLERANCE * scale  # the fine-tune does something
    assert np.abs(ours - theirs).max() < TOLERANCE * scale
