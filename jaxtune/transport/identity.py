"""Plain addition: the task vector as it is. Right where both bases descend from one start."""

from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import check_same, task_vector
from jaxtune.types import Params


def prepare_identity(key, symmetry: Symmetry, source: Params, finetuned: Params, target: Params) -> Prepared:
    """Takes `finetuned - source` to the target unchanged.

    Args:
        key: Unused.
        symmetry: Spec of the bases; only its declared leaves are used.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.

    Reference:
        Ilharco et al. 2023, arXiv:2212.04089; between releases of a base, Lin et al. 2025, arXiv:2503.20110.
    """
    del key
    check_same({"source": source, "target": target})

    def move(finetuned):
        return task_vector(source, finetuned)

    return Prepared(task_vector=move(finetuned), spec=symmetry(), move=move)
