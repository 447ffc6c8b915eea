"""int8 x int8 on a GPU, for training, in Triton: one kernel for the forward, the gradient of x and that of the weight.

A matrix unit reads int8 operands along the sum: both must lie with K innermost ("NT"). Training has three products::

    y  (M, N) = x_q (M, K) . w_q (N, K)      sum over K
    dx (M, K) = dy_q (M, N) . w_q_t (K, N)   sum over N
    dw (N, K) = dy_q_t (N, M) . x_q_t (K, M) sum over M

so the quantizers store a transposed int8 copy where one is wanted (``triton_training.py``), and no product has to turn
bytes around in registers, which is slow on every architecture before 10.0.

Neighbouring programs take the tiles of a few rows of tiles, column by column, so that what they read is still in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.configurations import Int8Tile, int8_tile
from bitnet_kernels.triton_matmul import architecture
from bitnet_kernels.triton_norm import rows_of


@triton.jit
def _tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of the program's tile: GROUP rows of tiles are worked off column by column."""
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit(do_not_specialize_on_alignment=["inv_ptr"])  # one of many scales that lie side by side
def int8_matmul_kernel(
    a_ptr, b_ptr, out_ptr, row_inv_ptr, inv_ptr, M, N, K, A_STRIDE, B_STRIDE, OUT_STRIDE,
    ONE_SCALE: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BM, BN) of ``float32(a . b) / (row_inv_scale * inv_scale)``; without ONE_SCALE, of a . b / row_inv."""
    row_tile, column_tile = _tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rows, columns = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    rows_ok, columns_ok = rows < M, columns < N
    k = tl.arange(0, BK)
    a_at = a_ptr + rows[:, None].to(tl.int64) * A_STRIDE + k[None, :]
    b_at = b_ptr + columns[None, :].to(tl.int64) * B_STRIDE + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        if EVEN_K:
            a = tl.load(a_at + start, mask=rows_ok[:, None], other=0)
            b = tl.load(b_at + start, mask=columns_ok[None, :], other=0)
        else:
            k_ok = start + k < K
            a = tl.load(a_at + start, mask=rows_ok[:, None] & k_ok[None, :], other=0)
            b = tl.load(b_at + start, mask=columns_ok[None, :] & k_ok[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    inv = tl.load(row_inv_ptr + rows, mask=rows_ok, other=1.0)
    if ONE_SCALE:
        inv *= tl.load(inv_ptr)
    y = tl.div_rn(acc.to(tl.float32), tl.broadcast_to(inv[:, None], acc.shape))
    to = out_ptr + rows[:, None].to(tl.int64) * OUT_STRIDE + columns[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & columns_ok[None, :])


def int8_matmul(
    a: Tensor,
    b: Tensor,
    row_inv_scale: Tensor,
    inv_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Int8Tile | None = None,
) -> Tensor:
    """See ``training_ops.int8_matmul``, which has checked the arguments. ``tile`` is for tests and tuning."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=out_dtype or torch.float32, device=a.device)
    if m == 0 or n == 0:
        return out
    a, b, row_inv = rows_of(a), rows_of(b), row_inv_scale.contiguous()
    tile = tile or int8_tile(architecture(a), m)
    int8_matmul_kernel[(-(-m // tile.rows) * -(-n // tile.columns),)](
        a, b, out, row_inv, row_inv if inv_scale is None else inv_scale, m, n, k, a.stride(0), b.stride(0), n,
        ONE_SCALE=inv_scale is not None, EVEN_K=k % tile.depth == 0, BM=tile.rows, BN=tile.columns, BK=tile.depth,
        GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
