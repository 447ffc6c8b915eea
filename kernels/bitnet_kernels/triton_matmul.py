"""The packed product on a GPU, in Triton: one kernel for every M, from one token to a long prompt.

Weights are the left operand, ``acc (rows, tokens) += dot(codes (rows, K), x.T (K, tokens))``: then no lane is wasted on
few tokens, and unpacked codes go from registers into the matrix unit. A packed tile of 64 bytes a row yields, plane by
plane, int8 tiles of the same shape and layout by shift and mask alone, written as PTX that treats four bytes at once;
``ASM=False`` is the same in plain Triton. Codes stay unsigned: the sum of the token is subtracted at the end.

Where a matrix has too few rows to fill the device, programs share the sum over K and add their int32 parts by atomics,
which is exact in any order. Group scales accumulate in float32 in ascending order, in one program.

Imported on first use only: a machine without a GPU needs no triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.configurations import Shape, Tile, choose
from bitnet_kernels.formats import BLOCK, FORMATS

MOST_INPUTS = 2**31 - 1
"""Offsets of inputs are int32: more of them are taken in parts."""


def _unpack_asm(bits: int, first: int) -> str:
    """PTX for planes first .. first + 3 of the four packed bytes in a register: shift, and keep `bits` of each byte."""
    mask = {2: "0x03030303", 1: "0x01010101"}[bits]
    lines = []
    for i in range(4):
        shift, source = bits * (first + i), "$4"
        if shift:
            lines.append(f"shr.b32 ${i}, $4, {shift};")
            source = f"${i}"
        lines.append(f"and.b32 ${i}, {source}, {mask};")
    return "{ " + " ".join(lines) + " }"


UNPACK_2: tl.constexpr = tl.constexpr(_unpack_asm(2, 0))
UNPACK_1_LOW: tl.constexpr = tl.constexpr(_unpack_asm(1, 0))
UNPACK_1_HIGH: tl.constexpr = tl.constexpr(_unpack_asm(1, 4))
FOUR_OUTPUTS: tl.constexpr = tl.constexpr(
    "=&r,=&r,=&r,=&r,r"
)  # early clobber: no output may share the input's register


@triton.jit
def _four_planes(packed, FIRST: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Planes FIRST .. FIRST + 3 of a packed tile, as int8 tiles of its shape."""
    if ASM:
        if BITS == 2:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                UNPACK_2, FOUR_OUTPUTS, [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
        elif FIRST == 0:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                UNPACK_1_LOW, FOUR_OUTPUTS, [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                UNPACK_1_HIGH, FOUR_OUTPUTS, [packed], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        c0 = ((packed >> (BITS * FIRST)) & MASK).to(tl.int8, bitcast=True)
        c1 = ((packed >> (BITS * (FIRST + 1))) & MASK).to(tl.int8, bitcast=True)
        c2 = ((packed >> (BITS * (FIRST + 2))) & MASK).to(tl.int8, bitcast=True)
        c3 = ((packed >> (BITS * (FIRST + 3))) & MASK).to(tl.int8, bitcast=True)
    return c0, c1, c2, c3


@triton.jit
def _tokens(x_ptr, at, K, x_row, tokens_ok, p: tl.constexpr, S: tl.constexpr, EVEN_K: tl.constexpr):
    """Activations (bytes, tokens) that meet plane p of the packed bytes whose first plane begins at input ``at``."""
    k = at + p * S
    if EVEN_K:
        return tl.load(x_ptr + k[:, None] + x_row[None, :], mask=tokens_ok[None, :], other=0)
    return tl.load(x_ptr + k[:, None] + x_row[None, :], mask=(k < K)[:, None] & tokens_ok[None, :], other=0)


@triton.jit
def _four_dots(
    acc, packed, x_ptr, at, K, x_row, tokens_ok, FIRST: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr,
    EVEN_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    c0, c1, c2, c3 = _four_planes(packed, FIRST, BITS, ASM)
    acc = tl.dot(c0, _tokens(x_ptr, at, K, x_row, tokens_ok, FIRST, S, EVEN_K), acc, out_dtype=tl.int32)
    acc = tl.dot(c1, _tokens(x_ptr, at, K, x_row, tokens_ok, FIRST + 1, S, EVEN_K), acc, out_dtype=tl.int32)
    acc = tl.dot(c2, _tokens(x_ptr, at, K, x_row, tokens_ok, FIRST + 2, S, EVEN_K), acc, out_dtype=tl.int32)
    return tl.dot(c3, _tokens(x_ptr, at, K, x_row, tokens_ok, FIRST + 3, S, EVEN_K), acc, out_dtype=tl.int32)


@triton.jit
def _store(
    total, out_ptr, x_sum_ptr, x_inv_ptr, w_inv_ptr, rows, tokens, rows_ok, tokens_ok, N,
    SCALED: tl.constexpr, PER_ROW: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The epilogue (see ops.py) of code sums (rows, tokens)."""
    total = total * FACTOR - tl.load(x_sum_ptr + tokens, mask=tokens_ok, other=0)[None, :]
    to = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    ok = rows_ok[:, None] & tokens_ok[None, :]
    if SCALED:
        x_inv = tl.load(x_inv_ptr + tokens, mask=tokens_ok, other=1.0)
        if PER_ROW:
            w_inv = tl.load(w_inv_ptr + rows, mask=rows_ok, other=1.0)
            inv = w_inv[:, None] * x_inv[None, :]
        else:
            inv = (tl.load(w_inv_ptr) * x_inv)[None, :]
        inv = tl.broadcast_to(inv, total.shape)
        tl.store(to, tl.div_rn(total.to(tl.float32), inv).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(to, total, mask=ok)


@triton.jit
def packed_matmul_kernel(
    x_ptr, w_ptr, out_ptr, x_sum_ptr, x_inv_ptr, w_inv_ptr, M, N, K, ROW_BYTES, X_STRIDE, BYTES_PER_PART,
    BITS: tl.constexpr, S: tl.constexpr, SCALED: tl.constexpr, PER_ROW: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, ASM: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One tile of BR rows and BM tokens, over a part of K. S: inputs of a plane of a block; BB: packed bytes a step."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    rows_ok, tokens_ok = rows < N, tokens < M
    byte = tl.arange(0, BB)
    # Input that plane 0 of a byte holds, relative to the step's first: planes of a block lie S apart, blocks 256.
    in_step = byte // S * 256 + byte % S
    w_row = w_ptr + rows[:, None].to(tl.int64) * ROW_BYTES + byte[None, :]
    x_row = tokens * X_STRIDE
    acc = tl.zeros((BR, BM), dtype=tl.int32)
    first = tl.program_id(2) * BYTES_PER_PART
    last = tl.minimum(first + BYTES_PER_PART, ROW_BYTES)
    for start in range(first, last, BB):
        if EVEN_K:
            packed = tl.load(w_row + start, mask=rows_ok[:, None], other=0)
        else:
            packed = tl.load(w_row + start, mask=rows_ok[:, None] & (start + byte < ROW_BYTES)[None, :], other=0)
        at = start // S * 256 + in_step
        acc = _four_dots(acc, packed, x_ptr, at, K, x_row, tokens_ok, 0, BITS, S, EVEN_K, ASM)
        if BITS == 1:
            acc = _four_dots(acc, packed, x_ptr, at, K, x_row, tokens_ok, 4, BITS, S, EVEN_K, ASM)
    if SPLIT:
        to = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
        tl.atomic_add(to, acc, mask=rows_ok[:, None] & tokens_ok[None, :], sem="relaxed")
    else:
        _store(
            acc, out_ptr, x_sum_ptr, x_inv_ptr, w_inv_ptr, rows, tokens, rows_ok, tokens_ok, N,
            SCALED, PER_ROW, 3 - BITS,
        )  # fmt: skip


@triton.jit
def epilogue_kernel(
    total_ptr, out_ptr, x_sum_ptr, x_inv_ptr, w_inv_ptr, M, N,
    SCALED: tl.constexpr, PER_ROW: tl.constexpr, FACTOR: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Code sums that several programs have added up, int32 (M, N) -> results."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    rows_ok, tokens_ok = rows < N, tokens < M
    at = total_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    total = tl.load(at, mask=rows_ok[:, None] & tokens_ok[None, :], other=0)
    _store(
        total, out_ptr, x_sum_ptr, x_inv_ptr, w_inv_ptr, rows, tokens, rows_ok, tokens_ok, N, SCALED, PER_ROW, FACTOR
    )


@triton.jit
def _one_plane(
    y, part, codes, group, x_ptr, at, K, x_row, tokens, tokens_ok, rows, rows_ok, group_sum_ptr, scale_ptr, GROUPS,
    GROUP_SIZE, first_k, p: tl.constexpr, S: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Add plane p to the running int32 sum; where a group ends with it, move the sum, scaled, to the float32 result."""
    part = tl.dot(codes, _tokens(x_ptr, at, K, x_row, tokens_ok, p, S, False), part, out_dtype=tl.int32)
    end = first_k + (p + 1) * S
    ends = (end % GROUP_SIZE == 0) | (end >= K)
    if ends & (group < GROUPS):
        x_sum = tl.load(group_sum_ptr + tokens * GROUPS + group, mask=tokens_ok, other=0)
        scale = tl.load(scale_ptr + rows * GROUPS + group, mask=rows_ok, other=0.0)
        y += (part * FACTOR - x_sum[None, :]).to(tl.float32) * scale[:, None]
        part = tl.zeros_like(part)
        group += 1
    return y, part, group


@triton.jit
def grouped_matmul_kernel(
    x_ptr, w_ptr, out_ptr, group_sum_ptr, scale_ptr, x_inv_ptr, M, N, K, ROW_BYTES, X_STRIDE, GROUPS, GROUP_SIZE,
    BITS: tl.constexpr, S: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """As ``packed_matmul_kernel`` with a scale per group of inputs; S packed bytes, one block, a step."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    rows_ok, tokens_ok = rows < N, tokens < M
    byte = tl.arange(0, S)
    w_row = w_ptr + rows[:, None].to(tl.int64) * ROW_BYTES + byte[None, :]
    x_row = tokens * X_STRIDE
    part = tl.zeros((BR, BM), dtype=tl.int32)
    y = tl.zeros((BR, BM), dtype=tl.float32)
    group = 0
    FACTOR: tl.constexpr = 3 - BITS
    for start in range(0, ROW_BYTES, S):
        packed = tl.load(w_row + start, mask=rows_ok[:, None], other=0)
        first_k = start // S * 256
        at = first_k + byte
        for half in tl.static_range(0, 8 // BITS, 4):
            c0, c1, c2, c3 = _four_planes(packed, half, BITS, ASM)
            y, part, group = _one_plane(
                y, part, c0, group, x_ptr, at, K, x_row, tokens, tokens_ok, rows, rows_ok, group_sum_ptr, scale_ptr,
                GROUPS, GROUP_SIZE, first_k, half, S, FACTOR,
            )  # fmt: skip
            y, part, group = _one_plane(
                y, part, c1, group, x_ptr, at, K, x_row, tokens, tokens_ok, rows, rows_ok, group_sum_ptr, scale_ptr,
                GROUPS, GROUP_SIZE, first_k, half + 1, S, FACTOR,
            )  # fmt: skip
            y, part, group = _one_plane(
                y, part, c2, group, x_ptr, at, K, x_row, tokens, tokens_ok, rows, rows_ok, group_sum_ptr, scale_ptr,
                GROUPS, GROUP_SIZE, first_k, half + 2, S, FACTOR,
            )  # fmt: skip
            y, part, group = _one_plane(
                y, part, c3, group, x_ptr, at, K, x_row, tokens, tokens_ok, rows, rows_ok, group_sum_ptr, scale_ptr,
                GROUPS, GROUP_SIZE, first_k, half + 3, S, FACTOR,
            )  # fmt: skip
    if SCALED:
        x_inv = tl.load(x_inv_ptr + tokens, mask=tokens_ok, other=1.0)
        y = tl.div_rn(y, tl.broadcast_to(x_inv[None, :], y.shape))
    to = out_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=rows_ok[:, None] & tokens_ok[None, :])


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    k: int,
    x_inv_scale: Tensor | None = None,
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
    row_sum: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    asm: bool = True,
) -> Tensor:
    """See ``ops.packed_matmul``, which has checked the arguments. ``tile`` and ``asm`` are for tests and tuning."""
    m, planes = x.shape[0], FORMATS[format].planes
    x = x if x.stride(-1) == 1 else x.contiguous()
    packed = packed.contiguous()
    if m > 1 and m * x.stride(0) > MOST_INPUTS:
        parts = []
        for rows in (slice(m // 2), slice(m // 2, m)):
            x_inv, sums = (None if t is None else t[rows] for t in (x_inv_scale, row_sum))
            scales = x_inv, w_inv_scale, group_scale, group_size
            parts.append(packed_matmul(x[rows], packed, format, n, k, *scales, sums, out_dtype, tile, asm))
        return torch.cat(parts)
    if group_scale is not None:
        return _grouped(x, packed, planes, n, k, x_inv_scale, group_scale, group_size, out_dtype, asm)
    scaled = x_inv_scale is not None
    out = torch.empty(m, n, dtype=(out_dtype or torch.float32) if scaled else torch.int32, device=x.device)
    if m == 0 or n == 0:
        return out
    row_sum = x.sum(dim=-1, dtype=torch.int32) if row_sum is None else row_sum.contiguous()
    row_bytes = packed.shape[1]
    tile = tile or choose(Shape(architecture(x), m, n, row_bytes), planes)
    steps = -(-row_bytes // tile.bytes)
    split = min(tile.split_k, steps)
    part = -(-steps // split) * tile.bytes
    to = torch.zeros(m, n, dtype=torch.int32, device=x.device) if split > 1 else out
    x_inv, w_inv = (row_sum if s is None else s.contiguous() for s in (x_inv_scale, w_inv_scale))
    per_row = scaled and w_inv.numel() > 1
    packed_matmul_kernel[(-(-n // tile.rows), -(-m // tile.tokens), split)](
        x, packed, to, row_sum, x_inv, w_inv, m, n, k, row_bytes, x.stride(0), part,
        BITS=8 // planes, S=BLOCK // planes, SCALED=scaled, PER_ROW=per_row, SPLIT=split > 1,
        EVEN_K=k % BLOCK == 0 and row_bytes % tile.bytes == 0, ASM=asm, BR=tile.rows, BM=tile.tokens, BB=tile.bytes,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split > 1:
        epilogue_kernel[(-(-n // 128), -(-m // 16))](
            to, out, row_sum, x_inv, w_inv, m, n, SCALED=scaled, PER_ROW=per_row, FACTOR=3 - 8 // planes, BR=128, BM=16,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _grouped(
    x: Tensor,
    packed: Tensor,
    planes: int,
    n: int,
    k: int,
    x_inv_scale: Tensor | None,
    group_scale: Tensor,
    group_size: int,
    out_dtype: torch.dtype | None,
    asm: bool,
) -> Tensor:
    m, groups = x.shape[0], group_scale.shape[1]
    out = torch.empty(m, n, dtype=out_dtype or torch.float32, device=x.device)
    if m == 0 or n == 0:
        return out
    padded = torch.nn.functional.pad(x, (0, groups * group_size - k))
    group_sum = padded.view(m, groups, group_size).sum(dim=-1, dtype=torch.int32)
    x_inv = group_scale if x_inv_scale is None else x_inv_scale.contiguous()
    tokens = 16 if m <= 16 else 32
    grouped_matmul_kernel[(-(-n // 64), -(-m // tokens))](
        x, packed, out, group_sum, group_scale.contiguous(), x_inv, m, n, k, packed.shape[1], x.stride(0), groups,
        group_size, BITS=8 // planes, S=BLOCK // planes, SCALED=x_inv_scale is not None, ASM=asm, BR=64, BM=tokens,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def architecture(x: Tensor) -> int:
    """The compute capability of the device of x: 90 for 9.0."""
    if not x.is_cuda:
        return 90  # interpreted: any table will do
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor
