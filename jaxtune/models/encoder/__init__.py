"""Post-LN encoders: one network that BERT, RoBERTa, DistilBERT and their kin are configs of."""

from jaxtune.models.encoder.config import Config
from jaxtune.models.encoder.leaves import init
from jaxtune.models.encoder.network import apply, apply_block, as_matrix, embed, example, read_out
from jaxtune.models.encoder.symmetry import symmetry

__all__ = ["Config", "apply", "apply_block", "as_matrix", "embed", "example", "init", "read_out", "symmetry"]
