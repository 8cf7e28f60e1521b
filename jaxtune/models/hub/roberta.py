"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions count real tokens, with heads of its own."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.models import encoder
from jaxtune.models.hub import bert
from jaxtune.models.hub.encoder_rows import dense_rows, norm_rows, vocabulary_rows
from jaxtune.models.hub.facts import FACTS
from jaxtune.models.hub.fields import Fields
from jaxtune.models.keys import KeyTable

DEFAULTS = {**bert.DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}
# CamemBERT and XLM-RoBERTa are saved by classes of their own with the same ends.
CLASSES = {
    "RobertaModel": "none",
    "CamembertModel": "none",
    "ForMaskedLM": "vocabulary",
    "ForSequenceClassification": "sequence",
    "ForMultipleChoice": "choice",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "tokens",
}


def facts(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What only the tensors tell: older releases stored the pooler beside every head."""
    del values
    return {"pooler": any(name.endswith("pooler.dense.weight") for name in names)}


def read_config(values: Mapping[str, Any]) -> encoder.Config:
    """The encoder of a config.json.

    Raises:
        ConfigError: a field that is not supported, or sizes that make no sense.
    """
    fields = Fields(values, DEFAULTS)
    padding = fields["pad_token_id"]
    if not isinstance(padding, int) or padding < 0:
        raise fields.error(
            f'"pad_token_id" is {padding!r} in config.json; the positions of {fields.model_type} need one.'
        )
    return encoder.Config(**bert.read_sizes(fields), counted_from=padding + 1, **_read_head(fields))


def key_table(config: encoder.Config, values: Mapping[str, Any], names: Collection[str]) -> KeyTable:
    """Between the stored tensors and our tree."""
    del values
    prefix = bert.prefix_of(names, "roberta.")
    rows, ties = [], {}
    if config.head == "vocabulary":
        rows += [*dense_rows("lm_head.dense", "head/dense"), *norm_rows(names, "lm_head.layer_norm", "head/norm")]
        last, ties = vocabulary_rows(
            config,
            names,
            table=f"{prefix}embeddings.word_embeddings.weight",
            decoder="lm_head.decoder.weight",
            biases=("lm_head.bias", "lm_head.decoder.bias"),
        )
        rows += last
    elif config.head == "sequence" and config.head_dense != "none":
        rows += [*dense_rows("classifier.dense", "head/dense"), *dense_rows("classifier.out_proj", "head")]
    elif config.head != "none":
        rows += dense_rows("qa_outputs" if "qa_outputs.weight" in names else "classifier", "head")
    return KeyTable((*bert.trunk_rows(config, names, prefix), *rows), ties, bert.IGNORED)


def _read_head(fields):
    kind = fields.head(CLASSES)
    pooler = fields.get(FACTS, {}).get("pooler", kind in ("none", "choice"))
    match kind:
        case "none":
            return {"head": "none", "pooler": pooler}
        case "vocabulary":
            tied = bool(fields["tie_word_embeddings"])
            return {"head": "vocabulary", "head_dense": "gelu", "tied": tied, "pooler": pooler}
        case "sequence":
            labels = fields.num_labels()
            return {"head": "sequence", "head_dense": "tanh", "num_outputs": labels, "pooler": pooler}
        case "choice":
            return {"head": "sequence", "num_outputs": 1, "pooler": True}
    return {"head": "tokens", "num_outputs": fields.num_labels(), "pooler": pooler}
