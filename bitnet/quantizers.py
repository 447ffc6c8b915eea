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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_kernels.cpu import weights as native_weights
from bitnet_kernels.training_ops import binary_weight, ternary_weight

EPS = 1e-5

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


GRID = 2.0**40
"""Sums of weights count multiples of 2^-40: exact for every float32 above 2^-17, and off by 2^-41 at most below it."""


def exact_sums(values: Tensor) -> Tensor:
    """Sum of all elements of (N, K), float64 (2,), such that adding these pairs is exact in any order.

    The pair counts 2^-14 and 2^-40. So the sum of a matrix does not depend on threads, nor on how it is split over
    processes and in which order they are added, while a float sum does, and the last bit of a scale decides trits.
    Holds for rows whose sum stays below 2^13 and for matrices below 2^35.
    """
    rows = (values.double() * GRID).round_().sum(dim=-1)  # whole numbers below 2^53
    high = (rows * 2.0**-26).floor()
    return torch.stack((high.sum(), (rows - high * 2.0**26).sum()))


def mean_of(sums: Tensor, count: int) -> Tensor:
    """Float32 mean, rounded once, of ``count`` elements whose ``exact_sums`` are ``sums`` (2,)."""
    total = sums[0] * 2.0**26 + sums[1]
    # An eager GPU would multiply by the reciprocal of a plain number: another last bit than a CPU's.
    return (total / torch.full_like(total, GRID * count)).to(torch.float32)


class WeightScale(NamedTuple):
    """What a whole matrix says about itself, before a weight is rounded: both float32, shape ()."""

    inv_scale: Tensor
    mean: Tensor
    """Of the signed weights; 0 and unused for ternary."""


@dataclass(frozen=True)
class WeightQuantizer:
    """A weight quantizer in two halves: what must be known of the whole matrix, and what is done to each weight."""

    binary: bool
    format: str
    """The packed form of its levels that the kernels read: a key of ``bitnet_kernels.FORMATS``."""

    def statistics(self, w: Tensor) -> Tensor:
        """Float64 (4,): ``exact_sums`` of magnitudes and, for binary, of weights. Those of pieces can be added."""
        w = w.detach()
        sums = native_weights.weight_sums(w, self.binary)
        if sums is None:
            magnitudes = exact_sums(w.abs())
            sums = torch.cat((magnitudes, exact_sums(w) if self.binary else torch.zeros_like(magnitudes)))
        return sums

    def scale(self, statistics: Tensor, count: int) -> WeightScale:
        """From the statistics of all ``count`` weights of a matrix."""
        inv_scale = mean_of(statistics[:2], count).clamp(min=EPS).reciprocal()
        return WeightScale(inv_scale, mean_of(statistics[2:], count))

    def levels(self, w: Tensor, scale: WeightScale) -> Tensor:
        """Weights, or some of them -> float32 ``q``."""
        w = w.detach().float()
        if not self.binary:
            return (w * scale.inv_scale).round_().clamp_(-1, 1)
        # mean - mean is 0, but NaN when a weight is NaN or infinite: a comparison alone would hide that as -1.
        return torch.where(w > scale.mean, 1.0, -1.0) + (scale.mean - scale.mean)

    def int8_levels(self, w: Tensor, scale: WeightScale) -> Tensor:
        """The same as int8, which knows no NaN: there the scale is NaN too, and what is computed with it."""
        q = native_weights.weight_levels(w.detach(), *scale, self.binary)
        return self.levels(w, scale).to(torch.int8) if q is None else q

    def int8_levels_both_ways(self, w: Tensor, scale: WeightScale) -> tuple[Tensor, Tensor]:
        """``int8_levels`` (N, K), and transposed (K, N): in one kernel on a GPU."""
        w = w.detach()
        return binary_weight(w, scale.mean) if self.binary else ternary_weight(w, scale.inv_scale)

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``(q, inv_scale)`` of a matrix that is here as a whole."""
        scale = self.scale(self.statistics(w), w.numel())
        return self.levels(w, scale), scale.inv_scale


quantize_ternary_absmean = WeightQuantizer(binary=False, format="ternary2")
"""(N, K) weights -> float32 ``q`` (N, K) in {-1, 0, 1} and ``inv_scale`` () (arXiv 2402.17764, section 2)."""

quantize_binary_sign = WeightQuantizer(binary=True, format="binary1")
"""(N, K) weights -> float32 ``q`` (N, K) in {-1, 1} and ``inv_scale`` () (arXiv 2310.11453, eq 1-3)."""


def quantize_int8_absmax(x: Tensor, largest: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(..., K) activations -> float32 ``q`` (..., K) in [-127, 127] and ``inv_scale`` (..., 1), one per token.

    ``largest`` takes the largest magnitudes (..., 1) found here to those of all K where others hold the rest.
    """
    x = x.detach().float()
    absmax = x.abs().amax(dim=-1, keepdim=True)
    inv_scale = 127.0 / (absmax if largest is None else largest(absmax)).clamp(min=EPS)
    # No clamp: |x| * inv_scale exceeds 127 by rounding only, and rounds to 127.
    return (x * inv_scale).round_(), inv_scale


def quantize_int4_absmean(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) activations -> float32 ``q`` (..., K) in [-8, 7] and ``inv_scale`` (..., 1) (arXiv 2411.04965)."""
    x = x.detach().float()
    inv_scale = math.sqrt(7.0) / x.abs().mean(dim=-1, keepdim=True).clamp_(min=EPS)
    return (x * inv_scale).round_().clamp_(-8, 7), inv_scale


WEIGHT_QUANTIZERS: dict[str, WeightQuantizer] = {"ternary": quantize_ternary_absmean, "binary": quantize_binary_sign}
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
