"""CLIP as a classifier of classes that it was never tuned for: texts are its read-out."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxtune.models import clip
from jaxtune.models.readout import DEFAULT_SCALE
from jaxtune.types import Params


def zero_shot_embeddings(
    config: clip.Config,
    params: Params,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[list[str]], np.ndarray],
    *,
    renormalise: bool = True,
) -> np.ndarray:
    """One vector per class, for `embeddings=` of `make_sample` and `evaluate_classifier`.

    Unit features of every template are averaged for each class. The rows carry the model's own temperature, so that
    the frozen read-out gives CLIP's own logits, and loss and calibration are CLIP's. The offset of SigLIP, the same
    for all classes, is left out: it changes no probability among them.

    Args:
        config, params, class_names, templates, tokenize, renormalise: As `clip.zero_shot_classifier`.

    Shapes:
        result: float32[C, embed_dim].

    Raises:
        ConfigError, DataError: as `clip.zero_shot_classifier`.

    Reference:
        Radford et al. 2021, arXiv:2103.00020, section 3.1.4.
    """
    rows = clip.zero_shot_classifier(config, params, class_names, templates, tokenize, renormalise=renormalise)
    scale = float(np.exp(np.asarray(jax.device_get(params["logit_scale"]), np.float64))) / DEFAULT_SCALE
    return np.asarray(rows, np.float32) * np.float32(scale)
