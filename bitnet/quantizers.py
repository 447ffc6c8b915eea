r"""Quantizers of the BitNet papers, as pure functions.

Each ``quantize_*`` returns ``(q, inv_scale)``: ``q`` holds integers in float32 and ``inv_scale`` is the *reciprocal*
scale of the papers, so that ``x ~ q / inv_scale``::

    ternary absmean   q = clamp(round(w * s), -1, 1)    s = 1 / mean|w|                       arXiv 2402.17764
    binary sign       q = +1 if w > mean(w) else -1     s = 1 / mean|w|                       arXiv 2310.11453, eq 1-3
    int8 absmax       q = round(x * s)                  s = 127 / max|x|  per token           arXiv 2402.17764
    int4 absmean      q = clamp(round(x * s), -8, 7)    s = sqrt(7) / mean|x|  per token      arXiv 2411.04965

Rules that hold for all of them: scales are computed in float32 whatever the input dtype (127 / 1e-5 overflows fp16);
statistics are clamped at ``EPS`` so that a zero row gives zeros; rounding is half to even, as in ``torch.round``;
NaN and infinity come out as NaN, never as an integer. A weight of exactly the mean maps to -1 in binary, as in the
paper (Microsoft's training tips use ``torch.sign``, which would give a third value, 0).

``q / inv_scale`` must never be quantized again: absmean of an already ternary matrix is smaller by its share of zeros.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-5

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


def absmean(w: Tensor) -> Tensor:
    """Mean magnitude of all elements, float32, shape ().

    Accumulated in float64 and rounded once: a float32 sum depends on the number of threads and on how the matrix is
    split, and the last bit of this scale decides trits.
    """
    return (w.detach().abs().sum(dtype=torch.float64) / w.numel()).to(torch.float32)


def quantize_ternary_absmean(w: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) weights -> float32 ``q`` (N, K) in {-1, 0, 1} and ``inv_scale`` () (arXiv 2402.17764, section 2)."""
    inv_scale = absmean(w).clamp(min=EPS).reciprocal()
    return (w.detach().float() * inv_scale).round_().clamp_(-1, 1), inv_scale


def quantize_binary_sign(w: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) weights -> float32 ``q`` (N, K) in {-1, 1} and ``inv_scale`` () (arXiv 2310.11453, eq 1-3)."""
    w = w.detach()
    mean = w.mean(dtype=torch.float64).to(torch.float32)
    inv_scale = absmean(w).clamp(min=EPS).reciprocal()
    # mean - mean is 0, but NaN when a weight is NaN or infinite: a comparison alone would hide that as -1.
    return torch.where(w.float() > mean, 1.0, -1.0) + (mean - mean), inv_scale


def quantize_int8_absmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) activations -> float32 ``q`` (..., K) in [-127, 127] and ``inv_scale`` (..., 1), one per token."""
    x = x.detach().float()
    inv_scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp_(min=EPS)
    # No clamp: |x| * inv_scale exceeds 127 by rounding only, and rounds to 127.
    return (x * inv_scale).round_(), inv_scale


def quantize_int4_absmean(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) activations -> float32 ``q`` (..., K) in [-8, 7] and ``inv_scale`` (..., 1) (arXiv 2411.04965)."""
    x = x.detach().float()
    inv_scale = math.sqrt(7.0) / x.abs().mean(dim=-1, keepdim=True).clamp_(min=EPS)
    return (x * inv_scale).round_().clamp_(-8, 7), inv_scale


WEIGHT_QUANTIZERS: dict[str, Quantizer] = {
    "ternary": quantize_ternary_absmean,
    "binary": quantize_binary_sign,
}
ACTIVATION_QUANTIZERS: dict[int, Quantizer] = {
    8: quantize_int8_absmax,
    4: quantize_int4_absmean,
}


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in the forward pass, the identity to ``x`` in the backward pass, exactly.

    The usual spelling ``x + (value - x).detach()`` rounds: it has more than three values for a ternary matrix.
    """
    return value.detach() + (x - x.detach())


def fake_quantize(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Quantize and dequantize ``x`` in its own dtype, with the straight-through gradient."""
    q, inv_scale = quantizer(x)
    return straight_through((q / inv_scale).to(x.dtype), x)
