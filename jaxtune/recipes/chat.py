"""The chat template of the output: that of most models, a known one by name, or the text itself."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoint.files import parse_object, read_small
from jaxtune.recipes.nodes import RecipeError, did_you_mean
from jaxtune.recipes.opening import Opened
from jaxtune.recipes.schema import Recipe

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
# Formats by the names that recipes of mergekit give them, written for this file after their vendors' own.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        " {{ message['content'] }}{{ eos_token }}{% elif message['role'] == 'user' %} [INST] "
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
        "{{ message['content'] }} [/INST]{% elif not (loop.first and message['role'] == 'system') %}"
        "{{ raise_exception('expected user and assistant, behind one system message at most') }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] | trim }}\n\n"
        "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] | trim }}\n\n"
        "{% elif message['role'] == 'user_context' %}### Input:\n{{ message['content'] | trim }}\n\n"
        "{% else %}### Instruction:\n{{ message['content'] | trim }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}### Response:\n{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}[|system|][|endofturn|]\n"
        "{% endif %}[|{{ message['role'] }}|]{{ message['content'] }}{% if message['role'] != 'user' %}[|endofturn|]"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}


def choose_template(recipe: Recipe, models: Sequence[Opened]) -> tuple[str | None, str | None]:
    """(the template, a note) that a recipe asks for; no template where the output keeps what its files say.

    Raises:
        RecipeError: neither "auto", nor a known name, nor a template.
    """
    asked = recipe.chat_template
    if asked is None:
        return None, None
    if asked == "auto":
        found = [template.strip() for model in models if (template := read_template(model.side_files))]
        if not found:
            return None, "chat_template: auto, and no model has one"
        chosen, count = Counter(found).most_common(1)[0]
        return chosen, f"chat_template: auto took that of {count} of {len(models)} models"
    if "{" in asked:
        return asked, None
    if asked in TEMPLATES:
        return TEMPLATES[asked], None
    raise _unknown(recipe, asked)


def read_template(side_files: Mapping[str, Any]) -> str | None:
    """The chat template of a model; of several that it names, the default one."""
    if FILE in side_files:
        return _read(side_files[FILE]).decode("utf-8", "replace")
    if SETTINGS not in side_files:
        return None
    template = parse_object(_read(side_files[SETTINGS]), SETTINGS).get("chat_template")
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def put_template(files: dict[str, Any], template: str) -> None:
    """Writes a template among the files of the output, in both places that releases of transformers look in."""
    files[FILE] = template.encode()
    if SETTINGS in files:
        settings = parse_object(_read(files[SETTINGS]), SETTINGS) | {"chat_template": template}
        files[SETTINGS] = (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode()


def _read(place) -> bytes:
    return place if isinstance(place, bytes) else read_small(Path(place))


def _unknown(recipe, name) -> RecipeError:
    known = did_you_mean(name, ["auto", *TEMPLATES])
    return recipe.error_at("chat_template", f"{name!r} is no known template, and no Jinja text.{known}")
