"""Tokenizer, token folders and rows: nothing lost, nothing twice, nothing stale."""

import json
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers

from bitnet.data.corpora import Reading, open_corpus
from bitnet.data.datamodule import TokenDataModule
from bitnet.data.loader import make_batch
from bitnet.data.prepare import Splitting, _sample, prepare, split_single, validation_documents
from bitnet.data.tokenizer import EOS, find_eos, pieces, token_byte_lengths, train_tokenizer
from bitnet.data.tokens import UNSAID, validation_rows
from bitnet.errors import UserError
from bitnet.loss import IGNORE

from ..conftest import story_text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([story_text(20)], 400)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_and_byte_lengths_add_up(tokenizer, text) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    lengths = token_byte_lengths(tokenizer)
    eos = text.count(EOS)  # written out, the special token is one id and no bytes
    assert sum(lengths[i] for i in ids) == len(text.encode()) - eos * len(EOS)


def test_pre_tokenizer_is_gpt2s(tokenizer) -> None:
    """What llama.cpp calls "gpt-2": GPT-2's own split and byte alphabet, and nothing else."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    saved = json.loads(tokenizer.to_str())
    assert saved["pre_tokenizer"] == json.loads(reference.to_str())["pre_tokenizer"]
    assert saved["normalizer"] is None and saved["post_processor"] is None
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert tokenizer.token_to_id(EOS) == 0 == find_eos(tokenizer)


def test_training_is_deterministic_and_small_text_gives_a_smaller_vocabulary() -> None:
    a, b = (train_tokenizer([story_text(10)], 350) for _ in range(2))
    assert a.to_str() == b.to_str()
    assert 257 <= train_tokenizer(["abc"], 5000).get_vocab_size() < 300
    with pytest.raises(UserError, match="vocab_size = 256"):
        train_tokenizer(["abc"], 256)


@given(st.lists(st.sampled_from(["a", "bc ", "\n", " ", "\n\n", "d.", "\t"]), max_size=60))
@settings(max_examples=200, deadline=None)
def test_cutting_long_documents_changes_no_token(tokenizer, parts) -> None:
    text = "".join(parts)
    cut = list(pieces(text, size=4))
    assert "".join(cut) == text
    encode = lambda t: tokenizer.encode(t, add_special_tokens=False).ids  # noqa: E731
    assert [i for piece in cut for i in encode(piece)] == encode(text)


def test_token_folder_holds_every_document_once(stories, run_prepare) -> None:
    store = run_prepare(stories)
    documents = list(open_corpus(str(stories), Reading()))
    found = []
    for name in ("train-0", "val"):
        ids = store.ids(name)
        ends = np.flatnonzero(ids == store.eos_id)
        texts = [store.tokenizer.decode(part[part != store.eos_id].tolist()) for part in np.split(ids, ends + 1)[:-1]]
        totals = store.totals(name)
        assert totals.documents == len(texts) == len(ends) and ids[-1] == store.eos_id
        assert totals.text_bytes == sum(len(t.encode()) for t in texts)
        found += texts
    assert sorted(found) == sorted(documents)
    assert 1 <= store.totals("val").documents < 10
    counts = torch.bincount(torch.from_numpy(store.ids("val").astype(np.int64)), minlength=store.vocab_size)
    assert (counts * store.byte_lengths()).sum() == store.totals("val").text_bytes


def test_held_out_text_never_reaches_the_tokenizer(tmp_path, run_prepare) -> None:
    (tmp_path / "a.txt").write_text(story_text(40) + "\n<|endoftext|>\n" + "zqzqzqzq " * 400)
    store = run_prepare(tmp_path / "a.txt", val_split="last", val_fraction=0.1)
    assert not any("zq" in token for token in store.tokenizer.get_vocab())


def test_single_document_is_cut_at_its_end(tmp_path, run_prepare) -> None:
    text = "\n".join(f"line number {i}" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    store = run_prepare(tmp_path / "a.txt", val_fraction=0.2)
    train, val = (store.tokenizer.decode(store.ids(n)[:-1].tolist()) for n in ("train-0", "val"))
    assert train + val == text and val.startswith("line number")
    assert len(val) / len(text) == pytest.approx(0.2, abs=0.01)


def test_split_is_by_whole_documents() -> None:
    sizes = [100] * 50 + [1000]
    last = Splitting(val_fraction=0.1, val_split="last")
    assert validation_documents(sizes, last) == {50}
    assert validation_documents([100] * 50 + [5000], last) == set()  # half of the text: rather cut the ends
    one, other = (validation_documents(sizes, Splitting(val_fraction=0.02, seed=s)) for s in (1, 2))
    assert one != other and 0 < len(one) < 50
    assert validation_documents([10, 10], Splitting(val_fraction=0.99)) in ({0}, {1})
    for seed in range(6):
        assert validation_documents([100_000, 700], Splitting(seed=seed)) <= {1}  # the book is for training
        assert len(validation_documents([100_000, 700], Splitting(seed=seed), whole=True)) == 1


def test_documents_that_are_too_large_to_be_held_out_are_cut(tmp_path, run_prepare) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"line {i} of {name}" for i in range(400)))
    (tmp_path / "empty.txt").write_text("")
    store = run_prepare([str(tmp_path / f"{name}.txt") for name in ("a", "b", "empty")])
    shares = [store.totals(f"train-{i}").documents for i in range(3)]
    assert shares == [1, 1, 0] and store.totals("val").documents == 2 and len(store.ids("train-2")) == 0
    held = store.totals("val").text_bytes
    assert held / (held + sum(store.totals(f"train-{i}").text_bytes for i in range(2))) == pytest.approx(0.05, abs=0.01)


def test_a_cut_is_near_where_it_was_asked_for() -> None:
    text = "a" * 520 + "\n" + "b" * 480
    assert [len(part) for part in split_single(text, 0.05)] == [951, 50]
    text = "a" * 930 + "\n" + "b" * 69
    assert [len(part) for part in split_single(text, 0.05)] == [931, 69]


def test_a_sample_for_a_tokenizer_ends_inside_a_document() -> None:
    documents = [("train-0", "a" * 8), ("val", "b" * 8), ("train-0", "c" * 8), ("train-0", "d")]
    assert list(_sample(documents, limit=10)) == ["a" * 8, "c" * 2]


@pytest.mark.parametrize("kind", ["truncation", "padding"])
def test_a_given_tokenizer_neither_cuts_nor_fills(stories, tmp_path, run_prepare, kind) -> None:
    """As transformers saves them: its tokenizers remember what they were last asked to do."""
    plain = run_prepare(stories)
    tokenizer = Tokenizer.from_file(str(plain.folder / "tokenizer.json"))
    tokenizer.enable_truncation(8) if kind == "truncation" else tokenizer.enable_padding(length=999)
    tokenizer.save(str(tmp_path / "given.json"))
    store = run_prepare(stories, tokenizer=str(tmp_path / "given.json"))
    assert np.array_equal(store.ids("train-0"), plain.ids("train-0"))
    assert np.array_equal(store.ids("val"), plain.ids("val"))


def test_whoever_is_second_with_the_same_tokens_takes_those_of_the_first(stories, tmp_path) -> None:
    corpus, cache, first = open_corpus(str(stories), Reading()), tmp_path / "cache", []

    def make(progress=None):
        return prepare([corpus], [], Reading(), Splitting(), None, 300, None, cache, progress)

    def overtake(label: str, done: int, total: int) -> None:
        if label == "tokenizing" and not first:
            first.append(make())

    second = make(overtake)
    assert second.folder == first[0].folder
    assert [file.name for file in cache.iterdir()] == [second.folder.name], "nothing half-written beside it"


def test_cache_is_keyed_by_content_tokenizer_and_settings(tmp_path, run_prepare) -> None:
    file = tmp_path / "a.txt"
    file.write_text(story_text(30))
    first = run_prepare(file)
    moved = tmp_path / "b.txt"
    shutil.copy(file, moved)
    assert run_prepare(file).folder == first.folder == run_prepare(moved).folder
    data = TokenDataModule(str(moved), vocab_size=300, seq_len=16, batch_size=2, cache_dir=str(tmp_path / "cache"))
    assert data.prepare_tokens().folder == first.folder
    assert data.summary()["paths"] == [str(moved)]
    before = file.stat()
    file.write_text(story_text(30).replace("dog", "cat"))
    import os

    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time, other text
    changed = run_prepare(file)
    assert changed.folder != first.folder
    folders = {first.folder, changed.folder}
    for options in (
        {"vocab_size": 310},
        {"val_fraction": 0.3},
        {"seed": 5},
        {"separator": "\n"},
        {"val_path": str(moved)},
    ):
        store = run_prepare(file, **options)
        assert store.folder not in folders
        folders.add(store.folder)
    given_tokenizer = run_prepare(file, tokenizer=str(first.folder / "tokenizer.json"))
    assert given_tokenizer.folder not in folders
    assert given_tokenizer.tokenizer.to_str() == first.tokenizer.to_str()


def test_interrupted_preparation_leaves_nothing_to_be_found(stories, tmp_path, run_prepare, monkeypatch) -> None:
    import bitnet.data.prepare as preparation

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        preparation.json, "dumps", lambda *a, real=json.dumps, **k: fail() if "indent" in k else real(*a, **k)
    )
    with pytest.raises(KeyboardInterrupt):
        run_prepare(stories)
    assert list((tmp_path / "cache").iterdir()) == []


def test_prepared_folder_is_taken_as_it_is_and_damage_is_noticed(stories, tmp_path, run_prepare) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(run_prepare(stories).folder, folder)
    store = run_prepare(folder)
    assert store.folder == folder and store.totals("train-0").documents > 30
    for option, value in (("val_path", str(stories)), ("chat_template", "plain")):
        with pytest.raises(UserError, match=f"data.{option}: .* is a prepared token folder, which has this"):
            run_prepare(folder, **{option: value})
    with pytest.raises(UserError, match="weights has 2 numbers for 1 paths"):
        run_prepare(folder, weights=[1.0, 2.0])
    with (folder / "val.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"val\.bin: missing or not of"):
        run_prepare(folder).ids("val")


@pytest.mark.parametrize("content", ["[1, 2]", '{"title": "of a corpus"}'])
def test_another_meta_json_is_a_file_among_texts(content, stories, tmp_path, run_prepare) -> None:
    shutil.copy(stories, tmp_path / "a.txt")
    (tmp_path / "meta.json").write_text(content)
    assert run_prepare(tmp_path).totals("train-0").documents > 30
    (tmp_path / "meta.json").write_text('{"format": ')
    with pytest.raises(UserError, match="not a token folder"):
        run_prepare(tmp_path)


def test_rows_predict_every_id_once() -> None:
    for n in (2, 5, 9, 10, 17):
        ids = np.arange(100, 100 + n)
        rows = list(validation_rows(ids, 4))
        targets = torch.cat([row[1:] for row in rows])
        assert targets[targets != IGNORE].tolist() == ids[1:].tolist()


def test_document_ids() -> None:
    rows = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 0]])
    assert "document_ids" not in make_batch(rows)
    assert make_batch(rows, 0)["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    rows[0, 4] += UNSAID  # behind a conversation; the others end answers
    batch = make_batch(rows, UNSAID)
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert batch["inputs"].tolist() == [[5, 6, 0, 7, 0, 0, 8]]
