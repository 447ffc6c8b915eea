"""``BitLinear``: a linear layer that is trained with the numbers it will be served with.

Forward (arXiv 2402.17764; the norm before it belongs to the model)::

    x_q, s_x = int8(x) per token      w_q, s_w = ternary(w) or binary(w) per tensor
    y = (x_q @ w_q.T) / (s_x * s_w)

Both operands of the matrix product hold integers, so its float32 sum is exact up to ``MAX_EXACT_K`` inputs, in any
order and at any speed: a packed kernel that adds int32 gets the same bits. Backward is the straight-through estimator
with identity gradients: ``dx = dy @ (w_q / s_w)`` and ``dw = dy.T @ (x_q / s_x)``. Activations are saved as int8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, fake_quantize, straight_through

WeightKind = Literal["ternary", "binary", "none"]
ActBits = Literal[8, 4, "none"]

MAX_EXACT_K = 2**24 // 127
"""Most inputs for which a float32 sum of int8 x {-1, 0, 1} products is exact (132,104)."""


@contextmanager
def _bf16_products(device: torch.device) -> Iterator[None]:
    """Let float32 matmuls round their operands to bf16, which changes no integer below 257, and is much faster.

    The setting is process-global, hence the narrow scope. Under ``torch.compile`` it is left alone.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def integer_matmul(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` for integer-valued float32 x (M, K) and w (N, K): the exact sums as float32 (M, N)."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda:
            return torch.mm(x.to(torch.bfloat16), w.to(torch.bfloat16).t(), out_dtype=torch.float32)
        with _bf16_products(x.device):
            return torch.mm(x, w.t())


class _Rows(NamedTuple):
    """Quantized activations: float32 ``q`` (M, K) holding integers, the same as int8, and ``inv_scale`` (M, 1)."""

    q: Tensor
    q_int8: Tensor
    inv_scale: Tensor


def _quantize_rows(x: Tensor, bits: int) -> _Rows:
    """Quantize the activations (..., K) of a layer, once for all layers that read the same tensor.

    wq, wk and wv do, and so do w1 and w3. The result is kept on the tensor itself, so it lives no longer than that, and
    is made again when the tensor has been written to. Only intermediate results of a training forward are touched so.
    """
    keep = x.grad_fn is not None and not torch.compiler.is_compiling()
    key = (bits, x._version) if keep else None
    kept = getattr(x, "_bitnet_rows", None) if keep else None
    if kept is not None and kept[0] == key:
        rows: _Rows = kept[1]
        return rows
    q, inv_scale = ACTIVATION_QUANTIZERS[bits](x)
    q = q.reshape(-1, x.shape[-1])
    rows = _Rows(q, q.to(torch.int8), inv_scale.reshape(-1, 1))
    if keep:
        x._bitnet_rows = (key, rows)  # type: ignore[attr-defined]
    return rows


class _BitLinearFunction(torch.autograd.Function):
    """x (M, K), weight (N, K), their quantized forms, w_q as int8 (N, K) -> y (M, N) in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: _Rows, w_q: Tensor, w_inv_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows.q_int8, rows.inv_scale, w_q, w_inv_scale)
        ctx.input_dtypes = x.dtype, weight.dtype
        y = integer_matmul(rows.q, w_q.float())
        return y.div_(rows.inv_scale * w_inv_scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x_q, x_inv_scale, w_q, w_inv_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.input_dtypes
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, w_q.to(grad.dtype)).to(x_dtype).div_(w_inv_scale)
        if ctx.needs_input_grad[1]:
            grad_w = torch.mm(grad.t(), x_q.float().div_(x_inv_scale).to(grad.dtype)).to(w_dtype)
        return grad_x, grad_w, None, None, None, None


class BitLinear(nn.Linear):
    """Drop-in for ``nn.Linear`` with ``weight_kind`` weights and ``act_bits`` activations; ``.weight`` is latent.

    ``warmup`` blends the quantizers in while training: 0 is a float layer, 1 (the default) the exact low-bit forward.
    In eval mode the layer always computes what will be served.
    Raises ``ValueError`` when in_features exceeds ``MAX_EXACT_K``.
    """

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
        self.act_bits: ActBits = act_bits
        self.warmup = 1.0
        self._held = False
        self._quantized: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

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

    def quantized_weight(self) -> tuple[Tensor, Tensor]:
        """``(q, inv_scale)``: int8 (N, K) and float32 () of the latent weight as it is now.

        They are computed once and kept where nothing can change the weight: between forwards without gradients in eval
        mode, and inside a window of gradient accumulation, which the trainer declares by ``hold``. No version counter
        could tell in general: fused optimizers and FSDP write to a parameter without raising it.
        """
        assert self.weight_kind != "none"
        quantizer = WEIGHT_QUANTIZERS[self.weight_kind]
        keep = self._held or not (self.training or torch.is_grad_enabled())
        if not keep or torch.compiler.is_compiling():
            self._quantized = None
            q, inv_scale = quantizer(self.weight)
            return q.to(torch.int8), inv_scale
        key = (self.weight.data_ptr(), self.weight.dtype, self.weight.is_inference() or self.weight._version)
        if self._quantized is None or self._quantized[0] != key:
            q, inv_scale = quantizer(self.weight)
            self._quantized = (key, q.to(torch.int8), inv_scale)
        return self._quantized[1], self._quantized[2]

    def hold(self, held: bool) -> None:
        """Promise (or stop promising) that the weight will not change, so that its quantized form can be reused."""
        self._held = held
        if not held:
            self._quantized = None

    def train(self, mode: bool = True) -> "BitLinear":
        self._quantized = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        blending = self.training and self.warmup < 1.0
        if self.weight_kind == "none" or self.act_bits == "none" or blending:
            return self._float_forward(x, self.warmup if blending else 1.0)
        w_q, w_inv_scale = self.quantized_weight()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows = _quantize_rows(x, self.act_bits)
        flat = x.reshape(-1, self.in_features)
        y: Tensor = _BitLinearFunction.apply(flat, self.weight, rows, w_q, w_inv_scale, dtype)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _float_forward(self, x: Tensor, warmup: float) -> Tensor:
        """Fake quantization of whichever side is low-bit, blended by ``warmup``: u + warmup * (quantized(u) - u)."""
        w = self.weight
        if self.weight_kind != "none":
            q, inv_scale = self.quantized_weight()
            w = _blend(w, (q / inv_scale).to(w.dtype), warmup)
        if self.act_bits != "none":
            x = _blend(x, fake_quantize(ACTIVATION_QUANTIZERS[self.act_bits], x.detach()), warmup)
        return F.linear(x, w, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_kind={self.weight_kind}, act_bits={self.act_bits}"


def _blend(x: Tensor, quantized: Tensor, warmup: float) -> Tensor:
    return straight_through(quantized if warmup == 1.0 else torch.lerp(x.detach(), quantized, warmup), x)


def low_bit_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The layers of ``model`` whose weights are quantized, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    return {name: layer for name, layer in layers.items() if layer.weight_kind != "none"}


def level_shares(q: Tensor) -> list[float]:
    """Shares of -1, 0 and +1 in a quantized weight."""
    return [float((q == level).float().mean()) for level in (-1, 0, 1)]
