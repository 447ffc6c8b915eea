r"""Ternary and binary weights with other scales than one mean magnitude: per matrix, per row, or per group of inputs.

With ``step`` a statistic of the weights of a matrix, a row or a group, and ``m`` their mean::

    ternary   q = clamp(round(w / step), -1, 1)      binary   q = +1 if w > m else -1      w ~ q * scale

    rule        step                    scale
    absmean     mean|w|                 step                             arXiv 2402.17764, 2310.11453
    absmedian   median|w|               step                             arXiv 2407.09527, 2411.05882
    rms         c sqrt(mean w^2)        step                             arXiv 2502.05003 (QuEST)
    twn         1.5 mean|w|             mean of |w| over q != 0          arXiv 1605.04711; ternary only

rms has the least squared error of Gaussian weights (c = 1.2240, binary 0.7979), twn the least of its own levels.

So a ternary weight is 0 below half a step. Statistics are float32, rounded once from sums that do not depend on the
order of adding; a group of zeros has the scale of ``EPS``. A statistic that is NaN or infinite makes its scale NaN.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitnet.errors import UserError
from bitnet.quantizers import EPS, GRID, WEIGHT_QUANTIZERS, exact_sums, mean_of

ScaleRule = Literal["absmean", "absmedian", "rms", "twn"]
ScalePer = Literal["matrix", "row"] | int

GAUSSIAN = {"ternary": 1.2240, "binary": 0.7979}
"""The scale of standard normal weights whose squared error is least, for three and for two levels."""


def _mean(groups: Tensor, shape: torch.Size) -> Tensor:
    """Float32 mean of each group (R, G, S) of a matrix of ``shape``, rounded once: see ``exact_sums``."""
    if groups.shape[:2] == (1, 1):
        return mean_of(exact_sums(groups.view(shape)), groups.numel()).view(1, 1)
    return ((groups.double() * GRID).round_().sum(dim=-1) / (GRID * groups.shape[-1])).float()


@dataclass(frozen=True, kw_only=True)
class ScaledQuantizer:
    """A weight quantizer with one scale for each matrix, row, or group of ``per`` inputs of a row.

    Raises ``UserError`` for a group that the packed format cannot hold and for twn with binary weights.
    """

    kind: Literal["ternary", "binary"]
    rule: ScaleRule = "absmean"
    per: ScalePer = "matrix"

    def __post_init__(self) -> None:
        plane = 64 if self.kind == "ternary" else 32
        if isinstance(self.per, int) and (self.per < plane or self.per % plane):
            raise UserError(f"scale_per = {self.per}: a group of {self.kind} weights is a multiple of {plane} inputs.")
        if self.rule == "twn" and self.kind == "binary":
            raise UserError("scale = twn: binary weights have no zeros; use absmean, absmedian or rms.")

    @property
    def format(self) -> str:
        """The packed form of its levels."""
        return WEIGHT_QUANTIZERS[self.kind].format

    def groups(self, w: Tensor) -> Tensor:
        """(N, K) -> (R, G, weights of a group), where R is 1 or N. Raises ``UserError`` for a K that does not fit."""
        n, k = w.shape
        if self.per == "matrix":
            return w.reshape(1, 1, n * k)
        if self.per == "row":
            return w.reshape(n, 1, k)
        if k % self.per:
            raise UserError(f"scale_per = {self.per}: a matrix has {k} inputs, which is no multiple of it.")
        return w.reshape(n, k // self.per, self.per)

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, K) weights -> ``q`` int8 (N, K), ``scale`` float32 (R, G), ``step`` float32 (R, G)."""
        w = w.detach().float()
        groups = self.groups(w)
        sizes = groups.abs()
        if self.rule == "absmedian":
            step = torch.where(sizes.isfinite().all(-1), sizes.median(dim=-1).values, torch.nan)
        elif self.rule == "rms":
            step = _mean(groups.double().square(), w.shape).sqrt() * GAUSSIAN[self.kind]
        else:
            step = _mean(sizes, w.shape) * (1.5 if self.rule == "twn" else 1.0)
        step = torch.where(step.isfinite(), step, torch.nan).clamp_(min=EPS)
        if self.kind == "binary":
            q = torch.where(groups > _mean(groups, w.shape)[..., None], 1.0, -1.0)
        else:
            q = (groups / step[..., None]).round_().clamp_(-1, 1).nan_to_num_(0.0)
        scale = step
        if self.rule == "twn":
            kept = q.abs().sum(dim=-1)
            mean = _mean(sizes * q.abs(), w.shape) * (groups.shape[-1] / kept.clamp(min=1))
            scale = torch.where(step.isfinite(), mean, torch.nan).clamp_(min=EPS)
        return q.view(w.shape).to(torch.int8), scale, step


class FakeWeight(torch.autograd.Function):
    """w (N, K) and what it is rounded to, ``dense`` (N, K) -> that, its gradient passed straight through to ``w``.

    Where ``|w|`` exceeds ``clip`` steps the gradient of a weight is dropped (the trust mask of QuEST, arXiv 2502.05003,
    at 1.5). ``factor`` (R, G) is a trained part of ``scale``: its gradient is that of ``q * (scale / factor)``.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        w: Tensor,
        factor: Tensor | None,
        dense: Tensor,
        q: Tensor,
        scale: Tensor,
        step: Tensor,
        quantizer: ScaledQuantizer,
        clip: float | None,
    ) -> Tensor:
        ctx.quantizer, ctx.clip = quantizer, clip  # type: ignore[attr-defined]
        saved = (w if clip is not None else None, factor, q if factor is not None else None, scale, step)
        ctx.save_for_backward(*saved)  # type: ignore[arg-type]
        return dense

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, factor, q, scale, step = ctx.saved_tensors  # type: ignore[attr-defined]
        quantizer: ScaledQuantizer = ctx.quantizer  # type: ignore[attr-defined]
        grad_factor = None
        if factor is not None:
            products = quantizer.groups(grad) * quantizer.groups(q.to(grad.dtype))
            grad_factor = products.sum(-1) * (scale / factor)
        if w is not None:
            near = quantizer.groups(w).abs() <= ctx.clip * step[..., None]  # type: ignore[attr-defined]
            grad = grad * near.view(grad.shape)
        return grad, grad_factor, None, None, None, None, None, None
