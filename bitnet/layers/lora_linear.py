"""``LoRALinear``: frozen low-bit weights and a trained low-rank adapter (LoRA, QLoRA, LoftQ, QA-LoRA).

    y = x @ W_hat.T + scaling * (pool(x) @ A.T) @ B.T        A (R, K or G)   B (N, R)   scaling = alpha / R

``pool`` is nothing (arXiv 2106.09685), or the sum over each group of inputs (QA-LoRA, arXiv 2309.14717): then the
adapter adds one number to all weights of a group, which the zero points can take in without loss::

    zero_point' = zero_point - scaling * (B @ A) / scale        in floating point
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.affine import Scheme, stored_scale
from bitnet.layers.activation_quantizer import filled
from bitnet.layers.fake_quantized_linear import FakeQuantizedLinear


class LoRALinear(FakeQuantizedLinear):
    """A frozen ``FakeQuantizedLinear`` with float activations and an adapter of ``rank``.

    With ``pooled`` the grid must be asymmetric and grouped, and ``merge`` takes the adapter into the zero points.
    """

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, alpha: float, pooled: bool = False, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.rank, self.scaling, self.pooled = rank, alpha / rank, pooled
        self.merges_adapter = pooled
        inputs = in_features
        if pooled:
            assert isinstance(self.grid, Scheme) and self.grid.granularity == "group" and not self.grid.symmetric
            inputs = in_features // self.grid.group_size
        self.lora_a: nn.Parameter | None = nn.Parameter(filled((rank, inputs), 0.0))
        self.lora_b: nn.Parameter | None = nn.Parameter(filled((out_features, rank), 0.0))
        if not self.lora_a.is_meta:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def adapter(self) -> Tensor:
        """What the adapter adds to ``W_hat``, float32 (N, K); 0 when it has been merged."""
        if self.lora_a is None or self.lora_b is None:
            return torch.zeros(())
        change = self.scaling * (self.lora_b @ self.lora_a)
        return change.repeat_interleave(self._rows.group_size, dim=1) if self.pooled else change

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_a is None or self.lora_b is None:
            return y
        read = x.unflatten(-1, (-1, self._rows.group_size)).sum(-1) if self.pooled else x
        return y + self.scaling * F.linear(F.linear(read, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Take a pooled adapter into the zero points, which become floating point; the function stays the same."""
        assert self.pooled and self.zero_point is not None and self.scale is not None
        if self.lora_a is None or self.lora_b is None:
            return
        if self._is_skeleton:
            self.lora_a = self.lora_b = None
            return
        change = self.scaling * (self.lora_b @ self.lora_a)
        self.zero_point.data = self.zero_point - change.unsqueeze(-1) / stored_scale(self.scale)
        self.lora_a = self.lora_b = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}, pooled={self.pooled}"
