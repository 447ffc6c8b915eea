"""What may happen to the inputs of wo and w2 before they are quantized: a rotation, or keeping only the largest.

``hadamard`` (BitNet v2, arXiv 2504.18415) spreads outliers over a row: x -> H x / sqrt(n) for each block of n inputs,
where n is the largest power of two that divides their number. Without it 4-bit inputs of these layers diverge there.
``top_half`` (a4.8, arXiv 2411.04965) keeps the half of a row with the largest magnitudes; the others become 0.

Both are differentiable as they stand, and neither depends on batch or threads: sums are pairs, added in one order.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

TransformName = Literal["none", "hadamard", "top_half"]


def block_of(k: int) -> int:
    """The largest power of two that divides ``k``."""
    return k & -k


def hadamard(x: Tensor) -> Tensor:
    """x (..., K) -> (..., K): each block of ``block_of(K)`` values times the normalized matrix of Sylvester's order."""
    size, width = block_of(x.shape[-1]), 1
    y = x.reshape(-1, size)
    while width < size:
        pairs = y.view(-1, size // (2 * width), 2, width)
        a, b = pairs.unbind(2)
        y = torch.stack((a + b, a - b), dim=2)
        width *= 2
    scale: float = size**-0.5
    return y.reshape(x.shape) * scale


def top_half(x: Tensor) -> Tensor:
    """x (..., K) -> its ceil(K / 2) largest magnitudes in their places, 0 elsewhere; equal ones are all kept."""
    kept = -(-x.shape[-1] // 2)
    least = x.detach().abs().kthvalue(x.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    # Asked this way round a NaN is kept.
    return torch.where(x.detach().abs() < least, torch.zeros((), dtype=x.dtype, device=x.device), x)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"hadamard": hadamard, "top_half": top_half}
