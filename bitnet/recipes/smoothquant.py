r"""SmoothQuant (arXiv 2211.10438): 8-bit weights and activations after outliers have moved into the weights.

    s_j = max_t |X_tj|^alpha / max_n |W_nj|^(1 - alpha)        (equation 4)

Norms are divided by ``s`` and the matrices behind them multiplied (see ``smoothing.py``); then weights take one scale a
matrix and activations one a token (O1), one a call (O2), or one fixed by calibration (O3). What wo and w2 read is
quantized but, as in the paper, not smoothed, unless a sub-norm lies before them; ``matrices`` smooths it too,
through wv and w3.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bitnet.affine import Scheme
from bitnet.errors import UserError
from bitnet.layers import ActivationScheme, quantized_layers
from bitnet.layers.activation_quantizer import ActivationScale
from bitnet.loss import next_token_loss
from bitnet.model import Block, Transformer
from bitnet.recipes.base import Progress, no_progress
from bitnet.recipes.calibration import Chain, Hidden, watching
from bitnet.recipes.post_training import PostActBits, PostTraining
from bitnet.recipes.smoothing import pairs

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST = 1e-5
LEVELS: dict[str, ActivationScale] = {"o1": "token", "o2": "tensor", "o3": "static"}


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``s`` (K,) from the largest magnitudes of the inputs (K,) and of the weights of all readers (K,)."""
    a, w = activations.float().clamp(min=SMALLEST), weights.float().clamp(min=SMALLEST)
    return (a**alpha / w ** (1 - alpha)).clamp(min=SMALLEST).to(activations.dtype)


@torch.no_grad()
def smooth_block(chain: Chain, block: Block, hidden: Hidden, alpha: float, matrices: bool = False) -> None:
    """Fold ``s`` into every norm of ``block`` and the linears behind it; ``hidden`` is what the block reads."""
    found = list(reversed(list(pairs(block, matrices))))  # folds between matrices change rows that others look at
    largest: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen = x.abs().flatten(0, -2).amax(0)
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

    first = {next(iter(pair.readers)): pair for pair in found}  # all readers of a pair see the same
    with watching({name: pair.readers[name] for name, pair in first.items()}, see):
        chain.run(block, hidden)
    for name, pair in first.items():
        weights = torch.stack([linear.weight.abs().amax(0) for linear in pair.readers.values()]).amax(0)
        pair.fold(smoothing_factors(largest[name], weights, alpha))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(PostTraining):
    """SmoothQuant O1, O2 and O3 (arXiv 2211.10438)."""

    needs_text: ClassVar[bool] = True

    bits: Literal[8] = 8
    """Bits of the weights."""
    group_size: int = 0
    """Not used: weights have one scale a matrix or an output."""
    symmetric: bool = True
    """Without zero points."""
    activation_bits: PostActBits = 8
    """Bits of the activations."""
    level: Literal["o1", "o2", "o3"] = "o1"
    """Scale of the activations: one a token, one a call, or one fixed by calibration."""
    weight_scale: Literal["tensor", "channel"] = "tensor"
    """Who shares a scale of the weights; the paper has one a matrix."""
    alpha: float | Literal["auto", "none"] = 0.5
    """How much of the outliers moves into the weights; auto tries several, none smooths nothing."""
    matrices: bool = False
    """Also smooth what wo and w2 read where the matrix before can take the factor, which the paper does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.alpha, str) and not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"alpha = {self.alpha}: must be between 0 and 1, auto or none.")
        if self.group_size or not self.symmetric or self.activation_bits == "none":
            raise UserError("SmoothQuant has symmetric weights without groups, and integer activations.")

    def grid(self) -> Any:
        return Scheme(bits=self.bits, granularity=self.weight_scale, symmetric=True)

    def activations(self, name: str) -> ActivationScheme | None:
        assert self.activation_bits != "none"
        return ActivationScheme(bits=self.activation_bits, scale=LEVELS[self.level])

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        batches = list(batches)
        if not batches:
            return super().prepare(model)
        assert isinstance(model, Transformer)
        alpha = self.best_alpha(model, batches, progress) if self.alpha == "auto" else self.alpha
        if alpha != "none":
            assert not isinstance(alpha, str)
            self.smooth(model, batches, alpha, progress)
            self.found["alpha"] = alpha
        names = super().prepare(model)
        if self.level == "o3":
            calibrate_ranges(model, batches)
        return names

    def smooth(self, model: Transformer, batches: list[Tensor], alpha: float, progress: Progress = no_progress) -> None:
        """Fold the factors of every block; the function of the model stays what it is."""
        chain = Chain(model, batches)
        hidden = chain.embedded()
        for number, block in enumerate(chain.blocks):
            smooth_block(chain, block, hidden, alpha, self.matrices)
            hidden = chain.run(block, hidden)
            progress("smoothing", number + 1, len(chain.blocks))

    @torch.no_grad()
    def best_alpha(self, model: Transformer, batches: list[Tensor], progress: Progress) -> float:
        """The alpha with which the quantized model predicts the calibration text best."""
        losses: dict[float, float] = {}
        for number, alpha in enumerate(ALPHAS):
            progress("searching alpha", number, len(ALPHAS))
            trial = copy.deepcopy(model)
            replace(self, alpha=alpha).prepare(trial, batches)
            rows = [{"inputs": b[:, :-1], "targets": b[:, 1:]} for b in batches]
            losses[alpha] = sum(float(next_token_loss(trial, row)) for row in rows) / len(rows)
        self.found["losses"] = losses
        return min(losses, key=lambda alpha: losses[alpha])


@torch.no_grad()
def calibrate_ranges(model: Transformer, batches: list[Tensor]) -> None:
    """Set static activation ranges to the widest that ``batches`` show, in a forward with float activations."""
    layers = quantized_layers(model).values()
    for layer in layers:
        assert layer.act is not None
        layer.act.observing, layer.quantizes_activations = "widest", False
    for batch in batches:
        model(batch)
    for layer in layers:
        assert layer.act is not None
        layer.act.observing, layer.quantizes_activations = None, True


@dataclass(frozen=True, kw_only=True)
class LLMInt8(PostTraining):
    """LLM.int8() (arXiv 2208.07339): int8 rows times int8 tokens, and input columns with large values in float.

    A column counts as large when any of its values in the call exceeds ``threshold``, so that, as in the original, the
    result for one token depends a little on those beside it.
    """

    bits: Literal[8] = 8
    """Bits of the weights."""
    group_size: int = 0
    """0: one scale per output."""
    symmetric: bool = True
    """Without zero points."""
    activation_bits: PostActBits = 8
    """Bits of the activations."""
    threshold: float = 6.0
    """Magnitude above which an input column is taken in floating point."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold <= 0:
            raise UserError(f"threshold = {self.threshold}: must be positive.")

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        return super().options(name, linear) | {"outlier_threshold": self.threshold}
