"""T5: an encoder, and most often a decoder that reads it, with RMS norms and relative positions."""

from jaxtune.models.t5.config import Config
from jaxtune.models.t5.leaves import init
from jaxtune.models.t5.network import apply, decode, encode, example, read_out
from jaxtune.models.t5.symmetry import symmetry

__all__ = ["Config", "apply", "decode", "encode", "example", "init", "read_out", "symmetry"]
