"""Decoder-only transformers: one network; GPT-2, OPT, NeoX, Llama, Qwen, Gemma and Phi are configs of it."""

from jaxtune.models.decoder.config import Config, Rotary
from jaxtune.models.decoder.leaves import init, qk_parts
from jaxtune.models.decoder.network import apply, apply_block, embed, example, read_out
from jaxtune.models.decoder.symmetry import symmetry

__all__ = ["Config", "Rotary", "apply", "apply_block", "embed", "example", "init", "qk_parts", "read_out", "symmetry"]
