"""The definitions, in plain torch, that every faster kernel must equal bit for bit."""

import torch
from torch import Tensor

from bitnet_kernels.formats import FORMATS

ABSMAX_FLOOR = 1e-5
"""A row of activations whose largest magnitude is below this is quantized as if it were this."""


def matmul_reference(x: Tensor, w: Tensor) -> Tensor:
    """x int8 (M, K), w int8 (N, K) -> ``x @ w.T`` as int32 (M, N), exact. Raises ``ValueError`` for other dtypes."""
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise ValueError(f"x and w must be int8, not {x.dtype} and {w.dtype}")
    total = x.to(torch.int64) @ w.to(torch.int64).t()
    if total.numel() and int(total.abs().max()) > torch.iinfo(torch.int32).max:
        raise ValueError(f"a sum over K = {x.shape[1]} does not fit int32")
    return total.to(torch.int32)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``, int8 (M, K) @ (K, N) -> int32, for every K: on a CPU torch leaves K = 1 unwritten (2.13)."""
    return a.to(torch.int32) * b.to(torch.int32) if a.shape[1] == 1 else torch._int_mm(a, b)


def scale_reference(total: Tensor, x_inv_scale: Tensor | None, w_inv_scale: Tensor | None) -> Tensor:
    """The epilogue: int32 sums (M, N) / (x_inv_scale (M, 1) * w_inv_scale (1,) or (N,)), in float32."""
    if x_inv_scale is None or w_inv_scale is None:
        return total
    return total.float() / (x_inv_scale.view(-1, 1) * w_inv_scale)


def packed_matmul_reference(
    x: Tensor,
    packed: Tensor,
    format: str,
    k: int,
    x_inv_scale: Tensor | None = None,
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """What ``packed_matmul`` computes (see ops.py), a few rows of weights at a time, with torch's int8 product."""
    M, N = x.shape[0], packed.shape[0]
    out = torch.empty(M, N, dtype=torch.int32 if x_inv_scale is None and group_scale is None else torch.float32)
    rows = max(1, 2**22 // k)
    for n in range(0, N, rows):
        w = FORMATS[format].unpack(packed[n : n + rows], None, k)
        if group_scale is None:
            scale = w_inv_scale if w_inv_scale is None or w_inv_scale.numel() == 1 else w_inv_scale[n : n + rows]
            out[:, n : n + rows] = scale_reference(int_mm(x, w.t()), x_inv_scale, scale)
            continue
        y = torch.zeros(M, w.shape[0], dtype=torch.float32)
        for g, start in enumerate(range(0, k, group_size)):
            part = slice(start, min(start + group_size, k))
            y += int_mm(x[:, part].contiguous(), w[:, part].t()).float() * group_scale[n : n + rows, g]
        out[:, n : n + rows] = y if x_inv_scale is None else y / x_inv_scale.view(-1, 1)
    return out


def rms_norm_quantize_reference(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What ``rms_norm_quantize`` computes (see ops.py)."""
    if weight is not None:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        x = weight * y.to(x.dtype)
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True)
    inv_scale = 127.0 / absmax.clamp(min=ABSMAX_FLOOR)
    finite = absmax < float("inf")
    q = torch.where(finite, (x * inv_scale).round(), 0.0).to(torch.int8)
    return q, torch.where(finite, inv_scale, float("nan")), q.sum(dim=-1, dtype=torch.int32)
