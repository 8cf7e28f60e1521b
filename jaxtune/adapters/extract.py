"""Full weights as a LoRA: the best factors of a given rank for every matrix that fine-tuning changed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.adapters.binding import is_stacked, network_name
from jaxtune.adapters.folder import PREFIX, Adapter, parse_tensors
from jaxtune.checkpoint import safetensors
from jaxtune.errors import ConfigError
from jaxtune.models.keys import KeyTable, Row
from jaxtune.tree import check_same, flatten, is_float
from jaxtune.types import Params

EXACT_SIZE = 256  # of the smaller side of a matrix, up to which all singular values are computed
OVERSAMPLING, PASSES = 16, 6  # of the search for the leading ones in larger matrices


@dataclass(frozen=True)
class Extracted:
    """An adapter cut out of full weights, and what it leaves out.

    Attributes:
        adapter: Ready for `write_adapter`.
        errors: Stored name of every matrix with factors -> share of its change (in norm) that they leave out.
        error: The same of all those matrices together.
        whole: Stored names of tensors that the adapter holds in full.
        not_held: Stored names of tensors that changed and that no LoRA of PEFT can hold -> why.
        total_error: Share of the whole change that the adapter leaves out, `not_held` included.
    """

    adapter: Adapter
    errors: dict[str, float]
    error: float
    whole: tuple[str, ...]
    not_held: dict[str, str]
    total_error: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for `report.json`."""
        names = ("errors", "error", "whole", "not_held", "total_error")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}


def extract_adapter(
    task_vector: Params,
    table: KeyTable,
    target: Params,
    *,
    rank: int,
    base: str | None = None,
    task_type: str | None = None,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Extracted:
    """The LoRA of rank `rank` that comes closest to a change of full weights.

    A matrix of a linear layer gets the leading `rank` singular vectors of its change, which no other factors of that
    rank come closer than (Eckart & Young 1936). Biases beside such factors, norms and tables of embeddings are held in
    full ("bias" and "modules_to_save" of PEFT). Tensors that did not change are left out.

    Args:
        task_vector: Change of the target's weights, tree as the target; leaves are read one row at a time.
        table: Key table of the target.
        target: Our tree of the target; values are read only of what is held in full.
        rank: Of the factors; smaller where a matrix has no such rank.
        base: Path or name of the target, for adapter_config.json.
        task_type: Of adapter_config.json, for instance "CAUSAL_LM".
        dtype: Of the factors.
        seed: Of the search in large matrices.

    Raises:
        TreeMismatchError: the task vector is not the target's.
        ConfigError: `rank` is below 1; no matrix of a linear layer has changed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank is {rank!r}; factors need a rank of at least 1.")
    check_same({"target": target, "task_vector": task_vector})
    changes, own = flatten(task_vector), flatten(target)
    stored = [name for row in table.rows for name in row.names]
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    errors, not_held, norms, lost, saved = {}, {}, {}, {}, set()
    draw = np.random.default_rng(seed)
    for row in table.rows:
        if not all(is_float(own[path]) for path in row.leaves):
            continue
        change = row.encode({path: np.asarray(changes[path], _wide(changes[path])) for path in row.leaves})
        for name, tensor in change.items():
            norms[name] = float(np.linalg.norm(tensor.astype(np.float64)))
            lost[name] = 0.0
            if norms[name] == 0:
                continue
            reason = _why_not_held(row, name, stored)
            if _is_linear(row, tensor):
                axis = row.trace(row.leaves[0], 2)[0]
                a, b, lost[name] = factorise(tensor if axis == 1 else tensor.T, rank, draw)
                factors[name] = a.astype(dtype), b.astype(dtype)
                errors[name] = lost[name] / norms[name]
            elif reason:
                not_held[name], lost[name] = reason, norms[name]
            else:
                saved.add(name)
    # A bias beside factors belongs to a layer that PEFT wraps; of another module all tensors are saved.
    layers = {_owner(name) for name in factors}
    saved |= {name for name in stored if _owner(name) in {_owner(one) for one in saved} - layers}
    whole = _add(table, own, changes, saved)
    if not factors:
        raise ConfigError(
            "the task vector changes no matrix of a linear layer, and PEFT reads no adapter without factors. "
            "Ask for full weights."
        )
    return Extracted(
        adapter=_make_adapter(factors, whole, table, rank=rank, base=base, task_type=task_type),
        errors=errors,
        error=_share({name: lost[name] for name in factors}, {name: norms[name] for name in factors}),
        whole=tuple(whole),
        not_held=not_held,
        total_error=_share(lost, norms),
    )


def factorise(matrix: np.ndarray, rank: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """(A, B, error): the `B A` of the given rank that is closest to a matrix.

    Small matrices: all singular values. Large ones: the leading ones are searched in a few products with the matrix
    (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4); the error is that of what was found.

    Shapes:
        matrix: float[out, in]; A: float[rank, in]; B: float[out, rank], the singular values shared equally.
        error: norm of `matrix - B A`.
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT_SIZE, 2 * (rank + OVERSAMPLING)):
        left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    else:
        basis = draw.standard_normal((matrix.shape[1], rank + OVERSAMPLING)).astype(matrix.dtype)
        for _ in range(PASSES):
            basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
        left, values, right = np.linalg.svd((matrix @ basis).astype(np.float64), full_matrices=False)
        right = right @ basis.T.astype(np.float64)
    root = np.sqrt(values[:rank])
    a, b = root[:, None] * right[:rank], left[:, :rank] * root
    return a, b, float(np.linalg.norm(matrix - (b @ a).astype(matrix.dtype)))


