"""Half of what fine-tuning changed, taken back: whole matrices, drawn at random."""

import re

import numpy as np

from jaxtune.merge.method import Method
from jaxtune.merge.options import check_choice
from jaxtune.merge.random_bits import draw_bits, make_stream
from jaxtune.merge.view import Combine, View
from jaxtune.merge.weighted import add_weighted

# Category -> what its members are called, member by member. A path's last component but "kernel", "weight", "bias", …
# decides; the first pattern that fits.
CATEGORIES = {
    "attention": (
        r"(q|query|to_q|wq|q_proj)",
        r"(k|key|to_k|wk|k_proj)",
        r"(v|value|to_v|wv|v_proj)",
        r"(o|out|to_out|wo|o_proj|out_proj)",
    ),
    "fused attention": (r"(qkv|qkv_proj|in_proj|c_attn|query_key_value|Wqkv)", r"(proj|dense|c_proj)"),
    "gated feed-forward": (r"(gate|gate_proj|w1|wi_0)", r"(up|up_proj|w3|wi_1)", r"(down|down_proj|w2)"),
    "feed-forward": (r"(fc1|c_fc|lin1|wi|dense_h_to_4h|linear1)", r"(fc2|lin2|dense_4h_to_h|linear2)"),
    "norms": (
        r"(norm1|ln_?1|input_layernorm|attn_norm|attention_norm|layer_norm1|layernorm_before)",
        r"(norm2|ln_?2|post_attention_layernorm|mlp_norm|ffn_norm|layer_norm2|layernorm_after)",
    ),
}
LEVELS = ("category", "layer", "leaf")
KEPT = re.compile(r"embed|wte|wpe|shared|lm_head|(^|[./])head|classifier|score", re.IGNORECASE)
PARTS = {"kernel", "weight", "bias", "scale", "gain", "offset", "embedding"}


def merge_half_reset(view: View, *, level: str = "category", weight: tuple[float, ...] = 1.0) -> Combine:
    """`θ_0 + Σ w_t M_t ⊙ τ_t`, M_t one or zero on a whole leaf, drawn from the seed, the model's place and the names.

    Args:
        view: Of the models.
        level: "category": in each block two of query, key, value and output, in half of the blocks two and in the
            others one of the three matrices of a gated feed-forward part, one matrix of a plain one, one of two norms;
            a bias goes with its matrix, embeddings and heads keep all, and what has no known name is drawn by itself.
            "layer": one of each two blocks is kept whole, and all that is outside of blocks. "leaf": every leaf is kept
            with probability one half.
        weight: Of each task vector.

    Reference:
        Hui et al. 2024, arXiv:2404.18466: half fine-tuning, applied after the fact; `train.half` draws the same masks
        for training. Differs:
        members of a category are known by name, so that a category that lacks some keeps half of them on average.
    """
    factors = tuple(factor * is_kept(view.seed, model, view.name, level=level) for model, factor in enumerate(weight))
    return Combine(add_weighted, (factors,))


def is_kept(seed: int, model: int, name: str, *, level: str) -> bool:
    """Whether one model's leaf keeps what fine-tuning made of it; a function of these four alone.

    Args:
        seed: Of the draw.
        model: Which one: its place in a merge, the stage in training.
        name: Of the leaf, components divided by "/" or ".".
        level: One of `LEVELS`.
    """
    if level == "leaf":
        return bool(_draw(seed, model, f"leaf {name}", 1)[0] % 2 == 0)
    if level == "layer":
        return _keeps_layer(seed, model, re.split(r"[./]", name))
    if KEPT.search(name):
        return True
    components = re.split(r"[./]", name)
    if len(components) > 1 and components[-1] in PARTS:
        components.pop()
    numbered = [n for n, component in enumerate(components) if re.search(r"(^|_)\d+$", component)]
    block = "/".join(components[: numbered[-1] + 1]) if numbered else ""
    for category, members in CATEGORIES.items():
        for place, member in enumerate(members):
            if re.fullmatch(member, components[-1]):
                return _keeps_member(seed, model, block, category, len(members), place)
    return bool(_draw(seed, model, f"leaf {'/'.join(components)}", 1)[0] % 2 == 0)


def _keeps_layer(seed, model, components):
    """One of the blocks 2 n and 2 n + 1 is kept; of an odd number the last one by chance."""
    for place, component in enumerate(components):
        numbered = re.fullmatch(r"(.*?_?)(\d+)", component)
        if numbered:
            stack, number = "/".join([*components[:place], numbered[1]]), int(numbered[2])
            return bool(number % 2 == _draw(seed, model, f"layer {stack} {number // 2}", 1)[0] % 2)
    return True


def _keeps_member(seed, model, block, category, size, place):
    words = _draw(seed, model, f"{block} {category}", size + 1)
    kept = (size + words[size] % 2) // 2 if size % 2 else size // 2
    return place in np.argsort(words[:size], kind="stable")[:kept]


def _draw(seed, model, name, count):
    return draw_bits(np, make_stream(seed, model, f"half_reset {name}"), 0, (count,))


HALF_RESET = Method(
    merge_half_reset,
    "a random half of the matrices back to the base",
    "arXiv:2404.18466",
    per_model=("weight",),
    check=lambda options: check_choice(options, "level", LEVELS),
)
