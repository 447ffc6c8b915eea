"""What weights.c does to a matrix of latent weights (float32, contiguous): exact sums, levels, packed codes.

Each function gives ``None`` where there are no compiled kernels or they do not apply; torch then computes the same.
"""

import torch
from torch import Tensor

from bitnet_kernels.cpu import native


def weight_sums(w: Tensor, with_sign: bool) -> Tensor | None:
    """Float64 (4,) of w (N, K): the pairs ``exact_sums(w.abs())`` and, ``with_sign``, ``exact_sums(w)``; else zeros."""
    if not native.takes(w, torch.float32):
        return None
    out = torch.empty(4, dtype=torch.float64)
    wrong = native.call("bitnet_weight_sums", w, w.numel(), with_sign, out)
    return None if wrong else out


def weight_levels(w: Tensor, inv_scale: Tensor, mean: Tensor, binary: bool) -> Tensor | None:
    """int8 (N, K): ``clamp(round(w * inv_scale), -1, 1)``, or the sign of ``w - mean`` with -1 for 0."""
    if not native.takes(w, torch.float32):
        return None
    q = torch.empty(w.shape, dtype=torch.int8)
    native.call("bitnet_weight_levels", w, w.numel(), float(inv_scale), float(mean), binary, q)
    return q


def pack_levels(q: Tensor, planes: int) -> Tensor | None:
    """int8 levels (N, K) -> uint8 (N, whole blocks of K), unchecked; ``planes`` is 4 for ternary, 8 for binary."""
    if not native.takes(q, torch.int8):
        return None
    n, k = q.shape
    packed = torch.empty(n, -(-k // 256) * 256 // planes, dtype=torch.uint8)
    native.call("bitnet_pack_levels", q, n, k, planes, packed)
    return packed
