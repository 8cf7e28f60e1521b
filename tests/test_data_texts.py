"""Texts: how lines become records and records tokens, windows that predict every token once, and every refusal."""

import dataclasses
import gzip
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.rungs.networks import Networks, Schedule
from jaxtune import sampling
from jaxtune.data import DataSource, Loader, open_source, take_few, take_sample
from jaxtune.data.parts import read_labels
from jaxtune.data.tokens import WORD
from jaxtune.errors import ConfigError, DataError, UnknownNameError
from jaxtune.models import decoder, encoder, registry, tokenizer
from jaxtune.sample import example_losses

SHARED = Path(__file__).parents[2] / "shared" / "data" / "text" / "open"
PETS = [
    ("train", "The cat sat.", 0, "cat"),
    ("train", "a dog, the dog", 1, "dog"),
    ("train", "the bird", 2, "bird"),
    ("val", "the cat and a bird", 0, "cat"),
    ("test", "the zebra", 1, "dog"),
    ("test", "Größe", 2, "bird"),
]
TEXT_MODEL = encoder.Config(vocab_size=64, num_positions=32, width=16, depth=1, num_heads=2, mlp_width=16, pooler=True)


def lines_of(task, rows):
    keys = ("split", "text", "label", "label_name")
    return [json.dumps({"task": task, **dict(zip(keys, row, strict=False))}) for row in rows]


@pytest.fixture
def save(tmp_path):
    def save_lines(lines, name="zoo.jsonl.gz"):
        path = tmp_path / name
        data = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return save_lines


@pytest.fixture
def pets(save):
    return save([*lines_of("pets", PETS), "", *lines_of("moods", [("train", "so so the", 0, "calm")] * 5)])


def all_of(source):
    return source.__getitems__(np.arange(len(source)))


def number_words(texts, train, vocab_size, num_hashed):
    """Ids of words counted one by one: the second opinion."""
    counts = {}
    for text in train:
        for word in WORD.findall(text.lower()):
            counts[word] = counts.get(word, 0) + 1
    known = [word for _, word in sorted((-count, word) for word, count in counts.items())][
        : vocab_size - num_hashed - 3
    ]
    rows = []
    for text in texts:
        row = [vocab_size - 2]
        for word in WORD.findall(text.lower()):
            row.append(
                1 + num_hashed + known.index(word) if word in known else 1 + zlib.crc32(word.encode()) % num_hashed
            )
        rows.append([*row, vocab_size - 1])
    return rows


@pytest.mark.parametrize(("vocab_size", "num_hashed"), [(64, 8), (12, 2), (5, 1)])
def test_words_are_numbered_by_their_rank_in_train(pets, vocab_size, num_hashed):
    train = [row[1] for row in PETS if row[0] == "train"] + ["so so the"] * 5
    for split, stored in (("train", "train"), ("validation", "val"), ("test", "test")):
        source = open_source(pets, split, task="pets", vocab_size=vocab_size, num_hashed=num_hashed)
        texts = [row[1] for row in PETS if row[0] == stored]
        batch = all_of(source)
        for ids, mask, row in zip(
            batch["text"], batch["mask"], number_words(texts, train, vocab_size, num_hashed), strict=True
        ):
            assert ids[mask].tolist() == row
            assert not ids[~mask].any()
        assert batch["text"].shape == (len(texts), 8)  # the longest of the file, 5 words with start and end
        assert (source.name, source.split, source.class_names, source.vocab_size) == (
            "pets", split, ("cat", "dog", "bird"), vocab_size,
        )  # fmt: skip
        np.testing.assert_array_equal(batch["label"], [row[2] for row in PETS if row[0] == stored])


def test_a_source_of_texts_keeps_the_protocol(pets):
    source = open_source(pets, "train", task="pets")
    assert isinstance(source, DataSource)
    batch = source.__getitems__([2, 0, 2])
    assert {key: (values.dtype.name, values.ndim) for key, values in batch.items()} == {
        "text": ("int32", 2), "mask": ("bool", 2), "label": ("int32", 1),
    }  # fmt: skip
    for row, index in enumerate([2, 0, 2]):
        for key, value in source[index].items():
            np.testing.assert_array_equal(value, batch[key][row])
    with pytest.raises(IndexError, match="it has 3 records"):
        source[3]
    assert len(take_few(source, 1)) == 3
    assert next(iter(Loader(source, 2, seed=0)))["text"].shape == (2, 8)


