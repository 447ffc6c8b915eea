"""The three products of a low-bit layer as an autograd function: all operands are integers, or may become so.

Forward (arXiv 2402.17764)::

    x_q, s_x = int8(x) per token      w_q, s_w = ternary(w) or binary(w) per tensor
    y = (x_q @ w_q.T) / (s_x * s_w)

Both operands hold integers, so the sum is exact in any order and on any unit: as int32 by a packed kernel, or as
float32 (up to ``MAX_EXACT_K`` inputs) by a float product of bf16 operands. Backward is the straight-through estimator
with identity gradients, ``dx = dy @ (w_q / s_w)`` and ``dw = dy.T @ (x_q / s_x)``, where one operand holds integers
and ``dy`` can be made to: see ``bitnet_kernels.gradients``. Activations are saved as int8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitnet.quantizers import ACTIVATION_QUANTIZERS, quantize_int8_absmax
from bitnet_kernels import packed_matmul, rms_norm_quantize
from bitnet_kernels.gradients import input_gradient, weight_gradient
from bitnet_kernels.training_ops import int8_matmul

MAX_EXACT_K = 2**24 // 127
"""Most inputs for which a float32 sum of int8 x {-1, 0, 1} products is exact (132,104)."""

GradientKind = Literal["float", "int16", "int8"]
DIGITS: dict[str, int] = {"int8": 1, "int16": 2}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """On which units a low-bit layer multiplies while it trains. The forward gives the same bits on all of them."""

    forward: Literal["auto", "int8", "float"] = "auto"
    """int8 matrix units, float units on integers, or auto: int8 on a CPU, float (bf16) on a GPU."""
    input_gradient: GradientKind = "float"
    """The gradient of the layer's input: as float, or with the output gradient rounded to int16 or int8 per token."""
    weight_gradient: GradientKind = "float"
    """The gradient of the weights: the same, rounded per output."""


class Rows(NamedTuple):
    """Quantized activations: int8 ``q`` (M, K), float32 ``inv_scale`` (M, 1), and int32 ``row_sum`` (M,) if known."""

    q: Tensor
    inv_scale: Tensor
    row_sum: Tensor | None
    q_t: Tensor | None = None
    """``q`` transposed, where a gradient will read it so."""


class Levels(NamedTuple):
    """A quantized weight: int8 ``q`` (N, K), float32 ``inv_scale`` () or (N,), and what else a product reads."""

    q: Tensor
    inv_scale: Tensor
    packed: Tensor | None = None
    format: str = ""
    q_t: Tensor | None = None
    """``q`` transposed, where a gradient will read it so."""
    group_scale: Tensor | None = None
    """Float32 (N, G) factors for groups of inputs, in the place of ``inv_scale``."""


def dequantize(q: Tensor, inv_scale: Tensor | None, group_scale: Tensor | None) -> Tensor:
    """int8 (N, K) with ``inv_scale`` () or (N,), or with ``group_scale`` (N, G) -> float32 (N, K)."""
    if group_scale is not None:
        n, groups = group_scale.shape
        return (q.view(n, groups, -1) * group_scale[..., None]).view(q.shape)
    assert inv_scale is not None
    return q / inv_scale.view(-1, 1)


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
    """``x @ w.T`` for int8 x (M, K) and w (N, K) in float units: the exact sums as float32 (M, N)."""
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda:
            return torch.mm(x.to(torch.bfloat16), w.to(torch.bfloat16).t(), out_dtype=torch.float32)
        with _bf16_products(x.device):
            return torch.mm(x.float(), w.float().t())


def activation_rows(x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] | None = None) -> Rows:
    """Quantize the activations (..., K) of a layer, once for all layers that read the same tensor.

    wq, wk and wv do, and so do w1 and w3. The result is kept on the tensor itself, so it lives no longer than that, and
    is made again when the tensor has been written to. Only intermediate results of a training forward are touched so.
    ``largest`` completes the largest magnitude of each token where a process sees only some of its inputs (8 bits).
    """
    keep = x.grad_fn is not None and not torch.compiler.is_compiling()
    key = (bits, x._version) if keep else None
    kept = getattr(x, "_bitnet_rows", None) if keep else None
    if kept is not None and kept[0] == key:
        rows: Rows = kept[1]
        return rows
    if bits == 8 and largest is None and not torch.compiler.is_compiling():
        rows = Rows(*rms_norm_quantize(x.detach(), None))
    else:
        q, inv_scale = quantize_activations(x, bits, largest)
        rows = Rows(q.reshape(-1, x.shape[-1]).to(torch.int8), inv_scale.reshape(-1, 1), None)
    if keep:
        keep_rows(x, bits, rows)
    return rows


