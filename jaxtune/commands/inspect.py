"""`jaxtune inspect`: what is in a checkpoint."""

import json
import math

from jaxtune import checkpoint
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
    leaves = flatten(model.params)
    spec, problem = None, None
    try:
        spec = registry.symmetry_of(registry.config_from_dict(model.config))
        spec.check(model.params)
    except JaxtuneError as error:
        spec, problem = None, str(error)
    axes = spec.axes if spec else {}
    return {
        "path": str(model.path),
        "format": model.format,
        "family": model.config.get("model_type"),
        "config": model.config,
        "num_parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "num_bytes": model.layout.num_bytes,
        "leaves": [
            {
                "path": path,
                "dtype": str(leaf.dtype),
                "shape": list(leaf.shape),
                "axes": [axis.group if axis else None for axis in axes[path]] if path in axes else None,
            }
            for path, leaf in leaves.items()
        ],
        "ties": [],  # no family read so far shares a leaf under two names
        "symmetry": [
            {"group": name, "kind": group.kind, "role": group.role, "size": group.size, "inside": group.parent}
            for name, group in (spec.groups.items() if spec else ())
        ],
        "not_understood": problem,
        "side_files": sorted(model.side_files),
        "left_out": model.left_out,
    }


def _as_text(facts):
    head = [
        {"what": "path", "value": facts["path"]},
        {"what": "format", "value": facts["format"]},
        {"what": "family", "value": facts["family"] or "not named in the config"},
        {"what": "parameters", "value": f"{facts['num_parameters']:,}"},
        {"what": "size", "value": count_bytes(facts["num_bytes"])},
        {"what": "files carried along", "value": ", ".join(facts["side_files"]) or "none"},
        *({"what": "left out", "value": f"{name}: {why}"} for name, why in facts["left_out"].items()),
    ]
    rows = [
        {
            "path": leaf["path"],
            "dtype": leaf["dtype"],
            "shape": str(leaf["shape"]),
            "axes": "" if leaf["axes"] is None else ", ".join(axis or "fixed" for axis in leaf["axes"]),
        }
        for leaf in facts["leaves"]
    ]
    parts = [
        render_table({"what": "checkpoint", "value": ""}, head),
        render_table({"path": "leaf", "dtype": "dtype", "shape": "shape", "axes": "axes move with"}, rows),
    ]
    if facts["symmetry"]:
        columns = {"group": "group", "kind": "kind", "role": "role", "size": "size", "inside": "inside"}
        parts.append(render_table(columns, facts["symmetry"]))
    if facts["not_understood"]:
        parts.append(f"Not understood: {facts['not_understood']}")
    return "\n\n".join(parts)
