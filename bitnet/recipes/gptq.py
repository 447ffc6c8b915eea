r"""GPTQ and SpQR: quantize the columns of a matrix in order, each correcting the error of those before it.

GPTQ (arXiv 2210.17323) minimizes ``|(W - W_hat) X|^2``. With ``H = 2 X X^T`` (plus 1 % of its mean diagonal) and the
Cholesky factor ``U`` of its inverse, column j is rounded to nearest and the columns after it take up its error::

    e = (w_j - w_hat_j) / U_jj        W[:, j+1:] -= e U[j, j+1:]

SpQR (arXiv 2306.03078) keeps the weights whose rounding would cost most, ``(w - w_hat)^2 / U_jj^2``, in floating point
and stores the scales of the groups in 3 bits.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitnet.affine import Scheme, dequantize_affine, fit, minmax, quantize_affine, stored_scale
from bitnet.errors import UserError
from bitnet.model import Transformer
from bitnet.recipes.base import Progress, no_progress
from bitnet.recipes.calibration import Chain, linears, second_moments
from bitnet.recipes.post_training import PostTraining

STEP = 128
"""Columns between two updates of all later ones, where no group is smaller."""


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor (K, K) of the inverse of the damped Hessian, float32."""
    h = hessian.double()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean() + 1e-10
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise UserError(f"damping = {damping}: the moments of the inputs cannot be inverted so; raise it.") from error
    return factor.float()


Grid = tuple[Tensor, Tensor]


