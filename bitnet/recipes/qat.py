r"""Quantization-aware training from a float model: the forward is quantized, the gradient passes straight through.

Weights take the grid of their smallest and largest values anew at every step, or one whose scale and zero point are
trained too (LSQ, arXiv 1902.08153). Activations have one scale per token, or one that is a moving average of what
training has shown and is frozen in evaluation (arXiv 1712.05877, section 3.1). Training may begin with float
activations, so that these averages settle first.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from bitnet.errors import UserError
from bitnet.layers import ActivationScheme, quantized_layers
from bitnet.layers.fake_quantized_linear import State
from bitnet.recipes.base import Progress, no_progress
from bitnet.recipes.post_training import PostTraining


@dataclass(frozen=True, kw_only=True)
class QAT(PostTraining):
    """Quantization-aware training (arXiv 1712.05877, 1902.08153)."""

    trains: ClassVar[bool] = True

    ranges: Literal["minmax", "learned"] = "minmax"
    """Grid of the weights: from their smallest to their largest value, or trained."""
    act_scale: Literal["token", "static"] = "token"
    """Scale of the activations: one a token, or a moving average."""
    act_momentum: float = 0.01
    """Weight of a batch in the moving average."""
    act_from: float = 0.0
    """Fraction of the run with float activations; the averages settle meanwhile."""
    train: Literal["all", "linears"] = "all"
    """What is trained: everything, or only the linears of the blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.act_from <= 1.0:
            raise UserError(f"act_from = {self.act_from}: a fraction between 0 and 1 is needed.")

    def state(self) -> State:
        return "learned" if self.ranges == "learned" else "latent"

    def activations(self, name: str) -> ActivationScheme | None:
        if self.activation_bits == "none":
            return None
        return ActivationScheme(bits=self.activation_bits, scale=self.act_scale, momentum=self.act_momentum)

    def prepare(self, model: nn.Module, batches: Iterable[Tensor] = (), progress: Progress = no_progress) -> list[str]:
        names = super().prepare(model)
        for layer in quantized_layers(model).values():
            if layer.act is not None:
                layer.act.observing = "average"
                layer.quantizes_activations = self.act_from == 0.0
        return names

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        in_linear = name.endswith((".scale", ".zero_point")) or (name.startswith("layers.") and parameter.ndim == 2)
        return self.train == "all" or in_linear

    def on_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        for layer in quantized_layers(model).values():
            layer.quantizes_activations = self._has_begun(step, total_steps)

    def _has_begun(self, step: int, total_steps: int) -> bool:
        return step >= self.act_from * total_steps

    def served(self, step: int, total_steps: int) -> "QAT":
        return replace(self, act_from=0.0 if self._has_begun(step, total_steps) else 1.0)
