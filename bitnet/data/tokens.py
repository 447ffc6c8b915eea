"""Token ids on disk: prepared once (``prepare.py``), then memory-mapped.

A token folder holds ``tokenizer.json``, ``meta.json``, ``val.bin`` and one ``train-<i>.bin`` per source: little-endian
uint16 ids (uint32 above 65,536 tokens), documents one after another, each followed by the end-of-text id.

A *row* is ``seq_len + 1`` consecutive ids; row i starts at ``i * seq_len``, so each id is predicted once.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.data.tokenizer import load_tokenizer, token_byte_lengths
from bitnet.errors import UserError
from bitnet.loss import IGNORE

FORMAT = "bitnet-tokens-1"
UNSAID = 1 << 24
"""Added to the ids of what a model reads and is not taught to say: all of a conversation but the answers."""

LOOKED_AT = 1 << 24
"""Ids of a file that are compared with the vocabulary before a run begins; more would keep it waiting."""


def file_digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What went into one .bin file."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents, separators not counted."""

    def with_document(self, tokens: int, text: str) -> "Totals":
        """These and one document more."""
        return Totals(
            documents=self.documents + 1,
            tokens=self.tokens + tokens,
            text_bytes=self.text_bytes + len(text.encode()),
        )


class TokenStore:
    """A token folder that has been prepared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        self.tokenizer = load_tokenizer(folder)
        self.eos_id: int = self.meta["eos_id"]
        self._dtype = np.dtype(self.meta["dtype"])
        self._check_tokenizer()
        for name in ("val", *(f"train-{i}" for i in range(self.sources))):
            self.ids(name)

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer other than the one that made the ids, and ids that no row of the embedding stands for."""
        file = self.folder / "tokenizer.json"
        there, made = self.vocab_size, self.meta.get("vocab_size")
        changed = self.meta.get("tokenizer_sha256") not in (None, file_digest(file))
        if changed or there != made:
            raise UserError(f"{file}: not the tokenizer that made these ids; put it back, or prepare the text again.")
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= there:
            raise UserError(f"{file}: has the id {largest} and {there} tokens; ids must run from 0 without gaps.")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def separator(self) -> int:
        """The id behind each document. Conversations have the same one behind answers, too, which the model says."""
        return self.eos_id + UNSAID if self.chat_template is not None else self.eos_id

    @property
    def chat_template(self) -> str | None:
        """Jinja text, where the documents are conversations."""
        template: str | None = self.meta["settings"].get("reading", {}).get("chat_template")
        return template

    @property
    def sources(self) -> int:
        return len(self.meta["train"])

    def totals(self, name: str) -> Totals:
        """``name`` is ``val`` or ``train-<i>``."""
        if name == "val":
            return Totals(**self.meta["val"])
        return Totals(**self.meta["train"][int(name.removeprefix("train-"))])

    def ids(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Memory-mapped ids of ``val`` or ``train-<i>``."""
        file = self.folder / f"{name}.bin"
        expected = self.totals(name).tokens * self._dtype.itemsize
        if expected and not (file.is_file() and file.stat().st_size == expected):
            raise UserError(f"{file}: missing or not of {expected} bytes; delete {self.folder} to prepare it again.")
        ids = np.memmap(file, dtype=self._dtype, mode="r") if expected else np.zeros(0, self._dtype)
        head = ids[:LOOKED_AT]
        largest = int((head if self._dtype.itemsize < 4 else head % UNSAID).max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(
                f"{file}: has the id {largest}, and the tokenizer {self.vocab_size} tokens; prepare the text again."
            )
        return ids

    def bytes_per_token(self) -> float:
        """Bytes of text per token over the training set, end-of-text tokens counted as tokens."""
        totals = [self.totals(f"train-{i}") for i in range(self.sources)]
        return sum(t.text_bytes for t in totals) / sum(t.tokens for t in totals)

    def byte_lengths(self) -> Tensor:
        """Float32 (V,): bytes of text that each id stands for, corrected to add up over the validation set."""
        lengths = torch.tensor(token_byte_lengths(self.tokenizer), dtype=torch.float32)
        counts = torch.from_numpy(np.bincount(self.ids("val").astype(np.int64) % UNSAID, minlength=self.vocab_size))
        total = float((counts.double() * lengths.double()).sum())
        return lengths * (self.totals("val").text_bytes / total) if total else lengths


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a token folder (meta.json cannot be read).") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder}: token folder of format {meta.get('format')}; this version reads {FORMAT}.")
    return meta  # type: ignore[no-any-return]


def is_token_folder(path: str) -> bool:
    """Whether there is a meta.json of ours, or one that nobody can read; any other is a file among texts."""
    file = Path(path).expanduser() / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return file.is_file()
    return isinstance(meta, dict) and "format" in meta


def validation_rows(ids: np.ndarray[Any, np.dtype[Any]], seq_len: int) -> Iterator[Tensor]:
    """All rows of ``ids`` as int64 (seq_len + 1,), the last one padded with ``IGNORE``: each id but the first is a
    target exactly once.
    """
    for start in range(0, max(len(ids) - 1, 0), seq_len):
        row = torch.full((seq_len + 1,), IGNORE, dtype=torch.int64)
        part = torch.from_numpy(ids[start : start + seq_len + 1].astype(np.int64))
        row[: len(part)] = part
        yield row
