"""The product of integer activations with weights on a grid: exact sums of integers, scaled group by group.

y = sum over g ascending of float32(sum over k in g of w_q * x_q) * scale[n, g]
"""

from typing import Any

import torch
from torch import Tensor

from bitnet.layers.integer_products import integer_matmul

EXACT_CHUNK = 512
"""Inputs for which float32 sums of integers below 256 times integers below 128 are exact."""


def exact_sums(x_q: Tensor, w: Tensor) -> Tensor:
    """``x_q @ w.T`` of integer-valued float32 (M, K) and (N, K): the exact sums, rounded once to float32 (M, N)."""
    if x_q.shape[1] <= EXACT_CHUNK:
        return integer_matmul(x_q, w)
    total = torch.zeros(x_q.shape[0], w.shape[0], dtype=torch.int32, device=x_q.device)
    for a, b in zip(x_q.split(EXACT_CHUNK, dim=1), w.split(EXACT_CHUNK, dim=1), strict=True):
        total += integer_matmul(a, b).to(torch.int32)
    return total.float()


def grouped_product(x_q: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """x_q (M, K), w (N, K) integer-valued float32, scale (N or 1, G) -> float32 (M, N), by the formula above."""
    size = -(-w.shape[1] // scale.shape[1])
    parts = zip(x_q.split(size, dim=1), w.split(size, dim=1), scale.t(), strict=True)
    y = torch.zeros(x_q.shape[0], w.shape[0], dtype=torch.float32, device=x_q.device)
    for a, b, factor in parts:
        y += exact_sums(a, b) * factor
    return y


class Served(torch.autograd.Function):
    """x (M, K), W_hat (N, K) and the served result (M, N) -> that result; backward as of ``x @ W_hat.T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        grad_x = grad @ w.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_w = (grad.t() @ x.to(grad.dtype)).to(w.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None
