"""RMSNorm, absmax and int8 rounding in one kernel while training on a GPU.

A norm of a block is read by low-bit layers only, which quantize what they read. The kernel that normalizes a row has it
in registers, so it finds the row's scale and writes its int8 form too; the layers then find that on the tensor (see
``activation_rows``) and read the norm's output no more. Kept for backward are its input and one number per row.
"""

import functools
from typing import Any

from torch import Tensor

from bitnet.layers.bit_linear import BitLinear
from bitnet.layers.integer_products import Rows, keep_rows
from bitnet_kernels.rms_norm import norm_and_rows


def norm_with_rows(
    x: Tensor, weight: Tensor, eps: float, transposed: bool = False, reader: BitLinear | None = None
) -> Tensor:
    """RMSNorm of x (..., K), differentiable; on the result lies what ``activation_rows`` would make of it at 8 bits.

    ``transposed`` lays the rows there a second time as the int8 gradient of a weight reads them. While ``reader`` takes
    none, at a float start of a run or while quantizers are blended in, nothing lies there, to no use, until backward.
    """
    kept = reader is None or (reader.phase == "low-bit" and _reads_rows(reader))
    transposed = transposed and kept
    y, q, inv_scale, q_t = norm_and_rows(x, weight, eps, transposed)
    if kept:
        keep_rows(y, 8, Rows(q, inv_scale.view(-1, 1), None, q_t if transposed else None))
    return y


def _reads_rows(layer: Any) -> bool:
    plain = isinstance(layer, BitLinear) and layer.transform == "none"
    return plain and layer.weight_kind != "none" and layer.act_bits == 8


def fuse_norms(blocks: Any) -> int:
    """Let norms that only 8-bit low-bit layers read use ``norm_with_rows`` on a GPU; return how many those are.

    A block says by ``norm_groups()`` which layers read which of its norms.
    """
    fused = 0
    for block in blocks:
        for norm, readers in block.norm_groups():
            if all(_reads_rows(r) for r in readers):
                transposed = any(r.arithmetic.weight_gradient != "float" for r in readers)
                norm.training_kernel = functools.partial(norm_with_rows, transposed=transposed, reader=readers[0])
                fused += 1
    return fused
