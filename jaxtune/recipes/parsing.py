"""From the keys and values of a recipe to its records; every key is read or refused by name."""

import os
from pathlib import Path

from jaxtune.merge.registry import METHODS
from jaxtune.recipes.examples import LEARNED, parse_data
from jaxtune.recipes.nodes import Node, did_you_mean
from jaxtune.recipes.parameters import parse_parameters
from jaxtune.recipes.references import parse_reference
from jaxtune.recipes.refused import REFUSED_KEYS, REFUSED_METHODS, REFUSED_OF_MODELS
from jaxtune.recipes.schema import Entry, Module, Recipe, Slice, Tokenizer, TokenRows, Transport

DTYPES = ("float16", "bfloat16", "float32", "float64")
KEYS = (
    "models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
    "out_path", "preset", "seed", "post", "evaluate", "data",
)  # fmt: skip


def parse_recipe(node: Node, folder: Path | None = None) -> Recipe:
    """The records of one document.

    Raises:
        RecipeError: names file, line, column, key, and the nearest known key.
    """
    node.check_keys(KEYS, REFUSED_KEYS)
    forms = [key for key in ("models", "slices", "modules") if node.get(key) is not None]
    if len(forms) != 1:
        found = " and ".join(forms) or "none of them"
        raise node.error(f"expected exactly one of models, slices and modules; found {found}.")
    if node.get("merge_method") is None:
        raise node.error("merge_method is missing: it names how the models are merged, for instance linear.")
    base, data = node.get("base_model"), node.get("data")
    method = _parse_method(node.get("merge_method"), has_data=data is not None)
    models = _parse_list(node.get("models"), _parse_model)
    return Recipe(
        merge_method=method,
        models=models,
        slices=_parse_list(node.get("slices"), _parse_slice),
        modules=_parse_modules(node.get("modules")),
        base_model=parse_reference(base) if base else None,
        parameters=parse_parameters(node.get("parameters")),
        dtype=_parse_dtype(node.get("dtype")),
        out_dtype=_parse_dtype(node.get("out_dtype")),
        tokenizer=_parse_tokenizer(node),
        chat_template=_text(node.get("chat_template")),
        name=_text(node.get("name")),
        out_path=_text(node.get("out_path")),
        preset=_text(node.get("preset")),
        seed=_parse_seed(node.get("seed")),
        post=_parse_post(node.get("post")),
        evaluate=node.get("evaluate") and node.get("evaluate").plain,
        plain=node.plain,
        node=node,
        folder=folder,
        data=parse_data(data, method, models) if data else None,
    )


def _parse_method(node, *, has_data):
    name = node.expect(str, "the name of a merge method")
    if name in LEARNED:
        if not has_data:
            raise node.error(f"{name} is learned from examples: write data: {{sources: {{MODEL: EXAMPLES}}}} too.")
        return name
    if name in REFUSED_METHODS and name not in METHODS:
        raise node.error(f"{name!r} is not made here: {REFUSED_METHODS[name]}")
    if name not in METHODS:
        raise node.error(f"unknown merge method {name!r}.{did_you_mean(name, (*METHODS, *LEARNED))}")
    return name


def _parse_list(node, parse):
    if node is None:
        return None
    items = node.expect(tuple, "a list")
    if not items:
        raise node.error("the list is empty.")
    return tuple(parse(item) for item in items)


def _parse_model(node: Node) -> Entry:
    if not isinstance(node.value, dict):
        raise node.error("expected 'model: PATH', with 'parameters' if there are any.")
    node.check_keys(("model", "parameters", "transport", "data"), REFUSED_OF_MODELS)
    return _entry(node, None)


def _parse_source(node: Node) -> Entry:
    node.check_keys(("model", "parameters", "transport", "data", "layer_range"), REFUSED_OF_MODELS)
    layers = node.get("layer_range")
    if layers is None:
        raise node.error("layer_range is missing: [first, end], end not included.")
    pair = layers.expect(tuple, "[first, end], end not included")
    numbers = [item.expect(int, "a whole number") for item in pair]
    if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise layers.error(f"expected [first, end] with 0 <= first <= end, found {layers.plain}.")
    return _entry(node, (numbers[0], numbers[1]))


def _entry(node, layer_range):
    if node.get("model") is None:
        raise node.error("'model' is missing: a path, or PATH+LORA.")
    transport, data = node.get("transport"), node.get("data")
    return Entry(
        model=parse_reference(node.get("model")),
        parameters=parse_parameters(node.get("parameters")),
        layer_range=layer_range,
        transport=_parse_transport(transport) if transport else None,
        data=data.expect(str, "a path") if data else None,
        node=node,
    )


def _parse_transport(node: Node) -> Transport:
    options = dict(node.items("transport: {base: PATH, method: auto}"))
    if "base" not in options:
        raise node.error(
            "'base' is missing: the model that this one was fine-tuned from."
            + (did_you_mean("base", options) if options else "")
        )
    base = parse_reference(options.pop("base"))
    method = options.pop("method", None)
    return Transport(
        base=base,
        method=method.expect(str, "the name of a transport method") if method else "auto",
        options={key: value.plain for key, value in options.items()},
        node=node,
    )


