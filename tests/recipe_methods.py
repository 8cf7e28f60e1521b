"""Stand-ins for merge methods of mergekit that are not in the registry: options and counts alone, no arithmetic."""

from jaxtune.merge import registry
from jaxtune.merge.method import Method


def _linear(view, *, weight: tuple[float, ...] = 1.0, normalize: bool = True): ...


def _slerp(view, *, t: float): ...


def _passthrough(view, *, scale: tuple[float | None, ...] = None): ...


def _ties(view, *, weight: tuple[float, ...], density: tuple[float, ...] = 1.0, normalize: bool = True, lambda_=1.0): ...


def _karcher(view, *, max_iter: int = 10, tol: float = 1e-5): ...


def _model_stock(view, *, filter_wise: bool = False): ...


def _plain(view): ...


STAND_INS = {
    "linear": Method(_linear, "", "", base="may", per_model=("weight",)),
    "slerp": Method(_slerp, "", "", num_models=(1, 1)),
    "passthrough": Method(_passthrough, "", "", base="none", num_models=(1, 1), per_model=("scale",)),
    "ties": Method(_ties, "", "", per_model=("weight", "density")),
    "dare_ties": Method(_ties, "", "", per_model=("weight", "density")),
    "task_arithmetic": Method(_ties, "", "", per_model=("weight",)),
    "karcher": Method(_karcher, "", "", base="none", num_models=(2, None)),
    "model_stock": Method(_model_stock, "", "", num_models=(2, None)),
    "arcee_fusion": Method(_plain, "", "", num_models=(1, 1)),
}


def install():
    """Puts those that are missing into the registry; the real ones stay."""
    for name, method in STAND_INS.items():
        registry.METHODS.setdefault(name, method)
