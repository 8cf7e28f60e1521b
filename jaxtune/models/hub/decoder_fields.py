"""What the config.json of decoders have in common: head, rotary, windows."""

from collections.abc import Mapping
from typing import Any

from jaxtune.models.decoder import Rotary
from jaxtune.models.hub.fields import Fields

HEADS = {
    "ForCausalLM": "tokens",
    "LMHeadModel": "tokens",
    "ForSequenceClassification": "last",
    "Model": "none",
}
WINDOWED, FULL = "sliding_attention", "full_attention"


def read_head(fields: Fields) -> dict[str, Any]:
    """`head`, `num_outputs` and `tied` of a `decoder.Config`."""
    head = fields.head(HEADS)
    return {
        "head": head,
        "num_outputs": fields.num_labels() if head == "last" else None,
        "tied": head == "tokens" and bool(fields["tie_word_embeddings"]),
    }


def read_rotary(fields: Fields, *, theta: float = 10000.0, fraction: float | None = None) -> Rotary:
    """The rotary of a family that has one for all blocks.

    Args:
        fields: Of the config.json.
        theta: Where none is given.
        fraction: Where none is given, for families whose rotary may be partial; None for those where it must be whole.

    Raises:
        ConfigError: a kind of scaling that is not supported, or a partial rotary where none is known.
    """
    parameters = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = fields.get("rope_theta") or theta
    if fraction is None:
        for source in (fields.values, parameters):
            if source.get("partial_rotary_factor") not in (None, 1):
                raise fields.error(
                    f'"partial_rotary_factor" is {source["partial_rotary_factor"]!r} in config.json; '
                    f"a {fields.model_type} is supported with 1 only."
                )
        fraction = 1.0
    fraction = parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", fraction))
    return make_rotary(fields, parameters, theta=theta, fraction=fraction)


def make_rotary(fields: Fields, parameters: Mapping[str, Any], *, theta: float, fraction: float = 1.0) -> Rotary:
    """A rotary from one dict of parameters, `{"rope_type": "llama3", "factor": 8.0, ...}`.

    Raises:
        ConfigError: a kind of scaling that is not supported, or one dict a kind of block.
    """
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise fields.error(
            f"the rotary parameters in config.json differ by kind of block ({', '.join(nested)}), "
            f"which a {fields.model_type} does not have."
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta", theta)
    if kind == "default":
        return Rotary(theta=theta, fraction=fraction)
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    if kind not in needed:
        raise fields.error(
            f'"rope_type" is {kind!r} in config.json; supported are default, linear and llama3. '
            "Other scalings change the angles, some with the length of the text."
        )
    missing = [name for name in needed[kind] if parameters.get(name) is None]
    if missing:
        raise fields.error(f"rotary scaling {kind!r} in config.json lacks {', '.join(missing)}.")
    if kind == "linear":
        return Rotary(theta=theta, fraction=fraction, scaling="linear", factor=parameters["factor"])
    length = parameters.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return Rotary(
        theta=theta,
        fraction=fraction,
        scaling="llama3",
        factor=parameters["factor"],
        low_frequency=parameters["low_freq_factor"],
        high_frequency=parameters["high_freq_factor"],
        original_length=fields.get("original_max_position_embeddings") or length,
    )


def read_layer_types(fields: Fields, default: list[bool]) -> tuple[bool, ...]:
    """Which blocks have a window, from "layer_types".

    Args:
        fields: Of the config.json.
        default: Where it does not say.

    Raises:
        ConfigError: a kind of block that is neither full nor windowed.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(default)
    odd = sorted({str(kind) for kind in kinds} - {WINDOWED, FULL})
    if odd:
        raise fields.error(f'"layer_types" in config.json has {", ".join(odd)}; supported: {FULL}, {WINDOWED}.')
    return tuple(kind == WINDOWED for kind in kinds)


def read_windows(fields: Fields, default: list[bool]) -> dict[str, Any]:
    """`window` and `windowed` of a `decoder.Config` whose "layer_types" say which blocks "sliding_window" is for.

    Raises:
        ConfigError: as `read_layer_types`; blocks with a window, and none given.
    """
    windowed = read_layer_types(fields, default)
    if not any(windowed):
        return {}
    if fields.get("sliding_window") is None:
        raise fields.error('"layer_types" in config.json names blocks with a window, and "sliding_window" is null.')
    return {"window": fields["sliding_window"], "windowed": windowed}
