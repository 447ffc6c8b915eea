"""What a decoding step does between its products on a GPU, in Triton: few kernels, because a launch is what each costs.

One new token a sequence. ``rotate_and_append`` turns the query and the key by their position and puts key and value in
their place in the cache; ``attend`` reads the cache up to there; ``relu2_gate`` is the gate of a feed-forward network.
A place is read from memory, so that a CUDA graph can be replayed for the next one. Where torch's operations round to
the dtype of their operands, so do these; the sums of attention have an order of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitnet_kernels.devices import on_its_device
from bitnet_kernels.triton_norm import rows_of

BLOCK = 64
"""Places of the cache that are read at a time."""


@triton.jit
def _turned(a, b, cos, sin, dtype: tl.constexpr):
    """``a * cos + b * sin`` as torch rounds it in ``dtype``, for float32 that hold such values; cosine and sine any."""
    one = (a * cos.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    other = (b * sin.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (one + other).to(dtype)


@triton.jit
def rotate_and_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, keys_ptr, values_ptr, place_ptr,
    H, G, Q_STRIDE, K_STRIDE, V_STRIDE, ANGLE_STRIDE, CACHE_STRIDE, HEAD_STRIDE, HALF, BH: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: of the query, then of the keys, then of the values."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BH)
    ok = i < HALF
    group = (head - H) % G
    to_cache = b * CACHE_STRIDE + group * HEAD_STRIDE + tl.load(place_ptr) * 2 * HALF
    if head >= H + G:
        of = v_ptr + b * V_STRIDE + group * 2 * HALF
        for part in range(2):
            value = tl.load(of + part * HALF + i, mask=ok)
            tl.store(values_ptr + to_cache + part * HALF + i, value.to(values_ptr.dtype.element_ty), mask=ok)
    else:
        of = q_ptr + b * Q_STRIDE + head * 2 * HALF
        if head >= H:
            of = k_ptr + b * K_STRIDE + group * 2 * HALF
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        first, second = tl.load(of + i, mask=ok).to(tl.float32), tl.load(of + HALF + i, mask=ok).to(tl.float32)
        angle = b * ANGLE_STRIDE + i
        cos, sin = tl.load(cos_ptr + angle, mask=ok), tl.load(sin_ptr + angle, mask=ok)
        low = _turned(first, -second, cos, sin, dtype)
        cos, sin = tl.load(cos_ptr + HALF + angle, mask=ok), tl.load(sin_ptr + HALF + angle, mask=ok)
        high = _turned(second, first, cos, sin, dtype)
        if head < H:
            to = out_ptr + (b * H + head) * 2 * HALF + i
            tl.store(to, low, mask=ok)
            tl.store(to + HALF, high, mask=ok)
        else:
            to = keys_ptr + to_cache + i
            tl.store(to, low.to(keys_ptr.dtype.element_ty), mask=ok)
            tl.store(to + HALF, high.to(keys_ptr.dtype.element_ty), mask=ok)


@triton.jit
def attend_kernel(
    q_ptr, keys_ptr, values_ptr, place_ptr, first_ptr, y_ptr, scale, H, GROUP, CACHE_STRIDE, HEAD_STRIDE, D,
    PADDED: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: softmax over the places that are filled, in float32, block by block."""
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BD)
    d_ok = d < D
    q = tl.load(q_ptr + (b * H + head) * D + d, mask=d_ok, other=0.0).to(tl.float32) * scale
    begin = tl.load(first_ptr + b) if PADDED else tl.zeros((), tl.int64)
    end = tl.load(place_ptr) + 1
    cache = b * CACHE_STRIDE + (head // GROUP) * HEAD_STRIDE
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    y = tl.zeros((BD,), tl.float32)
    for start in range(begin, end, BS):
        place = start + tl.arange(0, BS)
        ok = place < end
        at = cache + place[:, None] * D + d[None, :]
        both = ok[:, None] & d_ok[None, :]
        keys = tl.load(keys_ptr + at, mask=both, other=0.0).to(tl.float32)
        score = tl.where(ok, tl.sum(keys * q[None, :], axis=1), float("-inf"))
        above = tl.maximum(largest, tl.max(score, axis=0))
        weight, keep = tl.exp(score - above), tl.exp(largest - above)
        values = tl.load(values_ptr + at, mask=both, other=0.0).to(tl.float32)
        y = y * keep + tl.sum(weight[:, None] * values, axis=0)
        total = total * keep + tl.sum(weight, axis=0)
        largest = above
    tl.store(y_ptr + (b * H + head) * D + d, (y / total).to(y_ptr.dtype.element_ty), mask=d_ok)


@triton.jit
def relu2_gate_kernel(gate_ptr, up_ptr, y_ptr, N, GATE_STRIDE, UP_STRIDE, BN: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    ok = n < N
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * GATE_STRIDE + n, mask=ok).to(tl.float32)
    positive = tl.where(gate < 0, 0.0, gate)  # NaN stays NaN
    squared = (positive * positive).to(dtype).to(tl.float32)
    up = tl.load(up_ptr + row * UP_STRIDE + n, mask=ok).to(tl.float32)
    tl.store(y_ptr + row * N + n, (squared * up).to(dtype), mask=ok)


@on_its_device
def rotate_and_append(
    q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, place: Tensor
) -> Tensor:
    """q (B, 1, H * D), k, v (B, 1, G * D), cosine and sine float32 (1, D) or (B, ..., D) -> q turned, (B, H, D).

    ``keys`` and ``values`` (B, G, S, D), with places one after another, are written at ``place``, int64 (1,).
    """
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    cos, sin = (angle.reshape(-1, angle.shape[-1]).contiguous() for angle in angles)
    (batch, groups, _, dim), heads = keys.shape, q.shape[1] // keys.shape[3]
    out = torch.empty(batch, heads, dim, dtype=q.dtype, device=q.device)
    rotate_and_append_kernel[(batch, heads + 2 * groups)](
        q, k, v, cos, sin, out, keys, values, place, heads, groups, q.stride(0), k.stride(0), v.stride(0),
        0 if cos.shape[0] == 1 else dim, keys.stride(0), keys.stride(1), dim // 2,
        BH=triton.next_power_of_2(dim // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@on_its_device
def attend(q: Tensor, keys: Tensor, values: Tensor, place: Tensor, first: Tensor | None) -> Tensor:
    """q (B, H, D); keys, values (B, G, S, D), filled up to ``place``, int64 (1,) -> (B, 1, H * D).

    Sequence b sees the places from ``first[b]``, int64 (B,), on, or all of them.
    """
    (batch, heads, dim), groups = q.shape, keys.shape[1]
    y = torch.empty(batch, 1, heads * dim, dtype=q.dtype, device=q.device)
    attend_kernel[(batch, heads)](
        q, keys, values, place, place if first is None else first, y, dim**-0.5, heads, heads // groups,
        keys.stride(0), keys.stride(1), dim, PADDED=first is not None, BD=triton.next_power_of_2(dim), BS=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y


@on_its_device
def relu2_gate(gate: Tensor, up: Tensor) -> Tensor:
    """``relu(gate)^2 * up`` for (..., F), rounded where torch's three operations round."""
    rows, others = rows_of(gate), rows_of(up)
    y = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    m, n = rows.shape
    if m and n:
        relu2_gate_kernel[(m, -(-n // 1024))](
            rows, others, y, n, rows.stride(0), others.stride(0), BN=1024, num_warps=4, enable_fp_fusion=False
        )
    return y.view(gate.shape)
