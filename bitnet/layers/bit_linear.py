"""``BitLinear``: a linear layer that is trained with the numbers it will be served with.

``.weight`` is latent: float, and what the optimizer moves. The forward sees its levels, {-1, 0, 1} or {-1, 1}, and int8
or int4 activations; formulas and gradients are in ``integer_products``. The norm before it belongs to the model.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitnet.input_transforms import TRANSFORMS, TransformName
from bitnet.layers.integer_products import (
    MAX_EXACT_K,
    Arithmetic,
    Levels,
    LowBitProduct,
    activation_rows,
    dequantize,
    quantize_activations,
)
from bitnet.layers.sharding import AddUp, Split, local_part
from bitnet.quantizers import (
    WEIGHT_QUANTIZERS,
    WeightScale,
    straight_through,
)
from bitnet.scale_rules import ScalePer
from bitnet_kernels import FORMATS
from bitnet_kernels.cpu.weights import pack_levels

WeightKind = Literal["ternary", "binary", "none"]
ActBits = Literal[8, 4, "none"]
Phase = Literal["float", "blended", "low-bit"]


class BitLinear(nn.Linear):
    """Drop-in for ``nn.Linear`` with ``weight_kind`` weights and ``act_bits`` activations; ``.weight`` is latent.

    ``warmup`` blends the quantizers in while training: 0 is a float layer, 1 (the default) the exact low-bit forward.
    In eval mode the layer always computes what will be served.
    Raises ``ValueError`` when in_features exceeds ``MAX_EXACT_K``.
    """

    needs_whole_scale = True
    """Whether a piece of the weight needs to know the scale of the whole matrix."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_kind: WeightKind = "ternary",
        act_bits: ActBits = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features > MAX_EXACT_K:
            raise ValueError(f"in_features = {in_features}: exact float32 sums end at {MAX_EXACT_K}.")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_kind: WeightKind = weight_kind
        self.scale_per: ScalePer = "matrix"
        self.transform: TransformName = "none"
        """What happens to the inputs before they are quantized."""
        self.act_bits: ActBits = act_bits
        self.warmup = 1.0
        self._held = False
        self._levels: tuple[tuple[Any, ...], Levels] | None = None
        self.arithmetic = Arithmetic()
        self.split: Split | None = None
        """How the matrix is split over processes that work on the same tokens (tensor parallelism)."""
        self.shared_scale: WeightScale | None = None
        """Scale of the whole matrix where this process holds a part of it; see ``share_scales``."""
        self.passes_by = False
        """Whether the whole weight is here only while it is used (FSDP2): then backward rounds it again."""
        self.weight_holds_levels = False
        """Whether what passes by are levels (``gather_levels``)."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, weight_kind: WeightKind, act_bits: ActBits) -> "BitLinear":
        """A ``BitLinear`` that shares the parameters of ``linear``; state-dict keys stay the same."""
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            weight_kind=weight_kind,
            act_bits=act_bits,
            device="meta",
        )
        new.weight, new.bias = linear.weight, linear.bias
        new.train(linear.training)
        return new

    @property
    def warmup(self) -> float:
        return float(self._strength)

    @warmup.setter
    def warmup(self, value: float) -> None:
        # ``torch.compile`` looks at the phase and takes the tensor as it comes. For each new value of a number it would
        # compile anew, and after eight of them give up for the rest of the run.
        self.phase: Phase = "float" if value <= 0.0 else "low-bit" if value >= 1.0 else "blended"
        with torch.inference_mode(False):  # wherever it is set: backward may need it
            self._strength = torch.tensor(value, dtype=torch.float64, device="cpu")

    @property
    def cut(self) -> Split | None:
        """The split, where other processes hold more of the inputs: scales are common, and outputs are added up."""
        return self.split if self.split is not None and self.split.dim == "inputs" else None

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """``(q, inv_scale)``: int8 (N, K) and float32 () of the latent weight as it is now."""
        levels = self.levels()
        return levels.q, levels.inv_scale

    def levels(self) -> Levels:
        """The quantized weight.

        It is computed once and kept where nothing can change the weight: between forwards without gradients in eval
        mode, and inside a window of gradient accumulation, which the trainer declares by ``hold``. No version counter
        could tell in general: fused optimizers and FSDP write to a parameter without raising it.
        """
        assert self.weight_kind != "none"
        keep = self._held or not (self.training or self.passes_by or torch.is_grad_enabled())
        if not keep or torch.compiler.is_compiling():
            self._levels = None
            return self._quantize()
        kept = self._kept()
        if kept is None:
            kept = self._quantize()
            self.keep(kept)
        return kept

    def keep(self, levels: Levels) -> None:
        """Take these for the levels of the weight as it is now."""
        self._levels = (self._state(), levels)

    def _state(self) -> tuple[Any, ...]:
        """Changes where a parameter is seen to have changed; what is made in inference mode serves there only."""
        return torch.is_inference_mode_enabled(), *(
            (local_part(p).detach().data_ptr(), p.dtype, p.is_inference() or p._version)
            for p in self.parameters(recurse=False)
        )

    def _kept(self) -> Levels | None:
        """Those that are kept, if they are of the weight as it is now."""
        return self._levels[1] if self._levels is not None and self._levels[0] == self._state() else None

    @property
    def is_on_gpu_as_a_whole(self) -> bool:
        """Whether the kernels take the weight that finish many matrices at once (``triton_levels``)."""
        whole = self.shared_scale is None and not self.passes_by and type(self.weight) is nn.Parameter
        plain = self.weight.dtype == torch.float32 and self.weight.is_contiguous()
        return self.weight.is_cuda and whole and plain and not torch.compiler.is_compiling()

    def _scale(self, weight: Tensor) -> WeightScale:
        quantizer = WEIGHT_QUANTIZERS[self.weight_kind]
        if self.shared_scale is not None:
            return self.shared_scale
        if not self.is_on_gpu_as_a_whole:
            return quantizer.scale(quantizer.statistics(weight), weight.numel())
        from bitnet_kernels.triton_levels import matrix_scales

        return WeightScale(*matrix_scales([weight], quantizer.binary)[0].unbind())

    def _quantize(self) -> Levels:
        weight, quantizer = local_part(self.weight).detach(), WEIGHT_QUANTIZERS[self.weight_kind]
        scale = self._scale(weight)
        if weight.is_cuda and self.arithmetic.input_gradient != "float" and not self.weight_holds_levels:
            q, q_t = quantizer.int8_levels_both_ways(weight, scale)
            return Levels(q, scale.inv_scale, q_t=q_t)
        q = self._int8(weight, scale)
        return Levels(q, scale.inv_scale, self._pack(q), quantizer.format)

    def _pack(self, q: Tensor) -> Tensor | None:
        """Levels as the packed product reads them, unless another one multiplies."""
        blends = self.training and self.phase != "low-bit"
        if blends or self.act_bits == "none" or self.arithmetic.forward == "float":
            return None
        return pack_levels(q, FORMATS[WEIGHT_QUANTIZERS[self.weight_kind].format].planes)

    def local_levels(self) -> Tensor:
        """int8 levels of the piece of a spread weight that this process keeps; needs ``share_scales``."""
        assert self.shared_scale is not None
        return WEIGHT_QUANTIZERS[self.weight_kind].int8_levels(local_part(self.weight).detach(), self.shared_scale)

    def _int8(self, weight: Tensor, scale: WeightScale) -> Tensor:
        if self.weight_holds_levels:
            return weight.to(torch.int8)
        return WEIGHT_QUANTIZERS[self.weight_kind].int8_levels(weight, scale)

    def hold(self, held: bool) -> None:
        """Promise (or stop promising) that the weight will not change, so that its quantized form can be reused."""
        if not (held and self._held):
            self._levels = None
        self._held = held

    @property
    def holds_nothing(self) -> bool:
        """Whether the levels would be kept, and are not there yet."""
        return self._held and self._kept() is None

    def train(self, mode: bool = True) -> "BitLinear":
        self._levels = None
        return super().train(mode)

    def transformed(self, x: Tensor) -> Tensor:
        """The inputs as they are quantized."""
        return x if self.transform == "none" else TRANSFORMS[self.transform](x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformed(x)
        phase: Phase = self.phase if self.training else "low-bit"
        if self.weight_kind == "none" or self.act_bits == "none" or phase != "low-bit":
            return self._float_forward(x, phase)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        cut = self.cut
        rows = activation_rows(x, self.act_bits, cut.largest if cut else None)
        scale = self.shared_scale
        again = functools.partial(self._int8, scale=scale) if self.passes_by and scale is not None else None
        y: Tensor = LowBitProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), local_part(self.weight), rows, self.levels(), dtype, self.arithmetic, again,
            cut.add_up if cut else None,
        )  # fmt: skip
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias

    def _float_forward(self, x: Tensor, phase: Phase) -> Tensor:
        """Fake quantization of whichever side is low-bit, blended by ``warmup``: u + warmup * (quantized(u) - u).

        Backward makes the blended operands again from ``x`` and the weight, which are there anyway: kept, they would
        take more than the float layer that a run begins with, and memory would run out in the middle of it. (The
        compiler decides by itself what is cheap to make again.)
        """
        operands = x, phase, self._strength
        narrow = x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type)  # a copy of the weight, then
        makes_operands = phase != "float" or narrow
        if not makes_operands or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            y: Tensor = self._float_product(*operands)
        else:
            y = checkpoint(self._float_product, *operands, use_reentrant=False, preserve_rng_state=False)
        if self.cut is None:
            return y
        y = AddUp.apply(y, self.cut)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _float_product(self, x: Tensor, phase: Phase, strength: Tensor) -> Tensor:
        w = local_part(self.weight)
        if self.weight_kind != "none":
            w = self._blended_weight(w, phase, strength)
        if self.act_bits != "none" and phase != "float":
            q, inv_scale = quantize_activations(x, self.act_bits, self.cut and self.cut.largest)
            x = straight_through(blend(x.detach(), (q / inv_scale).to(x.dtype), phase, strength), x)
        bias = None if self.bias is None or self.cut else self.bias.to(x.dtype)
        return F.linear(x, w.to(x.dtype), bias)  # latent weights are float32 in a bf16 model, too

    def _blended_weight(self, w: Tensor, phase: Phase, strength: Tensor) -> Tensor:
        if phase == "float":
            return w
        levels = self.levels()
        dense = dequantize(levels.q, levels.inv_scale, None).to(w.dtype)
        return straight_through(blend(w.detach(), dense, phase, strength), w)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_kind={self.weight_kind}, act_bits={self.act_bits}"


def blend(x: Tensor, quantized: Tensor, phase: Phase, strength: Tensor) -> Tensor:
    """``x + strength * (quantized - x)``; wholly quantized where nothing is blended in any more."""
    return quantized if phase == "low-bit" else torch.lerp(x, quantized, strength.to(x.dtype))


def low_bit_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The layers of ``model`` whose weights are quantized, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    return {name: layer for name, layer in layers.items() if layer.weight_kind != "none"}


def level_shares(q: Tensor) -> list[float]:
    """Shares of -1, 0 and +1 in a quantized weight."""
    return [float((q == level).float().mean()) for level in (-1, 0, 1)]
