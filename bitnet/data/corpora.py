"""Where text comes from: files, folders and globs, Hugging Face datasets, and the English that ships with Python.

A *document* is a text file, a part of one between separators, a line of a .jsonl file, or a row of a table. Documents
are read one file at a time, so that a corpus need not fit into memory.
"""

import ast
import gzip
import hashlib
import importlib.util
import json
import lzma
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet.chat_template import ChatText, conversation
from bitnet.errors import UserError

TEXT_SUFFIXES = (".txt", ".utf8", ".text", ".md")
TABLE_SUFFIXES = (".jsonl", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
BUILTIN = "builtin:python"
HUGGING_FACE = "hf:"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are taken out of files and tables."""

    separator: str = "<|endoftext|>"
    """Text between two of these is one document; an empty string leaves text files whole."""
    text_key: str = "text"
    """Key of the text in .jsonl and .parquet files and in datasets."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    chat_template: str | None = None
    """Jinja text: then .jsonl files hold conversations under ``messages``."""
    special_tokens: tuple[tuple[str, str], ...] = ()
    """Names that the template may use, such as ``("eos_token", "</s>")``."""


def _plain_suffix(path: Path) -> str:
    """``.txt`` of ``a.txt.xz``."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def list_files(path: str) -> list[Path]:
    """The text files meant by a file name, a folder (searched through) or a glob, in sorted order."""
    target = Path(path).expanduser()
    known = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    if target.is_file():
        return [target]
    if target.is_dir():
        files = sorted(p for p in target.rglob("*") if p.is_file() and _plain_suffix(p) in known)
        if not files:
            kinds = ", ".join(known)
            raise UserError(f"{path}: the folder has no text files ({kinds}, plain or .gz, .xz, .zst).")
        return files
    if any(c in path for c in "*?["):
        anchor = Path(target.anchor or ".")
        pattern = str(target.relative_to(anchor)) if target.is_absolute() else str(target)
        try:
            files = sorted(p for p in anchor.glob(pattern) if p.is_file())
        except ValueError as error:  # before Python 3.13
            raise UserError(f"{path}: no pattern ({error}); write **/ for any folders, as in **/*.txt.") from error
        if not files:
            raise UserError(f"{path}: no file matches this pattern.")
        return files
    raise UserError(f"{path}: no such file or folder (a Hugging Face dataset is written hf:NAME).")


def read_bytes(path: Path) -> bytes:
    """Content of a file, decompressed by its suffix."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if suffix == ".zst":
            import zstandard

            with path.open("rb") as file:
                return zstandard.ZstdDecompressor().stream_reader(file).read()
        return path.read_bytes()
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it.") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}).") from error
    except Exception as error:  # zstandard's own error class is known only once it is imported
        raise UserError(f"{path}: cannot be read ({error}).") from error


def decode(content: bytes, path: Path) -> str:
    """UTF-8 text with an optional byte-order mark; CRLF becomes LF. Refuses other encodings and binary files."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8).")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file or remove it.") from error
    if "\0" in text:
        raise UserError(f"{path}: holds NUL bytes, so it is not a text file.")
    return text.replace("\r\n", "\n")


def _json(line: str, path: Path, number: int) -> Any:
    r"""One line of a .jsonl file. ``\ud800`` alone is JSON, and half of a character: no UTF-8 can say it."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, lists in lists in lists
        raise UserError(f"{path}: line {number} cannot be read ({str(error).split(';')[0]}).") from error
    return record


def _json_lines(text: str, path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _json(line, path, number)
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}: line {number} has no text under '{key}' (it has: {keys}); set data.text_key.")
        yield record[key]


def _conversations(text: str, path: Path, template: str, special_tokens: dict[str, str]) -> Iterator[ChatText]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _json(line, path, number)
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object.")
        try:
            yield conversation(record.get("messages"), template, special_tokens)
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}.") from error


def _parquet_rows(path: Path, key: str) -> Iterator[str]:
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for record in table:
            if key not in record:
                raise UserError(f"{path}: has no column '{key}' (it has: {', '.join(record)}); set data.text_key.")
            if text := text_of(record, key, str(path)):
                yield text
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable .parquet file ({type(error).__name__}).") from error


