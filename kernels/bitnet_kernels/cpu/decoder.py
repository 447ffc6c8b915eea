"""All blocks of a packed transformer for one token per sequence, in one native call (decode.c)."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.native import FLOAT, INT64, POINTER


class Readers(NamedTuple):
    """The matrices that read one tensor, joined, and the RMSNorm before them (its weight, or ``None`` without one)."""

    norm: Tensor | None
    eps: float
    packed: Tensor
    inv_scale: Tensor
    planes: int
    in_features: int


class _Readers(ctypes.Structure):
    _fields_ = [
        ("norm", POINTER),
        ("w", POINTER),
        ("w_inv", POINTER),
        *((name, INT64) for name in ("w_inv_stride", "row_bytes", "n", "k", "planes")),
        ("eps", FLOAT),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("blocks", POINTER),
        *((name, INT64) for name in ("layers", "heads", "kv_heads", "head_dim")),
        ("last_norm", POINTER),
        ("last_eps", FLOAT),
        *((name, ctypes.c_int32) for name in ("silu", "sum_lanes", "exp_lanes", "threads", "isa")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", POINTER),
        ("values", POINTER),
        *((name, INT64) for name in ("layer_stride", "sequence_stride", "head_stride", "token_stride", "length")),
        ("first", POINTER),
    ]


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
        self._blocks = (_Readers * (4 * len(layers)))(*(self._entry(r) for layer in layers for r in layer))
        self._decoder = _Decoder(
            ctypes.addressof(self._blocks),
            *(len(layers), heads, kv_heads, head_dim),
            last_norm.data_ptr(),
            eps,
            self._silu,
        )

    @staticmethod
    def _entry(r: Readers) -> _Readers:
        return _Readers(
            None if r.norm is None else r.norm.data_ptr(),
            r.packed.data_ptr(),
            r.inv_scale.data_ptr(),
            0 if r.inv_scale.numel() == 1 else 1,
            r.packed.stride(0),
            r.packed.shape[0],
            r.in_features,
            r.planes,
            r.eps,
        )

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
        self._decoder.sum_lanes = native.lanes_of_torch() or 0
        self._decoder.exp_lanes = native.exp_lanes_of_torch() or 4
        self._decoder.threads = torch.get_num_threads()
        self._decoder.isa = native.best_isa()
        cache = _Cache(
            keys.data_ptr(), values.data_ptr(), *keys.stride()[:4], length, None if first is None else first.data_ptr()
        )
        lib = native.library()
        assert lib is not None
        failed = lib.bitnet_decode(
            ctypes.byref(self._decoder),
            ctypes.byref(cache),
            x.data_ptr(),
            x.shape[0],
            cos.data_ptr(),
            sin.data_ptr(),
            0 if cos.shape[0] == 1 else cos.stride(0),
        )
        if failed:
            raise MemoryError("decode: no memory for the activations of a token")
