"""Vocabularies that differ: rows follow their tokens, nothing is cut, padded or mixed up in silence."""

import json

import jax
import numpy as np
import pytest

import jaxtune as jt
from jaxtune.checkpoint.vocabulary import read_tokens
from jaxtune.errors import CheckpointError, ConfigError
from jaxtune.lazy import defer
from jaxtune.models import decoder, registry
from jaxtune.transport.vocabulary import map_rows, take_rows
from jaxtune.tree import map_leaves

SIZES = dict(width=16, depth=1, num_heads=2, num_kv_heads=2, head_width=8, mlp_width=24)
WORDS = ["<pad>", "a", "b", "c", "d", "e", "f", "g"]


def tokenizer(tokens, added=()):
    rows = {token: row for row, token in enumerate(tokens)}
    entries = [{"id": row, "content": token, "special": True} for token, row in added]
    return json.dumps({"model": {"type": "BPE", "vocab": rows, "merges": []}, "added_tokens": entries})


def write_model(folder, seed, tokens, *, vocab_size=None, kind="tokenizer.json", base=None):
    config = decoder.Config(vocab_size=vocab_size or len(tokens), **SIZES)
    draw = np.random.default_rng(seed)
    shapes = registry.init(jax.random.key(seed), config)
    params = map_leaves(lambda _, x: np.asarray(x) + 0.3 * draw.standard_normal(x.shape).astype(np.float32), shapes)
    if base is not None:
        params = map_leaves(lambda _, x, y: y + np.float32(0.01) * x, params, base)
    text = {
        "tokenizer.json": tokenizer(tokens),
        "vocab.json": json.dumps({token: row for row, token in enumerate(tokens)}),
        "vocab.txt": "".join(f"{token}\n" for token in tokens),
        None: "",
    }[kind]
    jt.save(folder, params, config=registry.config_to_dict(config), extra_files={kind: text} if kind else None)
    return jt.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_tokens_are_read_from_every_kind_of_file(name, tmp_path):
    model = write_model(tmp_path / "m", 0, WORDS, kind=name)
    assert read_tokens(model.side_files) == {token: row for row, token in enumerate(WORDS)}
    assert read_tokens({}) is None


