"""The score of a text document by document, and how sure a mean over documents is.

Every document is read alone, behind the token that ends or begins a text, in pieces of the model's context. Confidence
intervals are those of the bootstrap over documents (Efron 1979): the ratio of summed nats to summed bytes, resampled.
For two models the same documents are drawn for both, so that what makes a document hard cancels out.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.data.corpora import Reading, open_corpus
from bitnet.data.loader import make_batch
from bitnet.data.tokenizer import begin_id, encode_document
from bitnet.errors import NO_NUMBERS, UserError
from bitnet.loss import IGNORE, token_nats
from bitnet.model import Transformer

RESAMPLES = 2000
FEWEST = 10
"""Documents below which a text is cut into pieces that count as documents."""


@dataclass(frozen=True)
class Document:
    """Token ids with the end-of-text token behind them, and the bytes that they stand for."""

    ids: list[int]
    text_bytes: int


@dataclass(frozen=True)
class Scores:
    """Of every document: nats, predicted tokens and bytes."""

    nats: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / self.text_bytes.sum() / math.log(2))

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nats.sum() / self.tokens.sum()))

    def interval(self, minus: "Scores | None" = None, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Confidence interval of the bits per byte, or of their difference from those of ``minus``."""
        nats = self.nats if minus is None else self.nats - minus.nats
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(nats), size=(RESAMPLES, len(nats)))
        ratios = nats[drawn].sum(1) / self.text_bytes[drawn].sum(1) / math.log(2)
        low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def read_documents(tokenizer: Tokenizer, eos_id: int, path: str, reading: Reading, limit: int | None) -> list[Document]:
    """The first ``limit`` documents at ``path``. Raises ``UserError`` when there is nothing to read."""
    texts: list[str] = []
    for text in open_corpus(path, reading):
        texts.append(text)
        if limit is not None and len(texts) >= limit:
            break
    if len(texts) < FEWEST:  # one book: its parts vary as documents do
        texts = [part for text in texts for part in _parts(text, max(1000, len(text) // 50))]
    found = []
    for text in texts:
        if ids := encode_document(tokenizer, text):
            found.append(Document([*ids, eos_id], len(text.encode())))
    if len(found) < 2:
        raise UserError(f"{path}: too little text to compare models on.")
    return found


def _parts(text: str, size: int) -> Iterator[str]:
    """Parts of at least ``size`` characters, but for the last, which end where a line does."""
    start = 0
    for end in re.finditer("\n", text):
        if end.end() - start >= size:
            yield text[start : end.end()]
            start = end.end()
    if start < len(text):
        yield text[start:]


def _rows(documents: Sequence[Document], first: int, seq_len: int) -> Iterator[tuple[int, Tensor]]:
    """``(number of the document, ids int64 (seq_len + 1,))``, padded; each token of a document is a target once."""
    for number, document in enumerate(documents):
        ids = [first, *document.ids]
        for start in range(0, len(ids) - 1, seq_len):
            row = torch.full((seq_len + 1,), IGNORE, dtype=torch.int64)
            part = torch.tensor(ids[start : start + seq_len + 1])
            row[: len(part)] = part
            yield number, row


@torch.inference_mode()
def score_documents(
    model: Transformer,
    tokenizer: Tokenizer,
    eos_id: int,
    documents: Sequence[Document],
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every document; pieces of about the same length go together, so that little is padding. Raises
    ``UserError`` for logits that are no numbers."""
    context = min(seq_len or model.config.max_seq_len, model.config.max_seq_len)
    rows = sorted(_rows(documents, begin_id(tokenizer, eos_id), context), key=lambda r: int((r[1] >= 0).sum()))
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        longest = int((part[-1][1] >= 0).sum())
        batch = make_batch(torch.stack([row[:longest] for _, row in part]))
        found = token_nats(model, batch).view(len(part), -1).double().sum(1).tolist()
        counted = (batch["targets"] != IGNORE).sum(1).tolist()
        for (number, _), n, t in zip(part, found, counted, strict=True):
            nats[number] += n
            tokens[number] += t
        if progress:
            progress(min(at + batch_size, len(rows)), len(rows))
    if not np.isfinite(nats).all():
        raise UserError(NO_NUMBERS)
    return Scores(nats, tokens, np.asarray([d.text_bytes for d in documents], dtype=np.float64))