def quantize_columns(
    w: Tensor,
    factor: Tensor,
    scheme: Scheme,
    grid_of: Callable[[Tensor, int], Grid],
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers (N, K) of ``w``, scales, zero points, and the values (N, K) that were rounded; columns in order.

    ``grid_of(columns, group)`` gives the grid (N, 1) of a group from its columns as they are by then. Weights where
    ``keep`` (N, K) is true have no error: they are not rounded, but take up the errors of columns before them.
    """
    w, (N, K) = w.float().clone(), w.shape
    width = scheme.group_size if scheme.granularity == "group" else K
    step = min(width, STEP)
    if width < K and width % step:  # a step must not reach into the next group
        step = math.gcd(width, STEP)
    one_group = Scheme(bits=scheme.bits, granularity="channel", symmetric=scheme.symmetric)
    q = torch.zeros_like(w)
    grids: list[Grid] = []
    for start in range(0, K, step):
        end = min(start + step, K)
        if start % width == 0:
            grids.append(grid_of(w[:, start : start + width], start // width))
        scale, zero_point = grids[-1]
        errors = torch.zeros(N, end - start, device=w.device)
        for j in range(start, end):
            column = w[:, j : j + 1]
            q[:, j : j + 1] = quantize_affine(column, scale, zero_point, one_group)
            error = (column - dequantize_affine(q[:, j : j + 1], scale, zero_point, one_group)) / factor[j, j]
            if keep is not None:
                error = error.masked_fill(keep[:, j : j + 1], 0.0)
            w[:, j + 1 : end] -= error @ factor[j : j + 1, j + 1 : end]
            errors[:, j - start : j - start + 1] = error
        w[:, end:] -= errors @ factor[start:end, end:]
    shape = scheme.scale_shape((N, K))
    scale = torch.cat([s for s, _ in grids], dim=1).view(shape)
    zero_point = torch.cat([z for _, z in grids], dim=1).view(shape)
    return q, scale, zero_point, w


@dataclass(frozen=True, kw_only=True)
class GPTQ(PostTraining):
    """GPTQ (arXiv 2210.17323): one-shot, from second moments of the activations."""

    needs_text: ClassVar[bool] = True

    damping: float = 0.01
    """Share of the mean diagonal that is added to the Hessian."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping <= 0:
            raise UserError(f"damping = {self.damping}: must be positive, or a dead input stops the factorization.")

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        batches = list(batches)
        if not batches:
            return super().prepare(model)
        assert isinstance(model, Transformer)
        chain, names = Chain(model, batches), []
        hidden = chain.embedded()
        for number, block in enumerate(chain.blocks):
            progress(type(self).__name__, number, len(chain.blocks))
            moments = second_moments(chain, block, hidden)
            for name, linear in linears(block).items():
                layer = self.layer(f"layers.{number}.{name}", linear)
                self.quantize(layer, linear.weight.detach(), moments[name])
                block.set_submodule(name, layer)
                names.append(f"layers.{number}.{name}")
            hidden = chain.run(block, hidden)  # later blocks correct what this one gets wrong
        super().prepare(model)  # nothing is left to swap; sets what is trained
        progress(type(self).__name__, len(chain.blocks), len(chain.blocks))
        return names

    @torch.no_grad()
    def quantize(self, layer: Any, w: Tensor, hessian: Tensor) -> None:
        """Give ``layer`` its grid and integers from ``w`` (N, K) and ``hessian`` (K, K)."""
        scheme = self.grid()
        one_group = Scheme(bits=scheme.bits, granularity="channel", symmetric=scheme.symmetric)
        factor = inverse_factor(hessian, self.damping)
        q, scale, zero_point, _ = quantize_columns(w, factor, scheme, lambda columns, _: fit(columns, one_group))
        layer.set_grid(scale, zero_point)
        layer.set_codes(q)


def few_bit_scales(scale: Tensor, bits: int, group: int) -> Tensor:
    """Scales (N, 1) rounded to 2^bits values between the smallest and the largest of ``group`` rows each."""
    N = scale.shape[0]
    rows = torch.cat([scale, scale[-1:].expand(-N % group, 1)]).view(-1, group)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return stored_scale((low + ((rows - low) / step).round() * step).view(-1, 1)[:N])


@dataclass(frozen=True, kw_only=True)
class SpQR(GPTQ):
    """SpQR (arXiv 2306.03078): GPTQ, a few weights in floating point, and scales in few bits."""

    group_size: int = 16
    """Inputs that share a scale; small groups are affordable since scales take few bits."""
    outliers: float = 0.01
    """Share of the weights that stay in floating point."""
    scale_bits: int = 3
    """Bits of a scale."""
    scale_group: int = 16
    """Outputs whose scales share a range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.outliers <= 0.5:
            raise UserError(f"outliers = {self.outliers}: must be above 0 and at most 0.5.")
        if not self.group_size or not 1 <= self.scale_bits <= 8 or self.scale_group < 1:
            raise UserError("SpQR needs groups of inputs, scale_bits from 1 to 8 and a positive scale_group.")
        if self.activation_bits != "none":
            raise UserError(
                "SpQR keeps some weights in floating point, and so the activations: activation_bits is none."
            )

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        count = max(1, round(self.outliers * linear.in_features * linear.out_features))
        return super().options(name, linear) | {"outliers": count}

    @torch.no_grad()
    def quantize(self, layer: Any, w: Tensor, hessian: Tensor) -> None:
        scheme = self.grid()
        one_group = Scheme(bits=scheme.bits, granularity="channel", symmetric=scheme.symmetric)
        factor = inverse_factor(hessian, self.damping)
        rounded = dequantize_affine(quantize_affine(w, *fit(w, scheme), scheme), *fit(w, scheme), scheme)
        cost = ((w - rounded) / factor.diagonal()) ** 2
        at = cost.flatten().topk(layer.outlier_at.numel()).indices.sort().values
        keep = torch.zeros(w.numel(), dtype=torch.bool, device=w.device).index_fill_(0, at, True).view_as(w)

        def grid_of(columns: Tensor, group: int) -> Grid:
            kept = keep[:, group * scheme.group_size : (group + 1) * scheme.group_size]
            inner = columns.masked_fill(kept, 0.0)
            scale = few_bit_scales(fit(inner, one_group)[0], self.scale_bits, self.scale_group)
            if scheme.symmetric:
                return scale, torch.zeros_like(scale)
            return scale, (-minmax(inner, one_group)[0] / scale).round().clamp(scheme.qmin, scheme.qmax)

        q, scale, zero_point, values = quantize_columns(w, factor, scheme, grid_of, keep)
        layer.set_grid(scale, zero_point)
        layer.outlier_at, layer.outlier_values = at.to(torch.int32), values.flatten()[at].half().float()
        layer.set_codes(q)
