"""``ScaledBitLinear``: a ``BitLinear`` with any scale rule, per matrix, row or group, and a gradient mask.

It computes what its packed form computes, bit for bit: exact integer sums, scaled once per row, or group by group in
ascending order. Its backward goes through the dequantized weight, which takes more memory than the plain layer's.

A process that holds some rows, or whole groups, of a matrix has all that their scales depend on: it asks nobody.
"""

import torch
from torch import Tensor, nn

from bitnet.layers.bit_linear import ActBits, BitLinear, Phase, blend
from bitnet.layers.grouped_product import Served, grouped_product
from bitnet.layers.integer_products import Levels, activation_rows, dequantize, low_bit_forward
from bitnet.layers.sharding import AddUp, local_part
from bitnet.quantizers import straight_through
from bitnet.scale_rules import FakeWeight, ScaledQuantizer


class ScaledBitLinear(BitLinear):
    """``learned`` adds a trained ``factor`` (R, G), 1 at first, to every scale; ``gradient_clip`` is in steps."""

    needs_whole_scale = False
    factor: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quantizer: ScaledQuantizer,
        learned: bool = False,
        gradient_clip: float | None = None,
        act_bits: ActBits = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, weight_kind=quantizer.kind, act_bits=act_bits, device=device, dtype=dtype
        )
        self.quantizer, self.gradient_clip, self.scale_per = quantizer, gradient_clip, quantizer.per
        shape = quantizer.groups(torch.empty(out_features, in_features, dtype=torch.float32, device="meta")).shape[:2]
        self.factor = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device)) if learned else None

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        act_bits: ActBits,
        *,
        quantizer: ScaledQuantizer,
        learned: bool = False,
        gradient_clip: float | None = None,
    ) -> "ScaledBitLinear":
        """A layer that shares the parameters of ``linear``; its state-dict keys are the same, ``factor`` aside."""
        device = linear.weight.device
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, quantizer=quantizer, learned=learned,
            gradient_clip=gradient_clip, act_bits=act_bits, device="meta",
        )  # fmt: skip
        new.weight, new.bias = linear.weight, linear.bias
        if new.factor is not None:
            new.factor = nn.Parameter(torch.ones_like(new.factor, device=device))
        new.train(linear.training)
        return new

    def _quantize(self) -> Levels:
        q, scale, step = self.quantizer(local_part(self.weight))
        if self.factor is not None:
            scale = scale * local_part(self.factor).detach().float()
        self._steps = scale, step
        if isinstance(self.quantizer.per, int):
            return Levels(q, scale.reciprocal(), group_scale=scale)
        inv_scale = scale.reciprocal().view(()) if scale.numel() == 1 else scale.reciprocal().flatten()
        return Levels(q, inv_scale, self._pack(q), self.quantizer.format)

    def local_levels(self) -> Tensor:
        return self.quantizer(local_part(self.weight))[0]

    def _fake_weight(self, levels: Levels) -> Tensor:
        factor = None if self.factor is None else local_part(self.factor)
        dense = dequantize(levels.q, levels.inv_scale, levels.group_scale).to(self.weight.dtype)
        w: Tensor = FakeWeight.apply(  # type: ignore[no-untyped-call]
            local_part(self.weight), factor, dense, levels.q, *self._steps, self.quantizer, self.gradient_clip
        )
        return w

    def _blended_weight(self, w: Tensor, phase: Phase, strength: Tensor) -> Tensor:
        if phase == "float" and self.factor is None:
            return w
        return blend(w, self._fake_weight(self.levels()), phase, strength)

    def forward(self, x: Tensor) -> Tensor:
        if self.act_bits == "none" or (self.training and self.phase != "low-bit"):
            return super().forward(x)
        x = self.transformed(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        cut = self.cut
        rows = activation_rows(x, self.act_bits, cut.largest if cut else None)
        levels, flat = self.levels(), x.reshape(-1, x.shape[-1])
        if levels.group_scale is None:
            y = low_bit_forward(rows, levels, False, None)
        else:
            y = grouped_product(rows.q.float(), levels.q.float(), levels.group_scale).div_(rows.inv_scale)
        if torch.is_grad_enabled():
            seen = straight_through((rows.q / rows.inv_scale).to(dtype), flat)
            y = Served.apply(seen, self._fake_weight(levels), y)  # type: ignore[no-untyped-call]
        if cut is not None:
            y = AddUp.apply(y, cut)  # type: ignore[no-untyped-call]
        y = y.to(dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias
