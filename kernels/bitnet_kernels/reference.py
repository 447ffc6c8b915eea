"""The definition: int8 activations times int8-stored trits, summed in int64, returned as int32."""

import torch
from torch import Tensor


def matmul_reference(x: Tensor, w: Tensor) -> Tensor:
    """x int8 (M, K), w int8 (N, K) -> ``x @ w.T`` as int32 (M, N), exact. Raises ``ValueError`` for other dtypes."""
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise ValueError(f"x and w must be int8, not {x.dtype} and {w.dtype}")
    total = x.to(torch.int64) @ w.to(torch.int64).t()
    if total.numel() and int(total.abs().max()) > torch.iinfo(torch.int32).max:
        raise ValueError(f"a sum over K = {x.shape[1]} does not fit int32")
    return total.to(torch.int32)