def test_bytes_are_those_of_the_models(pets):
    source = open_source(pets, "test", task="pets", tokens="bytes", length=16)
    np.testing.assert_array_equal(
        all_of(source)["text"], tokenizer.tokenize(["the zebra", "Größe"], context_length=16), strict=True
    )
    assert source.vocab_size == tokenizer.VOCAB_SIZE
    given = open_source(
        pets, "test", task="pets", length=16, tokenizer=lambda texts: tokenizer.tokenize(texts, context_length=32)
    )
    for key, values in all_of(source).items():
        np.testing.assert_array_equal(all_of(given)[key], values)


def test_only_rows_that_were_padded_lose_ids_at_their_end(pets):
    """Id 0 is a word of many a vocabulary."""
    rows = [[5, 7, 0], [6, 0, 0]]
    for is_padded, lengths in ((False, [3, 3]), (True, [2, 1])):
        source = open_source(
            pets, "test", task="pets", length=4, tokenizer=lambda texts: rows[: len(texts)], is_padded=is_padded
        )
        np.testing.assert_array_equal(all_of(source)["mask"].sum(axis=1), lengths)


def test_long_texts_keep_their_end_and_are_counted(pets):
    source = open_source(pets, "train", task="pets", length=4)
    batch = all_of(source)
    assert source.num_cut == 2
    assert batch["mask"].all()
    np.testing.assert_array_equal(batch["text"][:, -1], 4095)
    np.testing.assert_array_equal(
        batch["text"][:, 1:3], all_of(open_source(pets, "train", task="pets"))["text"][:, 1:3]
    )


def test_tasks_and_files_share_their_words(pets, save):
    other = save(lines_of("birds", [("train", "cat the owl", 0, "owl"), ("test", "the cat", 0, "owl")]), "birds.jsonl")
    first = open_source(pets, "train", task="moods", validation_fraction=0.4)
    assert (len(first), len(open_source(pets, "validation", task="moods", validation_fraction=0.4))) == (3, 2)
    np.testing.assert_array_equal(first[0]["text"][1:4], [257, 257, 258])  # "so" 10 times, "the" 8 times
    shared = open_source(other, "test", vocabulary=pets)
    np.testing.assert_array_equal(
        shared[0]["text"][1:3], all_of(open_source(pets, "train", task="pets"))["text"][0, 1:3]
    )
    assert not np.array_equal(shared[0]["text"], open_source(other, "test")[0]["text"])


@pytest.mark.parametrize("tokens", ["bytes", "characters"])
@pytest.mark.parametrize("length", [2, 5, 200])
def test_windows_predict_every_token_once(save, tokens, length):
    long = "To be, or not to be: that is the question. " * 3
    path = save([json.dumps({"split": "train", "text": long}), json.dumps({"split": "test", "text": long + "§"})])
    source = open_source(path, "test", tokens=tokens, windows=length)
    assert (source.name, source.class_names) == ("zoo", ())
    batch = all_of(source)
    predicted = [ids[1:][mask[1:]] for ids, mask in zip(batch["text"], batch["mask"], strict=True)]
    stream = [batch["text"][0, 0], *np.concatenate(predicted)]
    if tokens == "bytes":
        assert bytes(int(id) - 1 for id in stream).decode() == long + "§"
    else:
        letters = sorted(set(long))
        assert "".join("\0?"[id] if id < 2 else letters[id - 2] for id in stream) == long + "?"
        assert source.vocab_size == len(letters) + 2
    np.testing.assert_array_equal(batch["text"][1:, 0], batch["text"][:-1, -1])


