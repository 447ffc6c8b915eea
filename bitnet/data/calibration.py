"""Text for recipes that look at activations: pieces equally spaced over a corpus, so that they are of all of it."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bitnet.data.corpora import Reading, open_corpus
from bitnet.data.tokenizer import encode_document, first_id
from bitnet.data.tokens import UNSAID
from bitnet.errors import UserError

MOST_TIMES = 8
"""How many times the tokens that are needed are read at most."""


def spaced_batches(
    ids: np.ndarray[Any, np.dtype[Any]], rows: int, seq_len: int, batch_size: int, first: int | None = None
) -> list[Tensor]:
    """Batches of token ids, int64 (batch_size, seq_len), of ``rows`` equally spaced pieces; the last may be smaller.

    ``first`` is put before every piece, as a tokenizer with a BOS token does before every text.
    Raises ``UserError`` for a text that is shorter than one piece.
    """
    length = seq_len - (first is not None)
    if len(ids) < length:
        raise UserError(f"calibration text of {len(ids)} tokens: one piece has {length}; give more text.")
    starts = np.linspace(0, len(ids) - length, rows).astype(np.int64)
    pieces_ = np.stack([ids[start : start + length].astype(np.int64) % UNSAID for start in starts])
    found = torch.from_numpy(pieces_)
    if first is not None:
        found = torch.cat([torch.full((rows, 1), first), found], dim=1)
    return list(found.split(batch_size))


def calibration_batches(
    tokenizer: Tokenizer, eos_id: int, path: str, reading: Reading, *, rows: int, seq_len: int, batch_size: int
) -> list[Tensor]:
    """``spaced_batches`` of the text at ``path``. Raises ``UserError`` for text that is missing or too short."""
    sizes = (("calibration_rows", rows, 1), ("calibration_len", seq_len, 2), ("batch_size", batch_size, 1))
    for name, value, least in sizes:
        if value < least:
            raise UserError(f"{name} = {value}: must be at least {least}.")
    ids: list[int] = []
    for document in open_corpus(path, reading):
        ids += [*encode_document(tokenizer, document), eos_id]
        if len(ids) >= MOST_TIMES * rows * seq_len:
            break
    try:
        return spaced_batches(np.asarray(ids), rows, seq_len, batch_size, first_id(tokenizer))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
