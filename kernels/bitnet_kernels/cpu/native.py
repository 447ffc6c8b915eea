"""The compiled CPU kernels as functions of tensors. Nothing is compiled before the first call.

Callers have checked shapes and dtypes (see ../ops.py); here pointers are passed on.
"""

import ctypes
import enum
import functools
import os
import struct
import warnings
from typing import Any

import torch
from torch import Tensor

from bitnet_kernels.cpu.api import declarations
from bitnet_kernels.cpu.build import CannotCompile, load_library


class Isa(enum.IntEnum):
    """Instruction sets in ascending order, as in common.h."""

    PORTABLE = 0
    NEON = 1
    AVX2 = 2
    AVX512 = 3
    AMX = 4


PACKED_MATMUL = struct.Struct("15q")
"""``packed_matmul_call`` of api.h. Made into one block, because ctypes takes 2 us for 15 arguments."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` (with one warning) where they cannot be had; then torch computes the same."""
    if os.environ.get("BITNET_CPU_ISA") == "torch":
        return None
    try:
        lib = load_library()
    except CannotCompile as error:
        warnings.warn(
            f"the CPU kernels cannot be compiled ({error}); results are the same, but several times slower. "
            "Install a C compiler such as gcc.",
            stacklevel=2,
        )
        return None
    for name, function in declarations().functions.items():
        getattr(lib, name).argtypes = list(function.parameters.values())
        getattr(lib, name).restype = function.result
    return lib


@functools.cache
def _function(name: str) -> tuple[Any, list[str]]:
    lib = library()
    assert lib is not None
    return getattr(lib, name), list(declarations().functions[name].parameters)


def call(name: str, *arguments: Any, isa: Isa | None = None) -> Any:
    """What the function of api.h gives. Tensors go by address and structures by reference; ``threads`` and ``isa`` at
    the end need not be given: torch's number of threads, and the best instruction set unless ``isa`` names one."""
    function, parameters = _function(name)
    given = [
        a.data_ptr() if isinstance(a, Tensor) else ctypes.byref(a) if isinstance(a, ctypes.Structure) else a
        for a in arguments
    ]
    for parameter in parameters[len(given) :]:
        if parameter == "threads":
            given.append(torch.get_num_threads())
        else:
            assert parameter == "isa", f"{name}: {parameter} is not given"
            given.append(best_isa() if isa is None else isa)
    return function(*given)


def run(name: str, *arguments: Any, isa: Isa | None = None) -> None:
    """``call`` of a function that gives 0, or else has had no memory."""
    if call(name, *arguments, isa=isa):
        raise MemoryError(f"{name}: no memory for what it computes on the way")


def takes(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels are there and can be given this tensor by its address."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype == dtype and x.is_contiguous()
    return plain and not torch.compiler.is_compiling() and library() is not None


@functools.cache
def best_isa() -> Isa:
    """The best instruction set of this machine, or the lower one that ``$BITNET_CPU_ISA`` names."""
    best = Isa(call("bitnet_best_isa"))
    wish = os.environ.get("BITNET_CPU_ISA")
    if not wish:
        return best
    if wish.upper() not in Isa.__members__:
        names = ", ".join(["torch", *(i.name.lower() for i in Isa)])
        raise ValueError(f"BITNET_CPU_ISA={wish}: must be one of {names}")
    return min(best, Isa[wish.upper()])


@functools.cache
def lanes_of_torch() -> int | None:
    """How many lanes torch's own sum of a row uses on this machine, found by comparing; ``None`` when none fits."""
    generator = torch.Generator().manual_seed(0)
    for lanes in (8, 16, 4):
        for k in (64, 250, 1000, 4099):
            x = torch.randn(16, k, generator=generator)
            sums = [call("bitnet_mean_of_squares", row, k, lanes) for row in x]
            if not torch.equal(torch.tensor(sums), x.pow(2).mean(-1)):
                break
        else:
            return lanes
    return None


def gate(gate_up: Tensor, kind: str, lanes: int) -> Tensor:
    """Float32 (M, 2 F), two halves -> activation(first) * second, (M, F); ``lanes`` as ``exp_lanes_of_torch``."""
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=torch.float32)
    call("bitnet_activate", gate_up, *out.shape, kind == "silu", lanes, out)
    return out


@functools.cache
def exp_lanes_of_torch() -> int | None:
    """The vector width of torch's silu on this machine, found by comparing; ``None`` where it computes otherwise."""
    generator = torch.Generator().manual_seed(0)
    for lanes in (16, 8, 4):
        for f in (33, 100, 1000, 4099):
            x = torch.randn(1, 2 * f, generator=generator) * 8
            if not torch.equal(gate(x, "silu", lanes), torch.nn.functional.silu(x[:, :f]) * x[:, f:]):
                break
        else:
            return lanes
    return None


