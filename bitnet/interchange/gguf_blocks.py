"""Layouts of ternary matrices in GGUF files, and the order of rows that llama.cpp's Llama graph wants.

=======  ===============  =====================================================================  ===============
type     weights a block  layout                                                                  bits per weight
=======  ===============  =====================================================================  ===============
TQ2_0    256              64 bytes of 2-bit codes, then the scale (float16); gguf package         2.0625
TQ1_0    256              54 bytes of base-3 digits, then the scale (float16); gguf package       1.6875
Q2_0     64               scale (float16), then 16 bytes: code j in bits 2 (j % 4) of byte j / 4  2.25
I2_S     128              32 bytes: code 32 i + j in bits 6 - 2 i of byte j; one scale (float32)
                          in a tail of 32 bytes behind the whole matrix                           2
=======  ===============  =====================================================================  ===============

Codes are level + 1. Q2_0 is llama.cpp's, I2_S that of bitnet.cpp (ik_llama.cpp reads it to requantize).
"""

import enum
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Levels = NDArray[np.int8]


class OwnType(enum.IntEnum):
    """Tensor types that the gguf package does not know, by the numbers that the runtimes give them."""

    I2_S = 36
    Q2_0 = 42


BLOCK = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "i2_s": 128}
"""Weights of a block, of which a row must have a whole number."""
FILE_TYPE = {"f32": 0, "f16": 1, "tq1_0": 36, "tq2_0": 37, "i2_s": 40, "q2_0": 41}
"""``general.file_type``: a hint for people, which the runtimes do not act on."""


def q2_0(levels: Levels, scale: float) -> Bytes:
    """int8 (N, K) of -1, 0, 1 -> uint8 (N, K / 64 * 18)."""
    n, k = levels.shape
    codes = (levels + 1).astype(np.uint8).reshape(n, k // 64, 16, 4)
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    scales = np.broadcast_to(np.float16(scale).reshape(1).view(np.uint8), (n, k // 64, 2))
    return np.concatenate([scales, packed], axis=-1).reshape(n, -1)


def i2_s(levels: Levels, scale: float) -> Bytes:
    """int8 (N, K) of -1, 0, 1 -> uint8 (N K / 4 + 32,)."""
    codes = (levels + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = codes[:, 0] << 6 | codes[:, 1] << 4 | codes[:, 2] << 2 | codes[:, 3]
    tail = np.zeros(32, np.uint8)
    tail[:4] = np.float32(scale).reshape(1).view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


OWN_WRITERS: dict[str, Callable[[Levels, float], Bytes]] = {"q2_0": q2_0, "i2_s": i2_s}


def interleave_rows(w: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows of wq or wk (heads * K, D) from rotation by halves, as here, to that of neighbours, as in llama.cpp."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def separate_rows(w: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """The inverse of ``interleave_rows``."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
