"""All blocks of a packed transformer for one token per sequence, in one native call (decode.c)."""

import ctypes
from typing import NamedTuple

from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.api import declarations


class Readers(NamedTuple):
    """The matrices that read one tensor, joined, and the RMSNorm before them (its weight, or ``None`` without one)."""

    norm: Tensor | None
    eps: float
    packed: Tensor
    inv_scale: Tensor
    planes: int
    in_features: int


class Decoder:
    """The weights of all blocks as decode.c reads them; keeps the tensors that it points into alive.

    ``layers`` holds wq|wk|wv, wo, w1|w3 and w2 of each block; ``last_norm`` is the weight of the norm after the last.
    """

    MOST_SEQUENCES = 16
    """One tile of tokens."""
    MOST_GATES = 2**15
    """Elements of an activation from which on torch splits it between threads, and rounds by the place of the split."""

    def __init__(
        self,
        layers: list[list[Readers]],
        last_norm: Tensor,
        eps: float,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        activation: str,
    ) -> None:
        self._layers, self._last_norm = layers, last_norm
        self._ffn_dim = layers[0][3].in_features
        self._silu = activation == "silu"
        structures = declarations().structures
        blocks = [structures["block"](*(self._entry(readers) for readers in layer)) for layer in layers]
        self._blocks = (structures["block"] * len(layers))(*blocks)
        self._decoder = structures["decoder"](
            ctypes.addressof(self._blocks), len(layers), heads, kv_heads, head_dim, last_norm.data_ptr(), eps,
            self._silu, native.lanes_of_torch() or 0, native.exp_lanes_of_torch() or 4,
        )  # fmt: skip

    @staticmethod
    def _entry(r: Readers) -> ctypes.Structure:
        return declarations().structures["readers"](
            None if r.norm is None else r.norm.data_ptr(), r.packed.data_ptr(), r.inv_scale.data_ptr(),
            r.inv_scale.numel() > 1, r.packed.stride(0), r.packed.shape[0], r.in_features, r.planes, r.eps,
        )  # fmt: skip

    def can_decode(self, sequences: int) -> bool:
        """Whether the results will be those of torch's operators."""
        if sequences > self.MOST_SEQUENCES:
            return False
        if not self._silu:
            return True
        return native.exp_lanes_of_torch() is not None and sequences * self._ffn_dim < self.MOST_GATES

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, first: Tensor | None
    ) -> None:
        """x (M, D) is replaced by the output of the last norm; the cache (L, M, G, max_len, K) gets token ``length``.

        cos, sin: (1, K) or (M, K). ``first`` int64 (M,): the first token that each sequence sees.
        """
        cache = declarations().structures["cache"](
            keys.data_ptr(), values.data_ptr(), *keys.stride()[:4], length, None if first is None else first.data_ptr()
        )
        angle_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
        native.run("bitnet_decode", self._decoder, cache, x, x.shape[0], cos, sin, angle_stride)
