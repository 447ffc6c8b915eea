"""Reading text: every format, the usual oddities of files, and one clear line for each bad source."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from bitnet.data.corpora import BUILTIN, Reading, list_files, open_corpus
from bitnet.data.streaming import open_streams, take_head
from bitnet.errors import UserError

TEXT = "One line.\r\nTwo \u00e9l\u00e8ve \U0001f600.\r\n<|endoftext|>\r\nSecond document.\r\n"
DOCUMENTS = ["One line.\nTwo \u00e9l\u00e8ve \U0001f600.", "Second document."]


def read(path: Path | str, **options: str) -> list[str]:
    return list(open_corpus(str(path), Reading(**options)))


def compress_zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    "name,compress",
    [
        ("a.txt", bytes),
        ("a.utf8", bytes),
        ("a.txt.gz", gzip.compress),
        ("a.txt.xz", lzma.compress),
        ("a.txt.zst", compress_zst),
    ],
)
def test_text_with_byte_order_mark_and_crlf(tmp_path, name, compress) -> None:
    (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf" + TEXT.encode()))
    assert read(tmp_path / name) == DOCUMENTS
    assert read(tmp_path) == DOCUMENTS
    assert read(f"{tmp_path}/*") == DOCUMENTS


def test_separator_is_configurable(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a\n---\nb\n---\n\n---\nc")
    assert read(tmp_path, separator="---") == ["a", "b", "c"]
    assert len(read(tmp_path, separator="")) == 1


def test_json_lines_and_parquet(tmp_path) -> None:
    records = [{"text": "first", "n": 1}, {"text": "  "}, {"text": "second\nline"}]
    lines = "\n".join(json.dumps(r) for r in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace('"text"', '"body"').encode()))
    assert read(tmp_path / "a.jsonl") == ["first", "second\nline"]
    assert read(tmp_path / "b.jsonl.gz", text_key="body") == ["first", "second\nline"]
    import datasets

    datasets.Dataset.from_list([{"text": "in a"}, {"text": "table"}]).to_parquet(tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet") == ["in a", "table"]
    datasets.Dataset.from_list([{"text": "in a"}, {"text": None}, {"text": ""}]).to_parquet(tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == ["in a"]
    datasets.Dataset.from_list([{"text": 3}]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(UserError, match="column 'text' holds no text but int"):
        read(tmp_path / "e.parquet")


def test_hugging_face_dataset_by_name(tmp_path) -> None:
    folder = tmp_path / "owner"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    assert read(f"hf:{folder}") == ["a", "b"]
    assert read(f"hf:{folder}", split="test") == ["c"]
    with pytest.raises(UserError, match=r"no column 'body' \(it has: text\)"):
        read(f"hf:{folder}", text_key="body")
    with pytest.raises(UserError, match="hf:nobody/nothing"):
        read("hf:nobody/nothing")


def test_records_that_are_no_texts_are_named(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "parts": ["b", "c"]}\n')
    with pytest.raises(UserError, match=r"column 'parts' holds no text but list; set data\.text_key"):
        read(f"hf:{tmp_path}", text_key="parts")
    streams = open_streams([f"hf:{tmp_path}"], Reading(text_key="parts"))
    with pytest.raises(UserError, match="column 'parts' holds no text but list"):
        take_head(streams[0], "hf:", "parts", 1, 1)


def test_a_pattern_that_is_none_is_named(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text")
    try:
        assert list_files(str(tmp_path / "**.txt"))  # Python 3.13 on
    except UserError as error:
        assert "write **/ for any folders" in str(error)


def test_folder_is_sorted_and_leaves_other_files_alone(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", "picture.png", "notes.csv"):
        (tmp_path / name).write_text(name)
    assert [f.name for f in list_files(str(tmp_path))] == ["a.txt", "b.txt", "c.md"]


BAD = {
    "empty.txt": (b"", "no text"),
    "blank.txt": (b" \n\n \n", "no text"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), "byte 3 is not UTF-8"),
    "nul.txt": (b"abc\x00def", "NUL"),
    "zip.txt": (bz2.compress(b"abc"), "not UTF-8"),
    "broken.txt.gz": (gzip.compress(b"abc" * 99)[:-9], "cannot be decompressed"),
    "broken.txt.xz": (b"not xz at all", "cannot be decompressed"),
    "broken.txt.zst": (b"not zstandard", "cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "half.jsonl": (b'{"text": "half a character: \\ud83d"}\n', "line 1 cannot be read ('utf-8' codec"),
    "long.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1 cannot be read (Exceeds the limit"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1 cannot be read (maximum recursion"),
    "other.jsonl": (b'{"body": "a"}\n', "line 1 has no text under 'text' (it has: body)"),
    "list.jsonl": (b"[1, 2]\n", "line 1 has no text"),
    "broken.parquet": (b"PAR1 nothing", "not a readable .parquet"),
}


def test_builtin_text_is_english_and_the_same_each_time() -> None:
    corpus = open_corpus(BUILTIN, Reading())
    documents = list(corpus)
    size = sum(len(d.encode()) for d in documents)
    assert 1_500_000 < size < 4_000_000 and len(documents) > 300
    assert sum(d.count(" the ") for d in documents) > 5_000
    assert corpus.fingerprint() == open_corpus(BUILTIN, Reading()).fingerprint()


def test_real_texts_load_as_they_are(shared_data) -> None:
    novel = read(shared_data / "100_english_novels" / "Doyle_Hound_1902.txt.xz")
    assert len(novel) == 1 and not novel[0].startswith("\ufeff") and "\r" not in novel[0]
    assert len(read(shared_data / "tinystories")) > 2_000
    assert len(read(shared_data / "calibration-mix" / "multilingual.utf8")) == 1
    assert len(read(shared_data / "eval" / "lambada_openai.jsonl", text_key="context")) == 5153
    assert len(list_files(str(shared_data / "100_english_novels"))) == 93