def quantize_activations(
    x: Tensor, bits: int, largest: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``q`` and ``inv_scale`` of ``ACTIVATION_QUANTIZERS``; ``largest`` as in ``activation_rows``."""
    return ACTIVATION_QUANTIZERS[bits](x) if largest is None else quantize_int8_absmax(x, largest)


def keep_rows(x: Tensor, bits: int, rows: Rows) -> None:
    """Leave the quantized form of ``x`` on it, for the next layer that reads it."""
    x._bitnet_rows = ((bits, x._version), rows)  # type: ignore[attr-defined]


def low_bit_forward(rows: Rows, levels: Levels, on_int8_units: bool, reduce: Callable[[Tensor], None] | None) -> Tensor:
    """Float32 (M, N). ``reduce`` adds up the sums of processes that hold some of the inputs each: exactly."""
    (n, k), scales = levels.q.shape, rows.inv_scale * levels.inv_scale
    if on_int8_units and reduce is None:
        return int8_matmul(rows.q, levels.q, rows.inv_scale.flatten(), levels.inv_scale)
    if levels.packed is None:
        total = integer_matmul(rows.q, levels.q)
    elif reduce is None:
        return packed_matmul(
            rows.q, levels.packed, levels.format, n=n, k=k, x_inv_scale=rows.inv_scale,
            w_inv_scale=levels.inv_scale.view(-1), row_sum=rows.row_sum,
        )  # fmt: skip
    else:
        total = packed_matmul(rows.q, levels.packed, levels.format, n=n, k=k, row_sum=rows.row_sum).float()
    if reduce is not None:
        reduce(total)
    return total.div_(scales)


def _transposed(of: Rows | Levels) -> Tensor:
    return of.q.t() if of.q_t is None else of.q_t


class LowBitProduct(torch.autograd.Function):
    """x (M, K), weight (N, K), their quantized forms -> y (M, N) in ``dtype``.

    ``levels_again`` gives the levels of ``weight`` once more: then backward calls it instead of keeping them, because
    the weight is there in full only while it is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rows: Rows,
        levels: Levels,
        dtype: torch.dtype,
        arithmetic: Arithmetic,
        levels_again: Callable[[Tensor], Tensor] | None,
        reduce: Callable[[Tensor], None] | None,
    ) -> Tensor:
        w_kept = weight
        if levels_again is None:
            w_kept = levels.q if arithmetic.input_gradient == "float" else _transposed(levels)
        x_kept = rows.q if arithmetic.weight_gradient == "float" else _transposed(rows)
        ctx.save_for_backward(x_kept, rows.inv_scale, w_kept, levels.inv_scale)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.arithmetic, ctx.levels_again = arithmetic, levels_again
        on_int8_units = arithmetic.forward == "int8" and rows.q.is_cuda
        return low_bit_forward(rows, levels, on_int8_units, reduce).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_q, x_inv_scale, w_q, w_inv_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        how = ctx.arithmetic
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            if ctx.levels_again is not None:
                w_q = ctx.levels_again(w_q)
                w_q = w_q if how.input_gradient == "float" else w_q.t()
            if how.input_gradient == "float":
                grad_x = torch.mm(grad, w_q.to(grad.dtype)).to(x_dtype).div_(w_inv_scale)
            else:
                grad_x = input_gradient(grad, w_q, w_inv_scale, DIGITS[how.input_gradient]).to(x_dtype)
        if ctx.needs_input_grad[1]:
            if how.weight_gradient == "float":
                grad_w = torch.mm(grad.t(), x_q.float().div_(x_inv_scale).to(grad.dtype)).to(w_dtype)
            else:
                grad_w = weight_gradient(grad, x_q, x_inv_scale, DIGITS[how.weight_gradient]).to(w_dtype)
        return grad_x, grad_w, None, None, None, None, None, None
