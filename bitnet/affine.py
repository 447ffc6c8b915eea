r"""Affine and symmetric integer quantization, as pure functions: the core of the post-training recipes.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x ~ (q - zero_point) * scale

Here ``scale`` multiplies on the way back, as everywhere outside BitNet. Asymmetric schemes use the integers 0 ..
2^b - 1 and a zero point, symmetric ones -(2^(b-1) - 1) .. 2^(b-1) - 1 and none (arXiv 1712.05877, section 2).

Who shares a scale is the *granularity*: ``tensor`` all elements, ``channel`` a row of a weight, ``token`` a row of
activations, ``group`` the ``group_size`` consecutive inputs of a row. Scales have the shape of the rows with 1 for what
they are shared over: (1, 1), (N, 1), (..., 1), (N, groups, 1).

Gradients are written out (arXiv 1902.08153, 1909.13144): inside the range dx = 1, ds = (q - z) - x / s, dz = 0; outside
dx = 0, ds = q - z, dz = -s. Inside means that the *rounded* value needed no clamping, so an element that rounds to qmin
or qmax itself keeps its gradient. Autograd of ``torch.clamp`` would decide that differently from version to version.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitnet.errors import UserError
from bitnet.quantizers import straight_through

Granularity = Literal["tensor", "channel", "token", "group"]
SMALLEST_SCALE = 1e-8
"""A constant group still needs a scale to divide by."""
SMALLEST_STORED_SCALE = 2.0**-24
"""The smallest number of float16."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a tensor becomes integers. Raises ``UserError`` for what no integer grid is."""

    bits: int = 8
    """2 to 8."""
    granularity: Granularity = "channel"
    """Who shares a scale: tensor, channel, token or group."""
    group_size: int = 64
    """Inputs of a group."""
    symmetric: bool = True
    """Without a zero point."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits = {self.bits}: must be between 2 and 8.")
        if self.granularity == "group" and self.group_size < 1:
            raise UserError(f"group_size = {self.group_size}: must be at least 1.")

    @property
    def qmin(self) -> int:
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def codes_dtype(self) -> torch.dtype:
        """The smallest dtype of torch that holds every integer of this scheme."""
        return torch.int8 if self.symmetric else torch.uint8

    def rows(self, x: Tensor) -> Tensor:
        """``x`` (..., K) as the rows that share a scale each along the last dimension; a view."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if self.granularity != "group":
            return x
        if x.shape[-1] % self.group_size:
            raise UserError(f"group_size = {self.group_size} does not divide a row of {x.shape[-1]} inputs.")
        return x.reshape(*x.shape[:-1], -1, self.group_size)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape``."""
        if self.granularity == "tensor":
            return (1, 1)
        if self.granularity != "group":
            return (*shape[:-1], 1)
        if shape[-1] % self.group_size:
            raise UserError(f"group_size = {self.group_size} does not divide a row of {shape[-1]} inputs.")
        return (*shape[:-1], shape[-1] // self.group_size, 1)


def minmax(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row of ``scheme.rows(x)``, with 0 between them; float32, no gradient."""
    rows = scheme.rows(x.detach()).float()
    return rows.amin(-1, keepdim=True).clamp_(max=0), rows.amax(-1, keepdim=True).clamp_(min=0)


def grid(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """``(scale, zero_point)`` from ``low`` <= 0 to ``high`` >= 0; zero points are integers, 0 if symmetric."""
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) / scheme.qmax).clamp_(min=SMALLEST_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / scheme.qmax).clamp_(min=SMALLEST_SCALE)
    return scale, (-low / scale).round_().clamp_(scheme.qmin, scheme.qmax)


def stored_scale(scale: Tensor) -> Tensor:
    """``scale`` as it is stored, one of float16's values, in float32; the identity backward.

    Layers compute with it from the beginning: a scale that is rounded only when a model is saved can move integers.
    """
    rounded = scale.detach().clamp(SMALLEST_STORED_SCALE, 65504.0).to(torch.float16).float()
    return straight_through(rounded, scale)


def fit(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """``(scale, zero_point)`` that cover the rows of ``w``, the scale as it is stored (see ``stored_scale``)."""
    low, high = minmax(w, scheme)
    scale = stored_scale(grid(low, high, scheme)[0])
    if scheme.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (-low / scale).round_().clamp_(scheme.qmin, scheme.qmax)


def quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Integers of ``x`` in float32, in the shape of ``x``; half to even."""
    rows = scheme.rows(x.detach()).float()
    return (rows / scale).round_().add_(zero_point).clamp_(scheme.qmin, scheme.qmax).reshape(x.shape)


def dequantize_affine(q: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """What integers ``q`` stand for, float32 in their shape."""
    return ((scheme.rows(q).float() - zero_point) * scale).reshape(q.shape)


class _FakeQuantize(torch.autograd.Function):
    """rows (..., K), scale and zero_point (..., 1) -> what the integers stand for; gradients as written above."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        ratio = rows.float() / scale
        z = zero_point.round().clamp(qmin, qmax)
        unclamped = ratio.round() + z
        q = unclamped.clamp(qmin, qmax)
        ctx.save_for_backward(ratio, q - z, unclamped == q, scale)
        return ((q - z) * scale).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        ratio, level, inside, scale = ctx.saved_tensors
        grad_x = grad_s = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.where(inside, grad, torch.zeros_like(grad))
        if ctx.needs_input_grad[1]:
            grad_s = (grad.float() * torch.where(inside, level - ratio, level)).sum(-1, keepdim=True)
            grad_s = grad_s.sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            outside = torch.where(inside, torch.zeros_like(ratio), -scale.expand_as(ratio))
            grad_z = (grad.float() * outside).sum(-1, keepdim=True).sum_to_size(scale.shape)
        return grad_x, grad_s, grad_z, None, None


def fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize and dequantize ``x``, differentiable in ``x``, ``scale`` and ``zero_point``."""
    y: Tensor = _FakeQuantize.apply(scheme.rows(x), scale, zero_point, scheme.qmin, scheme.qmax)  # type: ignore[no-untyped-call]
    return y.reshape(x.shape)
