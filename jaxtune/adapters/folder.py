"""An adapter on disk: adapter_config.json, and its factors in adapter_model.safetensors."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import checkpoint
from jaxtune.adapters.config import check_config, find_rank, find_scale, is_targeted
from jaxtune.checkpoint import files
from jaxtune.checkpoint.formats import Layout, StoredFile
from jaxtune.checkpoint.output import write_checkpoint, write_extra_files
from jaxtune.checkpoint.publish import publish
from jaxtune.errors import CheckpointError
from jaxtune.tree import MAX_LINES, check_finite, flatten, is_float

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME, TORCH_NAME = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every tensor that PEFT writes
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix, `scale * B A`.

    Attributes:
        module: What holds the matrix, as the network names it: "model.layers.0.self_attn.q_proj".
        a: Name of the tensor [rank, in].
        b: Name of the tensor [out, rank].
        scale: As adapter_config.json says.
        is_embedding: Whether the matrix is a table: rows are inputs.
    """

    module: str
    a: str
    b: str
    scale: float
    is_embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        config: adapter_config.json as parsed.
        tensors: Name in the file -> array.
        low_rank: Every pair of factors among them.
        whole: Name of a parameter of the network ("model.norm.weight") -> name of the tensor that replaces it: biases,
            modules to save, copies of the base's own tables.
        header: How to write the tensors again; holds their stored dtypes.
        side_files: Other files of the folder -> where to read them.
        left_out: Files that are not carried along -> why.
        path: What was read; None for an adapter that was made.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    low_rank: tuple[LowRank, ...]
    whole: Mapping[str, str]
    header: Any
    side_files: Mapping[str, Path] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def rank(self) -> int:
        """The largest rank of all factors."""
        return max((len(self.tensors[low.a]) for low in self.low_rank), default=0)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return os.path.isfile(Path(path) / CONFIG_NAME)


def read_adapter(path: str | Path) -> Adapter:
    """Reads a LoRA folder that PEFT wrote.

    Args:
        path: A folder with adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        CheckpointError: a file is missing or damaged, or has a tensor that is not understood.
        ConfigError: the adapter is no plain LoRA, see `config.check_config`.
        NonFiniteError: a factor holds NaN or Inf.
    """
    folder = Path(path)
    where = folder / CONFIG_NAME
    config = files.parse_object(files.read_small(files.locate(folder, CONFIG_NAME)), str(where), has_constants=True)
    if "adapter_type" in config and "peft_type" not in config:
        raise CheckpointError(
            f"{where}: an adapter of jaxtune's own training, not of PEFT. The training run wrote the merged model "
            "too; give that one."
        )
    check_config(config, str(where))
    name = next((name for name in (WEIGHTS_NAME, TORCH_NAME) if os.path.lexists(folder / name)), None)
    if name is None:
        raise CheckpointError(f"{folder}: has {CONFIG_NAME} and neither {WEIGHTS_NAME} nor {TORCH_NAME}.")
    stored = checkpoint.load(files.locate(folder, name), config={})
    if len(stored.layout.files) != 1:
        raise CheckpointError(f"{folder / name}: expected one file of tensors.")
    tensors = flatten(stored.params)
    check_finite(str(folder / name), tensors)
    low_rank, whole = parse_tensors(config, tensors, str(folder / name))
    side_files, left_out = files.list_side_files(folder, [CONFIG_NAME, name])
    return Adapter(
        config=config,
        tensors=tensors,
        low_rank=low_rank,
        whole=whole,
        header=stored.layout.files[0].header,
        side_files=side_files,
        left_out=left_out,
        path=folder,
    )


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    *,
    extra_files: Mapping[str, bytes | str] | None = None,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
) -> Path:
    """Publishes an adapter as a folder that PEFT loads, whole or not at all.

    Args:
        path: The folder to create.
        adapter: As `read_adapter`, `move_adapter` or `extract_adapter` give it; tensors are rounded to the dtypes of
            its header, once.
        extra_files: Name -> content, written beside the rest (report.json).
        overwrite: Whether a former output at `path` may be replaced.
        inputs: Checkpoints that `path` may not touch, besides the adapter's own folder.

    Returns:
        The absolute path of the folder.

    Raises:
        OutputError: see `checkpoint.publish`.
        CheckpointError: a value does not fit the stored dtype.
    """
    layout = Layout((StoredFile(WEIGHTS_NAME, adapter.header),))
    text = json.dumps(adapter.config, indent=2) + "\n"
    extra = {CONFIG_NAME: text.encode()}
    extra |= {name: data.encode() if isinstance(data, str) else data for name, data in (extra_files or {}).items()}
    num_bytes = layout.num_bytes + sum(map(len, extra.values()))
    inputs = [*inputs, *([adapter.path] if adapter.path else [])]
    with publish(path, overwrite=overwrite, inputs=inputs, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, adapter.tensors, layout, side_files=adapter.side_files)
        write_extra_files(folder, extra)
    return Path(os.path.abspath(path))


