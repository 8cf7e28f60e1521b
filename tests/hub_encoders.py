"""What the tests of BERT, RoBERTa and DistilBERT share: tiny sizes, batches with padding, the oracle's outputs."""

import jax
import numpy as np
from hub_models import assert_close, read_folder, write_folder
from small_models import run

VOCAB, LENGTHS = 37, (5, 11)
FEW = {"vocab_size": VOCAB, "max_position_embeddings": 20, "attn_implementation": "eager"}
SIZES = {**FEW, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def draw_batch(length, *, padding=0, num_segments=1, seed=0):
    """Three texts: one as long as may be, one padded behind, one padded in front."""
    draw = np.random.default_rng(seed)
    mask = np.ones((3, length), bool)
    mask[1, length // 2 :] = False
    mask[2, : length // 3] = False
    real = [token for token in range(VOCAB) if token != padding]
    text = np.where(mask, draw.choice(real, size=mask.shape), padding).astype(np.int32)
    batch = {"text": text, "mask": mask}
    if num_segments > 1:
        batch["segments"] = draw.integers(0, num_segments, size=mask.shape).astype(np.int32)
    return batch


def outputs_of_oracle(model, batch):
    """All that the model returns of one batch, in the order of our leaves."""
    import torch

    torch.set_num_threads(1)
    inputs = {"input_ids": batch["text"], "attention_mask": batch["mask"]}
    inputs |= {"token_type_ids": batch["segments"]} if "segments" in batch else {}
    inputs = {name: torch.from_numpy(values.astype(np.int64)) for name, values in inputs.items()}
    kind = type(model).__name__
    if kind.endswith("MultipleChoice"):  # every text is a question's only choice
        inputs = {name: values[:, None] for name, values in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    if kind.endswith("QuestionAnswering"):
        return [torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()]
    if kind.endswith("PreTraining"):
        return [out.prediction_logits.numpy(), out.seq_relationship_logits.numpy()]
    if "logits" in out:
        return [out.logits.numpy()]
    pooled = out.get("pooler_output")
    return [out.last_hidden_state.numpy()] + ([] if pooled is None else [pooled.numpy()])


def assert_parity(folder, model, **options):
    """Ours from the folder that the model writes against the model, on texts of several lengths; returns the config."""
    config, params, _ = read_folder(write_folder(folder, model))
    for length in LENGTHS:
        batch = draw_batch(length, padding=config.padding, num_segments=config.num_segments or 1, **options)
        ours, theirs = jax.tree.leaves(run(config, params, batch)), outputs_of_oracle(model, batch)
        for mine, expected in zip(ours, theirs, strict=True):
            assert_close(mine, expected)
    return config
