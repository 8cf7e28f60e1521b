"""Values of parameters against mergekit's own resolver: levels, gradients, filters."""

import random
import warnings

import pytest

from jaxtune.recipes.nodes import RecipeError, nodes_of
from jaxtune.recipes.parameters import Resolver, parse_parameters


def settle(value, name="x", t=0.0, kind="float"):
    parsed = parse_parameters(nodes_of({"p": value}))
    return Resolver([parsed["p"]], kind, None)(name, t)


@pytest.mark.parametrize("level", range(4))
def test_a_gradient_at_half_depth_is_the_middle_at_every_level(level):
    levels = [parse_parameters(nodes_of({"p": [1e-5, 1e-3]} if at == level else {})) for at in range(4)]
    resolve = Resolver([each["p"] for each in levels if "p" in each], "float", 1.0)
    assert resolve("model.layers.1.mlp.up_proj.weight", 0.5) == pytest.approx(0.000505, rel=1e-15)


def test_the_first_matching_filter_wins():
    value = [{"filter": "mlp", "value": 1}, {"filter": "mlp.up", "value": 2}, {"filter": "*", "value": [3, 5]}]
    assert settle(value, "layers.0.mlp.up_proj") == 1
    assert settle(value, "layers.0.attn", 0.25) == 3.5
    assert settle({"filter": "attn", "value": 4}, "layers.0.attn") == 4
    assert settle({"filter": "attn", "value": 4}, "layers.0.mlp") is None
    assert settle([], t=0.5) is None


def test_a_level_that_says_nothing_of_a_tensor_leaves_it_to_the_next():
    strong = parse_parameters(nodes_of({"p": [{"filter": "attn", "value": 1}]}))["p"]
    weak = parse_parameters(nodes_of({"p": 2}))["p"]
    resolve = Resolver([strong, weak], "float", 3)
    assert [resolve(name, 0.0) for name in ("attn", "mlp")] == [1, 2]


def test_kinds_of_values():
    assert settle([2, 4], t=0.5, kind="int") == 3
    assert isinstance(settle([2, 4], t=0.5, kind="int"), int)
    assert settle([2, 3], t=0.4, kind="int") == 2
    assert settle("1e-5") == 1e-5  # YAML 1.1 reads it as text
    assert settle(["1e-5", "1e-3"], t=0.5) == pytest.approx(0.000505)
    assert settle([True, False], t=0.99, kind="bool") is True
    assert settle([True, False], t=1.0, kind="bool") is False
    assert settle("yes", kind="bool") is True
    assert settle(["a", "b", "c"], t=0.5, kind="str") == "b"
    assert settle(True, kind="switch") is True
    assert settle("keep", kind="switch") == "keep"
    for value, kind in (("ten", "float"), (2.5, "int"), (2, "bool"), (1, "str"), (float("nan"), "float")):
        with pytest.raises(RecipeError, match="p: expected"):
            settle(value, kind=kind)


@pytest.mark.parametrize("value", [{"a": 1}, [1, {"value": 2}], [[1, 2]], {"filter": "a"}, [{"filter": 1, "value": 2}]])
def test_what_is_no_setting_is_refused(value):
    with pytest.raises(RecipeError, match=r"the recipe: p"):
        settle(value)


def draw_setting(draw, kind, *, depth=0):
    scalars = {
        "float": lambda: draw.choice([draw.uniform(-2, 2), draw.randint(-3, 3), "1e-3"]),
        "int": lambda: draw.randint(-3, 3) * 12,  # whole at every depth that is drawn
        "bool": lambda: draw.choice([True, False]),
        "str": lambda: draw.choice(["a", "b", "c"]),
    }
    form = draw.random()
    if form < 0.35:
        return scalars[kind]()
    if form < 0.7 or depth:
        return [scalars[kind]() for _ in range(draw.randint(1, 5))]
    return [
        {"value": draw_setting(draw, kind, depth=1)}
        | ({"filter": draw.choice(["mlp", "self_attn", "*", "layers.1", "norm"])} if draw.random() < 0.8 else {})
        for _ in range(draw.randint(1, 3))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_random_settings_resolve_as_mergekit_resolves_them(seed):
    pytest.importorskip("mergekit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import OutputModuleDefinition
        from mergekit.merge_methods.base import ParameterScope, ParameterSpec
        from mergekit.parameter_resolver import resolve_parameter
    from pydantic import ValidationError

    draw = random.Random(seed)
    kind, python = draw.choice([("float", float), ("int", int), ("bool", bool), ("str", str)])
    levels = [{"p": draw_setting(draw, kind)} if draw.random() < 0.6 else {} for _ in range(4)]
    theirs = [OutputModuleDefinition(models=[{"model": "x"}], parameters=level).parameters for level in levels]
    default = {"float": 9.0, "int": 9, "bool": False, "str": "none"}[kind]
    spec = ParameterSpec("p", python, ParameterScope.SHARED, default)
    parsed = [parse_parameters(nodes_of(level)) for level in levels]
    ours = Resolver([level["p"] for level in parsed if "p" in level], kind, default)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.11.self_attn.k_proj.weight", "model.norm.weight"):
        for t in (0.0, 0.25, 1 / 3, 0.5, 0.75, 1.0):
            try:
                expected = resolve_parameter(spec, theirs, tensor_name=name, t=t)
            except ValidationError:  # a whole number between two: mergekit stops, we round
                assert kind == "int"
                continue
            assert ours(name, t) == expected
            assert type(ours(name, t)) is type(expected)
