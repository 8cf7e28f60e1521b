"""Every method against mergekit's own output: in float64 to 1e-12, in float32 to 1e-6."""

import numpy as np
import pytest

from jaxtune.merge.arrays import merge_trees
from jaxtune.merge.registry import METHODS

torch = pytest.importorskip("torch")
merge_methods = pytest.importorskip("mergekit.merge_methods")

SHAPES = {"matrix": (9, 14), "vector": (31,), "conv": (4, 3, 2, 5)}
CASES = {
    "linear": [(3, dict(weight=(0.3, 1.2, -0.2))), (3, dict(weight=(0.3, 0.2, 0.1), normalize=False))],
    "slerp": [(1, dict(t=t)) for t in (-0.2, 0.25, 0.8, 1.2)],
    "task_arithmetic": [
        (3, {"weight": (0.7, -0.2, 0.5), "lambda": 0.8, "normalize": True}),
        (3, dict(weight=(0.7, -0.2, 0.5))),
        (2, dict(weight=(0.5, -0.5), normalize=True)),
    ],
    "nuslerp": [
        (2, dict(weight=(0.75, 0.25))),
        (2, dict(weight=(0.3, 0.4), nuslerp_flatten=False)),
        (2, dict(weight=(0.3, 0.4), nuslerp_flatten=False, nuslerp_row_wise=True)),
        (2, dict(weight=(0.5, -0.5))),
    ],
    "multislerp": [(2, dict(weight=(0.75, 0.25))), (4, dict(weight=(0.3, 0.4, 0.2, 0.6), normalize_weights=False))],
    "karcher": [(2, {}), (4, {}), (4, dict(max_iter=2, tol=1e-9))],
    "model_stock": [(2, {}), (4, {}), (3, dict(filter_wise=True))],
    "nearswap": [(1, dict(t=t)) for t in (0.05, 3e-7, 10.0)],
    "passthrough": [(1, dict(scale=(0.7,))), (1, {})],
    "arcee_fusion": [(1, {})],
    "ties": [
        (3, {"weight": (0.7, -0.2, 0.5), "density": (0.6, 0.6, 0.6), "lambda": 0.8}),
        (4, dict(weight=(1.0, 0.5, 0.5, 0.3), density=(0.1, 0.9, 1.0, 0.0), normalize=False)),
        (2, dict(weight=(1.0, 0.5), density=(0.3, 0.3), rescale=True)),
    ],
    "breadcrumbs": [
        (3, {"weight": (0.7, -0.2, 0.5), "density": (0.6,) * 3, "gamma": (0.1,) * 3, "lambda": 0.8}),
        (2, dict(weight=(1.0, 1.0), density=(0.9, 0.5), gamma=(0.3, 0.0), normalize=True, rescale=True)),
    ],
    "breadcrumbs_ties": [
        (3, {"weight": (0.7, -0.2, 0.5), "density": (0.6,) * 3, "gamma": (0.1,) * 3, "lambda": 0.8}),
        (3, dict(weight=(1.0, 0.4, 0.2), density=(0.3, 0.5, 1.0), gamma=(0.2, 0.01, 0.5), normalize=True)),
    ],
    "dare_linear": [(3, dict(weight=(0.7, -0.2, 0.5), density=(1.0, 1.0, 0.0), normalize=True))],
    "dare_ties": [(3, dict(weight=(0.7, -0.2, 0.5), density=(1.0, 1.0, 0.0)))],
    "della": [(3, dict(weight=(0.7, -0.2, 0.5), density=(1.0, 1.0, 0.0)))],
    "della_linear": [(3, dict(weight=(0.7, -0.2, 0.5), density=(1.0, 1.0, 0.0)))],
    "sce": [(3, {}), (3, dict(select_topk=0.3)), (2, dict(select_topk=0.7)), (3, dict(select_topk=0.0))],
    "ram": [(3, dict(epsilon=0.08))],
    "ramplus_tl": [(3, dict(epsilon=0.08)), (4, dict(epsilon=0.1, r=2.0, alpha=5.0))],
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
MAY_HAVE_A_BASE = ("nuslerp", "multislerp")
WITHOUT_BASE = ("linear", "karcher", "passthrough", *MAY_HAVE_A_BASE)


def draw(count, dtype, seed=0):
    draw = np.random.default_rng(seed)
    base = {path: draw.standard_normal(shape).astype(dtype) for path, shape in SHAPES.items()}
    models = [
        {path: leaf + (0.1 * draw.standard_normal(leaf.shape)).astype(dtype) for path, leaf in base.items()}
        for _ in range(count)
    ]
    return base, models


def merge_by_mergekit(name, models, base, options):
    if base is not None:
        models = [base, *models]
    tensors = [{path: torch.from_numpy(leaf) for path, leaf in model.items()} for model in models]
    merged = merge_methods.api.merge_state_dicts(
        tensors, name, parameters=options, base=0 if base is not None else None
    )
    return {path: leaf.numpy() for path, leaf in merged.items()}


def every_case():
    for name, cases in CASES.items():
        for n, (count, options) in enumerate(cases):
            if name not in WITHOUT_BASE or name in MAY_HAVE_A_BASE:
                yield pytest.param(name, count, options, True, id=f"{name}-{n}")
            if name in WITHOUT_BASE:
                yield pytest.param(name, count, options, False, id=f"{name}-{n}-without-base")


def test_every_method_of_mergekit_is_here_and_tested():
    theirs = {method.spec.name for method in merge_methods.registry.registered_methods()}
    assert theirs == set(CASES)
    assert theirs <= set(METHODS)


def test_every_option_of_mergekit_is_known():
    for method in merge_methods.registry.registered_methods():
        ours = METHODS[method.spec.name]
        per_model = {p.name for p in method.spec.parameters if p.scope.value != "shared"}
        assert {p.name for p in method.spec.parameters} <= set(ours.options), method.spec.name
        assert per_model == set(ours.per_model), method.spec.name
        for parameter in method.spec.parameters:
            if not parameter.required:
                assert ours.options[parameter.name] == parameter.default, (method.spec.name, parameter.name)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("name", "count", "options", "has_base"), list(every_case()))