def _parse_slice(node: Node) -> Slice:
    node.check_keys(("sources", "base_model", "parameters", "residual_weight"))
    if node.get("residual_weight") is not None:
        raise node.get("residual_weight").error("mergekit reads residual_weight and does nothing with it. Take it out.")
    if node.get("sources") is None:
        raise node.error("'sources' is missing: a list of models with their layer_range.")
    base = node.get("base_model")
    sources = _parse_list(node.get("sources"), _parse_source)
    lengths = [source.layer_range[1] - source.layer_range[0] for source in sources]
    if len(set(lengths)) > 1:
        counts = ", ".join(f"{source.model} {length}" for source, length in zip(sources, lengths, strict=True))
        raise node.get("sources").error(f"sources of a slice need as many layers each; found {counts}.")
    return Slice(sources, parse_reference(base) if base else None, parse_parameters(node.get("parameters")), node)


def _parse_modules(node):
    if node is None:
        return None
    modules = {}
    for name, one in node.items("modules by name"):
        one.check_keys(("models", "slices", "parameters"))
        models, slices = one.get("models"), one.get("slices")
        if (models is None) == (slices is None):
            raise one.error("expected models or slices, one of the two.")
        modules[name] = Module(
            _parse_list(models, _parse_model),
            _parse_list(slices, _parse_slice),
            parse_parameters(one.get("parameters")),
            one,
        )
    if not modules:
        raise node.error("no module in it.")
    return modules


def _parse_dtype(node):
    if node is None:
        return None
    name = node.expect(str, "the name of a dtype").removeprefix("torch.")
    if name not in DTYPES:
        raise node.error(f"unknown dtype {name!r}.{did_you_mean(name, DTYPES)}")
    return name


def _parse_tokenizer(top: Node) -> Tokenizer | None:
    short, node = top.get("tokenizer_source"), top.get("tokenizer")
    if short is not None and node is not None:
        raise short.error("tokenizer_source and tokenizer say the same thing: keep one.")
    if short is not None:
        return Tokenizer(_parse_token_source(short), {}, None, short)
    if node is None:
        return None
    if not isinstance(node.value, dict):
        raise node.error("expected keys (source, tokens, pad_to_multiple_of); for the source alone: tokenizer_source.")
    node.check_keys(("source", "tokens", "pad_to_multiple_of"))
    source, tokens, pad = node.get("source"), node.get("tokens"), node.get("pad_to_multiple_of")
    if pad is not None and pad.expect(int, "a whole number") < 1:
        raise pad.error(f"expected a number of rows, at least 1, found {pad.value}.")
    return Tokenizer(
        _parse_token_source(source) if source else "union",
        {token: _parse_token(one) for token, one in tokens.items("tokens and where their rows come from")}
        if tokens
        else {},
        pad and pad.value,
        node,
    )


def _parse_token_source(node):
    return node.value if node.value in ("union", "base") else parse_reference(node)


def _parse_token(node: Node) -> TokenRows:
    node.check_keys(("source", "force"))
    source, force = node.get("source"), node.get("force")
    force = force.expect(bool, "true or false") if force else False
    if source is None:
        if force:
            raise node.error("force: true needs a source: a model, {kind: model_token, ...} or {kind: zero}.")
        return TokenRows("default", None, None, None, False, node)
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenRows("model", parse_reference(source), None, None, force, node)
    kind = source.value["kind"].expect(str, "model_token or zero")
    if kind == "zero":
        source.check_keys(("kind",))
        return TokenRows("zero", None, None, None, force, node)
    if kind != "model_token":
        raise source.value["kind"].error(f"unknown kind {kind!r}.{did_you_mean(kind, ('model_token', 'zero'))}")
    source.check_keys(("kind", "model", "token", "token_id"))
    token, token_id = source.get("token"), source.get("token_id")
    if source.get("model") is None or (token is None) == (token_id is None):
        raise source.error("expected 'model', and one of 'token' and 'token_id'.")
    return TokenRows(
        "model_token",
        parse_reference(source.get("model")),
        token and token.expect(str, "a token"),
        token_id and token_id.expect(int, "the number of a row"),
        force,
        node,
    )


def _parse_seed(node):
    if node is None:
        return 0
    seed = node.expect(int, "a whole number")
    if not 0 <= seed < 1 << 63:
        raise node.error(f"expected a seed of at least 0, found {seed}.")
    return seed


def _parse_post(node):
    if node is None:
        return ()
    steps = []
    for item in node.expect(tuple, "a list of steps, for instance [{lines: {}}]"):
        if isinstance(item.value, str):
            steps.append((item.value, {}))
            continue
        pairs = item.expect(dict, "a step: {name: {option: value}}")
        if len(pairs) != 1:
            raise item.error(f"expected one step an entry, found {len(pairs)}.")
        name, options = next(iter(pairs.items()))
        plain = {} if options.value is None else options.expect(dict, "options: {option: value}") and options.plain
        steps.append((name, plain or {}))
    return tuple(steps)


def _text(node):
    return None if node is None else os.fspath(node.expect(str, "text"))
