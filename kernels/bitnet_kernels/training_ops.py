"""The operators of training with int8 products, for CPU and CUDA, for eager and compiled models.

``int8_matmul``         int8 x int8, both along their sum -> exact int32 sums over scales
``quantize_rows``       x -> int8 with one scale a row, and transposed
``quantize_columns``    x -> int8 with one scale a column, transposed
``ternary_weight``      weights -> -1, 0, 1, as they lie and transposed; ``binary_weight``: -1, 1
``norm_quantize``       RMSNorm -> the result, its int8 rows, and what the backward needs; ``rms_norm_backward``

With them a low-bit linear layer y = x . w^T has three int8 products. Forward: ``int8_matmul(x_q, w_q, s_x, s_w)``.
Gradient of x: ``int8_matmul(dy_q, w_q_t, s_dy, s_w)``, where dy is quantized by rows. Gradient of the weight,
``dw[n, k] = sum over m of dy[m, n] / s_x[m] * x_q[m, k]``: the scales of x stand inside the sum, so they go into dy
before it is quantized by columns, ``int8_matmul(*quantize_columns(dy, s_x), ...)`` with ``x_q_t``.

Scales are reciprocal, as everywhere here (``x ~ q / inv_scale``); sums are exact; rounding is half to even. A row or
column that is not finite has integers 0 and inv_scale NaN, so its products are NaN. All are registered with torch as
``bitnet_kernels::...``. Nothing waits for the device.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet_kernels import training_reference
from bitnet_kernels.devices import on_its_device
from bitnet_kernels.ops import _is_plain_cpu
from bitnet_kernels.reference import ABSMAX_FLOOR
from bitnet_kernels.training_reference import MAX_INT8_K

GRADIENT_FLOOR = 1e-30
"""Floor of the magnitudes of gradients: a mean over a batch makes them far smaller than 1e-5."""

LEAST_FLOOR = 1e-35
"""A lower floor would have a scale that float32 cannot hold: 127 / 1e-37 is infinite."""

_LIBRARY = torch.library.Library("bitnet_kernels", "FRAGMENT")
_ON_CPU: dict[str, Callable[..., Any]] = {}


def _call(name: str, *arguments: Any) -> Any:
    """An operator of this library; an eager call on the CPU goes past the dispatcher, as in ``ops``."""
    if _is_plain_cpu(arguments[0]):
        return _ON_CPU[name](*arguments)
    return getattr(torch.ops.bitnet_kernels, name)(*arguments)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    row_inv_scale: Tensor,
    inv_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """a int8 (M, K), b int8 (N, K) -> ``float32(a . b^T) / (row_inv_scale[m] * inv_scale)`` in ``out_dtype``, (M, N).

    The product of the scales is rounded, then the quotient, then once more to ``out_dtype`` (float32, bfloat16 or
    float16; float32 if not given). ``row_inv_scale`` is float32 (M,), ``inv_scale`` float32 of one value, or 1.
    In one of a and b no value is -128. Raises ``ValueError`` for other dtypes and shapes, and for K above
    ``MAX_INT8_K``.
    """
    return _call("int8_matmul", a, b, row_inv_scale, inv_scale, out_dtype)  # type: ignore[no-any-return]


def quantize_rows(x: Tensor, transposed: bool = False, floor: float = ABSMAX_FLOOR) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) -> q int8 (M, K), inv_scale float32 (M,), and q transposed (K, M) or an empty tensor.

    ``inv_scale = 127 / max(max|x|, floor)`` over a row, ``q = round(x * inv_scale)``: the activations of a forward with
    the default floor, gradients with ``GRADIENT_FLOOR``.
    """
    return _call("quantize_rows", x, transposed, floor)  # type: ignore[no-any-return]


def quantize_columns(
    x: Tensor, row_inv_scale: Tensor | None = None, floor: float = GRADIENT_FLOOR
) -> tuple[Tensor, Tensor]:
    """x (M, N) -> q transposed, int8 (N, M), and inv_scale float32 (N,), one for each column of ``x / row_inv_scale``.

    The quotient is rounded to float32. Without ``row_inv_scale``, float32 (M,), it is x.
    """
    return _call("quantize_columns", x, row_inv_scale, floor)  # type: ignore[no-any-return]


