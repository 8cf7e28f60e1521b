"""Random recipes: what mergekit plans and we plan is the same, tensor by tensor, and what it refuses is refused."""

import random

import pytest
import yaml
from recipe_oracle import assert_same_plan, model_folder, plan_with_mergekit

from jaxtune.recipes.nodes import RecipeError
from jaxtune.recipes.reading import read_recipe
from jaxtune.recipes.resolve import resolve

pytest.importorskip("mergekit")

METHODS = {  # name -> parameters of a model, of all models
    "ties": (["weight", "density"], ["lambda"]),
    "dare_linear": (["weight", "density"], ["lambda"]),
    "linear": (["weight"], []),
    "nuslerp": (["weight"], []),
    "multislerp": (["weight"], ["eps"]),
    "slerp": ([], ["t"]),
    "model_stock": ([], []),
    "karcher": ([], ["tol"]),
    "passthrough": (["scale"], []),
    "sce": ([], ["select_topk"]),
}
# Where mergekit stops for want of a parameter, we have a default; of a method, not of a level.
LENIENT = "Missing required parameter"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return [str(model_folder(place, "llama", seed, num_hidden_layers=4)) for seed in range(4)]


def draw_setting(draw):
    def scalar():
        return draw.choice([round(draw.uniform(0.1, 1), 2), 1, "5e-1"])

    form = draw.random()
    if form < 0.3:
        return scalar()
    if form < 0.6:
        return [scalar() for _ in range(draw.randint(1, 4))]
    return [
        {
            "filter": draw.choice(["mlp", "attn", "layers.1", "*", "norm"]),
            "value": draw.choice([scalar(), [scalar(), scalar()]]),
        }
        for _ in range(draw.randint(1, 2))
    ]


def draw_recipe(draw, models):
    method = draw.choice(list(METHODS))
    own, shared = METHODS[method]

    def parameters(names, share):
        return {name: draw_setting(draw) for name in names if draw.random() < share}

    recipe = {"merge_method": method, "parameters": parameters(own + shared, 0.8)}
    if draw.random() < 0.75:
        recipe["base_model"] = models[0]
    form = draw.choice(["models", "slices", "modules"])
    if form == "models":
        chosen = draw.sample(models, draw.randint(1, 3))
        return {**recipe, "models": [{"model": model, "parameters": parameters(own, 0.5)} for model in chosen]}
    slices = []
    # As many sources in each slice: mergekit gives the head of the last one to as many models as the first one has.
    count = 1 if method == "passthrough" else draw.randint(1, 3)
    for _ in range(draw.randint(1, 3)):
        depth = draw.randint(1, 3)
        sources = []
        for model in draw.sample(models, count):
            start = draw.randint(0, 4 - depth)
            layers = [start, start + depth]
            sources.append({"model": model, "layer_range": layers, "parameters": parameters(own, 0.4)})
        slices.append({"sources": sources, "parameters": parameters(own + shared, 0.3)})
        if draw.random() < 0.2:
            slices[-1]["base_model"] = draw.choice(sources)["model"]
    if form == "slices":
        return {**recipe, "slices": slices}
    return {**recipe, "modules": {"default": {"slices": slices, "parameters": parameters(own + shared, 0.3)}}}


@pytest.mark.parametrize("first_seed", range(0, 160, 20))
def test_random_recipes_are_planned_as_mergekit_plans_them(first_seed, models):
    num_agreed = 0
    for seed in range(first_seed, first_seed + 20):
        recipe = draw_recipe(random.Random(seed), models)
        try:
            planned, refusal = plan_with_mergekit(yaml.safe_dump(recipe))[0], ""
        except (RuntimeError, ValueError) as error:
            planned, refusal = None, str(error)
        if planned is None:
            if LENIENT not in refusal:
                with pytest.raises(RecipeError):
                    resolve(read_recipe(recipe))
            continue
        jobs = resolve(read_recipe(recipe))
        assert_same_plan(jobs, planned, [str(model.path) for model in jobs.models])
        num_agreed += 1
    assert num_agreed >= 3
