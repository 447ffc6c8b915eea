"""Cross-entropy, as a training loss and as the scores of a held-out text: nats per token, bits per byte.

Bits per byte divide the nats of all predicted tokens, end-of-text tokens included, by ln 2 and by the UTF-8 bytes of
the text; separators between documents are not text. The figure does not depend on the vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100
"""Target id that is not counted (padding)."""


def batch_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, V) of ``inputs`` (B, T), attention masked by document when there are ``document_ids`` (B, T)."""
    extra = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
    return model(batch["inputs"], **extra)  # type: ignore[no-any-return]


def token_nats(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, float32 (B * T,), 0 where the target is ``IGNORE``.

    ``batch`` holds ``inputs`` and ``targets`` (B, T), and ``document_ids`` (B, T) when attention is masked by document.
    """
    logits = batch_logits(model, batch)
    return F.cross_entropy(
        logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="none"
    )


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean nats per target, a scalar."""
    targets = (batch["targets"] != IGNORE).sum()
    return token_nats(model, batch).sum() / targets.clamp(min=1)  # a batch of questions without answers teaches nothing


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: float = 0.0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes)

    @property
    def loss(self) -> float:
        """Nats per token; NaN when there was no token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the loss: per token, so comparable only between models with the same tokenizer."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


def score_batch(model: nn.Module, batch: dict[str, Tensor], byte_lengths: Tensor) -> Score:
    """Score of one batch; ``byte_lengths`` (V,) are the bytes of text that each token stands for."""
    nats = token_nats(model, batch)
    targets = batch["targets"]
    real = targets != IGNORE
    text_bytes = byte_lengths[targets.clamp(min=0)].double() * real
    return Score(float(nats.double().sum()), int(real.sum()), float(text_bytes.sum()))


@torch.inference_mode()
def score(model: nn.Module, batches: Iterable[dict[str, Tensor]], byte_lengths: Tensor) -> Score:
    """Sum of ``score_batch`` over all batches, with the model in the mode that it is in."""
    total = Score()
    for batch in batches:
        total += score_batch(model, batch, byte_lengths)
    return total
