"""The two operators of a served low-bit layer, for CPU and CUDA, for eager and compiled models.

``packed_matmul``      int8 activations x packed weights -> exact int32 sums, or the scaled result
``rms_norm_quantize``  RMSNorm (or nothing) -> int8 activations with one scale a token

Both are registered with torch as ``bitnet_kernels::...``, so that ``torch.compile`` and ``torch.export`` see one opaque
operator of known shape. An eager call on the CPU goes straight to the kernel: the dispatcher would cost as much as the
work of a small layer.

The epilogue, the same everywhere: with both scales ``y = float32(sum) / (x_inv_scale * w_inv_scale)``, where the
product of the scales is rounded first; with group scales ``y = 0; y += float32(sum of group g) * group_scale[n, g]``
for ascending g, never fused, then ``/ x_inv_scale``. The result is rounded once more to ``out_dtype``.
"""

from typing import Any

import torch
from torch import Tensor

from bitnet_kernels.cpu import native
from bitnet_kernels.devices import on_its_device
from bitnet_kernels.formats import FORMATS, MAX_K
from bitnet_kernels.reference import packed_matmul_reference, rms_norm_quantize_reference

_LIBRARY = torch.library.Library("bitnet_kernels", "DEF")
_LIBRARY.define(
    "packed_matmul(Tensor x, Tensor packed, str format, int n, int k, Tensor? x_inv_scale=None, "
    "Tensor? w_inv_scale=None, Tensor? group_scale=None, int group_size=0, Tensor? row_sum=None, "
    "ScalarType? out_dtype=None) -> Tensor"
)
_LIBRARY.define("rms_norm_quantize(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)")


def _is_plain_cpu(x: Tensor) -> bool:
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    format: str = "ternary2",
    *,
    n: int,
    k: int,
    x_inv_scale: Tensor | None = None,
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
    row_sum: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x int8 (M, k) times packed weights uint8 (n, bytes) -> (M, n): int32 without scales, else ``out_dtype``.

    Args:
        x_inv_scale: Float32, one for each token: (M,) or (M, 1). Given together with ``w_inv_scale``.
        w_inv_scale: Float32, one for the matrix (1,) or for each row (n,).
        group_scale: Float32 (n, ceil(k / group_size)), factors; instead of ``w_inv_scale``.
        group_size: Inputs that share a factor: a multiple of 64 (binary: of 32).
        row_sum: Int32 (M,), the sums of the rows of ``x``, where they are known.
        out_dtype: Of a scaled result; float32 if not given.

    Raises ``ValueError`` for a format, dtype, device or shape that is not supported, and for k above ``MAX_K``.
    """
    arguments = (x, packed, format, n, k, x_inv_scale, w_inv_scale, group_scale, group_size, row_sum, out_dtype)
    if _is_plain_cpu(x):
        return _packed_matmul_cpu(*arguments)
    return torch.ops.bitnet_kernels.packed_matmul(*arguments)  # type: ignore[no-any-return]


def rms_norm_quantize(x: Tensor, weight: Tensor | None, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., K) floating -> q int8 (M, K), inv_scale float32 (M, 1), row sums int32 (M,); M = all leading dimensions.

    ``y = x * rsqrt(mean(x^2) + eps) * weight`` (without weight, y = x), ``inv_scale = 127 / max(max|y|, 1e-5)``,
    ``q = round(y * inv_scale)``, half to even. A row with NaN or infinity has inv_scale NaN, so its products are NaN.
    """
    if _is_plain_cpu(x):
        return _rms_norm_quantize_cpu(x, weight, eps)
    return torch.ops.bitnet_kernels.rms_norm_quantize(x, weight, eps)  # type: ignore[no-any-return]


