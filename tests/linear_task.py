"""The smallest networks that learn: a softmax regression, whose losses and gradients NumPy writes in a line."""

import numpy as np

from jaxtune.sample import Sample

NUM_INPUTS, NUM_CLASSES = 4, 3


def forward(params, batch):
    return batch["image"] @ params["head"]["kernel"] + params["head"]["bias"][None]


def draw_sample(count=48, *, seed=0, truth=None, name="planes"):
    """Points and the labels that `truth`, or a drawn model, gives them."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, NUM_INPUTS)).astype(np.float32)
    truth = draw_params(seed=100) if truth is None else truth
    label = np.argmax(forward(truth, {"image": x}), axis=-1).astype(np.int32)
    return Sample(name, {"image": x, "label": label}, forward)


def draw_params(*, seed=0, scale=1.0):
    draw = np.random.default_rng(seed)
    return {
        "head": {
            "kernel": (scale * draw.normal(size=(NUM_INPUTS, NUM_CLASSES))).astype(np.float32),
            "bias": (scale * draw.normal(size=NUM_CLASSES)).astype(np.float32),
        }
    }


def to_vector(params):
    return np.concatenate([np.asarray(params["head"][name], np.float64).ravel() for name in ("bias", "kernel")])


def loss_of(vector, sample):
    """Mean cross-entropy and its gradient, in float64, of bias and kernel one behind the other."""
    bias, kernel = vector[:NUM_CLASSES], vector[NUM_CLASSES:].reshape(NUM_INPUTS, NUM_CLASSES)
    x, label = sample.batch["image"].astype(np.float64), sample.batch["label"]
    logits = x @ kernel + bias
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(x)), label]).mean()
    p[np.arange(len(x)), label] -= 1
    return loss, np.concatenate([p.mean(axis=0), (x.T @ p / len(x)).ravel()])
