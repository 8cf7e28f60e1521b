"""From the rows of every pair to the numbers that are printed: recovered shares, intervals, the verdict's worth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from jaxtune.transport.expectation import expect_recovery

NUM_DRAWS = 10_000
# Below this gap between the new base and its own fine-tune a share divides by noise (points of accuracy).
SMALLEST_GAP = 0.10
# A transport that brings at least this share of the gain is one that a user can build on.
WORTH = 0.5


def summarise_pair(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Method -> accuracy and support over the tasks of one pair, and the share of the gain that it recovers.

    Accuracies are averaged over tasks first: `recovered = (mean moved - mean base) / (mean ceiling - mean base)`, so
    a task with a small gap cannot dominate; None where even the mean gap is below `SMALLEST_GAP`.
    """
    means = {
        method: float(np.mean([row["accuracy"] for row in rows if row["method"] == method]))
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    gap = means["ceiling"] - means["base"]
    summary = {}
    for method, mean in means.items():
        support = [row["support"] for row in rows if row["method"] == method and "support" in row]
        summary[method] = {
            "accuracy": mean,
            "support": float(np.mean(support)) if support else None,
            "recovered": (mean - means["base"]) / gap if gap >= SMALLEST_GAP else None,
        }
    return summary


def bootstrap(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % interval over pairs, by drawing pairs with replacement."""
    values = np.asarray(values, np.float64)
    draws = np.random.RandomState(seed).randint(0, len(values), (NUM_DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summarise_rung(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rung of one model: every method's mean and interval over the pairs, and paired differences.

    Args:
        pairs: With "methods" of `summarise_pair`, and the facts of the pair.
    """
    methods = {}
    for method in dict.fromkeys(name for pair in pairs for name in pair["methods"]):
        rows = [pair["methods"][method] for pair in pairs if method in pair["methods"]]
        shares = [row["recovered"] for row in rows if row["recovered"] is not None]
        supports = [row["support"] for row in rows if row["support"] is not None]
        methods[method] = {
            "accuracy": float(np.mean([row["accuracy"] for row in rows])),
            "support": float(np.mean(supports)) if supports else None,
            "recovered": bootstrap(shares) if shares else None,
        }
    return {
        "num_pairs": len(pairs),
        "methods": methods,
        "differences": {
            f"{ours} - {theirs}": _difference(pairs, ours, theirs)
            for ours, theirs in (
                ("auto", "identity"),
                ("full", "identity"),
                ("full", "permutation"),
                ("full", "transfusion"),
                ("full", "random element"),
                ("full", "full with its layers shuffled"),
            )
        },
        "barrier": {
            name: float(np.mean([pair["middle"][name]["barrier"] for pair in pairs])) for name in pairs[0]["middle"]
        },
        "middle_accuracy": {
            name: float(np.mean([pair["middle"][name]["accuracy"] for pair in pairs])) for name in pairs[0]["middle"]
        },
        "distance": float(np.mean([pair["distance"] for pair in pairs])),
        "chosen": [pair["chosen"] for pair in pairs],
        "verdicts": [pair["verdict"]["verdict"] for pair in pairs],
    }


def _difference(pairs, ours, theirs):
    """Paired difference of recovered shares; None where either was not measured."""
    values = [
        pair["methods"][ours]["recovered"] - pair["methods"][theirs]["recovered"]
        for pair in pairs
        if pair["methods"].get(ours, {}).get("recovered") is not None
        and pair["methods"].get(theirs, {}).get("recovered") is not None
    ]
    return bootstrap(values) if values else None


def _rank_correlation(values, recovered):
    """Spearman's; None where one of the two does not vary."""
    is_constant = len(set(values)) < 2 or len(set(recovered.tolist())) < 2
    return None if is_constant else float(spearmanr(values, recovered).statistic)


def judge_verdict(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How well what the weights alone say predicts what `auto` recovers, over all pairs.

    "Wrong advice" is a verdict of kinship where less than `WORTH` of the gain arrives, or of "unrelated" where at
    least that arrives; of the residual, an expected share (`transport.expectation`) on the other side of `WORTH`.
    """
    used = [pair for pair in pairs if pair["methods"]["auto"]["recovered"] is not None]
    recovered = np.array([pair["methods"]["auto"]["recovered"] for pair in used])
    evidence = {
        "cosine after the chosen alignment": [1 - pair["residuals"][pair["chosen"]] ** 2 / 2 for pair in used],
        "cosine in place": [pair["cosine"]["identity"] for pair in used],
        "minus the midpoint barrier (needs data)": [-pair["middle"]["identity"]["barrier"] for pair in used],
    }
    is_kin = np.array([pair["verdict"]["verdict"] != "unrelated" for pair in used])
    is_worth = recovered >= WORTH
    expected = np.array([np.mean(expect_recovery(pair["residuals"][pair["chosen"]])) for pair in used])
    return {
        "num_pairs": len(used),
        "rank_correlation": {name: _rank_correlation(values, recovered) for name, values in evidence.items()},
        "wrong_advice": {
            "lineage": float(np.mean(is_kin != is_worth)),
            "residual": float(np.mean((expected >= WORTH) != is_worth)),
        },
        "kin_but_not_worth": int(np.sum(is_kin & ~is_worth)),
        "unrelated_but_worth": int(np.sum(~is_kin & is_worth)),
        "num_kin": int(np.sum(is_kin)),
    }
