"""Gemma 3, the text model: a Gemma 2 that norms queries and keys and turns slower in blocks without a window.

Checkpoints with images (model_type "gemma3") hold a second network and are not read.
"""

from collections.abc import Mapping
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.hub.decoder_fields import FULL, WINDOWED, make_rotary, read_windows
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.gemma2 import OWN, read_gemma
from jaxtune.models.hub.llama_like import DEFAULTS, key_table

__all__ = ["key_table", "read_config"]


def read_config(values: Mapping[str, Any]) -> decoder.Config:
    """The config of a Gemma 3."""
    fields = Fields(values, {**DEFAULTS, **OWN, "sliding_window_pattern": 6})
    fields.only("attn_logit_softcapping", None)  # read by none of its implementations
    period = fields["sliding_window_pattern"]
    windows = read_windows(fields, [bool((index + 1) % period) for index in range(fields["num_hidden_layers"])])
    return read_gemma(fields, qk_norm="head", **windows, **_read_rotaries(fields))


def _read_rotaries(fields):
    """One of the blocks without a window, one of those with one; in one dict each, or in the fields of older files."""
    both = fields.get("rope_parameters") or {}
    full, windowed = ({**(both.get(kind) or {})} for kind in (FULL, WINDOWED))
    full |= fields.get("rope_scaling") or {}
    return {
        "rotary": make_rotary(fields, full, theta=fields.get("rope_theta") or 1e6),
        "rotary_windowed": make_rotary(fields, windowed, theta=fields.get("rope_local_base_freq") or 1e4),
    }
