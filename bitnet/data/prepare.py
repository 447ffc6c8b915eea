"""From corpora to a token folder: hold text out, train a tokenizer, tokenize in parallel, once for each content.

The folder is named after a hash of all that decides its content, and appears under that name only when it is complete:
a folder that exists can be used, and cannot be stale.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from bitnet.chat_template import ChatText
from bitnet.data.corpora import Corpus, DocumentList, Reading
from bitnet.data.token_folder import complete_or_absent, describe, dtype_of_ids
from bitnet.data.tokenizer import find_eos, load_tokenizer, pieces, train_tokenizer
from bitnet.data.tokens import FORMAT, UNSAID, TokenStore, Totals
from bitnet.errors import UserError

BATCH_BYTES = 4 << 20
LARGEST_SHARE = 4
"""A document of more than so many times what is to be held out is not held out whole."""
TOKENIZER_BYTES = 64 << 20
"""Text from which a tokenizer is trained, at most."""

Progress = Callable[[str, int, int], None]
"""Called with a label, bytes done and bytes in total."""


AnyCorpus = Corpus | DocumentList


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """Which documents are held out for validation."""

    val_fraction: float = 0.05
    """Fraction of the text that is held out."""
    val_split: str = "random"
    """random: whole documents drawn with the seed; last: the end of the text."""
    seed: int = 0


def validation_documents(sizes: list[int], splitting: Splitting, whole: bool = False) -> set[int]:
    """Indices of the documents to hold out, about ``val_fraction`` of the bytes and never all.

    None of more than ``LARGEST_SHARE`` times that, unless they must stay ``whole``: a book beside a note is not left
    out of the training. Where no other is found, the set is empty.
    """
    order = list(range(len(sizes)))
    if splitting.val_split == "random":
        random.Random(splitting.seed).shuffle(order)
    else:
        order.reverse()
    wanted, chosen, held = splitting.val_fraction * sum(sizes), set[int](), 0
    for index in order[: len(order) - 1]:
        if not whole and sizes[index] > LARGEST_SHARE * wanted:
            if splitting.val_split == "last":
                break
            continue
        if chosen and held + sizes[index] / 2 > wanted:
            break
        chosen.add(index)
        held += sizes[index]
    return chosen


def split_single(document: str, fraction: float) -> tuple[str, str]:
    """Cut one document into its beginning and its end, at a line break where there is one near."""
    cut = max(1, min(len(document) - 1, round(len(document) * (1 - fraction))))
    line = document.rfind("\n", 0, cut) + 1
    cut = line if 0 < cut - line <= len(document) - cut < line else cut
    return document[:cut], document[cut:]


def _documents(corpora: list[AnyCorpus], held: set[int], cut: float | None) -> Iterator[tuple[str, str]]:
    """``(name of the .bin file, document)`` for all documents, in order.

    ``held`` are the indices of those to validate on; ``cut`` is the fraction to cut off the end of each document.
    """
    index = 0
    for i, corpus in enumerate(corpora):
        for document in corpus:
            if cut is not None:
                begin, end = split_single(document, cut)
                yield f"train-{i}", begin
                yield "val", end
            else:
                yield ("val" if index in held else f"train-{i}"), document
            index += 1


def _pieces(document: str) -> list[tuple[str, bool]]:
    """What is tokenized by itself, with whether the model is taught to say it."""
    if isinstance(document, ChatText):
        return list(document.parts)
    return [(piece, True) for piece in pieces(document)]


class _Writer:
    """Tokenizes documents in parallel batches and appends their ids to the .bin files."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, eos_id: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.tokenizer, self.eos_id, self.dtype = folder, tokenizer, eos_id, dtype
        self.totals: dict[str, Totals] = {}
        self._pending: list[tuple[str, str]] = []
        self._pending_bytes = 0

    def add(self, name: str, document: str) -> None:
        self._pending.append((name, document))
        self._pending_bytes += len(document)
        if self._pending_bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        parts = [_pieces(document) for _, document in self._pending]
        flat = [piece for part in parts for piece, _ in part]
        encoded = iter(self.tokenizer.encode_batch(flat, add_special_tokens=False))
        for (name, document), part in zip(self._pending, parts, strict=True):
            ids = [i if said else i + UNSAID for _, said in part for i in next(encoded).ids]
            # A conversation ends as its template says; what divides it from the next is not the model's to say
            # (``TokenStore.separator``).
            ids.append(self.eos_id + UNSAID if isinstance(document, ChatText) else self.eos_id)
            with (self.folder / f"{name}.bin").open("ab") as file:
                file.write(np.asarray(ids, dtype=self.dtype).tobytes())
            self.totals[name] = self.totals.get(name, Totals()).with_document(len(ids), document)
        self._pending, self._pending_bytes = [], 0