def wide_matmul(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """The head of a model for a few tokens: x floating (M, K) times w (N, K) as stored -> float32 (M, N).

    w is int8 with a float32 factor a row, or float16 or bfloat16; x is not rounded. ``None`` where there is no kernel
    for it; then any product will do, since nothing here is exact. Raises ``ValueError`` for shapes, dtypes and devices
    that do not fit.
    """
    _check_wide(x, w, scale)
    if torch.compiler.is_compiling() or w.dtype not in (torch.int8, torch.float16, torch.bfloat16):
        return None
    scale = None if scale is None else scale.contiguous()
    if x.is_cuda:
        from bitnet_kernels import triton_wide

        return triton_wide.wide_matmul(x, w, scale)
    if not _is_plain_cpu(x) or w.dtype == torch.bfloat16:
        return None
    return native.wide_matmul(x.float().contiguous(), w.contiguous(), scale)


def _check_wide(x: Tensor, w: Tensor, scale: Tensor | None) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.device != w.device:
        raise ValueError(f"x {tuple(x.shape)} on {x.device} and w {tuple(w.shape)} on {w.device}: (M, K) and (N, K)")
    if (scale is not None) != (w.dtype == torch.int8):
        raise ValueError(
            f"w of {w.dtype} with{'out' if scale is None else ''} scale: int8 weights have one, others none"
        )
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != w.shape[0] or scale.device != w.device):
        raise ValueError(
            f"scale must be float32 with {w.shape[0]} values on {w.device}, not {scale.dtype} {tuple(scale.shape)} on "
            f"{scale.device}"
        )