def sums_like_torch(k: int) -> bool:
    """Whether the kernels add the squares of ``k`` inputs as torch does: bit for bit, so torch need not be asked.

    Torch adds few numbers, and a single long row that it splits between threads, in other ways.
    """
    return 64 <= k < 2**15 and library() is not None and lanes_of_torch() is not None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    planes: int,
    k: int,
    x_inv_scale: Tensor | None,
    w_inv_scale: Tensor | None,
    row_sum: Tensor | None = None,
    isa: Isa | None = None,
) -> Tensor:
    """x int8 (M, K), packed uint8 (N, bytes) -> int32 (M, N), or float32 divided by both scales."""
    m, n = x.shape[0], packed.shape[0]
    out = torch.empty(m, n, dtype=torch.int32 if x_inv_scale is None else torch.float32)
    per_row = w_inv_scale is not None and w_inv_scale.numel() > 1
    run(
        "bitnet_packed_matmul",
        PACKED_MATMUL.pack(
            x.data_ptr(), x.stride(0), m, k, packed.data_ptr(), packed.stride(0), n, planes, _pointer(row_sum) or 0,
            _pointer(x_inv_scale) or 0, _pointer(w_inv_scale) or 0, per_row, out.data_ptr(), torch.get_num_threads(),
            best_isa() if isa is None else isa,
        ),
    )  # fmt: skip
    return out


def packed_matmul_grouped(
    x: Tensor, packed: Tensor, planes: int, k: int, group_scale: Tensor, group_size: int, x_inv_scale: Tensor | None
) -> Tensor:
    """As above with a scale per ``group_size`` inputs, group_scale float32 (N, groups) -> float32 (M, N)."""
    m, n = x.shape[0], packed.shape[0]
    out = torch.empty(m, n, dtype=torch.float32)
    run(
        "bitnet_packed_matmul_grouped", x, x.stride(0), m, k, packed, packed.stride(0), n, planes, group_scale,
        group_size, x_inv_scale, out,
    )  # fmt: skip
    return out


def norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, mean_square: Tensor | None, isa: Isa | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 (M, K) -> int8 (M, K), inv_scale (M, 1), row sums int32 (M,).

    ``mean_square`` (M,) are torch's means of squares, for rows whose sums it adds in another order.
    """
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8)
    inv_scale = torch.empty(m, 1, dtype=torch.float32)
    row_sum = torch.empty(m, dtype=torch.int32)
    run(
        "bitnet_norm_quantize", x, x.stride(0), m, k, weight, mean_square, eps, lanes_of_torch() or 0, q, inv_scale,
        row_sum, isa=isa,
    )  # fmt: skip
    return q, inv_scale, row_sum


def wide_matmul(x: Tensor, w: Tensor, scale: Tensor | None, isa: Isa | None = None) -> Tensor | None:
    """x float32 (M, K) times w int8 or float16 (N, K) -> float32 (M, N); ``None`` where there is no fast way."""
    if library() is None:
        return None
    m, n = x.shape[0], w.shape[0]
    out = torch.empty(m, n, dtype=torch.float32)
    missing = call("bitnet_wide_matmul", x, m, x.shape[1], w, n, w.dtype == torch.int8, scale, out, isa=isa)
    return None if missing else out


def affine_matmul(
    x: Tensor,
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    x_inv_scale: Tensor | None,
    isa: Isa | None = None,
) -> Tensor:
    """x int8 or float32 (M, K), packed codes (N, bytes), scale and zero_point float32 (N, G) -> float32 (M, N)."""
    x, packed = x.contiguous(), packed.contiguous()
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    x_inv_scale = None if x_inv_scale is None else x_inv_scale.contiguous()
    table = None if table is None else table.contiguous()
    (m, k), n = x.shape, packed.shape[0]
    out = torch.empty(m, n, dtype=torch.float32)
    run(
        "bitnet_affine_matmul", x, x.dtype == torch.float32, x.stride(0), m, k, packed, packed.stride(0), n, bits,
        scale, zero_point, table, -(-k // scale.shape[1]), x_inv_scale, out, isa=isa,
    )  # fmt: skip
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, first: Tensor | None = None) -> Tensor:
    """Attention of one token: q (B, H, 1, K), keys and values (B, G, S, K), float32 -> (B, H, 1, K).

    ``first`` int64 (B,): the first token that each sequence sees.
    """
    B, H, _, K = q.shape
    q = q.reshape(B, H * K)
    out = torch.empty(B, H, 1, K, dtype=torch.float32)
    arguments = declarations().structures["attention_args"](
        q.data_ptr(), q.stride(0), B, H, keys.shape[1], K, keys.data_ptr(), values.data_ptr(), *keys.stride()[:3],
        _pointer(first), keys.shape[2], out.data_ptr(),
    )  # fmt: skip
    run("bitnet_attend", arguments)
    return out
