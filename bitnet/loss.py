"""Cross-entropy, as a training loss and as the scores of a held-out text: nats per token, bits per byte.

Bits per byte divide the nats of all predicted tokens, end-of-text tokens included, by ln 2 and by the UTF-8 bytes of
the text; separators between documents are not text. The figure does not depend on the vocabulary.

With a large vocabulary the logits are the largest tensor of a training step, four times over: logits, log-softmax and
the gradients of both. A model whose ``loss_chunk`` is set never has all of them: its head and the cross-entropy work
on that many tokens at a time, and the gradients of a chunk are computed while its logits are there (``ChunkedNats``).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100
"""Target id that is not counted (padding)."""


ReadOut = Callable[[Tensor, nn.Module], Tensor]
"""Makes something of the normed residual stream (B, T, D) and of the head: what a model returns for its logits."""


def _run(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    extra = {"document_ids": batch["document_ids"]} if "document_ids" in batch else {}
    return model(batch["inputs"], **extra, **options)  # type: ignore[no-any-return]


def batch_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, V) of ``inputs`` (B, T), attention masked by document when there are ``document_ids`` (B, T)."""
    return _run(model, batch)


def _chunk_of(model: nn.Module) -> int | None:
    chunk: int | None = getattr(model, "loss_chunk", None)
    return chunk


def token_nats(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every target, float32 (B * T,), 0 where the target is ``IGNORE``.

    ``batch`` holds ``inputs`` and ``targets`` (B, T), and ``document_ids`` (B, T) when attention is masked by document.
    The model's ``loss_chunk`` counts where no gradients are taken; with gradients, all logits exist at once.
    """
    targets, chunk = batch["targets"].flatten(), _chunk_of(model)
    if chunk is None or torch.is_grad_enabled():
        return _nats(batch_logits(model, batch).flatten(0, 1), targets)

    def by_chunks(x: Tensor, head: nn.Module) -> Tensor:
        parts = zip(x.flatten(0, 1).split(chunk), targets.split(chunk), strict=True)
        return torch.cat([_nats(head(part), aims) for part, aims in parts])

    return _run(model, batch, read_out=by_chunks)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean nats per target, a scalar; with the model's ``loss_chunk``, without ever holding all logits."""
    targets, chunk = batch["targets"], _chunk_of(model)
    if chunk is None or not torch.is_grad_enabled():
        total = token_nats(model, batch).sum()
    else:
        total = _run(model, batch, read_out=lambda x, head: chunked_nats(x, head, targets, chunk))
    return total / (targets != IGNORE).sum().clamp(min=1)  # a batch of questions without answers teaches nothing


def chunked_nats(x: Tensor, head: nn.Module, targets: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropy of ``head(x)``, a scalar: x (B, T, D), targets (B, T), ``chunk`` tokens at a time.

    ``head`` must be a linear layer without bias, computed as autocast would.
    """
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError("loss_chunk needs an output head that is a linear layer without bias.")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    total: Tensor = ChunkedNats.apply(x.flatten(0, 1), head.weight, targets.flatten(), chunk, dtype)
    return total


class ChunkedNats(torch.autograd.Function):
    """x (N, D), weight (V, D), targets (N,) -> the sum of -log softmax(x @ weight.T)[target] over all targets.

    The gradient of the logits is softmax - onehot, known as soon as the logits are. So the forward takes each chunk to
    the gradients of x and weight while it has the chunk's logits, and throws those away: the same three products as
    without chunks, where ``torch.utils.checkpoint`` would take four. Backward only multiplies by the gradient of the
    sum, in place, and can do so once. The weight gradient adds up in float32, also where products run in bf16.

    ``torch.nn.functional.linear_cross_entropy`` (torch 2.13) does the same; older versions lack it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[:2]
        ctx.grad_x = torch.empty_like(x) if needs_x else None
        ctx.grad_w = torch.zeros_like(weight, dtype=torch.float32) if needs_w else None
        ctx.dtypes, ctx.used = (x.dtype, weight.dtype), False
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            for start in range(0, x.shape[0], chunk):
                rows = slice(start, start + chunk)
                part = x[rows].to(dtype)
                nats, grad = _nats_and_gradient(F.linear(part, w), targets[rows])
                total += nats
                grad = grad.to(dtype)
                if ctx.grad_x is not None:
                    ctx.grad_x[rows] = grad @ w
                if ctx.grad_w is not None:
                    _add_product(ctx.grad_w, grad.t(), part)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError("The gradients of a chunked loss were scaled in place: backward works once.")
        ctx.used = True
        found = [None if g is None else g.mul_(grad).to(t) for g, t in zip(_taken(ctx), ctx.dtypes, strict=True)]
        return *found, None, None, None


def _taken(ctx: Any) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that the forward left, which ``ctx`` gives away."""
    found = ctx.grad_x, ctx.grad_w
    ctx.grad_x = ctx.grad_w = None
    return found


def _nats_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of logits (n, V), and its gradient, float32 (n, V)."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    nats = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="sum")
    counted = (targets != IGNORE).unsqueeze(-1)
    grad = log_p.exp_().scatter_add_(
        -1, targets.clamp(min=0).unsqueeze(-1), -torch.ones_like(counted, dtype=log_p.dtype)
    )
    return nats, grad.mul_(counted)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a tensor of that size where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


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
        return math.inf if self.loss >= 700 else math.exp(self.loss)

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
