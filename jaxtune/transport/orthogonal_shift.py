"""The task vector without its part along the way from the old base to the new one."""

import numpy as np

from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.tree import check_same, flatten, is_float, map_leaves, task_vector
from jaxtune.types import Params


def prepare_orthogonal_shift(key, symmetry: Symmetry, source: Params, finetuned: Params, target: Params) -> Prepared:
    """Removes from each leaf of the task vector its projection on `target - source`.

    What fine-tuning and the new release both did is then not added twice: for a shift (2, 0) and a task
    vector (3, 4), (0, 4) remains. A leaf on which the bases agree keeps its whole task vector.

    Args:
        key: Unused.
        symmetry: Spec of the bases; only its declared leaves are used.
        source, finetuned, target: Old base, its fine-tune, new base; one architecture.

    Raises:
        TreeMismatchError: the trees differ in a path or a shape.

    Reference:
        The orthogonal-shift baseline of the merge-and-rebase project; tensor by tensor, as there.
    """
    del key
    check_same({"source": source, "target": target})
    shift = task_vector(source, target)

    def move(finetuned):
        return _project_out(task_vector(source, finetuned), shift)[0]

    vector = task_vector(source, finetuned)
    moved, removed = _project_out(vector, shift)
    kept = _norm(moved) / max(_norm(vector), np.finfo(np.float32).tiny)
    info = {"kept_norm": kept, "projection": removed}
    return Prepared(task_vector=moved, spec=symmetry(), info=info, move=move)


def _project_out(vector, shift):
    """(what remains, path -> share of the shift that was taken out)."""
    removed = {}

    def project_out(path, delta, along):
        if not is_float(delta):
            return delta
        delta, along = np.asarray(delta), np.asarray(along)
        square = np.vdot(along, along)
        if square == 0:
            return delta
        share = (np.vdot(along, delta) / square).astype(delta.dtype)
        removed[path] = float(share)
        return delta - share * along

    return map_leaves(project_out, vector, shift), removed


def _norm(tree):
    leaves = [leaf for leaf in flatten(tree).values() if is_float(leaf)]
    return float(np.sqrt(sum(np.vdot(leaf, leaf).astype(np.float64) for leaf in leaves)))