def _check(
    x: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    k: int,
    x_inv_scale: Tensor | None = None,  # torch leaves out what equals the defaults of the schema
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
    row_sum: Tensor | None = None,
) -> None:
    layout = FORMATS.get(format)
    if layout is None or not layout.planes:
        known = ", ".join(name for name, f in FORMATS.items() if f.planes)
        raise ValueError(f"format {format!r}: the kernels read {known}")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k = {k}: must be between 1 and {MAX_K}, where int32 sums end")
    if x.dtype != torch.int8 or x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must be int8 (M, {k}), not {x.dtype} {tuple(x.shape)}")
    if packed.dtype != torch.uint8 or packed.shape != (n, layout.row_bytes(k)):
        raise ValueError(
            f"{format} weights of {n} x {k} are uint8 ({n}, {layout.row_bytes(k)}), "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    scales = (("x_inv_scale", x_inv_scale), ("w_inv_scale", w_inv_scale), ("group_scale", group_scale))
    for name, other in (("packed", packed), ("row_sum", row_sum), *scales):
        if other is not None and other.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {other.device}")
    if group_scale is not None:
        plane = layout.plane
        if group_size < plane or group_size % plane:
            raise ValueError(f"group_size = {group_size}: {format} takes multiples of {plane}")
        if w_inv_scale is not None:
            raise ValueError("give w_inv_scale or group_scale, not both")
        if tuple(group_scale.shape) != (n, -(-k // group_size)):
            raise ValueError(f"group_scale must be ({n}, {-(-k // group_size)}), not {tuple(group_scale.shape)}")
    elif (x_inv_scale is None) != (w_inv_scale is None):
        raise ValueError("x_inv_scale and w_inv_scale go together")
    if w_inv_scale is not None and w_inv_scale.numel() not in (1, n):
        raise ValueError(f"w_inv_scale must have 1 or {n} values, not {w_inv_scale.numel()}")
    if x_inv_scale is not None and x_inv_scale.numel() != x.shape[0]:
        raise ValueError(f"x_inv_scale must have {x.shape[0]} values, not {x_inv_scale.numel()}")
    if row_sum is not None and (row_sum.dtype != torch.int32 or row_sum.shape != x.shape[:1]):
        raise ValueError(f"row_sum must be int32 ({x.shape[0]},), not {row_sum.dtype} {tuple(row_sum.shape)}")
    for name, scale in scales:
        if scale is not None and scale.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, not {scale.dtype}")


def _result_dtype(x_inv_scale: Tensor | None, group_scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    if x_inv_scale is None and group_scale is None:
        return torch.int32
    return out_dtype or torch.float32


def _packed_matmul_cpu(
    x: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    k: int,
    x_inv_scale: Tensor | None = None,
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
    row_sum: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(x, packed, format, n, k, x_inv_scale, w_inv_scale, group_scale, group_size, row_sum)
    x = x if x.stride(-1) == 1 else x.contiguous()
    packed = packed if packed.is_contiguous() else packed.contiguous()
    x_inv_scale = None if x_inv_scale is None else x_inv_scale.contiguous()
    if native.library() is None:
        y = packed_matmul_reference(x, packed, format, k, x_inv_scale, w_inv_scale, group_scale, group_size)
    elif group_scale is not None:
        y = native.packed_matmul_grouped(
            x, packed, FORMATS[format].planes, k, group_scale.contiguous(), group_size, x_inv_scale
        )
    else:
        w_inv_scale = None if w_inv_scale is None else w_inv_scale.contiguous()
        row_sum = None if row_sum is None else row_sum.contiguous()
        y = native.packed_matmul(x, packed, FORMATS[format].planes, k, x_inv_scale, w_inv_scale, row_sum)
    dtype = _result_dtype(x_inv_scale, group_scale, out_dtype)
    return y if y.dtype == dtype else y.to(dtype)


@on_its_device
def _packed_matmul_cuda(*arguments: Any) -> Tensor:
    from bitnet_kernels import triton_matmul

    _check(*arguments[:10])
    return triton_matmul.packed_matmul(*arguments)


def _packed_matmul_fake(
    x: Tensor,
    packed: Tensor,
    format: str,
    n: int,
    k: int,
    x_inv_scale: Tensor | None = None,
    w_inv_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    group_size: int = 0,
    row_sum: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(x, packed, format, n, k, x_inv_scale, w_inv_scale, group_scale, group_size, row_sum)
    return x.new_empty((x.shape[0], n), dtype=_result_dtype(x_inv_scale, group_scale, out_dtype))


def _rms_norm_quantize_cpu(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # or results would lie as their input does
    if native.library() is None or rows.dtype != torch.float32 or (weight is not None and weight.dtype != rows.dtype):
        return rms_norm_quantize_reference(rows, weight, eps)
    mean_square = None
    if weight is not None:
        mean_square = None if native.sums_like_torch(rows.shape[1]) else rows.pow(2).mean(-1)
        weight = weight.contiguous()
    return native.norm_quantize(rows, weight, eps, mean_square)


def _check_norm(x: Tensor, weight: Tensor | None) -> None:
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be floating point (..., K), not {x.dtype} {tuple(x.shape)}")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"the weight of the norm must be ({x.shape[-1]},), not {tuple(weight.shape)}")
    if weight is not None and weight.device != x.device:
        raise ValueError(f"x is on {x.device} and the weight of the norm on {weight.device}")


@on_its_device
def _rms_norm_quantize_cuda(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from bitnet_kernels import triton_norm

    _check_norm(x, weight)
    return triton_norm.rms_norm_quantize(x.reshape(-1, x.shape[-1]), weight, eps)


def _rms_norm_quantize_fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight)
    K = x.shape[-1]
    M = x.numel() // K
    return (
        x.new_empty((M, K), dtype=torch.int8),
        x.new_empty((M, 1), dtype=torch.float32),
        x.new_empty((M,), dtype=torch.int32),
    )


_LIBRARY.impl("packed_matmul", _packed_matmul_cpu, "CPU")
_LIBRARY.impl("packed_matmul", _packed_matmul_cuda, "CUDA")
_LIBRARY.impl("rms_norm_quantize", _rms_norm_quantize_cpu, "CPU")
_LIBRARY.impl("rms_norm_quantize", _rms_norm_quantize_cuda, "CUDA")
torch.library.register_fake("bitnet_kernels::packed_matmul", _packed_matmul_fake, lib=_LIBRARY)
torch.library.register_fake("bitnet_kernels::rms_norm_quantize", _rms_norm_quantize_fake, lib=_LIBRARY)