def _is_linear(row: Row, tensor):
    is_kernel = all(path.split("/")[-1] == "kernel" for path in row.leaves)
    return tensor.ndim == 2 and is_kernel and not is_stacked(row)


def _why_not_held(row: Row, name, stored):
    """Why "modules_to_save" cannot hold a tensor: PEFT saves modules, and only those that hold nothing but tensors."""
    module, _, end = name.rpartition(".")
    if is_stacked(row) or not module:
        return "part of no module of its own"
    if end not in ("weight", "bias") or any(_owner(other).startswith(f"{module}.") for other in stored):
        return f"a parameter of {module}, which has modules inside"
    return None


def _owner(name):
    return name.rpartition(".")[0]


def _add(table, own, changes, names) -> dict[str, np.ndarray]:
    """The fine-tuned tensors `names`."""
    whole = {}
    for row in table.rows:
        for name in names & set(row.names):
            before = row.encode({path: np.asarray(own[path]) for path in row.leaves})[name]
            change = row.encode({path: np.asarray(changes[path], _wide(changes[path])) for path in row.leaves})[name]
            whole[name] = (before.astype(change.dtype) + change).astype(before.dtype)
    return whole


def _make_adapter(factors, whole, table, *, rank, base, task_type) -> Adapter:
    twins = {twin: whole[name] for twin, name in table.ties.items() if name in whole}
    whole = {network_name(name, table): tensor for name, tensor in (whole | twins).items()}
    factors = {network_name(name, table).removesuffix(".weight"): pair for name, pair in factors.items()}
    owners = {name: name.rpartition(".")[0] for name in whole}
    # A bias beside factors is part of a layer that PEFT wraps; other tensors are saved with their module.
    wrapped = {name for name in whole if owners[name] in factors}
    saved = sorted({owners[name] for name in whole if name not in wrapped})
    tensors = {}
    for module, (a, b) in factors.items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    for name, tensor in whole.items():
        module, _, end = name.rpartition(".")
        tensors[f"{PREFIX}{module}.{'base_layer.' if name in wrapped else ''}{end}"] = tensor
    ranks = {f"^{re.escape(module)}": len(a) for module, (a, _) in factors.items() if len(a) != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # so that every product counts once
        "target_modules": sorted(factors),
        # The tie of a table and its twin brings the latter.
        "modules_to_save": [name for name in saved if f"{name}.weight" not in twins] or None,
        "bias": "lora_only" if wrapped else "none",
        "ensure_weight_tying": bool(twins),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    low_rank, wholes = parse_tensors(config, tensors, "the extracted adapter")
    header = safetensors.make_header(tensors, {"format": "pt"})
    return Adapter(config=config, tensors=tensors, low_rank=low_rank, whole=wholes, header=header)


def _share(lost: Mapping[str, float], norms: Mapping[str, float]) -> float:
    whole = np.sqrt(sum(norm**2 for norm in norms.values()))
    return float(np.sqrt(sum(value**2 for value in lost.values())) / whole) if whole else 0.0


def _wide(leaf):
    return np.float64 if leaf.dtype == np.float64 else np.float32
