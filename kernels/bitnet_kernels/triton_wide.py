"""The output head of a model on a GPU: few tokens times a wide matrix stored in 8 or 16 bits, in Triton.

One token reads the whole matrix once, so the bytes are the cost; weights become float32 in registers and the
activations are not rounded. Each program takes some rows and one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.devices import on_its_device


@triton.jit
def wide_matmul_kernel(x_ptr, w_ptr, scale_ptr, y_ptr, N, K, SCALED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(1)
    rows_ok = rows < N
    k = tl.arange(0, BK)
    w_row = w_ptr + rows[:, None].to(tl.int64) * K
    total = tl.zeros((BR, BK), dtype=tl.float32)
    for start in range(0, K, BK):
        ok = start + k < K
        x = tl.load(x_ptr + token * K + start + k, mask=ok, other=0.0).to(tl.float32)
        w = tl.load(w_row + (start + k)[None, :], mask=rows_ok[:, None] & ok[None, :], other=0).to(tl.float32)
        total += w * x[None, :]
    y = tl.sum(total, axis=1)
    if SCALED:
        y *= tl.load(scale_ptr + rows, mask=rows_ok, other=0.0)
    tl.store(y_ptr + token.to(tl.int64) * N + rows, y, mask=rows_ok)


@on_its_device
def wide_matmul(x: Tensor, w: Tensor, scale: Tensor | None) -> Tensor:
    """x floating (M, K) times w int8, float16 or bfloat16 (N, K), with a factor a row or none -> float32 (M, N)."""
    m, n, k = x.shape[0], w.shape[0], x.shape[1]
    x, w = x.contiguous(), w.contiguous()
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    if m and n:
        wide_matmul_kernel[(-(-n // 16), m)](
            x, w, w if scale is None else scale, y, n, k, SCALED=scale is not None, BR=16, BK=256, num_warps=4
        )
    return y
