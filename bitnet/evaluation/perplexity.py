"""Score a trained model on held-out text: loss, perplexity, bits per byte."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from bitnet.data.corpora import Reading, open_corpus
from bitnet.data.loader import make_batch
from bitnet.data.tokenizer import encode_document, find_eos, first_id, token_byte_lengths
from bitnet.errors import NO_NUMBERS, UserError
from bitnet.loss import IGNORE, Score, score_batch
from bitnet.model import Transformer

Ids = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of a text, and what it was."""

    score: Score
    documents: int
    text_bytes: int


def windows(ids: Ids, seq_len: int, stride: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of windows of ``seq_len`` tokens that begin ``stride`` apart, each id but the first being a target
    once: all targets of the first window count, and of every other one those beyond the window before it.
    """
    starts = range(0, max(1, len(ids) - 1 - (seq_len - stride)), stride)
    for at in range(0, len(starts), batch_size):
        rows = torch.full((len(starts[at : at + batch_size]), seq_len + 1), IGNORE, dtype=torch.int64)
        for row, start in zip(rows, starts[at : at + batch_size], strict=True):
            part = torch.from_numpy(ids[start : start + seq_len + 1].astype(np.int64))
            row[: len(part)] = part
        batch = make_batch(rows)
        seen = seq_len - stride
        batch["targets"][1 if at == 0 else 0 :, :seen] = IGNORE
        yield batch


@torch.inference_mode()
def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    path: str,
    reading: Reading,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    eos_id: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every token but the first of the text at ``path``, in windows of ``seq_len`` (default: the context).

    Windows begin ``stride`` tokens apart (default ``seq_len``: they do not overlap); a smaller stride gives each token
    more context and costs seq_len / stride times as much. With ``limit`` only the first windows are scored.
    Bytes are those of the documents as read, minus those of the very first token, which nothing predicts.
    Raises ``UserError`` for text that is missing or too short, a ``seq_len`` beyond the model's, or logits that are no
    numbers.
    """
    seq_len = model.config.max_seq_len if seq_len is None else seq_len
    if not 1 <= seq_len <= model.config.max_seq_len:
        raise UserError(f"seq_len = {seq_len}: the model's context holds {model.config.max_seq_len} tokens.")
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride = {stride}: must be between 1 and seq_len = {seq_len}.")
    if limit is not None and limit < 1:
        raise UserError(f"limit = {limit}: must be at least 1.")
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: must be at least 1.")
    eos_id = find_eos(tokenizer) if eos_id is None else eos_id
    begins = first_id(tokenizer)
    found: list[int] = [] if begins is None else [begins]
    documents = text_bytes = 0
    for document in open_corpus(path, reading):
        found += [*encode_document(tokenizer, document), eos_id]
        documents, text_bytes = documents + 1, text_bytes + len(document.encode())
        if limit is not None and len(found) > seq_len + 1 + (limit - 1) * stride:
            break
    if len(found) < 3:
        raise UserError(f"{path}: no text to evaluate.")
    ids = np.asarray(found[: None if limit is None else seq_len + 1 + (limit - 1) * stride])
    lengths = torch.tensor(token_byte_lengths(tokenizer), dtype=torch.float32)
    lengths = F.pad(lengths, (0, max(0, model.config.vocab_size - len(lengths))))
    first_bytes = float(lengths[ids[0]])
    batches = -(-len(range(0, max(1, len(ids) - 1 - (seq_len - stride)), stride)) // batch_size)
    total, device = Score(), model.norm.weight.device
    lengths = lengths.to(device)
    for number, batch in enumerate(windows(ids, seq_len, stride, batch_size), start=1):
        total += score_batch(model, {key: value.to(device) for key, value in batch.items()}, lengths)
        if progress:
            progress(number, batches)
    if not math.isfinite(total.nats):
        raise UserError(NO_NUMBERS)
    scored = total.text_bytes if limit is not None else text_bytes - first_bytes
    return Evaluation(score=Score(total.nats, total.tokens, scored), documents=documents, text_bytes=text_bytes)
