"""`jaxtune transport --plan`: what a run would take, from headers alone."""

from jaxtune.lazy import is_lazy
from jaxtune.models import registry
from jaxtune.report.table import count_bytes, render_table
from jaxtune.symmetry.canonical import canonical_spec
from jaxtune.tree import count_parameters, flatten

RUNTIME_BYTES = 500 * 2**20  # Python, JAX and its compiler before any weight is loaded
# Copies of the weights in float32 that a method and its evidence hold at the peak: those of benchmarks/plan.py and a
# tenth to a third more.
COPIES = {"identity": 8, "orthogonal_shift": 8, "permutation": 11, "transfusion": 11, "full": 16, "auto": 19}
WITH_DATA = "Beside this stand the activations and gradients of the examples, which a plan does not count."
# The same where leaves are read one at a time: copies of the largest leaf in float32 (folded and moved, or with noise,
# there are more of it), float32 tables of the largest group, and float64 tables of a stream that is turned.
LEAVES, FOLDED_LEAVES, TABLES, ROTATIONS = 6, 8, 6, 16


def check_symmetry(config, method) -> None:
    """Raises what the method would raise about this family, before any weight is read."""
    if method == "full":
        canonical_spec(registry.symmetry_of(config))
    if method == "transfusion":
        registry.symmetry_of(config, junctions="each", inside="joint")


def describe_plan(models, method, config) -> str:
    """The table that `--plan` prints."""
    stored = {role: model.layout.num_bytes for role, model in models.items()}
    names, target = models["target"].config, models["target"]
    leaves = flatten(target.params).values()
    if any(map(is_lazy, leaves)):
        needed, how = count_leaf_by_leaf(leaves, method, registry.symmetry_of(config))
        peak = RUNTIME_BYTES + needed
    else:
        working = 4 * count_parameters(target.params)
        peak = RUNTIME_BYTES + sum(stored.values()) + COPIES.get(method, COPIES["auto"]) * working
        how = "whole networks in memory"
    rows = [
        {"what": "family", "value": names.get("model_type") or names.get("architecture", "")},
        {"what": "parameters", "value": f"{count_parameters(target.params):,}"},
        *({"what": f"read {role}", "value": count_bytes(size)} for role, size in stored.items()),
        {"what": "write", "value": count_bytes(stored["target"])},
        {"what": "peak memory, at most about", "value": f"{count_bytes(peak)} ({how})"},
    ]
    words = ["The three fit together. Nothing was written.", *([] if method in COPIES else [WITH_DATA])]
    return "\n".join([render_table({"what": "plan", "value": ""}, rows), *words])


def count_leaf_by_leaf(leaves, method, spec) -> tuple[int, str]:
    """(bytes, of what in words) that a method holds beside the runtime where leaves are read one at a time."""
    largest = 4 * max(leaf.size for leaf in leaves)
    group = max(group.size for group in spec.groups.values())
    is_folded = method in ("full", "auto") and spec.form is not None
    num_leaves = FOLDED_LEAVES if is_folded else LEAVES
    needed = num_leaves * largest + TABLES * 4 * group**2
    how = f"leaf by leaf: {num_leaves} of {count_bytes(largest)}, {TABLES} tables of {group}²"
    if is_folded:
        width = max(group.size for group in spec.groups.values() if group.role == "stream")
        needed += ROTATIONS * 8 * width**2
        how += f", {ROTATIONS} of {width}² in float64"
    return needed, how
