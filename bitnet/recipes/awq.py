r"""AWQ (arXiv 2306.00978): weights of input channels with large activations are scaled up before rounding.

    s = mean |X|^a        a of a grid in [0, 1) with the least |(W - round(W s) / s) X|^2

folded like SmoothQuant's factors (see ``smoothing.py``), also between wv and wo and between w3 and w2.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitnet.affine import Scheme, dequantize_affine, fit, quantize_affine
from bitnet.model import Block, Transformer
from bitnet.recipes.base import Progress, no_progress
from bitnet.recipes.calibration import Chain, Hidden, linears, second_moments, watching
from bitnet.recipes.post_training import PostTraining
from bitnet.recipes.smoothing import Pair, pairs

EXPONENTS = tuple(i / 20 for i in range(20))


def rounded(w: Tensor, scheme: Scheme) -> Tensor:
    """``w`` after rounding to nearest, float32."""
    scale, zero_point = fit(w, scheme)
    return dequantize_affine(quantize_affine(w, scale, zero_point, scheme), scale, zero_point, scheme)


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """``|difference @ X|^2`` up to a factor, from the second moments of X."""
    difference = difference.float()
    return float(((difference @ hessian) * difference).sum())


@dataclass(frozen=True, kw_only=True)
class AWQ(PostTraining):
    """Activation-aware weight quantization (arXiv 2306.00978)."""

    needs_text: ClassVar[bool] = True

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        batches = list(batches)
        if batches:
            assert isinstance(model, Transformer)
            chain = Chain(model, batches)
            hidden = chain.embedded()
            for number, block in enumerate(chain.blocks):
                self.scale_block(chain, block, hidden)
                hidden = chain.run(block, hidden)
                progress("AWQ", number + 1, len(chain.blocks))
        return super().prepare(model)

    @torch.no_grad()
    def scale_block(self, chain: Chain, block: Block, hidden: Hidden) -> None:
        """Find and fold the factors of one block, whose inputs are ``hidden``."""
        moments = second_moments(chain, block, hidden)
        sums: dict[str, Tensor] = {}
        tokens = sum(x.shape[0] * x.shape[1] for x in hidden)

        def see(name: str, x: Tensor) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + x.abs().flatten(0, -2).sum(0) / tokens

        with watching(dict(linears(block)), see):
            chain.run(block, hidden)
        # A fold between two matrices changes rows of the first, so it comes before those of the norms are looked at;
        # folds of norms leave what wo and w2 read alone.
        for pair in reversed(list(pairs(block, matrices=True))):
            first = next(iter(pair.readers))
            pair.fold(self.best_factors(pair, sums[first], moments[first]))

    def best_factors(self, pair: Pair, magnitude: Tensor, hessian: Tensor) -> Tensor:
        """The factors (K,) with the least output error of all readers after rounding."""
        best, found = float("inf"), torch.ones_like(magnitude)
        for exponent in EXPONENTS:
            s = magnitude.clamp(min=1e-4) ** exponent
            s = s / (s.amax() * s.amin()).sqrt()
            error = 0.0
            for linear in pair.readers.values():
                w = linear.weight.detach().float()
                error += output_error(rounded(w * s, self.grid()) / s - w, hessian)
            if error < best:
                best, found = error, s
        return found