def _tokenize(
    folder: Path,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    eos_id: int,
    dtype: np.dtype[Any],
    report: Callable[[int], None],
) -> dict[str, Totals]:
    """Write the .bin files of ``documents``, each with the name of its file; what went into each file, by its name."""
    writer, done = _Writer(folder, tokenizer, eos_id, dtype), 0
    for name, document in documents:
        writer.add(name, document)
        done += len(document.encode())
        report(done)
    writer.flush()
    return writer.totals


def _sample(documents: Iterable[tuple[str, str]], limit: int = TOKENIZER_BYTES) -> Iterator[str]:
    """Training documents up to ``limit`` characters: the tokenizer never sees what is held out."""
    used = 0
    for name, document in documents:
        if used >= limit:
            return
        if name != "val":
            yield document[: limit - used]
            used += len(document)


def prepare(
    train: list[AnyCorpus],
    val: list[AnyCorpus],
    reading: Reading,
    splitting: Splitting,
    tokenizer_path: str | None,
    vocab_size: int,
    eos_token: str | None,
    cache_dir: Path,
    progress: Progress | None = None,
) -> TokenStore:
    """The token folder for these corpora and settings: from the cache when it is there, else made now.

    Without ``val`` corpora, ``splitting`` decides what is held out of ``train``.
    """
    report = progress or (lambda label, done, total: None)
    report("reading text", 0, 0)
    given = load_tokenizer(tokenizer_path) if tokenizer_path else None
    if given is not None:
        given.post_processor = None  # documents are divided by one end-of-text token, and nothing else is added
    settings = {
        "format": FORMAT,
        "rules": 2,  # raised when the same text and settings make other tokens
        "sources": [c.fingerprint() for c in train],
        "val_sources": [c.fingerprint() for c in val],
        "reading": asdict(reading),
        "splitting": None if val else asdict(splitting),
        "tokenizer": hashlib.sha256(given.to_str().encode()).hexdigest() if given else f"bpe-{vocab_size}",
        "eos_token": eos_token,
        "tokenizers": tokenizers.__version__,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_dir / key
    if folder.is_dir():
        report("tokens from the cache", 1, 1)
        return TokenStore(folder)

    sizes = [len(d.encode()) for corpus in train for d in corpus]
    if not sizes:
        raise UserError(f"{', '.join(c.path for c in train)}: no text in it.")
    are_conversations = reading.chat_template is not None
    held = set[int]() if val else validation_documents(sizes, splitting, whole=are_conversations)
    cut = None if val or held else splitting.val_fraction
    if cut is not None and are_conversations:
        raise UserError(f"{train[0].path}: one conversation cannot be divided; give more, or data.val_path.")
    total = sum(sizes) + sum(len(d.encode()) for corpus in val for d in corpus)

    def documents() -> Iterator[tuple[str, str]]:
        yield from _documents(train, held, cut)
        yield from (("val", d) for corpus in val for d in corpus)

    if given is None:
        report("training the tokenizer", 0, 0)
    tokenizer = given or train_tokenizer(_sample(documents()), vocab_size)
    eos_id = find_eos(tokenizer, eos_token)
    dtype = np.dtype("<u4") if are_conversations else dtype_of_ids(tokenizer)  # room for ``UNSAID``
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        with complete_or_absent(folder) as partial:
            totals = _tokenize(partial, documents(), tokenizer, eos_id, dtype, lambda d: report("tokenizing", d, total))
            if "val" not in totals:
                where = ", ".join(c.path for c in val or train)
                raise UserError(f"{where}: no text to validate on; give data.val_path.")
            describe(
                partial, tokenizer, dtype=dtype, eos_id=eos_id,
                train=[totals.get(f"train-{i}", Totals()) for i in range(len(train))], val=totals["val"],
                paths=[c.path for c in train], val_paths=[c.path for c in val], settings=settings,
            )  # fmt: skip
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster with the same content
            raise
    return TokenStore(folder)
