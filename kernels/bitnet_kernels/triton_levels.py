"""Many latent weight matrices on a GPU, quantized together, in Triton: three kernels for a whole model.

One matrix at a time, scale and levels take some thirty launches of torch's operations, and a model has a hundred
matrices: a training step of a small model then waits for the CPU that launches. Here a program looks up in a table
which matrix it works on and where.

The scale of a matrix is the mean of magnitudes that are rounded to multiples of 2^-40, and so are the weights in the
mean of a binary one. Their sum is one of integers: it has no order, and is that of ``bitnet.quantizers.exact_sums``.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.devices import on_its_device
from bitnet_kernels.reference import ABSMAX_FLOOR
from bitnet_kernels.triton_norm import rounded

CHUNK = 4096
"""Weights of a program."""

ALIGNMENT = 256
"""Bytes: where the levels of a matrix begin, so that products read them by 16."""

LARGEST = tl.constexpr(2.0**22)
"""From here on a weight counts as not finite: sums of as many as 2^25 such integers still fit 64 bits."""


@triton.jit
def level_of(w, statistic, BINARY: tl.constexpr):
    """int8: ``clamp(round(w * statistic), -1, 1)``, or 1 where w > statistic, else -1; what is not finite gives 0."""
    if BINARY:
        finite = tl.abs(statistic) < float("inf")
        q = tl.where(finite, tl.where(w > statistic, 1, -1), 0)
    else:
        scaled = w * statistic
        # Clamped before it is rounded, which is the same; NaN goes to 0.
        scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -1.0), 1.0), 0.0)
        q = rounded(scaled, 1.0, scaled == scaled)
    return q.to(tl.int8)


@triton.jit
def _chunk(w_ptrs, counts_ptr, matrix_ptr, first_ptr, CHUNK: tl.constexpr):
    """The matrix of this program, places in it, which of them exist, and the weights there."""
    program = tl.program_id(0)
    matrix = tl.load(matrix_ptr + program)
    at = (program - tl.load(first_ptr + matrix)).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    ok = at < tl.load(counts_ptr + matrix)
    w = tl.load(tl.load(w_ptrs + matrix).to(tl.pointer_type(tl.float32)) + at, mask=ok, other=0.0)
    return matrix, at, ok, w


@triton.jit
def _add_pair(to, integers):
    """Add the sum of int64 integers to a pair that counts 2^26 and 1."""
    high = integers >> 26
    tl.atomic_add(to, tl.sum(high, axis=0), sem="relaxed")
    tl.atomic_add(to + 1, tl.sum(integers - (high << 26), axis=0), sem="relaxed")


@triton.jit
def sums_kernel(w_ptrs, counts_ptr, matrix_ptr, first_ptr, sums_ptr, BINARY: tl.constexpr, CHUNK: tl.constexpr):
    """int64 (matrices, 5), over zeros: the pair of magnitudes, that of the weights, and how many are not finite."""
    matrix, _, _, w = _chunk(w_ptrs, counts_ptr, matrix_ptr, first_ptr, CHUNK)
    finite = tl.abs(w) < LARGEST
    x = tl.where(finite, w, 0.0).to(tl.float64) * 1099511627776.0  # 2^40
    # 1.5 * 2^52: adding it leaves the integer, rounded half to even, in the lowest bits. Above 2^51 x is an integer.
    x = tl.where(tl.abs(x) < 2251799813685248.0, (x + 6755399441055744.0) - 6755399441055744.0, x)
    integers = x.to(tl.int64)
    to = sums_ptr + 5 * matrix
    _add_pair(to, tl.where(integers < 0, -integers, integers))
    if BINARY:
        _add_pair(to + 2, integers)
    tl.atomic_add(to + 4, tl.sum(tl.where(finite, 0, 1).to(tl.int64), axis=0), sem="relaxed")


@triton.jit
def _mean(pair, count):
    """Float32 mean, of integers that count 2^-40; rounded to float64 before."""
    total = tl.load(pair).to(tl.float64) * 67108864.0 + tl.load(pair + 1).to(tl.float64)  # 2^26
    return (total / (count.to(tl.float64) * 1099511627776.0)).to(tl.float32)


@triton.jit
def scales_kernel(counts_ptr, sums_ptr, scales_ptr, BINARY: tl.constexpr, FLOOR: tl.constexpr):
    """Float32 (matrices, 2): ``1 / max(mean|w|, FLOOR)``, and the mean of the weights, or 0 where it is not used."""
    matrix = tl.program_id(0)
    sums, count = sums_ptr + 5 * matrix, tl.load(counts_ptr + matrix)
    finite = tl.load(sums + 4) == 0
    inv_scale = tl.div_rn(1.0, tl.maximum(_mean(sums, count), FLOOR))
    tl.store(scales_ptr + 2 * matrix, tl.where(finite, inv_scale, float("nan")))
    if BINARY:
        tl.store(scales_ptr + 2 * matrix + 1, tl.where(finite, _mean(sums + 2, count), float("nan")))
    else:
        tl.store(scales_ptr + 2 * matrix + 1, 0.0)


@triton.jit
def levels_kernel(
    w_ptrs, counts_ptr, matrix_ptr, first_ptr, scales_ptr, q_ptr, q_at_ptr, BINARY: tl.constexpr, CHUNK: tl.constexpr
):
    matrix, at, ok, w = _chunk(w_ptrs, counts_ptr, matrix_ptr, first_ptr, CHUNK)
    statistic = tl.load(scales_ptr + 2 * matrix + BINARY)
    q = level_of(w, statistic, BINARY)
    tl.store(q_ptr + tl.load(q_at_ptr + matrix) + at, q, mask=ok)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Which program works where: on the device, but for the numbers."""

    pointers: Tensor
    counts: Tensor
    matrix: Tensor
    """Of each program, int32 (programs,)."""
    first: Tensor
    """Program of each matrix, int32 (matrices,)."""
    q_at: Tensor
    """Where its levels begin, int64 (matrices,)."""
    places: tuple[int, ...]
    size: int
    """Bytes of all levels."""


