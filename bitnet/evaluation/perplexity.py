"""Score a trained model on held-out text: loss, perplexity, bits per byte."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from bitnet.data.corpora import Reading, open_corpus
from bitnet.data.loader import EvalLoader
from bitnet.data.tokenizer import find_eos, pieces, token_byte_lengths
from bitnet.errors import UserError
from bitnet.loss import Score, score_batch
from bitnet.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The score of a text, and what it was."""

    score: Score
    documents: int
    text_bytes: int


@torch.inference_mode()
def evaluate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    path: str,
    reading: Reading,
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every token but the first of the text at ``path``, in rows of ``seq_len`` (default: the model's context).

    Bytes are those of the documents as read, minus those of the very first token, which nothing predicts.
    Raises ``UserError`` for text that is missing or too short, or a ``seq_len`` beyond the model's.
    """
    seq_len = seq_len or model.config.max_seq_len
    if not 1 <= seq_len <= model.config.max_seq_len:
        raise UserError(f"seq_len = {seq_len}: the model's context holds {model.config.max_seq_len} tokens.")
    eos_id = find_eos(tokenizer)
    ids: list[int] = []
    documents = text_bytes = 0
    for document in open_corpus(path, reading):
        ids.extend(i for piece in pieces(document) for i in tokenizer.encode(piece, add_special_tokens=False).ids)
        ids.append(eos_id)
        documents, text_bytes = documents + 1, text_bytes + len(document.encode())
    if len(ids) < 3:
        raise UserError(f"{path}: no text to evaluate.")
    lengths = torch.tensor(token_byte_lengths(tokenizer), dtype=torch.float32)
    loader = EvalLoader(np.asarray(ids), seq_len, batch_size)
    total = Score()
    for number, batch in enumerate(loader, start=1):
        total += score_batch(model, batch, lengths)
        if progress:
            progress(number, len(loader))
    exact = Score(total.nats, total.tokens, text_bytes - float(lengths[ids[0]]))
    return Evaluation(score=exact, documents=documents, text_bytes=text_bytes)
