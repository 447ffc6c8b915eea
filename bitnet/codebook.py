r"""NormalFloat codebooks and double quantization (QLoRA, arXiv 2305.14314, section 3 and appendix E).

A codebook of b bits has 2^b levels at the quantiles of a standard normal, scaled to [-1, 1], with an exact 0: one level
more above it than below. A block of consecutive weights is divided by its largest magnitude and takes nearest levels::

    x ~ levels[code] * scale        scale = max|x| of the block
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet.affine import Scheme, stored_scale
from bitnet.errors import UserError

OUTERMOST = 0.9677083
"""The probability of the outermost quantile: midway between 1 - 1/30 and 1 - 1/32."""


CPU = torch.device("cpu")


@functools.cache  # a copy to a GPU for each use could be no part of a CUDA graph
@torch.inference_mode(False)
def normal_float(bits: int, device: torch.device = CPU) -> Tensor:
    """The levels of NF``bits`` in ascending order, float32 (2^bits,)."""

    def quantiles(count: int) -> Tensor:
        probabilities = torch.linspace(OUTERMOST, 0.5, count + 1, dtype=torch.float64, device=CPU)[:-1]
        return torch.special.ndtri(probabilities)  # type: ignore[no-any-return]

    half = 2 ** (bits - 1)
    levels = torch.cat([-quantiles(half - 1), torch.zeros(1, dtype=torch.float64, device=CPU), quantiles(half)])
    return (levels / levels.max()).float().sort().values.to(device)


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """How a weight takes the levels of a NormalFloat, in blocks along a row. Raises ``UserError`` for other bits."""

    bits: int = 4
    """2 to 4."""
    group_size: int = 64
    """Weights of a block."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise UserError(f"bits = {self.bits}: a NormalFloat has 2 to 4.")

    @property
    def blocks(self) -> Scheme:
        """The blocks of a row as the groups of an integer grid."""
        return Scheme(bits=self.bits, granularity="group", group_size=self.group_size)

    def levels(self, device: torch.device) -> Tensor:
        return normal_float(self.bits, device)

    def fit(self, w: Tensor) -> Tensor:
        """Scales of the blocks of ``w`` (N, K), float32 (N, blocks, 1), as they are stored."""
        return stored_scale(self.blocks.rows(w.detach()).float().abs().amax(-1, keepdim=True))

    def quantize(self, w: Tensor, scale: Tensor) -> Tensor:
        """Codes uint8 (N, K): the nearest level of each weight, the lower one of two that are equally near."""
        levels = self.levels(w.device)
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(self.blocks.rows(w.detach()).float() / scale, middles).to(torch.uint8).reshape(w.shape)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What ``codes`` stand for, float32 in their shape."""
        return (self.blocks.rows(self.levels(codes.device)[codes.int()]) * scale).reshape(codes.shape)


@dataclass(frozen=True, kw_only=True)
class DoubleQuantized:
    """Scales as 8-bit integers around their mean, with one float32 factor for each ``BLOCK`` of them."""

    codes: Tensor
    """int8, flat."""
    factors: Tensor
    """Float32 (blocks,)."""
    mean: Tensor
    """Float32 ()."""
    shape: torch.Size

    BLOCK = 256

    @classmethod
    def of(cls, scale: Tensor) -> "DoubleQuantized":
        mean = scale.mean()
        flat = (scale - mean).flatten()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % cls.BLOCK)).view(-1, cls.BLOCK)
        factors = padded.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        codes = (padded / factors[:, None]).round().to(torch.int8).flatten()[: flat.numel()]
        return cls(codes=codes, factors=factors, mean=mean, shape=scale.shape)

    def scale(self) -> Tensor:
        """The scales that are served, float32."""
        factors = self.factors.repeat_interleave(self.BLOCK)[: self.codes.numel()]
        return (self.codes.float() * factors + self.mean).view(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.factors, self.mean))