def test_a_method_gives_what_mergekit_gives(name, count, options, has_base, dtype):
    base, models = draw(count, dtype)
    base = base if has_base else None
    given = {"weight": (1.0,) * count, **options} if "weight" in METHODS[name].per_model else options
    expected = merge_by_mergekit(name, models, base, given)
    found = merge_trees(METHODS[name], models, base, input_axis=-1, **given)
    # ramplus_tl divides its counts in float32 there, whatever the dtype of the models.
    tolerance = 1e-12 if dtype == np.float64 and name != "ramplus_tl" else 1e-6
    for path, leaf in expected.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(found[path], leaf, rtol=tolerance, atol=tolerance * scale, err_msg=path)
        assert found[path].dtype == dtype


def find_kept(name, base, models, model):
    """Which elements of a model's task vector our draws keep."""
    weight = tuple(float(k == model) for k in range(len(models)))
    options = dict(weight=weight, density=0.6, rescale=False, normalize=False)
    found = merge_trees(METHODS[name], models, base, input_axis=-1, seed=5, **options)
    return {path: found[path] != base[path] for path in base}


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_method_gives_what_mergekit_gives_with_the_same_draws(name, normalize, rescale, monkeypatch):
    base, models = draw(3, np.float64)
    base.pop("conv")  # della ranks those along another axis there
    models = [{path: model[path] for path in base} for model in models]
    kept = [find_kept(name, base, models, model) for model in range(3)]
    drawn = (kept[model][path] for path in base for model in range(3))

    def bernoulli(odds):
        return torch.from_numpy(next(drawn)).reshape(odds.shape).to(odds.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    options = {"weight": (0.7, -0.2, 0.5), "density": 0.6, "lambda": 0.8, "normalize": normalize, "rescale": rescale}
    expected = {}
    for path, leaf in base.items():  # leaf by leaf: draws are taken in order
        tensors = [torch.from_numpy(tree[path]) for tree in (base, *models)]
        found = merge_methods.api.merge_tensors(tensors, name, parameters=options, base_index=0)
        expected[path] = found.numpy()
        assert leaf.shape == found.shape
    assert next(drawn, None) is None
    found = merge_trees(METHODS[name], models, base, input_axis=-1, seed=5, **options)
    for path, leaf in expected.items():
        # What is random is computed in float32 there, whatever the dtype of the models.
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)
