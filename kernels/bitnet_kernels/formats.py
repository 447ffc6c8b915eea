"""How low-bit weights lie in memory: pack and unpack, for any N and K, on any device. Drawings in kernels/README.md.

=============== ============ ===================================================================================
format          bits/weight  row of K weights
=============== ============ ===================================================================================
ternary2        2            codes w + 1; blocks of 256 weights in 64 bytes; bits 2p..2p+1 of byte j of a block hold
                             weight 64 p + j of that block (four planes of 64)
binary1         1            codes (w + 1) / 2; blocks of 256 weights in 32 bytes; bit p of byte j of a block holds
                             weight 32 p + j of that block (eight planes of 32)
ternary_base3   1.6          codes w + 1 of 5 consecutive weights as the digits of a number in base 3, the first one
                             lowest; for files only
=============== ============ ===================================================================================

Planes make unpacking elementwise: one load of packed bytes, shifted and masked, is consecutive weights. They stay
inside a block, so that a matrix can be cut along K at every multiple of 256. K is padded to whole blocks (base 3: to
whole bytes) with weights 0 (binary: -1, which meets activations that are padded with 0).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet_kernels.cpu.weights import pack_levels

BLOCK = 256
"""Weights of a block, the unit along K of the formats that the kernels read."""

MAX_K = 2**23 - 1
"""Most inputs of a product: sums of (code <= 2) x (|activation| <= 128) stay inside int32."""


@dataclass(frozen=True)
class PackedFormat:
    """A layout of bits. ``planes`` is the number of weights in a byte, 0 where weights do not lie in planes."""

    name: str
    levels: tuple[int, ...]
    bits: float
    planes: int
    pack: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    """``pack`` of what is known to be levels: nothing is checked, and a GPU need not be waited for."""
    unpack: Callable[[Tensor, int | None, int | None], Tensor]

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of ``k`` weights."""
        return -(-k // BLOCK) * BLOCK // self.planes if self.planes else -(-k // 5)

    @property
    def plane(self) -> int:
        """Weights of one plane of a block, the smallest group that can have its own scale."""
        return BLOCK // self.planes


def _checked(w: Tensor, levels: tuple[int, ...]) -> Tensor:
    if w.dtype != torch.int8 or w.ndim != 2:
        raise ValueError(f"w must be an int8 matrix (N, K), not {w.dtype} of shape {tuple(w.shape)}")
    if w.shape[1] < 1:
        raise ValueError(f"w of shape {tuple(w.shape)} has no columns")
    allowed = torch.zeros_like(w, dtype=torch.bool)
    for level in levels:
        allowed |= w == level
    if not bool(allowed.all()):
        raise ValueError(f"w holds {int(w[~allowed][0])}; its levels must be {', '.join(map(str, levels))}")
    return w


def _pack_planes(codes: Tensor, planes: int, padding: int) -> Tensor:
    """uint8 codes (N, K) -> (N, bytes); ``padding`` is the code that fills the last block."""
    N, K = codes.shape
    blocks = -(-K // BLOCK)
    codes = F.pad(codes, (0, blocks * BLOCK - K), value=padding).view(N, blocks, planes, BLOCK // planes)
    packed = torch.zeros_like(codes[:, :, 0])
    for p in range(planes):
        packed |= codes[:, :, p] << (8 // planes * p)
    return packed.view(N, -1)


def _unpack_planes(packed: Tensor, planes: int) -> Tensor:
    """(N, bytes) -> uint8 codes (N, whole blocks of K)."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % (BLOCK // planes):
        raise ValueError(f"not {planes} weights a byte in whole blocks: {packed.dtype} {tuple(packed.shape)}")
    bits = 8 // planes
    blocks = packed.reshape(packed.shape[0], -1, 1, BLOCK // planes)
    shifts = torch.arange(planes, dtype=torch.uint8, device=packed.device).view(1, 1, planes, 1) * bits
    codes: Tensor = (blocks >> shifts) & (2**bits - 1)
    return codes.view(packed.shape[0], -1)


def encode_ternary2(w: Tensor) -> Tensor:
    packed = pack_levels(w, 4)
    return _pack_planes((w + 1).to(torch.uint8), 4, padding=1) if packed is None else packed


def pack_ternary2(w: Tensor) -> Tensor:
    """int8 (N, K) in {-1, 0, 1} -> uint8 (N, 64 * ceil(K / 256)). Raises ``ValueError`` for other values or dtypes."""
    return encode_ternary2(_checked(w, (-1, 0, 1)))


def unpack_ternary2(packed: Tensor, n: int | None = None, k: int | None = None) -> Tensor:
    """The inverse of ``pack_ternary2``: int8 (n, k). Without ``n`` and ``k``, all rows and the padded K."""
    return (_unpack_planes(packed, 4)[:n, :k].to(torch.int8) - 1).contiguous()


def encode_binary1(w: Tensor) -> Tensor:
    packed = pack_levels(w, 8)
    return _pack_planes((w > 0).to(torch.uint8), 8, padding=0) if packed is None else packed


def pack_binary1(w: Tensor) -> Tensor:
    """int8 (N, K) in {-1, 1} -> uint8 (N, 32 * ceil(K / 256)). Raises ``ValueError`` for other values or dtypes."""
    return encode_binary1(_checked(w, (-1, 1)))


def unpack_binary1(packed: Tensor, n: int | None = None, k: int | None = None) -> Tensor:
    """The inverse of ``pack_binary1``: int8 (n, k). Without ``n`` and ``k``, all rows and the padded K."""
    return (_unpack_planes(packed, 8)[:n, :k].to(torch.int8) * 2 - 1).contiguous()


def encode_ternary_base3(w: Tensor) -> Tensor:
    codes = (w + 1).to(torch.uint8)
    digits = F.pad(codes, (0, -w.shape[1] % 5), value=1).view(w.shape[0], -1, 5)
    packed = torch.zeros_like(digits[:, :, 0])
    for i in reversed(range(5)):
        packed = packed * 3 + digits[:, :, i]
    return packed


def pack_ternary_base3(w: Tensor) -> Tensor:
    """int8 (N, K) in {-1, 0, 1} -> uint8 (N, ceil(K / 5)). Raises ``ValueError`` for other values or dtypes."""
    return encode_ternary_base3(_checked(w, (-1, 0, 1)))


def unpack_ternary_base3(packed: Tensor, n: int | None = None, k: int | None = None) -> Tensor:
    """The inverse of ``pack_ternary_base3``: int8 (n, k). Raises ``ValueError`` for a byte above 242."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"packed must be a uint8 matrix, not {packed.dtype} of shape {tuple(packed.shape)}")
    if packed.numel() and int(packed.max()) > 242:
        raise ValueError(f"byte {int(packed.max())} is no number of five base-3 digits")
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=packed.device)
    digits = torch.div(packed[:n, :, None], powers, rounding_mode="floor") % 3
    return (digits.view(digits.shape[0], -1)[:, :k].to(torch.int8) - 1).contiguous()


FORMATS: dict[str, PackedFormat] = {
    f.name: f
    for f in (
        PackedFormat("ternary2", (-1, 0, 1), 2.0, 4, pack_ternary2, encode_ternary2, unpack_ternary2),
        PackedFormat("binary1", (-1, 1), 1.0, 8, pack_binary1, encode_binary1, unpack_binary1),
        PackedFormat(
            "ternary_base3", (-1, 0, 1), 1.6, 0, pack_ternary_base3, encode_ternary_base3, unpack_ternary_base3
        ),
    )
}
