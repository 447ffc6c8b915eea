"""RMSNorm while training: one pass forward, one pass backward, and only its input is kept for that.

Spelled with torch's operations it is six passes forward and a dozen backward, and keeps three tensors of that size. On
a CPU the forward has the same bits as these (see norm.c), on a GPU those of the kernel that serves (``triton_norm``).
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.training_ops import norm_quantize, rms_norm_backward

MOST_ON_GPU = 65536
"""Values of a row: the kernel has them in registers."""


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` computes this: on a CPU, with the bits of torch's operations."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if x.is_cuda:
        return x.shape[-1] <= MOST_ON_GPU
    return x.is_cpu and x.dtype == weight.dtype == torch.float32 and native.sums_like_torch(x.shape[-1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=torch.float32)
        native.call("bitnet_norm_forward", rows, *rows.shape, weight, eps, native.lanes_of_torch(), y, rstd)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, rstd = ctx.saved_tensors
        threads = torch.get_num_threads()
        g = grad.reshape(rows.shape).contiguous()
        grad_x = torch.empty_like(rows)
        grad_weight = torch.zeros(threads, rows.shape[1], dtype=torch.float32)
        native.call("bitnet_norm_backward", g, rows, weight, rstd, *rows.shape, grad_x, grad_weight, threads)
        return grad_x.view(grad.shape), grad_weight.sum(0), None


class _NormAndRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, transposed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        y, q, inv_scale, rstd, q_t = norm_quantize(rows, weight, eps, transposed)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.mark_non_differentiable(q, inv_scale, q_t)
        ctx.set_materialize_grads(False)  # they would be zeros, cleared anew in each backward
        return y.view(x.shape), q, inv_scale, q_t

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = rms_norm_backward(grad.reshape(rows.shape), rows, weight, rstd)
        return grad_x.view(grad.shape), grad_weight, None, None


def norm_and_rows(x: Tensor, weight: Tensor, eps: float, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (..., K), weight (K,) -> y (..., K), differentiable; its int8 rows (M, K), their scales (M,), and the rows
    transposed (K, M) or an empty tensor: by the operators of a GPU."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _NormAndRows.apply(x, weight, eps, transposed)  # type: ignore[no-untyped-call]
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) over its root mean square, times weight (K,); differentiable. See ``takes``."""
    if x.is_cuda:
        return norm_and_rows(x, weight, eps, False)[0]
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y
