"""Activations as integers for the layers of the post-training recipes: symmetric, dynamic or static.

    q = round(x * inv_scale)      inv_scale = qmax / max|x|      x ~ q / inv_scale

Dynamic scales are those of a token or of the whole call; a static scale belongs to the layer and is observed: a moving
average of each batch's range while training (arXiv 1712.05877, section 3.1), or the widest range of a
calibration. The integers of 8 bits per token are those of BitLinear, so the same kernels make them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitnet.errors import UserError
from bitnet.quantizers import EPS, straight_through
from bitnet.recomputation import is_recomputing

ActivationScale = Literal["token", "tensor", "static"]


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """How the inputs of a layer become integers. Raises ``UserError`` for what no integer grid is."""

    bits: int = 8
    """2 to 8."""
    scale: ActivationScale = "token"
    """Whose largest magnitude decides: a token's, the whole call's, or that of a calibration."""
    momentum: float = 0.01
    """Weight of a batch in the moving average of a static range."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"activation_bits = {self.bits}: must be between 2 and 8.")
        if not 0.0 < self.momentum <= 1.0:
            raise UserError(f"momentum = {self.momentum}: must be above 0 and at most 1.")

    @property
    def qmax(self) -> int:
        return (1 << self.bits - 1) - 1


def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor full of ``value``; on the meta device only a shape, since filling one there imports 150 MB of torch."""
    made = torch.empty(shape, dtype=dtype)
    return made if made.is_meta else made.fill_(value)


class ActivationQuantizer(nn.Module):
    """``quantize`` gives integers, ``fake_quantize`` what they stand for; ``limits`` (2,) make a static scale.

    ``observing`` is what a forward does to ``limits``: "average" (only in training mode), "widest", or ``None``.
    """

    limits: Tensor | None

    def __init__(self, scheme: ActivationScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.observing: Literal["average", "widest"] | None = None
        self.register_buffer("limits", filled((2,), 0.0) if scheme.scale == "static" else None)

    @property
    def is_plain(self) -> bool:
        """Whether the integers are BitLinear's, which a kernel makes."""
        return self.scheme.bits == 8 and self.scheme.scale == "token"

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take ``x`` into ``limits``. The first batch sets it."""
        if self.limits is None or self.observing is None or (self.observing == "average" and not self.training):
            return
        if is_recomputing():  # the limits hold this batch already
            return
        seen = torch.stack(torch.aminmax(x.detach().float()))
        if self.observing == "average":
            new = self.limits.lerp(seen, self.scheme.momentum)
        else:
            new = torch.stack((torch.minimum(self.limits[0], seen[0]), torch.maximum(self.limits[1], seen[1])))
        # Decided on the device: asking whether this is the first batch would stop a GPU in every layer.
        self.limits.copy_(torch.where(self.limits.any(), new, seen))

    def inv_scale(self, x: Tensor) -> Tensor:
        """Float32 (..., 1): qmax over the magnitude that is to be covered."""
        if self.limits is not None:
            absmax = self.limits.abs().amax()
        elif self.scheme.scale == "tensor":
            absmax = x.abs().amax()
        else:
            return float(self.scheme.qmax) / x.abs().amax(dim=-1, keepdim=True).clamp_(min=EPS)
        return (float(self.scheme.qmax) / absmax.clamp(min=EPS)).expand(*x.shape[:-1], 1)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., K) -> float32 ``q`` (..., K) holding integers, and ``inv_scale`` float32 (..., 1)."""
        x = x.detach().float()
        inv_scale = self.inv_scale(x)
        q = (x * inv_scale).round_()
        return (q if self.limits is None else q.clamp_(-self.scheme.qmax, self.scheme.qmax)), inv_scale

    def fake_quantize(self, x: Tensor, q: Tensor, inv_scale: Tensor) -> Tensor:
        """``q / inv_scale`` in the dtype of ``x``; backward the identity, 0 where a static range cut something off."""
        values = (q / inv_scale).to(x.dtype)
        if self.limits is None:
            return straight_through(values, x)
        inside = ((x.detach().float() * inv_scale).round() == q).to(x.dtype)
        return values + (x * inside - (x * inside).detach())

    def extra_repr(self) -> str:
        return f"bits={self.scheme.bits}, scale={self.scheme.scale}"
