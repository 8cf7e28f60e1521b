"""What families with mixtures of experts share: fields of config.json and names of tensors.

Experts are stored one by one, as older releases did and transformers 5 still writes, or all in one tensor.
"""

from collections.abc import Collection
from typing import Any

from jaxtune.models import decoder
from jaxtune.models.experts import Experts
from jaxtune.models.hub.fields import Fields
from jaxtune.models.hub.llama_like import mlp_rows
from jaxtune.models.keys import LINEAR, Row

# What a config.json of Qwen3-MoE says by leaving a field out; a relative passes its own where it differs.
DEFAULTS = {
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}


def count_experts(fields: Fields) -> int:
    """How many experts there are, by either of the field's two names.

    Raises:
        ConfigError: the two are there and differ.
    """
    first, second = "num_experts", "num_local_experts"
    ours, theirs = (fields.values.get(name) for name in (first, second))
    if None not in (ours, theirs) and ours != theirs:
        raise fields.error(f'"{first}" is {ours!r} and "{second}" {theirs!r} in config.json; they mean the same.')
    return next(n for n in (ours, theirs, fields.get(first), fields.get(second)) if n is not None)


def read_mixture(fields: Fields, *, shared_hidden: int | None = None) -> dict[str, Any]:
    """`experts` and `sparse` of a `decoder.Config`: every so many blocks have a mixture, and some are named as dense.

    Args:
        fields: Of the config.json.
        shared_hidden: Of the shared expert; None without.

    Raises:
        ConfigError: numbers that make no sense.
    """
    count, dense, step = count_experts(fields), fields["mlp_only_layers"] or (), fields["decoder_sparse_step"]
    if not isinstance(step, int) or step < 1:
        raise fields.error(f'"decoder_sparse_step" is {step!r} in config.json; expected a number of blocks.')
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(fields["num_hidden_layers"]))
    if count == 0 or not any(sparse):
        return {}
    experts = Experts(
        num_experts=count,
        num_chosen=fields["num_experts_per_tok"],
        hidden=fields["moe_intermediate_size"],
        is_normalised=fields["norm_topk_prob"],
        shared_hidden=shared_hidden,
    )
    return {"experts": experts, "sparse": sparse}


def expert_rows(
    config: decoder.Config, index: int, stored: str, names: Collection[str], parts: dict[str, str] | None = None
) -> list[Row]:
    """Router and experts of one block.

    Args:
        config: Says how many experts block `index` has.
        index: Which block.
        stored: Stored name of the mixture, for instance "model.layers.0.mlp".
        names: Of all stored tensors: whether "experts.gate_up_proj" holds the gates and ups of all experts.
        parts: Ours -> what an expert's own tensors are called; gate_proj, up_proj and down_proj if left out.
    """
    path, experts = f"block_{index}/mlp", config.experts_of(index)
    rows = [Row(f"{stored}.gate.weight", f"{path}/router/kernel", LINEAR)]
    if f"{stored}.experts.gate_up_proj" in names:
        return [
            *rows,
            Row(
                f"{stored}.experts.gate_up_proj",
                (f"{path}/experts/gate/kernel", f"{path}/experts/up/kernel"),
                "hidden expert in -> expert in hidden",
                sizes=(experts.hidden, experts.hidden),
                before="expert both in -> both expert in",
            ),
            Row(f"{stored}.experts.down_proj", f"{path}/experts/down/kernel", "expert out in -> expert in out"),
        ]
    parts = parts or {part: f"{part}_proj" for part in ("gate", "up", "down")}
    for ours, theirs in parts.items():
        every = tuple(f"{stored}.experts.{expert}.{theirs}.weight" for expert in range(experts.num_experts))
        rows.append(Row(every, f"{path}/experts/{ours}/kernel", LINEAR))
    return rows


def sparse_or_dense_rows(config: decoder.Config, index: int, stored: str, names: Collection[str]) -> list[Row]:
    """Rows of a block whose MLP is a mixture, perhaps with a shared expert, or dense."""
    experts = config.experts_of(index)
    if experts is None:
        return mlp_rows(config, index, stored)
    path, stored = f"block_{index}/mlp", f"{stored}.mlp"
    rows = expert_rows(config, index, stored, names)
    if experts.shared_hidden is not None:
        for part in ("gate", "up", "down"):
            rows.append(Row(f"{stored}.shared_expert.{part}_proj.weight", f"{path}/shared/{part}/kernel", LINEAR))
        rows.append(Row(f"{stored}.shared_expert_gate.weight", f"{path}/shared_gate/kernel", LINEAR))
    return rows
