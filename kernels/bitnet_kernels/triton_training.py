"""Quantizers of int8 training on a GPU, in Triton: gradients by column, weights, and transposed copies of both.

The products want both operands along their sum (``triton_int8.py``), so a matrix that enters two products is stored
twice, as it is and transposed. A tile is read along its rows and written along its columns: the bytes change places in
shared memory, once, where they are made, instead of in every product that reads them.

Rows are quantized by the kernel of the norm, one program a row; a row does not end within a tile, so its transposed
copy is made from the int8 rows, a quarter to a half of the bytes of x. Columns take two passes over x: the largest
magnitude of each column, by atomics on float32 bits as integers (a maximum is the same in any order), then the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels import triton_norm
from bitnet_kernels.triton_levels import level_of
from bitnet_kernels.triton_norm import rounded, rows_of, scale_of

TILE = 64
"""Rows and columns of a tile that is transposed: 64 bytes are two sectors of memory in either direction."""

COLUMN_TILE = (64, 128)
"""Rows and columns of a tile of a quantizer by column. Wider than high, it needs fewest instructions an element."""


@triton.jit
def _store_transposed(q, q_t_ptr, rows, columns, M, N):
    """An int8 tile (rows, columns) of a matrix (M, N), to the matrix (N, M)."""
    at = q_t_ptr + columns[:, None].to(tl.int64) * M + rows[None, :]
    tl.store(at, tl.trans(q), mask=(columns < N)[:, None] & (rows < M)[None, :])


@triton.jit
def transpose_kernel(q_ptr, q_t_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (rows < M)[:, None] & (columns < N)[None, :]
    q = tl.load(q_ptr + rows[:, None].to(tl.int64) * N + columns[None, :], mask=ok, other=0)
    _store_transposed(q, q_t_ptr, rows, columns, M, N)


@triton.jit
def _over_row_scale(x_ptr, row_inv_ptr, rows, columns, M, N, X_STRIDE, DIVIDE: tl.constexpr):
    """A tile of x / row_inv_scale, float32; 0 outside the matrix."""
    ok = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * X_STRIDE + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    if DIVIDE:
        inv = tl.load(row_inv_ptr + rows, mask=rows < M, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(inv[:, None], x.shape))
    return x


@triton.jit
def column_largest_kernel(
    x_ptr, row_inv_ptr, largest_ptr, M, N, X_STRIDE, DIVIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Largest magnitude of each column, as int32 bits, over zeros: NaN is largest of all."""
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    x = _over_row_scale(x_ptr, row_inv_ptr, rows, columns, M, N, X_STRIDE, DIVIDE)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    tl.atomic_max(largest_ptr + columns, largest, mask=columns < N, sem="relaxed")


@triton.jit
def column_quantize_kernel(
    x_ptr, row_inv_ptr, largest_ptr, q_t_ptr, inv_scale_ptr, M, N, X_STRIDE,
    DIVIDE: tl.constexpr, FLOOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    x = _over_row_scale(x_ptr, row_inv_ptr, rows, columns, M, N, X_STRIDE, DIVIDE)
    # Beyond the matrix there may be 0 / NaN: these columns count as not finite.
    finite, inv_scale = scale_of(tl.load(largest_ptr + columns, mask=columns < N, other=0x7FFFFFFF), FLOOR)
    q = rounded(x, inv_scale[None, :], finite[None, :])
    _store_transposed(q.to(tl.int8), q_t_ptr, rows, columns, M, N)
    if tl.program_id(0) == 0:
        tl.store(inv_scale_ptr + columns, tl.where(finite, inv_scale, float("nan")), mask=columns < N)


@triton.jit
def weight_kernel(
    w_ptr, statistic_ptr, q_ptr, q_t_ptr, N, K, W_STRIDE, BINARY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (rows < N)[:, None] & (columns < K)[None, :]
    w = tl.load(w_ptr + rows[:, None].to(tl.int64) * W_STRIDE + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    q = level_of(w, tl.load(statistic_ptr), BINARY)
    tl.store(q_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], q, mask=ok)
    _store_transposed(q, q_t_ptr, rows, columns, N, K)


def _tiles(m: int, n: int, rows: int = TILE, columns: int = TILE) -> tuple[int, int]:
    return -(-m // rows), -(-n // columns)


def transpose(q: Tensor, wanted: bool = True) -> Tensor:
    """Contiguous int8 (M, N) -> contiguous (N, M), or an empty tensor where it is not wanted."""
    m, n = q.shape
    q_t = torch.empty((n, m) if wanted else (0,), dtype=torch.int8, device=q.device)
    if q_t.numel():
        transpose_kernel[_tiles(m, n)](q, q_t, m, n, BM=TILE, BN=TILE, num_warps=4)
    return q_t


def quantize_rows(x: Tensor, transposed: bool, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """See ``training_ops.quantize_rows``."""
    q, inv_scale = triton_norm.quantize(x, floor)
    return q, inv_scale, transpose(q, transposed)


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``training_ops.norm_quantize``."""
    y, q, inv_scale, rstd = triton_norm.norm_quantize(x, weight, eps)
    return y, q, inv_scale, rstd, transpose(q, transposed)


def quantize_columns(x: Tensor, row_inv_scale: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    """See ``training_ops.quantize_columns``."""
    x, (m, n) = rows_of(x), x.shape
    divide = row_inv_scale is not None
    row_inv = x if row_inv_scale is None else row_inv_scale.contiguous()
    largest = torch.zeros(n, dtype=torch.int32, device=x.device)
    q_t = torch.empty(n, m, dtype=torch.int8, device=x.device)
    inv_scale = torch.empty(n, dtype=torch.float32, device=x.device)
    rows, columns = COLUMN_TILE
    options = {"DIVIDE": divide, "BM": rows, "BN": columns, "num_warps": 4, "enable_fp_fusion": False}
    grid = _tiles(max(m, 1), n, rows, columns)  # without rows there are still scales
    column_largest_kernel[grid](x, row_inv, largest, m, n, x.stride(0), **options)
    column_quantize_kernel[grid](x, row_inv, largest, q_t, inv_scale, m, n, x.stride(0), FLOOR=floor, **options)
    return q_t, inv_scale


def ternary_weight(w: Tensor, inv_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See ``training_ops.ternary_weight``."""
    return _weight(w, inv_scale, False)


def binary_weight(w: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """See ``training_ops.binary_weight``."""
    return _weight(w, mean, True)


def _weight(w: Tensor, statistic: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
    w, (n, k) = rows_of(w), w.shape
    q = torch.empty(n, k, dtype=torch.int8, device=w.device)
    q_t = torch.empty(k, n, dtype=torch.int8, device=w.device)
    weight_kernel[_tiles(n, k)](
        w, statistic, q, q_t, n, k, w.stride(0), BINARY=binary, BM=TILE, BN=TILE, num_warps=4, enable_fp_fusion=False
    )
    return q, q_t
