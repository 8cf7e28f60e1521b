"""`jaxtune transport --plan`: what a run would take, from headers alone."""

from jaxtune.models import registry
from jaxtune.report.table import count_bytes, render_table
from jaxtune.symmetry.canonical import canonical_spec
from jaxtune.tree import count_parameters

RUNTIME_BYTES = 400 * 2**20  # Python, JAX and its compiler before any weight is loaded
# Copies of the weights in float32 that a method and its evidence hold at the peak; measured at 25 M weights.
COPIES = {"identity": 14, "orthogonal_shift": 14, "permutation": 14, "transfusion": 14, "full": 19}


def check_symmetry(config, method) -> None:
    """Raises what the method would raise about this family, before any weight is read."""
    if method == "full":
        canonical_spec(registry.symmetry_of(config))
    if method == "transfusion":
        registry.symmetry_of(config, junctions="each", inside="joint")


def describe_plan(models, method) -> str:
    """The table that `--plan` prints."""
    stored = {role: model.layout.num_bytes for role, model in models.items()}
    names = models["target"].config
    working = 4 * count_parameters(models["target"].params)
    peak = RUNTIME_BYTES + sum(stored.values()) + COPIES.get(method, COPIES["full"]) * working
    rows = [
        {"what": "family", "value": names.get("model_type") or names.get("architecture", "")},
        {"what": "parameters", "value": f"{count_parameters(models['target'].params):,}"},
        *({"what": f"read {role}", "value": count_bytes(size)} for role, size in stored.items()),
        {"what": "write", "value": count_bytes(stored["target"])},
        {"what": "peak memory, about", "value": count_bytes(peak)},
    ]
    return render_table({"what": "plan", "value": ""}, rows) + "\nThe three fit together. Nothing was written."
