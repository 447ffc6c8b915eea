r"""Adapters on frozen low-bit weights: QLoRA, LoftQ, QA-LoRA.

* QLoRA (arXiv 2305.14314): NormalFloat weights, scales quantized once more, an adapter on every linear that starts at
  zero: ``B = 0``.
* LoftQ (arXiv 2310.08659): the adapter starts where it repairs the rounding best. From ``A = B = 0``, alternately
  ``Q = quantize(W - B A)`` and ``B A`` = the rank-R SVD of ``W - Q``; of all rounds the one with the least
  ``|W - Q - B A|`` is kept, since the error need not fall at every round.
* QA-LoRA (arXiv 2309.14717): grouped integers and an adapter on sums over groups, at last merged into the zero points.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.affine import Scheme
from bitnet.codebook import Codebook, DoubleQuantized
from bitnet.errors import UserError
from bitnet.layers import FakeQuantizedLinear, LoRALinear, quantized_layers
from bitnet.layers.fake_quantized_linear import State
from bitnet.recipes.gptq import GPTQ
from bitnet.recipes.post_training import PostActBits, PostTraining


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


@dataclass(frozen=True, kw_only=True)
class QLoRA(PostTraining):
    """QLoRA (arXiv 2305.14314)."""

    trains: ClassVar[bool] = True
    kind: ClassVar[type[FakeQuantizedLinear]] = LoRALinear

    quantizer: Literal["normal", "uniform"] = "normal"
    """Levels at the quantiles of a normal distribution (2 to 4 bits), or equally spaced."""
    double_quantization: bool = True
    """Round the scales to 8 bits, 256 of them with one scale of their own (NormalFloat only)."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 16.0
    """What the adapters give is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"rank = {self.rank}: must be at least 1.")
        if self.activation_bits != "none":
            raise UserError(f"activation_bits = {self.activation_bits}: adapters read float activations; use none.")
        if self.quantizer == "normal" and not self.group_size:
            raise UserError("group_size = 0: NormalFloat needs blocks; 64 is usual.")

    def grid(self) -> Any:
        if self.quantizer == "normal":
            return Codebook(bits=self.bits, group_size=self.group_size)
        return super().grid()

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        return super().options(name, linear) | {"rank": self.rank, "alpha": self.alpha}

    def layer(self, name: str, linear: nn.Linear, state: State | None = None) -> FakeQuantizedLinear:
        layer = super().layer(name, linear, state)
        if not linear.weight.is_meta:
            self.begin(layer, linear.weight.detach())
        return layer

    def begin(self, layer: Any, w: Tensor) -> None:
        """Quantize ``w`` (N, K) and start the adapter."""
        self.round(layer, w)

    def round(self, layer: FakeQuantizedLinear, w: Tensor) -> Tensor:
        """Round ``w`` into ``layer``; returns what it then stands for."""
        layer.quantize_from(w)
        if self.quantizer == "normal" and self.double_quantization:
            assert layer.scale is not None
            layer.set_grid(DoubleQuantized.of(layer.scale.detach()).scale(), None)
            layer.requantize(w)
        return layer.dense().detach()

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        return is_adapter(name)


@torch.no_grad()
def loftq(
    w: Tensor, quantize: Callable[[Tensor], Tensor], rank: int, rounds: int
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """``(rounded input, A, B, errors)``: the best of ``rounds`` alternations (arXiv 2310.08659, algorithm 1).

    ``quantize`` returns what a matrix stands for after rounding. ``errors`` are ``|W - Q - B A| / |W|`` of the best so
    far, by round. The rounded input is the ``W - B A`` whose quantization goes with the returned A (R, K) and B (N, R).
    """
    a, b = w.new_zeros(rank, w.shape[1]), w.new_zeros(w.shape[0], rank)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    errors = []
    for _ in range(rounds):
        rest = w - b @ a
        q = quantize(rest)
        u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        error = float((w - q - b @ a).norm() / w.norm())
        if best is None or error < best[0]:
            best = (error, rest, a, b)
        errors.append(best[0])
    assert best is not None
    return best[1], best[2], best[3], errors


@dataclass(frozen=True, kw_only=True)
class LoftQ(QLoRA):
    """LoftQ (arXiv 2310.08659): QLoRA whose adapters start at the rounding error."""

    rounds: int = 5
    """Alternations of rounding and SVD; the best is kept."""
    alpha: float = 0.0
    """Not used: adapters are not scaled, since Q + B A must be near W."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise UserError(f"rounds = {self.rounds}: must be at least 1.")

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        return super().options(name, linear) | {"alpha": float(self.rank)}

    def begin(self, layer: Any, w: Tensor) -> None:
        rest, a, b, _ = loftq(w.float(), lambda x: self.round(layer, x), self.rank, self.rounds)
        self.round(layer, rest)
        missing = self.rank - a.shape[0]  # a matrix has no more singular values than rows or columns
        layer.lora_a.data = F.pad(a, (0, 0, 0, missing)).contiguous()
        layer.lora_b.data = F.pad(b, (0, missing)).contiguous()


@dataclass(frozen=True, kw_only=True)
class QALoRA(GPTQ):
    """QA-LoRA (arXiv 2309.14717): a base of GPTQ (of rounding to nearest without calibration text) and adapters that
    end in its zero points.
    """

    trains: ClassVar[bool] = True
    kind: ClassVar[type[FakeQuantizedLinear]] = LoRALinear

    group_size: int = 32
    """Inputs that share a scale, a zero point and an input of the adapter."""
    activation_bits: PostActBits = "none"
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 16.0
    """What the adapters give is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric or not self.group_size or self.activation_bits != "none" or self.rank < 1:
            raise UserError("QA-LoRA needs zero points, groups of inputs, float activations and a positive rank.")

    def grid(self) -> Scheme:
        return Scheme(bits=self.bits, granularity="group", group_size=self.group_size or 1, symmetric=False)

    def options(self, name: str, linear: nn.Linear) -> dict[str, Any]:
        return super().options(name, linear) | {"rank": self.rank, "alpha": self.alpha, "pooled": True}

    def is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        return is_adapter(name)

    def finalize(self, model: nn.Module) -> None:
        for layer in quantized_layers(model).values():
            assert isinstance(layer, LoRALinear)
            layer.merge()
            layer.requires_grad_(False)
