"""Proxy logits: the new base's answer, moved by what fine-tuning did to the old base's. No weights are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxtune.errors import ConfigError
from jaxtune.gradients import ask, check_sample
from jaxtune.sample import Sample
from jaxtune.types import Params


@dataclass(frozen=True)
class ProxyForward:
    """Logits `target + scale * (finetuned - source)` of three networks, as a `Sample`'s forward: hashable.

    Called with {"source": params, "finetuned": params, "target": params} in the place of one network's parameters, so
    that whatever evaluates a sample evaluates the three together.

    Attributes:
        forward: Of each network.
        scale: Factor of what fine-tuning did.

    Reference:
        Liu et al. 2024, arXiv:2401.08565, equation 1.
    """

    forward: Any
    scale: float = 1.0

    def __call__(self, params: Params, batch: Mapping[str, Any]) -> jax.Array:
        target, finetuned, source = (
            ask(self.forward, params[name], batch) for name in ("target", "finetuned", "source")
        )
        return target + self.scale * (finetuned - source)


def with_proxy(
    sample: Sample, source: Params, finetuned: Params, target: Params, *, scale: float = 1.0
) -> tuple[Sample, Params]:
    """(the sample with a forward of three networks, the three together): a reference for every transport.

    Three networks run at every prediction; logits of the same classes, or the same vocabulary, are needed, the networks
    may differ in all else that `sample.forward` takes.

    Raises:
        ConfigError: `scale` is not finite.
        DataError: the sample is empty or holds NaN.
    """
    if not abs(scale) < float("inf"):
        raise ConfigError(f"scale is {scale}; it must be finite.")
    check_sample(sample, target, is_labelled=False)
    proxy = Sample(sample.name, sample.batch, ProxyForward(sample.forward, scale))
    return proxy, {"source": source, "finetuned": finetuned, "target": target}
