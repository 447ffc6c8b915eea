"""Products of the backward pass on integer units: an output gradient as int8 digits, times int8 that are exact anyway.

With g (M, N) the gradient of the output, w (N, K) levels and x (M, K) int8 activations, the straight-through
gradients are ``dx = g @ w / s_w`` and ``dw = (g / s_x).T @ x``. Only g is no integer. It becomes one int8 digit, or
two, which are 16-bit fixed point with a scale for each token (for dx) or each output (for dw)::

    v = round(g * 32639 / absmax)        high = round(v / 256)        low = v - 256 high          (one digit: 127, v)
    dx = (256 (high @ w) + low @ w) / (inv_scale * s_w)

The sums are exact integers; what is lost is lost in rounding g: half of 1/127 or of 1/32639 of the largest value of
its row. bf16 keeps 8 bits of each value: two digits are finer, except for values below 1/128 of the largest.
"""

import functools

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.training_ops import GRADIENT_FLOOR, MAX_INT8_K, int8_matmul, quantize_columns, quantize_rows

LEVELS = {1: 127.0, 2: 127.0 * 257.0}


def _takes(g: Tensor) -> bool:
    return g.is_cpu and type(g) is Tensor and not torch.compiler.is_compiling() and native.library() is not None


def gradient_digits(
    g: Tensor, digits: int, row_inv: Tensor | None = None, per_column: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """g floating (M, N), rows divided by ``row_inv`` (M,) -> ``high`` int8 (M, N), ``low`` the same or ``None`` for one
    digit, and ``inv_scale`` float32 (M,) or, ``per_column``, (N,). NaN and infinity make their scale NaN."""
    g = g.float().contiguous()
    if not _takes(g):
        return _gradient_digits(g, digits, row_inv, per_column)
    lib = native.library()
    assert lib is not None
    m, n = g.shape
    high = torch.empty(m, n, dtype=torch.int8)
    low = torch.empty(m, n, dtype=torch.int8) if digits == 2 else None
    inv_scale = torch.empty(n if per_column else m, dtype=torch.float32)
    failed = lib.bitnet_gradient_digits(
        g.data_ptr(), None if row_inv is None else row_inv.data_ptr(), m, n, per_column, digits, high.data_ptr(),
        high.data_ptr() if low is None else low.data_ptr(), inv_scale.data_ptr(), torch.get_num_threads(),
        native.best_isa(),
    )  # fmt: skip
    if failed:
        raise MemoryError("gradient_digits: no memory for the largest values of the columns")
    return high, low, inv_scale


def _gradient_digits(
    g: Tensor, digits: int, row_inv: Tensor | None, per_column: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    if row_inv is not None:
        g = g * row_inv.reciprocal()[:, None]
    absmax = g.abs().amax(dim=0 if per_column else 1)
    inv_scale = torch.where(absmax < 1e-30, 1.0, LEVELS[digits] / absmax)
    inv_scale = torch.where(absmax.isfinite(), inv_scale, torch.nan)
    v = (g * (inv_scale if per_column else inv_scale[:, None])).nan_to_num_(0.0, 0.0, 0.0).round_()
    if digits == 1:
        return v.to(torch.int8), None, inv_scale
    high = torch.floor((v + 128.0) / 256.0)
    return high.to(torch.int8), (v - 256.0 * high).to(torch.int8), inv_scale


def join_digits(high: Tensor, low: Tensor | None, row_inv: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums int32 (or float32) (M, N) of the digits -> float32 ``(256 high + low) / (row_inv * scale)``."""
    scale = torch.ones((), dtype=torch.float32, device=high.device) if scale is None else scale
    if not _takes(high) or high.dtype != torch.int32:
        total = high.float() if low is None else high.float().mul_(256.0).add_(low)
        return total.mul_((row_inv * scale).reciprocal()[:, None])
    lib = native.library()
    assert lib is not None
    out = torch.empty(high.shape, dtype=torch.float32)
    lib.bitnet_join_digits(
        high.data_ptr(), None if low is None else low.data_ptr(), *high.shape, row_inv.data_ptr(), float(scale),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    """int8 (M, K) @ int8 (K, N) -> int32 (M, N), exact; float32 sums where there are no integer units.

    Raises ``ValueError`` for more than ``MAX_INT8_K`` terms.
    """
    if a.shape[1] > MAX_INT8_K:
        raise ValueError(f"sums of {a.shape[1]} int8 products may not fit int32; at most {MAX_INT8_K}")
    if a.is_cpu and cpu_multiplies_int8_exactly():
        return torch._int_mm(a, b)
    return torch.mm(a.float(), b.float())


def _on_gpu(digits: tuple[Tensor, Tensor | None], other: Tensor, inv_scale: Tensor, scale: Tensor | None) -> Tensor:
    """digits int8 (M, N), other int8 (K, N) -> float32 (M, K), scaled, by the int8 units of a GPU."""
    high, low = (None if part is None else int8_matmul(part, other, inv_scale, scale) for part in digits)
    assert high is not None
    return high if low is None else high.mul_(256.0).add_(low)


def input_gradient(g: Tensor, w_q: Tensor, w_inv_scale: Tensor, digits: int) -> Tensor:
    """g (M, N), levels int8 (N, K), their scale () -> float32 (M, K): ``g @ w_q / w_inv_scale``."""
    if g.is_cuda:
        if digits == 1:
            q, inv_scale, _ = quantize_rows(g, floor=GRADIENT_FLOOR)
            return _on_gpu((q, None), w_q.t().contiguous(), inv_scale, w_inv_scale)
        high, low, inv_scale = gradient_digits(g, digits)
        return _on_gpu((high, low), w_q.t().contiguous(), inv_scale, w_inv_scale)
    high, low, inv_scale = gradient_digits(g, digits)
    sums = [None if part is None else int8_product(part, w_q) for part in (high, low)]
    assert sums[0] is not None
    return join_digits(sums[0], sums[1], inv_scale, w_inv_scale)


def weight_gradient(g: Tensor, x_q: Tensor, x_inv_scale: Tensor, digits: int) -> Tensor:
    """g (M, N), activations int8 (M, K) and their scales (M, 1) -> float32 (N, K): ``(g / x_inv_scale).T @ x_q``."""
    if g.is_cuda:
        if digits == 1:
            q, inv_scale = quantize_columns(g, x_inv_scale.flatten())
            return _on_gpu((q, None), x_q.t().contiguous(), inv_scale, None)
        high, low, inv_scale = gradient_digits(g, digits, x_inv_scale.flatten(), per_column=True)
        columns = high.t().contiguous(), None if low is None else low.t().contiguous()
        return _on_gpu(columns, x_q.t().contiguous(), inv_scale, None)
    high, low, inv_scale = gradient_digits(g, digits, x_inv_scale.flatten(), per_column=True)
    sums = [None if part is None else int8_product(part.t(), x_q) for part in (high, low)]
    assert sums[0] is not None
    return join_digits(sums[0], sums[1], inv_scale)
