"""`jaxtune inspect`: what is in a checkpoint."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from jaxtune import checkpoint, loading
from jaxtune.commands.options import read_config
from jaxtune.errors import JaxtuneError
from jaxtune.models import registry
from jaxtune.report.table import count_bytes, render_table
from jaxtune.tree import flatten


def run(arguments) -> None:
    """Prints family, config, leaves and symmetry; what is not understood is said, not refused."""
    model = checkpoint.load(arguments.path, config=read_config(arguments.config))
    facts = _describe(model)
    print(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))


def _describe(model):
    stored, spec, problem, network, ties = flatten(model.params), None, None, None, dict(model.ties)
    try:
        model = loading.understand(model, lazy=True)
        network = loading.network_of(model)
        spec = registry.symmetry_of(network)
        spec.check(model.params)
    except JaxtuneError as error:
        spec, problem = None, str(error)
    codec = model.layout.codec
    if codec:
        ties |= {name: original for name, original in codec.table.ties.items() if name in stored}
    names = {path: list(row.names) for row in codec.table.rows for path in row.leaves} if codec else {}
    axes = spec.axes if spec else {}
    leaves = flatten(model.params)
    return {
        "path": str(model.path),
        "format": model.format,
        "family": model.config.get("model_type") or model.config.get("architecture"),
        "network": None if network is None else registry.config_to_dict(network),
        "config": model.config,
        "num_parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "num_bytes": model.layout.num_bytes,
        "leaves": [
            {
                "path": path,
                "stored": names.get(path, [path]),
                "dtype": str(leaf.dtype),
                "shape": list(leaf.shape),
                "axes": [axis.group if axis else None for axis in axes[path]] if path in axes else None,
            }
            for path, leaf in leaves.items()
        ],
        "ties": [{"name": name, "is": original} for name, original in ties.items()],
        "output_reads_the_embedding": bool(getattr(network, "tied", False)),
        "not_weights": sorted(codec.carried) if codec else [],
        "symmetry": [
            {"group": name, "kind": group.kind, "role": group.role, "size": group.size, "inside": group.parent}
            for name, group in (spec.groups.items() if spec else ())
        ],
        "has_canonical_form": None if spec is None else spec.form is not None,
        "not_understood": problem,
        "side_files": sorted(model.side_files),
        "left_out": model.left_out,
    }


def _as_text(facts):
    ties = [f"{tie['name']} is {tie['is']}" for tie in facts["ties"]]
    ties += ["the output layer reads the token embedding"] if facts["output_reads_the_embedding"] else []
    network = facts["network"]
    head = [
        {"what": "path", "value": facts["path"]},
        {"what": "format", "value": facts["format"]},
        {"what": "family", "value": facts["family"] or "not named in the config"},
        *([{"what": "read as", "value": network["model_type"]}] if network else []),
        {"what": "parameters", "value": f"{facts['num_parameters']:,}"},
        {"what": "size", "value": count_bytes(facts["num_bytes"])},
        {"what": "ties", "value": "; ".join(ties) or "none"},
        *(
            [{"what": "no weights", "value": ", ".join(_collapse(facts["not_weights"]))}]
            if facts["not_weights"]
            else []
        ),
        {"what": "files carried along", "value": ", ".join(facts["side_files"]) or "none"},
        *({"what": "left out", "value": f"{name}: {why}"} for name, why in facts["left_out"].items()),
    ]
    rows = _merge(
        {
            "path": leaf["path"],
            "stored": ", ".join(_collapse(leaf["stored"])),
            "dtype": leaf["dtype"],
            "shape": str(leaf["shape"]),
            "axes": "" if leaf["axes"] is None else ", ".join(axis or "fixed" for axis in leaf["axes"]),
        }
        for leaf in facts["leaves"]
    )
    columns = {"path": "leaf", "dtype": "dtype", "shape": "shape", "axes": "axes move with"}
    if any(row["stored"] != row["path"] for row in rows):
        columns["stored"] = "stored as"
    parts = [render_table({"what": "checkpoint", "value": ""}, head), render_table(columns, rows)]
    if facts["symmetry"]:
        columns = {"group": "group", "kind": "kind", "role": "role", "size": "size", "inside": "inside"}
        parts.append(render_table(columns, _merge(facts["symmetry"])))
        form, full = ("a", "works") if facts["has_canonical_form"] else ("no", "is refused")
        parts.append(f"The network has {form} canonical form: `full` {full} here.")
    if facts["not_understood"]:
        parts.append(f"Not understood: {facts['not_understood']}")
    return "\n\n".join(parts)


def _merge(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in block numbers only, as one: "block_{0..11}/mlp/up/kernel"."""
    merged: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(re.sub(r"\d+", "#", str(v)) if k in ("path", "group", "stored", "axes", "inside") else v
                    for k, v in row.items())  # fmt: skip
        merged.setdefault(key, []).append(row)
    return [_span(group) for group in merged.values()]


def _span(rows):
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: _span_words(words) if isinstance(words[0], str) else words[0] for key, words in columns.items()}


def _span_words(words):
    """One word for several that differ in numbers: each number that changes becomes its range."""
    pieces = [re.split(r"(\d+)", word) for word in words]
    joined = []
    for position, column in enumerate(zip(*pieces, strict=True)):
        numbers = sorted({int(piece) for piece in column}) if position % 2 else []
        joined.append(f"{{{numbers[0]}..{numbers[-1]}}}" if len(numbers) > 1 else column[0])
    return "".join(joined)


def _collapse(names):
    """Names, those that differ in numbers only as one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return [_span_words(group) for group in groups.values()]