def ternary_weight(w: Tensor, inv_scale: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) -> ``q = clamp(round(w * inv_scale), -1, 1)``, int8 (N, K), and q transposed (K, N).

    Where the product is NaN, q is 0. Nobody sees that there, but in the scale: with a weight that is NaN or infinite
    ``1 / mean|w|`` is NaN or 0, and so every product of the matrix is NaN.
    """
    return _call("ternary_weight", w, inv_scale)  # type: ignore[no-any-return]


def binary_weight(w: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) -> q = 1 where w > mean, else -1, int8 (N, K), and q transposed (K, N).

    Where the mean is not finite, all of q is 0; the scale of such a matrix says so (see ``ternary_weight``).
    """
    return _call("binary_weight", w, mean)  # type: ignore[no-any-return]


def norm_quantize(
    x: Tensor, weight: Tensor, eps: float, transposed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) -> y (M, K), its int8 rows q, inv_scale (M,), rstd (M,), and q transposed (K, M) or an empty tensor.

    ``rstd = 1 / sqrt(mean(x^2) + eps)``, float32; ``y = (x * rstd) * weight``, rounded to the dtype of x and then to
    that of its product with the weight; q and inv_scale are those of ``quantize_rows(y)``.
    """
    return _call("norm_quantize", x, weight, eps, transposed)  # type: ignore[no-any-return]


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dy, x (M, K), weight (K,), rstd float32 (M,) -> dx in the dtype of x, dweight in that of the weight.

    With ``u = x * rstd`` and ``g = dy * weight``: ``dx = (g - u * mean(g * u)) * rstd``, and ``dweight = sum(dy * u)``
    with u rounded to the dtype of x, as in the forward. The rest is float32, rounded once.
    """
    return _call("rms_norm_backward", dy, x, weight, rstd)  # type: ignore[no-any-return]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_matrix(name: str, x: Tensor) -> None:
    _require(x.is_floating_point() and x.ndim == 2, f"{name} must be floating (M, K), not {x.dtype} {tuple(x.shape)}")
    _require(x.shape[1] > 0, f"{name} has no columns")


def _check_scale(name: str, scale: Tensor, beside: Tensor, values: int) -> None:
    _require(
        scale.dtype == torch.float32 and scale.numel() == values and scale.device == beside.device,
        f"{name} must be float32 with {values} values on {beside.device}, "
        f"not {scale.dtype} {tuple(scale.shape)} on {scale.device}",
    )


def _check_quantizer(x: Tensor, floor: float) -> None:
    _check_matrix("x", x)
    _require(LEAST_FLOOR <= floor < float("inf"), f"floor = {floor}: must be at least {LEAST_FLOOR}")


def _check_columns(x: Tensor, row_inv_scale: Tensor | None, floor: float) -> None:
    _check_quantizer(x, floor)
    if row_inv_scale is not None:
        _check_scale("row_inv_scale", row_inv_scale, x, x.shape[0])


def _check_weight(w: Tensor, statistic: Tensor) -> None:
    _check_matrix("w", w)
    _require(w.shape[0] > 0, "w has no rows")
    _check_scale("inv_scale, or the mean,", statistic, w, 1)


def _check_product(
    a: Tensor, b: Tensor, row_inv_scale: Tensor, inv_scale: Tensor | None, out_dtype: torch.dtype | None
) -> None:
    for name, x in (("a", a), ("b", b)):
        _require(x.dtype == torch.int8 and x.ndim == 2, f"{name} must be int8 (., K), not {x.dtype} {tuple(x.shape)}")
    _require(a.shape[1] == b.shape[1], f"a {tuple(a.shape)} and b {tuple(b.shape)} must have the same K")
    _require(a.device == b.device, f"a is on {a.device} and b on {b.device}")
    _require(a.shape[1] <= MAX_INT8_K, f"K = {a.shape[1]}: must be at most {MAX_INT8_K}, where int32 sums end")
    _check_scale("row_inv_scale", row_inv_scale, a, a.shape[0])
    if inv_scale is not None:
        _check_scale("inv_scale", inv_scale, a, 1)
    floats = (None, torch.float32, torch.bfloat16, torch.float16)
    _require(out_dtype in floats, f"out_dtype must be float32, bfloat16 or float16, not {out_dtype}")


