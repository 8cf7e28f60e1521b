"""Tasks that a linear network solves: what compositions are tested on, with no model family behind it."""

from dataclasses import dataclass

import jax
import numpy as np

from jaxtune.sample import Sample

WIDTH, CLASSES = 6, 3


@dataclass(frozen=True)
class Linear:
    """Logits of two layers; each task reads the inputs that its own columns hold."""

    def __call__(self, params, batch):
        hidden = jax.numpy.tanh(batch["image"] @ params["block_0"]["kernel"] + params["block_0"]["bias"][None])
        return hidden @ params["block_1"]["kernel"]


def draw(*shape, seed, scale=1.0):
    return (scale * np.random.RandomState(seed).normal(size=shape)).astype(np.float32)


def make_base(seed=0):
    return {
        "block_0": {"kernel": draw(WIDTH, WIDTH, seed=seed), "bias": draw(WIDTH, seed=seed + 1)},
        "block_1": {"kernel": draw(WIDTH, CLASSES, seed=seed + 2)},
    }


def make_vectors(count, seed=10, scale=0.5):
    """Task vectors of the base's shapes."""
    return [jax.tree.map(lambda x, n=n: draw(*x.shape, seed=seed + n, scale=scale), make_base()) for n in range(count)]


def add(base, vectors, coefficients):
    """`base + Σ_t c_t τ_t` by a loop; c a number, or {path: number} a task."""
    result = jax.tree.map(np.copy, base)
    for vector, c in zip(vectors, coefficients, strict=True):
        for block, leaves in vector.items():
            for name, leaf in leaves.items():
                share = c[f"{block}/{name}"] if isinstance(c, dict) else c
                result[block][name] = (result[block][name] + share * leaf).astype(np.float32)
    return result


def make_task(params, *, size=60, seed=0, name="task", labelled=True):
    """Inputs, and the labels that a network gives them."""
    image = draw(size, WIDTH, seed=seed + 100)
    batch = {"image": image}
    if labelled:
        batch["label"] = np.asarray(Linear()(params, batch)).argmax(-1).astype(np.int32)
    return Sample(name, batch, Linear())


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def wide(tree):
    """In float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def forward64(params, image):
    """`Linear` by NumPy."""
    hidden = np.tanh(np.asarray(image, np.float64) @ params["block_0"]["kernel"] + params["block_0"]["bias"])
    return hidden @ params["block_1"]["kernel"]


def minimise(loss, numbers, steps, rate, *, decay=0.0, clip=None, is_cosine=False):
    """AdamW with gradients by central differences in float64: no code is shared with what is tested."""
    numbers = np.asarray(numbers, np.float64)
    first, second = np.zeros_like(numbers), np.zeros_like(numbers)
    for step in range(1, steps + 1):
        gradient = np.zeros_like(numbers)
        for n in range(numbers.size):
            shift = np.zeros_like(numbers)
            shift.flat[n] = 1e-5
            gradient.flat[n] = (loss(numbers + shift) - loss(numbers - shift)) / 2e-5
        if clip is not None:
            gradient *= min(1.0, clip / np.sqrt((gradient**2).sum()))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        hat = first / (1 - 0.9**step), second / (1 - 0.999**step)
        now = rate * (0.5 * (1 + np.cos(np.pi * (step - 1) / steps)) if is_cosine else 1.0)
        numbers = numbers - now * (hat[0] / (np.sqrt(hat[1]) + 1e-8) + decay * numbers)
    return numbers
