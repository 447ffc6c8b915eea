"""Weights on an integer grid of 2 to 8 bits (or a codebook): how they lie in memory, and their products.

A code is an integer from 0; ``code - zero_point`` counts steps of ``scale``. A row of K codes of b bits is padded to
whole blocks of 256 and stored as one part for each power of two in b (3 bits: 2 + 1), the lowest bits first. A part of
w bits is laid out like the formats of ``formats.py``: a block of 256 in 32 w bytes, in 8 / w planes; bits w p of byte
j hold the code of weight 256 / (8 / w) * p + j. So b bits take b bits, for every b.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_kernels.cpu import native
from bitnet_kernels.formats import BLOCK, _pack_planes, _unpack_planes

MAX_AFFINE_K = (2**31 - 1) // (255 * 128)
"""Most inputs for which every sum of codes and of differences stays inside int32 (65,793)."""


FEW_TOKENS = 8
"""Tokens up to which reading the weights is the cost; beyond, torch's own products of widened weights win."""


def widths(bits: int) -> list[int]:
    """The parts of a code of ``bits`` bits, widest first as they lie in a row."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of ``k`` codes."""
    return -(-k // BLOCK) * BLOCK * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 (N, K) codes below 2^bits -> uint8 (N, row_bytes). Raises ``ValueError`` for larger ones."""
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be a uint8 matrix (N, K), not {codes.dtype} of shape {tuple(codes.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits}: must be between 2 and 8")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    parts, done = [], 0
    for width in widths(bits):
        part = (codes >> done) & ((1 << width) - 1)
        parts.append(_pack_planes(part, 8 // width, padding=0))
        done += width
    return torch.cat(parts, dim=1)


def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of ``pack_codes``: uint8 (N, k)."""
    padded = -(-k // BLOCK) * BLOCK
    codes, done = torch.zeros(packed.shape[0], padded, dtype=torch.uint8, device=packed.device), 0
    for part, width in zip(packed.split([padded * w // 8 for w in widths(bits)], dim=1), widths(bits), strict=True):
        codes |= _unpack_planes(part.contiguous(), 8 // width) << done
        done += width
    return codes[:, :k].contiguous()


def dequantize_codes(
    packed: Tensor, bits: int, k: int, scale: Tensor, zero_point: Tensor, table: Tensor | None = None
) -> Tensor:
    """What packed codes stand for, float32 (N, k); scale and zero_point (N, G)."""
    codes = unpack_codes(packed, bits, k)
    size = -(-k // scale.shape[1])
    codes = F.pad(codes, (0, scale.shape[1] * size - k)).view(codes.shape[0], scale.shape[1], size)
    levels = codes.float() - zero_point[..., None] if table is None else table[codes.int()]
    return (levels * scale[..., None]).view(codes.shape[0], -1)[:, :k]


def affine_matmul_reference(
    x: Tensor, packed: Tensor, bits: int, k: int, scale: Tensor, zero_point: Tensor, x_inv_scale: Tensor
) -> Tensor:
    """What ``affine_matmul`` computes for int8 activations, in plain torch with int64 sums."""
    codes = unpack_codes(packed, bits, k).long()
    groups = scale.shape[1]
    size = -(-k // groups)
    y = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float32, device=x.device)
    for g in range(groups):
        part = slice(g * size, min((g + 1) * size, k))
        a, b = x[:, part].cpu().long(), (codes[:, part] - zero_point[:, g : g + 1].long()).cpu()
        y += (a @ b.t()).to(x.device).float() * scale[:, g]
    return y / x_inv_scale.view(-1, 1)


def affine_matmul(
    x: Tensor,
    packed: Tensor,
    bits: int,
    *,
    k: int,
    scale: Tensor,
    zero_point: Tensor,
    x_inv_scale: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """x (M, k) times packed codes (N, row_bytes) -> float32 (M, N).

    With ``x`` int8 and ``x_inv_scale`` float32 (M, 1), for G groups of ceil(k / G) inputs, exactly and in this order::

        y = (sum over g ascending of float32(sum over k in g of (code - zero_point) * x) * scale[n, g]) / x_inv_scale

    With ``x`` float32 the product with what the codes stand for, as a float32 sum rounds it. ``scale`` and integer
    ``zero_point`` are float32 (N, G); ``table`` (2^bits,) holds levels that take the place of ``code - zero_point``.
    Raises ``ValueError`` for shapes and dtypes that do not fit.
    """
    if x.ndim != 2 or x.shape[1] != k or not 1 <= k <= MAX_AFFINE_K:
        raise ValueError(f"x must be (M, {k}) with at most {MAX_AFFINE_K} inputs, not {tuple(x.shape)}")
    if packed.dtype != torch.uint8 or packed.shape[1] != row_bytes(k, bits):
        raise ValueError(f"{bits}-bit codes of {k} inputs are uint8 (N, {row_bytes(k, bits)}), not {packed.shape}")
    n = packed.shape[0]
    if scale.shape != zero_point.shape or scale.ndim != 2 or scale.shape[0] != n:
        raise ValueError(f"scale and zero_point must be ({n}, groups), not {scale.shape} and {zero_point.shape}")
    if scale.dtype != torch.float32 or zero_point.dtype != torch.float32:
        raise ValueError("scale and zero_point must be float32")
    groups = scale.shape[1]
    if groups != -(-k // -(-k // max(groups, 1))):
        raise ValueError(f"{k} inputs cannot be {groups} groups of ceil({k} / {groups})")
    for name, other, values in (("x_inv_scale", x_inv_scale, x.shape[0]), ("table", table, 1 << bits)):
        if other is not None and (other.dtype != torch.float32 or other.numel() != values):
            raise ValueError(f"{name} must be float32 with {values} values, not {other.dtype} {tuple(other.shape)}")
    is_integer = x.dtype == torch.int8
    if is_integer != (x_inv_scale is not None) or (is_integer and table is not None):
        raise ValueError("int8 activations go with x_inv_scale and without a table")
    if not is_integer and x.dtype != torch.float32:
        raise ValueError(f"x must be int8 or float32, not {x.dtype}")
    if x.is_cpu and native.library() is not None and not torch.compiler.is_compiling():
        return native.affine_matmul(x, packed, bits, scale, zero_point, table, x_inv_scale)
    if x_inv_scale is not None:
        return affine_matmul_reference(x, packed, bits, k, scale, zero_point, x_inv_scale)
    return F.linear(x, dequantize_codes(packed, bits, k, scale, zero_point, table))
