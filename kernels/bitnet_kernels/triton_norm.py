"""RMSNorm, absmax and int8 rounding of activations on a GPU, one program a token, in Triton; and the norm's backward.

``rms_norm`` is the same kernel stopped before the rounding. A model on a GPU uses it wherever it runs without
gradients, so that the norm of the model as trained and the fused one add in the same order and give the same bits.
``norm_quantize`` is the same kernel once more, which also keeps what a backward needs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, weight_ptr, q_ptr, y_ptr, inv_scale_ptr, row_sum_ptr, r_ptr, K, X_STRIDE, eps,
    NORM: tl.constexpr, QUANTIZE: tl.constexpr, STORE_Y: tl.constexpr, STORE_R: tl.constexpr, STORE_SUM: tl.constexpr,
    FLOOR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
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
        if STORE_R:
            tl.store(r_ptr + row, r)
    if STORE_Y:
        tl.store(y_ptr + row * K + k, y.to(y_ptr.dtype.element_ty), mask=ok)
    if QUANTIZE:
        # As integers, magnitudes compare the same and NaN is largest.
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        finite, inv_scale = scale_of(tl.max(bits, axis=0), FLOOR)
        q = tl.where(ok, rounded(y, inv_scale, finite), 0)
        tl.store(q_ptr + row * K + k, q.to(tl.int8), mask=ok)
        tl.store(inv_scale_ptr + row, tl.where(finite, inv_scale, float("nan")))
        if STORE_SUM:
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


def _launch(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    q: Tensor | None = None,
    y: Tensor | None = None,
    inv_scale: Tensor | None = None,
    row_sum: Tensor | None = None,
    r: Tensor | None = None,
    floor: float = ABSMAX_FLOOR,
) -> None:
    """Run the kernel; an output that is not given is not computed."""
    m, k = x.shape
    block = triton.next_power_of_2(k)
    # Where there is no tensor the kernel gets x, and does not touch it.
    weight_or_x, q_or_x, y_or_x, inv_or_x, sum_or_x, r_or_x = (
        x if t is None else t for t in (weight, q, y, inv_scale, row_sum, r)
    )
    if m:
        rms_norm_quantize_kernel[(m,)](
            x, weight_or_x, q_or_x, y_or_x, inv_or_x, sum_or_x, r_or_x, k, x.stride(0), eps,
            NORM=weight is not None, QUANTIZE=q is not None, STORE_Y=y is not None, STORE_R=r is not None,
            STORE_SUM=row_sum is not None, FLOOR=floor, BK=block, num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[1] > 65536:
        raise ValueError(f"rows of {rows.shape[1]}: the kernel holds at most 65536 in registers")
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def rms_norm_quantize(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.rms_norm_quantize``."""
    rows = _rows(x)
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    inv_scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
    row_sum = torch.empty(rows.shape[0], dtype=torch.int32, device=x.device)
    _launch(rows, None if weight is None else _promoted(x, weight), eps, q=q, inv_scale=inv_scale, row_sum=row_sum)
    return q, inv_scale, row_sum


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) normalized, in the dtype of its product with the weight."""
    rows, weight = _rows(x), _promoted(x, weight)
    out = torch.empty(rows.shape, dtype=weight.dtype, device=x.device)
    _launch(rows, weight, eps, y=out)
    return out.view(x.shape)


def quantize(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """x (M, K) -> q int8 (M, K), inv_scale (M,)."""
    rows = _rows(x)
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    inv_scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    _launch(rows, None, 0.0, q=q, inv_scale=inv_scale, floor=floor)
    return q, inv_scale


def norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) -> y (M, K), q int8 (M, K), inv_scale (M,), 1 / rms (M,)."""
    rows, weight = _rows(x), _promoted(x, weight)
    y = torch.empty(rows.shape, dtype=weight.dtype, device=x.device)
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    inv_scale, r = (torch.empty(rows.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(rows, weight, eps, q=q, y=y, inv_scale=inv_scale, r=r)
    return y, q, inv_scale, r


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