def test_added_tokens_take_rows_and_rename_reserved_ones(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer(["a", "<reserved>"], added=[("<chat>", 1), ("<end>", 2)]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": 3}))
    side = {path.name: path for path in tmp_path.iterdir()}
    assert read_tokens(side) == {"a": 0, "<chat>": 1, "<end>": 2, "<more>": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model": {"vocab": 3}}', "expected model.vocab"),
        ('{"model": {"vocab": {"a": -1}}}', "expected a token and its row"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "row 0 stands for"),
        ('{"model": {"vocab": [["a"]]}}', "pairs"),
        ("not json", "not JSON|JSON"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(content, words, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.json.*({words})"):
        read_tokens({"tokenizer.json": tmp_path / "tokenizer.json"})


def test_rows_match_by_token_and_padding_by_number():
    source, target = {"a": 0, "b": 1, "c": 2}, {"b": 0, "x": 1, "a": 2}
    found = map_rows(source, 6, target, 5)
    assert found.rows.tolist() == [1, -1, 0, 3, 4]
    assert found.num_lost == 2  # "c", and a row of padding
    assert "2 of the 3 tokens" in found.statement
    assert not found.is_identity
    assert map_rows(source, 6, dict(source), 6).is_identity


def test_without_a_tokenizer_rows_match_by_number_and_it_is_said():
    found = map_rows(None, 5, {"a": 0}, 3)
    assert found.rows.tolist() == [0, 1, 2]
    assert found.num_lost == 2
    assert "by number, one checkpoint lacks a tokenizer file" in found.statement
    assert map_rows(None, 4, None, 4).is_identity


def test_rows_that_are_missing_are_zero_on_any_axis_and_lazily_too():
    tree = {"a": np.arange(6.0).reshape(3, 2), "b": np.arange(6.0).reshape(2, 3), "c": np.ones(3)}
    for deferred in (tree, map_leaves(lambda _, x: defer(x), tree)):
        taken = take_rows(deferred, {"a": 0, "b": 1}, np.array([2, -1]))
        assert taken["b"].shape == (2, 2)
        np.testing.assert_array_equal(np.asarray(taken["a"]), [[4, 5], [0, 0]])
        np.testing.assert_array_equal(np.asarray(taken["b"]), [[2, 0], [5, 0]])
        assert taken["c"].shape == (3,)


def test_the_axes_of_a_vocabulary_are_those_that_grow_with_it():
    config = decoder.Config(vocab_size=16, **SIZES)  # as wide as the stream
    assert registry.vocabulary_axes(config) == {"embed/token": 0, "head/kernel": 1}
    assert registry.vocabulary_axes(decoder.Config(vocab_size=9, tied=True, **SIZES)) == {"embed/token": 0}


def test_a_task_vector_follows_its_tokens(tmp_path):
    old = write_model(tmp_path / "old", 0, WORDS)
    tuned = write_model(tmp_path / "tuned", 1, WORDS, base=old.params)
    # The very same network, its tokens in another order and two new ones.
    tokens = [*WORDS[::-1], "new", "newer"]
    new = write_model(tmp_path / "new", 2, tokens)
    rows = np.array([WORDS.index(token) if token in WORDS else -1 for token in tokens])
    target = take_rows(old.params, {"embed/token": 0, "head/kernel": 1}, rows)
    target["embed"]["token"][-2:] = 7.0
    jt.save(tmp_path / "target", target, like=new)
    found = jt.transport(tmp_path / "old", tmp_path / "tuned", tmp_path / "target", method="identity")
    words = found.prepared.info["vocabulary"]
    assert (words["num_shared_rows"], words["num_rows_left_as_they_are"]) == (8, 2)
    expected = take_rows(tuned.params, {"embed/token": 0, "head/kernel": 1}, rows)
    np.testing.assert_allclose(found.params["embed"]["token"][:8], expected["embed"]["token"][:8], atol=1e-6)
    np.testing.assert_array_equal(found.params["embed"]["token"][8:], 7.0)
    np.testing.assert_allclose(
        found.params["block_0"]["mlp"]["up"]["kernel"], tuned.params["block_0"]["mlp"]["up"]["kernel"], atol=1e-6
    )


def test_tokens_added_by_the_fine_tune_are_told_and_not_guessed(tmp_path):
    old = write_model(tmp_path / "old", 0, WORDS)
    tuned = write_model(tmp_path / "tuned", 1, [*WORDS, "<chat>"])
    new = write_model(tmp_path / "new", 2, [*WORDS, "<chat>"])
    found = jt.transport(old, tuned, new, method="identity")
    words = found.prepared.info["vocabulary"]
    assert words["num_rows_left_as_they_are"] == 1
    np.testing.assert_array_equal(found.params["embed"]["token"][8], new.params["embed"]["token"][8])


def test_other_differences_are_refused_as_before(tmp_path):
    old, tuned = (write_model(tmp_path / name, 0, WORDS) for name in ("old", "tuned"))
    config = decoder.Config(vocab_size=9, **{**SIZES, "mlp_width": 32})
    params = map_leaves(lambda _, x: np.asarray(x), registry.init(jax.random.key(0), config))
    jt.save(tmp_path / "new", params, config=registry.config_to_dict(config))
    with pytest.raises(ConfigError, match="mlp_width: source 24, target 32"):
        jt.transport(old, tuned, jt.load(tmp_path / "new"))


def test_an_alignment_moves_the_whole_source_by_the_rows_that_are_shared(tmp_path):
    old = write_model(tmp_path / "old", 0, WORDS)
    spec = registry.symmetry_of(registry.config_from_dict(old.config))
    element = jt.symmetry.random(jax.random.key(4), spec)
    tokens = WORDS[::-1][:6]
    new = write_model(tmp_path / "new", 2, tokens)
    rows = np.array([WORDS.index(token) for token in tokens])
    axes = {"embed/token": 0, "head/kernel": 1}
    jt.save(tmp_path / "target", take_rows(jt.symmetry.apply(spec, element, old.params), axes, rows), like=new)
    found = jt.align(old, tmp_path / "target")
    assert found.equivalence.is_exact
    assert found.info["vocabulary"]["num_shared_rows"] == 6
    assert found.params["embed"]["token"].shape == (8, 16)
    np.testing.assert_allclose(
        take_rows(found.params, axes, rows)["embed"]["token"], jt.load(tmp_path / "target").params["embed"]["token"]
    )
