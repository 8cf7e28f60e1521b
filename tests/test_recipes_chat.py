"""Chat templates that recipes name: what they make of a conversation, beside mergekit's."""

import importlib.resources

import pytest

from jaxtune.recipes import chat

pytest.importorskip("mergekit")
pytest.importorskip("transformers")

ASK, ANSWER = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}
TALKS = {
    "one": [ASK],
    "three": [ASK, ANSWER, ASK],
    "told": [{"role": "system", "content": "be nice"}, ASK, ANSWER, ASK],
    "with context": [ASK, {"role": "user_context", "content": "in a wood"}],
}
SPOKEN = {  # of the talk "told", with the beginning of an answer
    "chatml": "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nyes"
    "<|im_end|>\n<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s> [INST] be nice\n\nhi there [/INST] yes</s> [INST] hi there [/INST]",
    "exaone": "[|system|]be nice[|endofturn|]\n[|user|]hi there\n[|assistant|]yes[|endofturn|]\n[|user|]hi there\n"
    "[|assistant|]",
}


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_named_templates_say_what_mergekits_say(name):
    from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

    folder = importlib.resources.files("mergekit") / "_data" / "chat_templates"
    assert {one.name.removesuffix(".jinja") for one in folder.iterdir() if one.suffix == ".jinja"} == set(
        chat.TEMPLATES
    )
    theirs, ours = (folder / f"{name}.jinja").read_text(), chat.TEMPLATES[name]
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for talk in TALKS if name == "alpaca" else list(TALKS)[:3]:
        for is_open in (True, False):
            how = {"messages": TALKS[talk], "add_generation_prompt": is_open, **special}
            said = [compile_template(template).render(**how) for template in (ours, theirs)]
            # Some of theirs are laid out over lines, whose ends and indents come out between the parts.
            assert "".join(said[0].split()) == "".join(said[1].split()), talk
    if name in SPOKEN:
        said = compile_template(ours).render(messages=TALKS["told"], add_generation_prompt=True, **special)
        assert said == SPOKEN[name]
    if name == "mistral":
        with pytest.raises(Exception, match="user and assistant"):
            compile_template(ours).render(messages=[ASK, {"role": "tool", "content": "x"}], **special)
