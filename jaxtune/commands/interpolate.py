"""`jaxtune interpolate`: a model on the straight line between two."""

import math

import jaxtune
from jaxtune import checkpoint
from jaxtune.commands.options import describe_inputs, load_models, read_config, refuse_output
from jaxtune.errors import ConfigError
from jaxtune.report.page import Section, render_page
from jaxtune.report.run import Run, describe_host, to_json
from jaxtune.report.table import count_bytes, render_table


def run(arguments) -> None:
    """Writes `(1 - weight) * first + weight * second` in the layout of the first."""
    if not math.isfinite(arguments.weight):
        raise ConfigError(f"--weight {arguments.weight}: expected a finite number; 0 is A and 1 is B.")
    paths = {"first": arguments.first, "second": arguments.second}
    refuse_output(arguments.out, arguments.overwrite, list(paths.values()))
    work = Run("interpolate")
    with work.stage("load"):
        models = load_models(paths, read_config(arguments.config))
    with work.stage("interpolate"):
        params = jaxtune.interpolate(*models.values(), arguments.weight)
    report = {
        "command": "interpolate",
        "inputs": describe_inputs(models),
        "config": models["first"].config,
        "weight": arguments.weight,
        "host": describe_host(),
        "cost": work.cost(),
    }
    rows = [
        {"what": "weight", "value": f"{arguments.weight:g}"},
        {"what": "time", "value": f"{report['cost']['seconds']['total']} s"},
        {"what": "peak memory", "value": count_bytes(report["cost"]["peak_memory_bytes"])},
    ]
    page = render_page("jaxtune interpolate", [Section("What was done", [], {"what": "", "value": ""}, rows)])
    checkpoint.save(
        arguments.out,
        params,
        like=models["first"],
        overwrite=arguments.overwrite,
        inputs=paths.values(),
        extra_files={"report.json": to_json(report), "report.html": page},
    )
    print(render_table({"what": "interpolate", "value": ""}, rows) + f"\n\nWritten to {arguments.out}.")
