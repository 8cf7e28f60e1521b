"""The evidence of an alignment in words, rows and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.report.page import Section
from jaxtune.report.plots import has_plots, plot_bars

ADVICE = {
    "same": "One model, up to rounding and the order of its units: the fine-tune arrives whole.",
    "related": "The bases share a start, so weights can be compared unit by unit. Measure the result on your task.",
    "unrelated": (
        "Nothing in the weights says that these bases share a start. Between such bases no method without data has "
        "been seen to carry more than about a quarter of a fine-tune: do not use the result before you have measured "
        "it."
    ),
}
AGREEMENT_COLUMNS = {
    "block": "block",
    "identity": "cosine in place",
    "found": "cosine aligned",
    "random": "cosine of random elements",
}


def evidence_rows(evidence: Mapping[str, Any], equivalence: Mapping[str, Any] | None) -> list[dict[str, object]]:
    """(what, value) rows for a table, from `MatchEvidence.as_dict` and `Equivalence.as_dict`."""
    objective, cosine, lineage = (evidence[name] for name in ("objective", "cosine", "lineage"))
    place = " (in place)" if lineage["is_in_place"] else ""
    rows = [
        {"what": "lineage of the bases", "value": lineage["verdict"] + place},
        {"what": "matching objective, in place", "value": f"{objective['identity']:.5g}"},
        {"what": "matching objective, aligned", "value": f"{objective['found']:.5g}"},
        {"what": "matching objective, random elements", "value": _spread(objective["random"], "{:.4g}")},
        {"what": "cosine in place / aligned", "value": f"{cosine['identity']:.3f} / {cosine['found']:.3f}"},
        {"what": "cosine of random elements", "value": _spread(cosine["random"], "{:.3f}")},
        {"what": "coherence of the residual stream", "value": f"{evidence['coherence']:.3f}"},
    ]
    if equivalence is not None:
        rows += [
            {
                "what": "moved old base against old base",
                "value": "the same function" if equivalence["is_exact"] else "NOT the same function",
            },
            {
                "what": "  logit difference, max / mean",
                "value": f"{equivalence['max_relative']:.1e} / {equivalence['mean_relative']:.1e}",
            },
            {
                "what": "  KL divergence, argmax agreement",
                "value": f"{equivalence['kl']:.1e}, {100 * equivalence['argmax_agreement']:.0f} %",
            },
        ]
    return rows


def evidence_section(evidence: Mapping[str, Any], equivalence: Mapping[str, Any] | None) -> list[Section]:
    """Sections of a page: verdict, numbers, agreement by block."""
    lineage = evidence["lineage"]
    verdict = f"!Lineage: {lineage['verdict']}. {ADVICE[lineage['verdict']]} ({lineage['reason']})"
    blocks = [
        {"block": name, **{kind: f"{value:.3f}" for kind, value in values.items()}}
        for name, values in evidence["agreement"].items()
    ]
    figures = []
    if has_plots():
        names = list(evidence["agreement"])
        series = {
            AGREEMENT_COLUMNS[kind]: [evidence["agreement"][name][kind] for name in names]
            for kind in ("identity", "found", "random")
        }
        figures = [plot_bars("Agreement of the bases, block by block", names, series, y_label="cosine")]
    return [
        Section("How far to trust it", [verdict], {"what": "", "value": ""}, evidence_rows(evidence, equivalence)),
        Section("Agreement block by block", [], AGREEMENT_COLUMNS, blocks, figures),
    ]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(float(np.mean(values)))} ± {form.format(float(np.std(values, ddof=1)))}"
