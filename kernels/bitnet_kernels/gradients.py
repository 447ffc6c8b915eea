"""Products of the backward pass on integer units: an output gradient as int8 digits, times int8 that are exact anyway.

With g (M, N) the gradient of the output, w (N, K) levels and x (M, K) int8 activations, the straight-through
gradients are ``dx = g @ w / s_w`` and ``dw = (g / s_x).T @ x``. Only g is no integer. It becomes one int8 digit, or
two, which are 16-bit fixed point with a scale for each token (for dx) or each output (for dw)::

    v = round(g * 32639 / absmax)        high = round(v / 256)        low = v - 256 high          (one digit: 127, v)
    dx = (256 (high @ w) + low @ w) / (inv_scale * s_w)

The sums are exact integers; what is lost is lost in rounding g: half of 1/127 or of 1/32639 of the largest value of
its row. bf16 keeps 8 bits of each value: two digits are finer, except for values below 1/128 of the largest.
"""

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.training_ops import GRADIENT_FLOOR, int8_matmul, quantize_columns, quantize_rows
from bitnet_kernels.training_reference import int8_product

LEVELS = {1: 127.0, 2: 127.0 * 257.0}


def gradient_digits(
    g: Tensor, digits: int, row_inv: Tensor | None = None, per_column: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """g floating (M, N), rows divided by ``row_inv`` (M,) -> ``high`` int8 (M, N), ``low`` the same or ``None`` for one
    digit, and ``inv_scale`` float32 (M,). ``per_column`` gives (N, M), a view of what lies (M, N), and (N,).

    NaN and infinity make their scale NaN.
    """
    g = g.float().contiguous()
    if not native.takes(g, torch.float32):
        return _gradient_digits(g, digits, row_inv, per_column)
    m, n = g.shape
    high = torch.empty(m, n, dtype=torch.int8)
    low = torch.empty(m, n, dtype=torch.int8) if digits == 2 else None
    inv_scale = torch.empty(n if per_column else m, dtype=torch.float32)
    second = high if low is None else low  # not touched for one digit
    native.run("bitnet_gradient_digits", g, row_inv, m, n, per_column, digits, high, second, inv_scale)
    if per_column:
        return high.t(), None if low is None else low.t(), inv_scale
    return high, low, inv_scale


def _gradient_digits(
    g: Tensor, digits: int, row_inv: Tensor | None, per_column: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    if row_inv is not None:
        g = g * row_inv.reciprocal()[:, None]
    g = g.t() if per_column else g
    absmax = g.abs().amax(dim=1)
    inv_scale = torch.where(absmax < GRADIENT_FLOOR, 1.0, LEVELS[digits] / absmax)
    inv_scale = torch.where(absmax.isfinite(), inv_scale, torch.nan)
    v = (g * inv_scale[:, None]).nan_to_num_(0.0, 0.0, 0.0).round_()
    if digits == 1:
        return v.to(torch.int8), None, inv_scale
    high = torch.floor((v + 128.0) / 256.0)
    return high.to(torch.int8), (v - 256.0 * high).to(torch.int8), inv_scale


def _one_digit_by_operators(g: Tensor, row_inv: Tensor | None, per_column: bool) -> tuple[Tensor, None, Tensor]:
    """``gradient_digits`` of one digit on a GPU, where the transposed form is what is written."""
    if per_column:
        q, inv_scale = quantize_columns(g, row_inv)
    else:
        assert row_inv is None
        q, inv_scale, _ = quantize_rows(g, floor=GRADIENT_FLOOR)
    return q, None, inv_scale


def join_digits(high: Tensor, low: Tensor | None, row_inv: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sums int32 (M, N) of the digits -> float32 ``(256 high + low) / (row_inv * scale)``."""
    scale = torch.ones((), dtype=torch.float32, device=high.device) if scale is None else scale
    if not native.takes(high, torch.int32):
        total = high.float() if low is None else high.float().mul_(256.0).add_(low)
        return total.mul_((row_inv * scale).reciprocal()[:, None])
    out = torch.empty(high.shape, dtype=torch.float32)
    native.call("bitnet_join_digits", high, low, *high.shape, row_inv, float(scale), out)
    return out


def _product(digits: tuple[Tensor, Tensor | None, Tensor], other: Tensor, scale: Tensor | None, on_gpu: bool) -> Tensor:
    """Digits int8 (R, S) with their scales (R,), other int8 (T, S) -> float32 (R, T)."""
    high, low, inv_scale = digits
    if not on_gpu:
        sums = [None if part is None else int8_product(part, other.t()) for part in (high, low)]
        assert sums[0] is not None
        return join_digits(sums[0], sums[1], inv_scale, scale)
    other = other.contiguous()
    total = int8_matmul(high.contiguous(), other, inv_scale, scale)
    return total if low is None else total.mul_(256.0).add_(int8_matmul(low.contiguous(), other, inv_scale, scale))


def input_gradient(g: Tensor, w_q_t: Tensor, w_inv_scale: Tensor, digits: int, on_gpu: bool | None = None) -> Tensor:
    """g (M, N), levels int8 transposed (K, N), their scale () -> float32 (M, K): ``g @ w_q / w_inv_scale``.

    ``on_gpu`` chooses the operators that a GPU has kernels for; by default where g lies decides.
    """
    on_gpu = g.is_cuda if on_gpu is None else on_gpu
    by_operators = on_gpu and digits == 1
    parts = _one_digit_by_operators(g, None, False) if by_operators else gradient_digits(g, digits)
    return _product(parts, w_q_t, w_inv_scale, on_gpu)


def weight_gradient(g: Tensor, x_q_t: Tensor, x_inv_scale: Tensor, digits: int, on_gpu: bool | None = None) -> Tensor:
    """g (M, N), activations int8 transposed (K, M) and their scales (M, 1) -> float32 (N, K):
    ``(g / x_inv_scale).T @ x_q``."""
    on_gpu = g.is_cuda if on_gpu is None else on_gpu
    row_inv = x_inv_scale.flatten()
    by_operators = on_gpu and digits == 1
    parts = _one_digit_by_operators(g, row_inv, True) if by_operators else gradient_digits(g, digits, row_inv, True)
    return _product(parts, x_q_t, None, on_gpu)