def read_documents(path: Path, reading: Reading) -> Iterator[str]:
    """The non-blank documents of one file."""
    suffix = _plain_suffix(path)
    if suffix == ".parquet":
        documents: Iterable[str] = _parquet_rows(path, reading.text_key)
    else:
        text = decode(read_bytes(path), path)
        if reading.chat_template is not None:
            if suffix != ".jsonl":
                raise UserError(f"{path}: data.chat_template is for .jsonl files with 'messages'.")
            documents = _conversations(text, path, reading.chat_template, dict(reading.special_tokens))
        elif suffix == ".jsonl":
            documents = _json_lines(text, path, reading.text_key)
        else:
            documents = (d.strip("\n") for d in text.split(reading.separator)) if reading.separator else [text]
    for document in documents:
        if document.strip():
            yield document


def load_hugging_face(name: str, reading: Reading, streaming: bool) -> Any:
    """A dataset named ``hf:owner/name`` (or ``hf:folder``): the only place that may use the network."""
    import datasets

    name = name.removeprefix(HUGGING_FACE)
    try:
        dataset = datasets.load_dataset(name, reading.subset, split=reading.split, streaming=streaming)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"hf:{name}: the dataset cannot be loaded ({reason}).") from error
    columns = dataset.column_names or list(next(iter(dataset)))
    if reading.text_key not in columns:
        raise UserError(f"hf:{name}: no column '{reading.text_key}' (it has: {', '.join(columns)}); set data.text_key.")
    return dataset.select_columns([reading.text_key])


def text_of(record: dict[str, Any], key: str, path: str) -> str:
    """The text of a record of a dataset, empty where it has none."""
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{path}: column '{key}' holds no text but {type(text).__name__}; set data.text_key.")
    return text or ""


class Corpus:
    """The documents at one ``path``: re-iterable, in a fixed order, with a fingerprint of their content."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self._dataset = load_hugging_face(path, reading, streaming=False) if path.startswith(HUGGING_FACE) else None
        self.files = [] if self._dataset is not None else list_files(path)

    def __iter__(self) -> Iterator[str]:
        if self._dataset is not None:
            texts = (text_of(record, self.reading.text_key, self.path) for record in self._dataset)
            yield from (text for text in texts if text.strip())
        else:
            for file in self.files:
                yield from read_documents(file, self.reading)

    def fingerprint(self) -> str:
        """sha256 over the content: the bytes of the files, or the dataset's own fingerprint."""
        digest = hashlib.sha256()
        if self._dataset is not None:
            digest.update(str(self._dataset._fingerprint).encode())
        else:
            for file in self.files:
                try:
                    with file.open("rb") as handle:
                        digest.update(hashlib.file_digest(handle, "sha256").digest())
                except OSError as error:
                    raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
                digest.update(_plain_suffix(file).encode())
        return digest.hexdigest()


class DocumentList:
    """Documents that are already in memory, with the interface of ``Corpus``."""

    def __init__(self, path: str, documents: list[str]) -> None:
        self.path, self.documents = path, documents

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()


def open_corpus(path: str, reading: Reading) -> "Corpus | DocumentList":
    return DocumentList(path, list(builtin_documents())) if path == BUILTIN else Corpus(path, reading)


def builtin_documents() -> Iterator[str]:
    """English that is on every machine with Python: the Language Reference, and the standard library's docstrings.

    About 2.3 MB. Sources are parsed, never imported or run. The exact text depends on the Python version.
    """
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is not None and spec.origin:
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                for value in node.values:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
                        yield value.value.strip("\n")
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(p in ("site-packages", "test", "tests", "__pycache__", "pydoc_data", "idlelib") for p in parts):
            continue
        if document := _docstrings(file):
            yield document


def _docstrings(file: Path) -> str:
    """All docstrings of a source file, in order, separated by blank lines; empty when there are none to speak of."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""
    nodes = (
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    ordered = sorted(nodes, key=lambda n: getattr(n, "lineno", 0))
    texts = [text for n in ordered if (text := ast.get_docstring(n)) and len(text) > 40]
    return "\n\n".join(texts)


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))
