"""Checkpoints of any format in, one published whole or not at all out."""

from jaxtune.checkpoint.formats import Checkpoint, Layout, load
from jaxtune.checkpoint.manifest import describe_checkpoint, hash_checkpoint, write_manifest
from jaxtune.checkpoint.output import save, write_checkpoint
from jaxtune.checkpoint.publish import check_space, refuse_existing

__all__ = [
    "Checkpoint", "Layout", "check_space", "describe_checkpoint", "hash_checkpoint", "load", "refuse_existing",
    "save", "write_checkpoint", "write_manifest",
]  # fmt: skip