def test_windows_put_an_end_between_texts(pets):
    source = open_source(pets, "test", task="pets", tokens="bytes", windows=18)
    whole = [byte + 1 for byte in b"the zebra"], [byte + 1 for byte in "Größe".encode()]
    np.testing.assert_array_equal(source[0]["text"], [*whole[0], 258, *whole[1], 0])
    assert "label" not in source[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 7: not a JSON object in UTF-8"),
        ("[1]", r"line 7: found list, expected an object"),
        ('{"split": "train", "split": "test", "text": "a"}', r"line 7: .*a key stands twice"),
        ('{"task": "pets", "split": "trian", "text": "a"}', r"line 7: unknown split 'trian'\. Did you mean 'train'"),
        ('{"task": "pets", "text": "a"}', r"line 7: 'split' is None, expected text"),
        ('{"task": "pets", "split": "train", "text": 3}', r"line 7: 'text' is 3, expected text"),
        ('{"task": "pets", "split": "train", "text": "a", "label": -1}', r"line 7: 'label' is -1"),
        ('{"task": "pets", "split": "train", "text": "a", "label": true}', r"line 7: 'label' is True"),
        ('{"task": "pets", "split": "train", "text": "a", "label": 1.0}', r"line 7: 'label' is 1\.0"),
        ('{"task": "pets", "split": "train", "text": "a", "label_name": "b"}', r"line 7: there is a label_name, 'b'"),
        ('{"task": "pets", "split": "train", "text": "a"}', r"1 of the 7 texts of task 'pets' have no label"),
        (
            '{"task": "pets", "split": "train", "text": "a", "label": 1, "label_name": "b"}',
            r"label 1 .* 'dog' and also 'b'",
        ),
        (
            '{"task": "pets", "split": "train", "text": "a", "label": 3, "label_name": "dog"}',
            r"two labels .* called 'dog'",
        ),
        ('{"task": "pets", "split": "train", "text": "a", "label": 900}', r"7 labels of task 'pets' reach up to 900"),
    ],
)
def test_damaged_lines_are_refused_by_number(save, line, message):
    with pytest.raises(DataError, match=r"zoo\.jsonl.*" + message):
        open_source(save([*lines_of("pets", PETS), line], "zoo.jsonl"), "train", task="pets")


