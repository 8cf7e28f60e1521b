"""BERT: what its config.json means, and its tensors. RoBERTa, which names most of them alike, reads with its parts."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import encoder
from jaxtune.models.hub.encoder_rows import attention_rows, dense_rows, norm_rows, vocabulary_rows
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.keys import KeyTable, Row

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
CLASSES = {
    "BertModel": "none",
    "ForPreTraining": "pretraining",
    "ForMaskedLM": "vocabulary",
    "ForNextSentencePrediction": "next_sentence",
    "ForSequenceClassification": "sequence",
    "ForMultipleChoice": "choice",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "tokens",
}
# Stored beside the weights by older releases, computed by all.
IGNORED = (r"(\w+\.)?embeddings\.(position_ids|token_type_ids)",)
PREDICTIONS = "cls.predictions"


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What only the tensors tell: the parts that a file of one class may have or lack."""
    del values
    return {
        "pooler": any(name.endswith("pooler.dense.weight") for name in names),
        "next_sentence": "cls.seq_relationship.weight" in names,
    }


def read_config(values: Mapping[str, Any]) -> encoder.Config:
    """The encoder of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS)
    return encoder.Config(**read_sizes(fields), **_read_head(fields))


def key_table(config: encoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = prefix_of(names, "bert.")
    rows, ties = [], {}
    if config.head == "vocabulary":
        rows += dense_rows(f"{PREDICTIONS}.transform.dense", "head/dense")
        rows += norm_rows(names, f"{PREDICTIONS}.transform.LayerNorm", "head/norm")
        last, ties = vocabulary_rows(
            config,
            names,
            table=f"{prefix}embeddings.word_embeddings.weight",
            decoder=f"{PREDICTIONS}.decoder.weight",
            biases=(f"{PREDICTIONS}.bias", f"{PREDICTIONS}.decoder.bias"),
        )
        rows += last
        rows += dense_rows("cls.seq_relationship", "next_sentence") if config.next_sentence else []
    elif config.head != "none":
        known = ("classifier", "qa_outputs", "cls.seq_relationship")
        rows += dense_rows(next((name for name in known if f"{name}.weight" in names), known[0]), "head")
    return KeyTable((*trunk_rows(config, names, prefix), *rows), ties, IGNORED)


def read_sizes(fields: Fields) -> dict[str, Any]:
    """The fields of an `encoder.Config` that say nothing of its head.

    Raises:
        ConfigError: a field that is not supported.
    """
    fields.only("position_embedding_type", None, "absolute")
    fields.only("is_decoder", None, False)
    return {
        "vocab_size": fields["vocab_size"],
        "num_positions": fields["max_position_embeddings"],
        "width": fields["hidden_size"],
        "depth": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "mlp_width": fields["intermediate_size"],
        "num_segments": fields["type_vocab_size"],
        "activation": fields.activation("hidden_act"),
        "norm_eps": fields["layer_norm_eps"],
    }


def trunk_rows(config: encoder.Config, names: Collection[str], prefix: str) -> list[Row]:
    """Everything but the head."""
    stored = f"{prefix}embeddings"
    rows = [
        Row(f"{stored}.word_embeddings.weight", "embed/token"),
        Row(f"{stored}.position_embeddings.weight", "embed/position"),
        Row(f"{stored}.token_type_embeddings.weight", "embed/segment"),
        *norm_rows(names, f"{stored}.LayerNorm", "embed/norm"),
    ]
    for index in range(config.depth):
        block, stored = f"block_{index}", f"{prefix}encoder.layer.{index}"
        inside = {n: f"{stored}.attention.self.{m}" for n, m in (("q", "query"), ("k", "key"), ("v", "value"))}
        rows += attention_rows(config, {**inside, "out": f"{stored}.attention.output.dense"}, f"{block}/attn")
        rows += norm_rows(names, f"{stored}.attention.output.LayerNorm", f"{block}/norm1")
        rows += dense_rows(f"{stored}.intermediate.dense", f"{block}/mlp/up")
        rows += dense_rows(f"{stored}.output.dense", f"{block}/mlp/down")
        rows += norm_rows(names, f"{stored}.output.LayerNorm", f"{block}/norm2")
    return rows + (dense_rows(f"{prefix}pooler.dense", "pooler") if config.pooler else [])


def prefix_of(names: Collection[str], prefix: str) -> str:
    """What stands before the names of the trunk: nothing where it was saved alone."""
    return prefix if any(name.startswith(prefix) for name in names) else ""


def _read_head(fields):
    kind, stored = fields.head(CLASSES), fields.get(FACTS, {})
    if kind in ("next_sentence", "sequence", "choice"):
        num_outputs = {"next_sentence": 2, "choice": 1}.get(kind) or fields.num_labels()
        return {"head": "sequence", "num_outputs": num_outputs, "pooler": True}
    next_sentence = stored.get("next_sentence", kind == "pretraining")
    pooler = stored.get("pooler", kind in ("none", "pretraining"))
    if kind == "none":
        return {"head": "none", "pooler": pooler}
    if kind == "tokens":
        return {"head": "tokens", "num_outputs": fields.num_labels(), "pooler": pooler}
    return {
        "head": "vocabulary",
        "head_dense": fields.activation("hidden_act"),
        "tied": bool(fields["tie_word_embeddings"]),
        "pooler": pooler or next_sentence,
        "next_sentence": next_sentence,
    }
