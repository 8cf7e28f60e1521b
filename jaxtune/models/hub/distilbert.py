"""DistilBERT: BERT without segments and without a pooler, its tensors under other names."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import encoder
from jaxtune.models.hub.bert import IGNORED, prefix_of
from jaxtune.models.hub.encoder_rows import attention_rows, dense_rows, norm_rows, vocabulary_rows
from jaxtune.models.hub.fields import Fields
from jaxtune.models.keys import KeyTable, Row

DEFAULTS = {
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "n_layers": 6,
    "n_heads": 12,
    "dim": 768,
    "hidden_dim": 3072,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
CLASSES = {
    "DistilBertModel": "none",
    "ForMaskedLM": "vocabulary",
    "ForSequenceClassification": "sequence",
    "ForMultipleChoice": "choice",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "tokens",
}
NORM_EPS = 1e-12  # of every norm; no field of config.json


def read_config(values: Mapping[str, Any]) -> encoder.Config:
    """The encoder of a config.json. Positions made of sines are stored like any others.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS)
    fields.only("tie_weights_", None, True)
    return encoder.Config(
        vocab_size=fields["vocab_size"],
        num_positions=fields["max_position_embeddings"],
        width=fields["dim"],
        depth=fields["n_layers"],
        num_heads=fields["n_heads"],
        mlp_width=fields["hidden_dim"],
        activation=fields.activation("activation"),
        norm_eps=NORM_EPS,
        **_read_head(fields),
    )


def key_table(config: encoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = prefix_of(names, "distilbert.")
    stored = f"{prefix}embeddings"
    rows, ties = (
        [
            Row(f"{stored}.word_embeddings.weight", "embed/token"),
            Row(f"{stored}.position_embeddings.weight", "embed/position"),
            *norm_rows(names, f"{stored}.LayerNorm", "embed/norm"),
        ],
        {},
    )
    for index in range(config.depth):
        block, stored = f"block_{index}", f"{prefix}transformer.layer.{index}"
        inside = {name: f"{stored}.attention.{name}_lin" for name in ("q", "k", "v", "out")}
        rows += attention_rows(config, inside, f"{block}/attn")
        rows += norm_rows(names, f"{stored}.sa_layer_norm", f"{block}/norm1")
        rows += [
            *dense_rows(f"{stored}.ffn.lin1", f"{block}/mlp/up"),
            *dense_rows(f"{stored}.ffn.lin2", f"{block}/mlp/down"),
        ]
        rows += norm_rows(names, f"{stored}.output_layer_norm", f"{block}/norm2")
    if config.head == "vocabulary":
        rows += [*dense_rows("vocab_transform", "head/dense"), *norm_rows(names, "vocab_layer_norm", "head/norm")]
        table = f"{prefix}embeddings.word_embeddings.weight"
        last, ties = vocabulary_rows(
            config, names, table=table, decoder="vocab_projector.weight", biases=("vocab_projector.bias",)
        )
        rows += last
    elif config.head == "sequence":
        rows += [*dense_rows("pre_classifier", "head/dense"), *dense_rows("classifier", "head")]
    elif config.head == "tokens":
        rows += dense_rows("qa_outputs" if "qa_outputs.weight" in names else "classifier", "head")
    return KeyTable(tuple(rows), ties, IGNORED)


def _read_head(fields):
    match fields.head(CLASSES):
        case "none":
            return {"head": "none"}
        case "vocabulary":
            dense, tied = fields.activation("activation"), bool(fields["tie_word_embeddings"])
            return {"head": "vocabulary", "head_dense": dense, "tied": tied}
        case "sequence":
            return {"head": "sequence", "head_dense": "relu", "num_outputs": fields.num_labels()}
        case "choice":
            return {"head": "sequence", "head_dense": "relu", "num_outputs": 1}
    return {"head": "tokens", "num_outputs": fields.num_labels()}