@functools.lru_cache(maxsize=1024)
def _table(matrices: tuple[tuple[int, int], ...], device: torch.device) -> _Table:
    """For matrices given by address and number of weights: an optimizer changes neither."""
    places: list[int] = []
    first: list[int] = []
    matrix: list[int] = []
    end = 0
    for i, (_, count) in enumerate(matrices):
        places.append(end)
        first.append(len(matrix))
        matrix += [i] * -(-count // CHUNK)
        end += -(-count // ALIGNMENT) * ALIGNMENT

    def on_device(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return _Table(
        pointers=on_device([pointer for pointer, _ in matrices], torch.int64),
        counts=on_device([count for _, count in matrices], torch.int64),
        matrix=on_device(matrix, torch.int32), first=on_device(first, torch.int32),
        q_at=on_device(places, torch.int64), places=tuple(places), size=end,
    )  # fmt: skip


def _tables(ws: list[Tensor]) -> _Table:
    return _table(tuple((w.data_ptr(), w.numel()) for w in ws), ws[0].device)


def _options(binary: bool) -> dict[str, object]:
    return {"BINARY": binary, "num_warps": 8, "enable_fp_fusion": False}


@on_its_device
def matrix_scales(ws: list[Tensor], binary: bool) -> Tensor:
    """Matrices, float32 and contiguous, on one device -> float32 (matrices, 2): what their levels are rounded by.

    ``inv_scale = 1 / max(mean|w|, 1e-5)``, and for binary the mean of the weights, else 0. With a weight that is not
    finite, or 4 million and more, they are NaN.
    """
    table, device = _tables(ws), ws[0].device
    sums = torch.zeros(len(ws), 5, dtype=torch.int64, device=device)
    scales = torch.empty(len(ws), 2, dtype=torch.float32, device=device)
    sums_kernel[(table.matrix.numel(),)](
        table.pointers, table.counts, table.matrix, table.first, sums, CHUNK=CHUNK, **_options(binary)
    )
    scales_kernel[(len(ws),)](table.counts, sums, scales, FLOOR=ABSMAX_FLOOR, **_options(binary))
    return scales


@on_its_device
def quantize_matrices(ws: list[Tensor], binary: bool) -> tuple[list[Tensor], Tensor]:
    """Matrices as for ``matrix_scales`` -> their levels, int8 of the same shapes, and their scales.

    Levels are ``clamp(round(w * inv_scale), -1, 1)``, or 1 where w > mean, else -1; all 0 where the scale is NaN.
    """
    table, scales = _tables(ws), matrix_scales(ws, binary)
    q = torch.empty(table.size, dtype=torch.int8, device=scales.device)
    levels_kernel[(table.matrix.numel(),)](
        table.pointers, table.counts, table.matrix, table.first, scales, q, table.q_at, CHUNK=CHUNK, **_options(binary)
    )
    parts = [q[at : at + w.numel()].view(w.shape) for w, at in zip(ws, table.places, strict=True)]
    return parts, scales
