"""Rotations of what matrices read from activations, of what they make from the gradients of a loss."""

from dataclasses import replace

import numpy as np

from jaxtune.errors import unknown_name
from jaxtune.gradients import LabelLoss, check_sample, predict
from jaxtune.moments import Pair, gather_pairs
from jaxtune.sample import Sample
from jaxtune.transport.prepared import Prepared, Symmetry
from jaxtune.transport.theseus import check_options, fit_rotation, prepare_by_maps
from jaxtune.types import Params

OUTPUTS = ("gradients", "both")


def prepare_bico(
    key,
    symmetry: Symmetry,
    source: Params,
    finetuned: Params,
    target: Params,
    *,
    sample: Sample,
    outputs: str = "gradients",
    whitening: float = 0.0,
    ridge: float = 1e-3,
    chunk_size: int = 32,
) -> Prepared:
    """`theseus` with the map of what a matrix makes from gradients: what matters there, not what is large there.

    Under a rotation of the outputs activations and gradients turn alike. The loss is cross-entropy against the labels;
    of unlabelled examples against the classes that the old base says.

    Args:
        key: Not used; nothing is random.
        symmetry, source, finetuned, target, whitening, ridge, chunk_size: As `prepare_theseus`.
        sample: Inputs, with labels or without.
        outputs: "gradients", or "both": the moments of activations and of gradients, each over its size, added up.

    Raises:
        UnknownNameError: no such `outputs`.
        ConfigError, TreeMismatchError, NonFiniteError, DataError: as `prepare_theseus`.

    Reference:
        BiCo 2026, arXiv:2605.28444. Differs: as `prepare_theseus`; labels where there are none are the old base's.
    """
    del key
    check_options(whitening, ridge)
    if outputs not in OUTPUTS:
        raise unknown_name("outputs", outputs, OUTPUTS)
    check_sample(sample, source, is_labelled=sample.is_labelled)
    labelled = sample if sample.is_labelled else _label(sample, source)

    def sides(meeting):
        met = meeting.gradients
        return meeting.inputs, met if outputs == "gradients" else _add(_scale(met), _scale(meeting.outputs))

    return prepare_by_maps(
        symmetry(),
        (source, finetuned, target),
        gather_pairs(source, target, labelled, chunk_size=chunk_size, loss=LabelLoss(sample.forward)),
        lambda pair: fit_rotation(pair, centred=False, whitening=whitening, ridge=ridge),
        sides,
        len(sample),
    )


def _label(sample, source):
    labels = np.argmax(predict(sample, source), axis=-1).astype(np.int32)
    return replace(sample, batch={**sample.batch, "label": labels})


def _scale(pair: Pair) -> Pair:
    """The moments of both sides over their sizes, so that a perfect match has trace 1."""
    one, two = (np.sqrt(max(np.trace(gram), np.finfo(np.float64).tiny)) for gram in (pair.first, pair.second))
    totals = (pair.totals[0] / one, pair.totals[1] / two)
    return Pair(pair.cross / (one * two), pair.first / one**2, pair.second / two**2, totals, pair.count)


def _add(one: Pair, two: Pair) -> Pair:
    totals = tuple(a + b for a, b in zip(one.totals, two.totals, strict=True))
    return Pair(one.cross + two.cross, one.first + two.first, one.second + two.second, totals, one.count)
