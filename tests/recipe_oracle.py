"""mergekit's own plan of a recipe, tensor by tensor, and tiny models to plan with."""

import functools
import warnings

import hub_models
import numpy as np
import yaml


@functools.cache
def model_folder(place, family, seed=0, **changes):
    """A tiny model of a family in `place`; `changes` are of its config. Written once a place."""
    folder = place / "_".join([family, str(seed), *(f"{key}{value}" for key, value in sorted(changes.items()))])
    if not folder.exists():
        import transformers

        made, fields = hub_models.MODELS[family]
        made = getattr(transformers, made)
        model = hub_models.randomise(made(made.config_class(**{**fields, **changes})), seed)
        hub_models.write_folder(folder, model)
    return folder


def plan_with_mergekit(text):
    """Output name -> (method, {model: input name}, base, shared parameters, {model: parameters}), and its config."""
    with warnings.catch_warnings():  # its own imports warn
        warnings.simplefilter("ignore")
        return _plan_with_mergekit(text)


def _plan_with_mergekit(text):
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(lazy_unpickle=False)
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    out = _model_out_config(config, architecture)
    planned = {}
    planner = MergePlanner(config, architecture, options, out)
    planner._plan()
    for weight, task in planner._tensors:
        gathered = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
        planned[weight.name] = (
            task.method_name,
            {str(model): info.name for model, info in gathered.weight_info.items()},
            None if task.base_model is None else str(task.base_model),
            dict(task.parameters.items()),
            {str(model): dict(each.items()) for model, each in task.input_parameters.items()},
        )
    return planned, out


def assert_same_plan(jobs, planned, folders, *, base_is_model=False):
    """Every tensor from the same tensors with the same options; `folders` by index of the model."""
    assert {job.name for job in jobs.jobs} == set(planned)
    for job in jobs.jobs:
        method, names, base, shared, own = planned[job.name]
        assert job.method in (method, "copy")
        ours = {folders[source.model]: source.name for source in job.sources}
        if job.base is not None:
            assert folders[job.base.model] == base
            ours[folders[job.base.model]] = job.base.name
        assert ours == names, job.name
        if job.method == "copy":
            continue
        for option, value in shared.items():
            if option in job.options:
                assert_equal(job.options[option], value, (job.name, option))
        for at, source in enumerate(job.sources):
            for option, value in own[folders[source.model]].items():
                if option in job.options:
                    assert_equal(job.options[option][at], value, (job.name, option))


def assert_equal(ours, theirs, where):
    if isinstance(theirs, float) and not isinstance(theirs, bool):
        assert np.float64(ours) == np.float64(theirs), where
    else:
        assert ours == theirs, where
