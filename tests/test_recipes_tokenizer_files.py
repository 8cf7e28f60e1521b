"""Tokenizer files of every kind with tokens added or taken out, read back by transformers or as they lie."""

import json

import pytest

from jaxtune.checkpoint.vocabulary import read_tokens
from jaxtune.errors import CheckpointError
from jaxtune.recipes.tokenizer_files import added_entries, plain_entry, write_tokenizer

NEW = [{**plain_entry("<new>"), "id": 4, "special": True}]


def write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return {path.name: path for path in folder.iterdir()}


def read_back(files, folder):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return read_tokens({path.name: path for path in folder.iterdir()})


def fast(vocabulary, kind="BPE", merges=(), added=()):
    return {"model": {"type": kind, "vocab": vocabulary, "merges": list(merges)}, "added_tokens": list(added)}


def test_slow_files_get_a_list_of_added_tokens(tmp_path):
    side = write(tmp_path / "a", vocab__json={"a": 0, "b": 1, "ab": 2, "c": 3}, merges__txt="#version: 0.2\na b\n")
    files = write_tokenizer(side, NEW, ())
    assert json.loads(files["added_tokens.json"]) == {"<new>": 4}
    assert files["merges.txt"] == side["merges.txt"]
    assert read_back(files, tmp_path / "b") == {"a": 0, "b": 1, "ab": 2, "c": 3, "<new>": 4}


def test_word_lists_keep_their_lines(tmp_path):
    side = write(tmp_path / "a", vocab__txt="[PAD]\na\nb\nc\n", added_tokens__json={"x": 4})
    files = write_tokenizer(side, [{**plain_entry("y"), "id": 5}], ())
    assert read_back(files, tmp_path / "b") == {"[PAD]": 0, "a": 1, "b": 2, "c": 3, "x": 4, "y": 5}
    assert set(added_entries(side)) == {"x"}
    with pytest.raises(CheckpointError, match=r"can only be taken out of a tokenizer\.json"):
        write_tokenizer(side, (), {"c"})


@pytest.mark.parametrize("merge", ["a b", ["a", "b"]])
def test_a_token_leaves_with_its_merges(merge, tmp_path):
    content = fast({"a": 0, "b": 1, "c": 2, "ab": 3}, merges=[merge, "b c" if isinstance(merge, str) else ["b", "c"]])
    side = write(
        tmp_path / "a",
        tokenizer__json=content,
        tokenizer_config__json={"added_tokens_decoder": {"9": {"content": "gone", "special": True}}},
    )
    files = write_tokenizer(side, NEW, {"ab", "gone"})
    made = json.loads(files["tokenizer.json"])
    assert made["model"]["vocab"] == {"a": 0, "b": 1, "c": 2}
    assert len(made["model"]["merges"]) == 1
    assert [entry["content"] for entry in made["added_tokens"]] == ["<new>"]
    settings = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert list(settings) == ["4"]
    assert settings["4"]["special"] is True


def test_a_list_of_scores_loses_its_end(tmp_path):
    side = write(tmp_path / "a", tokenizer__json=fast([["a", 0.0], ["b", -1.0], ["c", -2.0]], kind="Unigram"))
    files = write_tokenizer(side, (), {"c"})
    assert read_back(files, tmp_path / "b") == {"a": 0, "b": 1}


def test_files_without_changes_are_copied(tmp_path):
    side = write(tmp_path / "a", tokenizer__json=fast({"a": 0}), tokenizer_config__json={"x": 1}, LICENSE="text")
    assert write_tokenizer(side, (), ()) == {name: place for name, place in side.items() if name != "LICENSE"}
