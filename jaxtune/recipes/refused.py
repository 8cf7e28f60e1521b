"""Keys and methods of other programs' recipes, each with the reason why it is not read here."""

_EVOLVE = "it belongs to a search over recipes (mergekit-evolve). Give the recipe that the search found."
_EXPERTS = "it builds a mixture of experts (mergekit-moe), which makes a new network and merges nothing."

REFUSED_KEYS: dict[str, str] = {
    "genome": _EVOLVE,
    "tasks": _EVOLVE,
    "limit": _EVOLVE,
    "num_fewshot": _EVOLVE,
    "experts": _EXPERTS,
    "gate_mode": _EXPERTS,
    "experts_per_token": _EXPERTS,
    "shared_experts": _EXPERTS,
    "positive_prompts": _EXPERTS,
    "layer_slices": "it is bakllama's, the forerunner of slices. Write slices with sources and layer_range.",
    "embedding_source": "it is bakllama's. Embeddings come from the first slice.",
    "lm_head_source": "it is bakllama's. The head comes from the last slice.",
    "ranked_ties": "it is of a fork of mergekit and has no published definition. Use the method ties.",
    "metric_method": "it is of a fork of mergekit and has no published definition. Name weights, one a model.",
    "align_weights": "it is of a fork of mergekit. 'transport' beside a model aligns it with base_model.",
    "pruning_order": "it is of a fork of mergekit (cabs).",
    "default_n_val": "it is of a fork of mergekit (cabs).",
    "default_m_val": "it is of a fork of mergekit (cabs).",
    "lora": "it belongs to a model: write 'model: PATH+LORA'.",
    "architecture": "the architecture comes from the config.json of the models.",
    "merge_options": "options of the engine are given on the command line.",
    "merges": "one merge a document; put '---' between them.",
    "int8_mask": "it is a parameter: write it under 'parameters'.",
    "density": "it is a parameter: write it under 'parameters'.",
    "weight": "it is a parameter: write it under 'parameters' of a model.",
    "normalize": "it is a parameter: write it under 'parameters'.",
    "lambda": "it is a parameter: write it under 'parameters'.",
    "t": "it is a parameter: write it under 'parameters'.",
}

REFUSED_OF_MODELS: dict[str, str] = {
    "lora": "write the adapter behind its base: 'model: PATH+LORA'.",
    "weight": "it is a parameter: write it under 'parameters'.",
    "density": "it is a parameter: write it under 'parameters'.",
}

REFUSED_METHODS: dict[str, str] = {
    "ranked_ties": "it is of a fork of mergekit and has no published definition. Use ties.",
    "metric_method": "it is of a fork of mergekit and has no published definition. Use linear with weights.",
    "task_swapping": "it is of a fork of mergekit. A negative weight with task_arithmetic takes a task out.",
    "cabs": "it is of a fork of mergekit. ties or breadcrumbs prune task vectors here.",
    "lrp": "it is of a fork of mergekit and needs data. ties prunes by magnitude.",
    "zipit": "'transport' beside a model aligns it with base_model; then merge with linear.",
    "encoder_decoder_weighted": (
        "it is of a fork of mergekit. Write modules, encoder and decoder, each with its models and their weights, and "
        "linear."
    ),
    "moe": "it makes a new network and merges nothing.",
}