def replace_tensors(adapter: Adapter, tensors: Mapping[str, np.ndarray], *, base: str | None) -> Adapter:
    """The same adapter with other numbers, for another base.

    Args:
        adapter: What stays as it is.
        tensors: Name in the file -> array; those left out stay.
        base: Path or name of the base, for adapter_config.json; None leaves the name out.
    """
    config = {**adapter.config, "base_model_name_or_path": base, "revision": None}
    return dataclasses.replace(adapter, config=config, tensors={**adapter.tensors, **tensors})


def parse_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> tuple[tuple[LowRank, ...], dict[str, str]]:
    """(low_rank, whole) of an `Adapter`: what each tensor of the file is.

    Raises:
        CheckpointError: a tensor that is not understood, a factor without its other half, a rank that is not the
            config's, a module that the config does not name; lists them.
    """
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    lines = []
    for name, tensor in tensors.items():
        own = name.removeprefix(PREFIX)
        factor = FACTOR.fullmatch(own)
        if own == name:
            lines.append(f"  {name}: does not begin with {PREFIX!r}")
        elif not is_float(tensor):
            lines.append(f"  {name}: {tensor.dtype}; only floats are added to weights")
        elif factor:
            pairs.setdefault(factor["module"], {})[factor["linear"] or factor["embedding"]] = name
        elif "lora_" in own or "token_adapter" in own:
            lines.append(f"  {name}: not a factor that a plain LoRA has")
        else:
            whole[own.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    low_rank = []
    for module, pair in pairs.items():
        lines += [f"  {name}: {complaint}" for name, complaint in _complaints(config, tensors, module, pair)]
        if pair.keys() == {"A", "B"}:
            is_embedding = "lora_embedding" in pair["A"]
            low_rank.append(LowRank(module, pair["A"], pair["B"], find_scale(config, module), is_embedding))
    if not lines and not tensors:
        lines.append("  no tensor at all")
    if lines:
        more = [f"  ... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise CheckpointError(
            f"{where}: {len(lines)} tensors are not understood:\n"
            + "\n".join(lines[:MAX_LINES] + more)
            + "\nEvery tensor must be: one that is left out may be part of the fine-tune."
        )
    return tuple(low_rank), whole


def _complaints(config, tensors, module, pair):
    for half, other in ("AB", "BA"):
        if half not in pair:
            yield pair[other], f"has no {half} beside it"
            return
    a, b = (tensors[pair[half]] for half in "AB")
    rank = find_rank(config, module)
    if a.ndim != 2 or b.ndim != 2:
        yield pair["A"], f"{list(a.shape)} and {list(b.shape)}; factors of convolutions are not supported"
    elif a.shape[0] != rank or b.shape[1] != rank:
        yield pair["A"], f"{list(a.shape)} and {list(b.shape)}, where {CONFIG_NAME} says rank {rank}"
    elif not is_targeted(config, module) and not config.get("ensure_weight_tying"):  # then the twin has them as well
        yield pair["A"], f"{CONFIG_NAME} does not target {module}, so PEFT would ignore it"
