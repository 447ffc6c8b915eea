"""RMSNorm while training, on a CPU: one pass forward, one pass backward, and only its input is kept for that.

Spelled with torch's operations it is six passes forward and a dozen backward, and keeps three tensors of that size. The
forward has the same bits; see norm.c.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels.cpu import native


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` computes this with the bits of torch's operations."""
    plain = type(x) is Tensor and x.is_cpu and x.dtype == weight.dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and native.sums_like_torch(x.shape[-1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        lib = native.library()
        assert lib is not None
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, rstd = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=torch.float32)
        lib.bitnet_norm_forward(
            rows.data_ptr(), *rows.shape, weight.data_ptr(), eps, native.lanes_of_torch(), y.data_ptr(),
            rstd.data_ptr(), torch.get_num_threads(), native.best_isa(),
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, rstd = ctx.saved_tensors
        lib = native.library()
        assert lib is not None
        threads = torch.get_num_threads()
        g = grad.reshape(rows.shape).contiguous()
        grad_x = torch.empty_like(rows)
        grad_weight = torch.zeros(threads, rows.shape[1], dtype=torch.float32)
        lib.bitnet_norm_backward(
            g.data_ptr(), rows.data_ptr(), weight.data_ptr(), rstd.data_ptr(), *rows.shape, grad_x.data_ptr(),
            grad_weight.data_ptr(), threads, native.best_isa(),
        )  # fmt: skip
        return grad_x.view(grad.shape), grad_weight.sum(0), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x float32 (..., K) over its root mean square, times weight (K,); differentiable. See ``takes``."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y