def test_other_refusals(pets, save, tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be opened \(No such file"):
        open_source(tmp_path / "none.jsonl", "train")
    (tmp_path / "cut.jsonl.gz").write_bytes(pets.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, line \d+: the packed file is damaged"):
        open_source(tmp_path / "cut.jsonl.gz", "train")
    (tmp_path / "raw.jsonl.gz").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"line 1: the packed file is damaged"):
        open_source(tmp_path / "raw.jsonl.gz", "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"split": "train", "text": "\xe9"}')
    with pytest.raises(DataError, match=r"line 1: not a JSON object in UTF-8"):
        open_source(tmp_path / "latin.jsonl", "train")
    with pytest.raises(DataError, match="there is no line in it"):
        open_source(save([""], "none.jsonl.gz"), "train")
    with pytest.raises(UnknownNameError, match=r"split of .* 'trian'.*Did you mean 'train'"):
        open_source(pets, "trian", task="pets")
    with pytest.raises(UnknownNameError, match=r"task of .* 'pet'\. Did you mean 'pets'.*moods, pets"):
        open_source(pets, "train", task="pet")
    with pytest.raises(DataError, match=r"holds 2 tasks, choose one: task=moods\|pets"):
        open_source(pets, "train")
    with pytest.raises(DataError, match="task 'moods' has no test texts"):
        open_source(pets, "test", task="moods")
    with pytest.raises(DataError, match=r"validation_fraction of 0\.0 of its 5 train texts leaves none for validation"):
        open_source(pets, "validation", task="moods", validation_fraction=0.0)
    with pytest.raises(UnknownNameError, match=r"kind of tokens 'word'.*Did you mean 'words'"):
        open_source(pets, "train", task="pets", tokens="word")
    with pytest.raises(UnknownNameError, match=r"option of data source '\.jsonl\.gz' 'window'"):
        open_source(pets, "train", task="pets", window=3)
    with pytest.raises(DataError, match="not both"):
        open_source(pets, "train", task="pets", windows=8, length=8)
    with pytest.raises(DataError, match="room for -1 words"):
        open_source(pets, "train", task="pets", vocab_size=10, num_hashed=8)
    with pytest.raises(DataError, match=r"tokenizer made 1 rows of 3 texts"):
        open_source(pets, "train", task="pets", tokenizer=lambda texts: [[1]])
    plain = save([json.dumps({"split": "train", "text": "a b c"})] * 9, "plain.jsonl")
    with pytest.raises(DataError, match=r"task 'plain' have no labels. For a language model give windows="):
        open_source(plain, "train")
    with pytest.raises(DataError, match=r"plain \(train\): the records have no labels"):
        read_labels(open_source(plain, "train", allow_unlabelled=True))


def test_a_sample_of_texts(pets):
    sample = sampling.make_sample(TEXT_MODEL, pets, task="pets", vocab_size=64, num_hashed=8, num_per_class=1)
    assert len(sample) == 3
    params = jax.eval_shape(lambda key: registry.init(key, TEXT_MODEL), jax.random.key(0))
    assert jax.eval_shape(sample.forward, params, sample.batch).shape == (3, 3)
    with pytest.raises(DataError, match=r"pets \(train\): token ids .* the vocabulary of the network has 64"):
        sampling.make_sample(TEXT_MODEL, pets, task="pets")
    with pytest.raises(DataError, match=r"pets \(train\): .*with L at most 32"):
        sampling.make_sample(TEXT_MODEL, pets, task="pets", vocab_size=64, num_hashed=8, length=40)
    hidden = encoder.Config(vocab_size=64, num_positions=32, width=16, depth=1, num_heads=2, mlp_width=16)
    with pytest.raises(DataError, match=r"pets \(train\): .*Give it a head for whole examples, or a pooler"):
        sampling.make_sample(hidden, pets, task="pets", vocab_size=64, num_hashed=8)
    with pytest.raises(ConfigError, match="options task are for a source that is opened here"):
        sampling.make_sample(TEXT_MODEL, open_source(pets, "train", task="pets"), task="pets")


def test_a_sample_for_a_language_model(pets):
    config = decoder.Config(
        vocab_size=259, width=16, depth=1, num_heads=2, num_kv_heads=1, head_width=8, mlp_width=16, num_positions=16
    )
    source = open_source(pets, "train", task="pets", tokens="bytes", windows=8)
    sample = sampling.make_text_sample(config, take_sample(source, 3))
    assert (len(sample), sample.name) == (3, "pets+sample(3) (train)")
    np.testing.assert_array_equal(sample.batch["label"], sample.batch["text"][:, 1:])
    with pytest.raises(DataError, match="the vocabulary of the network has 64"):
        sampling.make_text_sample(dataclasses.replace(config, vocab_size=64), source)
    for other in (TEXT_MODEL, dataclasses.replace(config, head="last", num_outputs=3)):
        with pytest.raises(ConfigError, match=f"head {other.head!r} does not predict the next token"):
            sampling.make_text_sample(other, source)
    with pytest.raises(DataError, match="these are images, and the network takes texts"):
        sampling.make_text_sample(config, open_source("digits", "test"))


def test_every_shared_file_opens():
    if not SHARED.is_dir():
        pytest.skip(f"the shared data sets are not at {SHARED}")
    source = open_source(SHARED / "clinc_domains.jsonl.gz", "validation", task="clinc_home")
    assert (len(source), len(source.class_names), source.num_cut) == (298, 15, 0)
    for name in ("snips", "banking77"):
        whole = {split: open_source(SHARED / f"{name}.jsonl.gz", split) for split in ("train", "validation", "test")}
        assert {tuple(source.class_names) for source in whole.values()} == {whole["train"].class_names}
        assert len(whole["validation"]) > 900
    plays = open_source(SHARED / "tiny_shakespeare.jsonl.gz", "validation", tokens="characters", windows=64)
    batch = all_of(plays)
    assert batch["mask"].sum() - len(plays) + 1 == 55756  # every character once, as its README counts them


def test_short_trainings_of_the_experiments_take_texts(pets, tmp_path):
    config = encoder.Config(
        vocab_size=64, num_positions=32, width=16, depth=1, num_heads=2, mlp_width=16, head="sequence",
        head_dense="tanh", num_outputs=8,
    )  # fmt: skip
    source = open_source(pets, "train", task="pets", vocab_size=64, num_hashed=8)
    start = jax.jit(registry.init, static_argnums=1)(jax.random.key(0), config)
    tuned = Networks(config, tmp_path / "networks").train("pets", lambda: start, source, Schedule(20, 0.003, 3), seed=0)
    sample = sampling.make_sample(config, source)
    loss = jax.jit(lambda params: example_losses(sample.forward(params, sample.batch), sample.batch).mean())
    losses = [float(loss(params)) for params in (start, tuned)]
    assert losses[1] < losses[0]
