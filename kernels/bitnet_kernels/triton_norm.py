"""RMSNorm, absmax and int8 rounding of activations on a GPU, one program a token, in Triton.

``rms_norm`` is the same kernel stopped before the rounding. A model on a GPU uses it wherever it runs without
gradients, so that the norm of the model as trained and the fused one add in the same order and give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, weight_ptr, q_ptr, inv_scale_ptr, row_sum_ptr, K, X_STRIDE, eps,
    NORM: tl.constexpr, QUANTIZE: tl.constexpr, BK: tl.constexpr,
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
    if QUANTIZE:
        # As integers, magnitudes compare the same and NaN is largest.
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(bits, axis=0)
        finite = largest < 0x7F800000
        absmax = largest.to(tl.float32, bitcast=True)
        inv_scale = tl.div_rn(1.0, tl.maximum(absmax, 1e-5)) * 127.0
        inv_scale = tl.where(finite, inv_scale, 0.0)
        # 1.5 * 2^23: adding it leaves the integer, rounded half to even, in the lowest bits.
        shifted = tl.where(finite, y, 0.0) * inv_scale + 12582912.0
        q = (shifted - 12582912.0).to(tl.int32)
        q = tl.where(ok, q, 0)
        tl.store(q_ptr + row * K + k, q.to(tl.int8), mask=ok)
        tl.store(inv_scale_ptr + row, tl.where(finite, inv_scale, float("nan")))
        tl.store(row_sum_ptr + row, tl.sum(q, axis=0))
    else:
        tl.store(q_ptr + row * K + k, y.to(q_ptr.dtype.element_ty), mask=ok)


def _promoted(x: Tensor, weight: Tensor) -> Tensor:
    """The weight in the dtype that its product with x has."""
    return weight.to(torch.promote_types(x.dtype, weight.dtype)).contiguous()


def _launch(
    x: Tensor, weight: Tensor | None, eps: float, out: Tensor, inv_scale: Tensor, row_sum: Tensor, quantize: bool
) -> None:
    m, k = x.shape
    block = triton.next_power_of_2(k)
    if m:
        rms_norm_quantize_kernel[(m,)](
            x, x if weight is None else weight, out, inv_scale, row_sum, k, x.stride(0), eps,
            NORM=weight is not None, QUANTIZE=quantize, BK=block,
            num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
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
    _launch(rows, None if weight is None else _promoted(x, weight), eps, q, inv_scale, row_sum, True)
    return q, inv_scale, row_sum


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) normalized, in the dtype of its product with the weight."""
    rows, weight = _rows(x), _promoted(x, weight)
    out = torch.empty(rows.shape, dtype=weight.dtype, device=x.device)
    _launch(rows, weight, eps, out, out, out, False)
    return out.view(x.shape)
