"""RMSNorm, absmax and int8 rounding of activations on a GPU, one program a token, in Triton; and the norm's backward.

``rms_norm``, ``rms_norm_quantize`` and ``norm_quantize`` run one compiled kernel and differ in what they take from it.
The compiler lays a row over threads as its widest store likes it, and the sum of squares is added up in that layout's
order: a kernel without the store of int8 gives other last bits. So a model as trained, which wants the norm's result,
has the rounding done too, to no use; and whether the result is stored is decided while the kernel runs. (One compiled
kernel for rows of one alignment: whoever compares bits gives both sides rows that lie one after another.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.devices import on_its_device
from bitnet_kernels.reference import ABSMAX_FLOOR


@triton.jit
def scale_of(largest, FLOOR: tl.constexpr):
    """Of a largest magnitude as int32 bits: is it finite, and 127 / it as torch divides a number by a tensor."""
    finite = largest < 0x7F800000
    absmax = largest.to(tl.float32, bitcast=True)
    inv_scale = tl.div_rn(1.0, tl.maximum(absmax, FLOOR)) * 127.0
    return finite, tl.where(finite, inv_scale, 0.0)


@triton.jit
def rounded(y, inv_scale, finite):
    """y * inv_scale as integers, half to even; 0 where it is not finite."""
    # 1.5 * 2^23: adding it leaves the integer, rounded half to even, in the lowest bits.
    shifted = tl.where(finite, y, 0.0) * inv_scale + 12582912.0
    return (shifted - 12582912.0).to(tl.int32)


@triton.jit(do_not_specialize=["stored"])
def rms_norm_quantize_kernel(
    x_ptr, weight_ptr, q_ptr, y_ptr, inv_scale_ptr, row_sum_ptr, r_ptr, K, X_STRIDE, eps, stored,
    NORM: tl.constexpr, FLOOR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``stored``: how many values of a norm's result are, all or none."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    ok = k < K
    loaded = tl.load(x_ptr + row * X_STRIDE + k, mask=ok, other=0.0)
    y = loaded.to(tl.float32)
    if NORM:
        mean_square = tl.div_rn(tl.sum(y * y, axis=0), K.to(tl.float32))
        r = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
        weight = tl.load(weight_ptr + k, mask=ok, other=0.0)
        # Rounded where eager code rounds: to the dtype of x, then to that of the product with the weight.
        y = (y * r).to(loaded.dtype).to(tl.float32) * weight.to(tl.float32)
        y = y.to(weight.dtype).to(tl.float32)
        tl.store(r_ptr + row, r)
        tl.store(y_ptr + row * K + k, y.to(y_ptr.dtype.element_ty), mask=k < stored)
    # As integers, magnitudes compare the same and NaN is largest.
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    finite, inv_scale = scale_of(tl.max(bits, axis=0), FLOOR)
    q = tl.where(ok, rounded(y, inv_scale, finite), 0)
    tl.store(q_ptr + row * K + k, q.to(tl.int8), mask=ok)
    tl.store(inv_scale_ptr + row, tl.where(finite, inv_scale, float("nan")))
    tl.store(row_sum_ptr + row, tl.sum(q, axis=0))


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, r_ptr, dx_ptr, part_ptr, M, K, DY_STRIDE, X_STRIDE, BK: tl.constexpr,
):  # fmt: skip
    """Rows p, p + programs, ... of dx, and the part of the weight's gradient that they add up to."""
    k = tl.arange(0, BK)
    ok = k < K
    total = tl.zeros((BK,), dtype=tl.float32)
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        at = tl.cast(row, tl.int64)
        loaded = tl.load(x_ptr + at * X_STRIDE + k, mask=ok, other=0.0)
        dy = tl.load(dy_ptr + at * DY_STRIDE + k, mask=ok, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + at)
        unit = loaded.to(tl.float32) * r
        total += dy * unit.to(loaded.dtype).to(tl.float32)
        # The weight is read for each row, from the cache: kept, it would push wide rows out of the registers.
        g = dy * tl.load(weight_ptr + k, mask=ok, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(g * unit, axis=0), K.to(tl.float32))
        tl.store(dx_ptr + at * K + k, ((g - unit * mean) * r).to(dx_ptr.dtype.element_ty), mask=ok)
    tl.store(part_ptr + tl.program_id(0).to(tl.int64) * K + k, total, mask=ok)


def _promoted(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the dtype that its product with x has."""
    return weight.to(torch.promote_types(x.dtype, weight.dtype)).contiguous()


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


class _Results(NamedTuple):
    """Of rows (M, K): int8 (M, K), float32 and int32 (M,); of a norm its result (M, K) if stored, and 1 / rms (M,)."""

    q: Tensor
    inv_scale: Tensor
    row_sum: Tensor
    y: Tensor
    r: Tensor


def _launch(
    x: Tensor, weight: Tensor | None, eps: float = 0.0, *, store_y: bool = False, floor: float = ABSMAX_FLOOR
) -> _Results:
    """Run the kernel over rows (M, K); without a weight they are only quantized."""
    m, k = x.shape
    weight = None if weight is None else _promoted(x, weight)
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    row_sum = torch.empty(m, dtype=torch.int32, device=x.device)
    inv_scale, r = (torch.empty(m, dtype=torch.float32, device=x.device) for _ in range(2))
    # What is not stored still has a dtype, which is compiled in.
    kind = x if weight is None else weight
    y = torch.empty(m, k, dtype=kind.dtype, device=x.device) if store_y else kind
    block = triton.next_power_of_2(k)
    if m:
        rms_norm_quantize_kernel[(m,)](
            x, kind, q, y, inv_scale, row_sum, r, k, x.stride(0), eps, k if store_y else 0,
            NORM=weight is not None, FLOOR=floor, BK=block, num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return _Results(q, inv_scale, row_sum, y, r)


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) as (M, K) whose rows lie together."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # which rows of nothing could not be
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _rows(x: Tensor) -> Tensor:
    rows = rows_of(x)
    if rows.shape[1] > 65536:
        raise ValueError(f"rows of {rows.shape[1]}: the kernel holds at most 65536 in registers")
    return rows


def rms_norm_quantize(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.rms_norm_quantize``."""
    found = _launch(_rows(x), weight, eps)
    return found.q, found.inv_scale[:, None], found.row_sum


@on_its_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) normalized, in the dtype of its product with the weight."""
    return _launch(_rows(x), weight, eps, store_y=True).y.view(x.shape)


def quantize(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """x (M, K) -> q int8 (M, K), inv_scale (M,)."""
    found = _launch(_rows(x), None, floor=floor)
    return found.q, found.inv_scale


def norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) -> y (M, K), q int8 (M, K), inv_scale (M,), 1 / rms (M,)."""
    found = _launch(_rows(x), weight, eps, store_y=True)
    return found.y, found.q, found.inv_scale, found.r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See ``training_ops.rms_norm_backward``. The sum over rows has one order on one kind of device."""
    rows, dy = _rows(x), _rows(dy)
    m, k = rows.shape
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    programs = min(m, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3)
    parts = torch.empty(programs, k, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    if m:
        rms_norm_backward_kernel[(programs,)](
            dy, rows, weight.contiguous(), rstd.contiguous(), dx, parts, m, k, dy.stride(0), rows.stride(0), BK=block,
            num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)