def _check_norm(x: Tensor, weight: Tensor) -> None:
    _check_matrix("x", x)
    _require(
        tuple(weight.shape) == (x.shape[1],) and weight.is_floating_point() and weight.device == x.device,
        f"the weight of the norm must be floating ({x.shape[1]},) on {x.device}",
    )


def _check_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> None:
    _check_norm(x, weight)
    _require(
        dy.shape == x.shape and dy.is_floating_point() and dy.device == x.device,
        f"dy must be floating {tuple(x.shape)} on {x.device}, not {dy.dtype} {tuple(dy.shape)} on {dy.device}",
    )
    _check_scale("rstd", rstd, x, x.shape[0])


def _int8(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _int8_transposed(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[0]) if wanted else (0,), dtype=torch.int8)


def _floats(x: Tensor, dim: int) -> Tensor:
    """A float32 value for each row (0) or column (1)."""
    return x.new_empty((x.shape[dim],), dtype=torch.float32)


def _register(schema: str, module: str, check: Callable[..., None], empty: Callable[..., object]) -> None:
    """Define an operator whose implementations have its name, in ``training_reference`` and in a module of kernels.

    ``empty`` makes results of the right shapes. No schema has defaults: torch leaves out arguments that equal them.
    """
    name = schema.partition("(")[0]

    def on_cpu(*arguments: Any) -> object:
        check(*arguments)  # contiguous, or results would lie as their input does, and not as ``empty`` says
        ready = (a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
        return getattr(training_reference, name)(*ready)

    @on_its_device
    def on_cuda(*arguments: Any) -> object:
        check(*arguments)
        return getattr(importlib.import_module(f"bitnet_kernels.{module}"), name)(*arguments)

    def fake(*arguments: Any) -> object:
        check(*arguments)
        return empty(*arguments)

    _ON_CPU[name] = on_cpu
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"bitnet_kernels::{name}", fake, lib=_LIBRARY)


_register(
    "int8_matmul(Tensor a, Tensor b, Tensor row_inv_scale, Tensor? inv_scale, ScalarType? out_dtype) -> Tensor",
    "triton_int8",
    _check_product,
    lambda a, b, row_inv, inv, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype or torch.float32),
)
_register(
    "quantize_rows(Tensor x, bool transposed, float floor) -> (Tensor, Tensor, Tensor)",
    "triton_training",
    lambda x, transposed, floor: _check_quantizer(x, floor),
    lambda x, transposed, floor: (_int8(x), _floats(x, 0), _int8_transposed(x, transposed)),
)
_register(
    "quantize_columns(Tensor x, Tensor? row_inv_scale, float floor) -> (Tensor, Tensor)",
    "triton_training",
    _check_columns,
    lambda x, row_inv, floor: (_int8_transposed(x), _floats(x, 1)),
)
for _name, _statistic in (("ternary_weight", "inv_scale"), ("binary_weight", "mean")):
    _register(
        f"{_name}(Tensor w, Tensor {_statistic}) -> (Tensor, Tensor)",
        "triton_training",
        _check_weight,
        lambda w, statistic: (_int8(w), _int8_transposed(w)),
    )
_register(
    "norm_quantize(Tensor x, Tensor weight, float eps, bool transposed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "triton_training",
    lambda x, weight, eps, transposed: _check_norm(x, weight),
    lambda x, weight, eps, transposed: (
        x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)),
        *(_int8(x), _floats(x, 0), _floats(x, 0), _int8_transposed(x, transposed)),
    ),
)
_register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    "triton_norm",
    _check_backward,
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
