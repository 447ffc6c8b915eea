"""The operators of int8 training in plain torch: their definitions, and what a CPU runs. ``training_ops`` states them.

The Triton kernels equal these bit for bit, except for the mean of squares in the norm and the two sums of its backward,
where float32 terms are added in another order.
"""

import functools

import torch
from torch import Tensor

from bitnet_kernels.reference import ABSMAX_FLOOR, int_mm

MAX_INT8_K = (2**31 - 1) // (127 * 128)
"""Most terms of an int8 x int8 sum that ends inside int32, where one of the factors is never -128 (132,104):
activations and levels never are, low digits of gradients may be."""


@functools.cache
def cpu_multiplies_int8_exactly() -> bool:
    """Whether torch's int8 product is exact on this CPU: without VNNI its kernels may saturate 16-bit sums."""
    a = torch.full((32, 256), 127, dtype=torch.int8)
    a[1::2] = -128
    expected = (a.long() @ a.long().t()).to(torch.int32)
    try:
        return torch.equal(torch._int_mm(a, a.t()), expected)
    except RuntimeError:
        return False


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) @ int8 (K, N) -> int32 (M, N), exact on every CPU. Raises ``ValueError`` above ``MAX_INT8_K``."""
    if a.shape[1] > MAX_INT8_K:
        raise ValueError(f"sums of {a.shape[1]} int8 products may not fit int32; at most {MAX_INT8_K}")
    if cpu_multiplies_int8_exactly():
        return int_mm(a, b)
    return torch.mm(a.double(), b.double()).to(torch.int32)


def int8_matmul(
    a: Tensor, b: Tensor, row_inv_scale: Tensor, inv_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    total = int8_product(a.contiguous(), b.contiguous().t())
    inv = row_inv_scale if inv_scale is None else row_inv_scale * inv_scale
    return (total.float() / inv.reshape(-1, 1)).to(out_dtype or torch.float32)


def _quantize(x: Tensor, absmax: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Float32 x and its largest magnitudes -> int8 and inv_scale; where those are not finite, 0 and NaN."""
    inv_scale = 127.0 / absmax.clamp(min=floor)
    finite = absmax < float("inf")
    q = torch.where(finite, (x * inv_scale).round(), 0.0).to(torch.int8)
    return q, torch.where(finite, inv_scale, float("nan"))


def _transposed(q: Tensor, wanted: bool) -> Tensor:
    return q.t().contiguous() if wanted else q.new_empty(0)


def quantize_rows(x: Tensor, transposed: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().float()
    q, inv_scale = _quantize(x, x.abs().amax(dim=1, keepdim=True), floor)
    return q, inv_scale.view(-1), _transposed(q, transposed)


def quantize_columns(x: Tensor, row_inv_scale: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    x = x.detach().float()
    if row_inv_scale is not None:
        x = x / row_inv_scale.reshape(-1, 1)
    x = x.t()
    absmax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    q, inv_scale = _quantize(x, absmax, floor)
    return q.contiguous(), inv_scale.view(-1)


def ternary_weight(w: Tensor, inv_scale: Tensor) -> tuple[Tensor, Tensor]:
    q = (w.detach().float() * inv_scale).round().clamp(-1, 1).nan_to_num(0.0).to(torch.int8)
    return q, _transposed(q, True)


def binary_weight(w: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    signs = torch.where(w.detach().float() > mean, 1.0, -1.0)
    q = torch.where(mean.isfinite(), signs, 0.0).to(torch.int8)
    return q, _transposed(q, True)


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, weight = x.detach(), weight.detach()
    y = x.float()
    rstd = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * (y * rstd).to(x.dtype)
    q, inv_scale, q_t = quantize_rows(y, transposed, ABSMAX_FLOOR)
    return y, q, inv_scale, rstd.view(-1), q_t


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, r = dy.detach().float(), x.detach(), rstd.reshape(-1, 1)
    unit = x.float() * r
    g = dy * weight.detach().float()
    dx = (g - unit * (g * unit).mean(-1, keepdim=True)) * r
    return dx.to(x.dtype), (dy * unit.to(x.dtype).float()).sum(0).to(weight.dtype)
