"""LoRA adapters of PEFT: read, made dense, moved factor by factor, written, cut out of full weights."""

from jaxtune.adapters.dense import adapter_task_vector, merge_adapter
from jaxtune.adapters.extract import Extracted, extract_adapter
from jaxtune.adapters.folder import Adapter, LowRank, is_adapter, read_adapter, write_adapter
from jaxtune.adapters.move import move_adapter

__all__ = [
    "Adapter", "Extracted", "LowRank", "adapter_task_vector", "extract_adapter", "is_adapter", "merge_adapter",
    "move_adapter", "read_adapter", "write_adapter",
]  # fmt: skip
