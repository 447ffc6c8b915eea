"""Compile the Triton kernels of int8 training for every architecture, without a GPU: registers, stack, instructions.

    PYTHONPATH=.:kernels python -m tests.kernels.compile_training [--out FILE]

prints one line of JSON a kernel, and writes a table of them all to FILE. See ``compile_ahead``.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton

from bitnet_kernels import triton_int8, triton_levels, triton_norm, triton_training
from bitnet_kernels.configurations import int8_tile
from tests.kernels.compile_ahead import ARCHITECTURES, compile_for, facts, norm

FLOATS = dict.fromkeys(("row_inv_ptr", "inv_ptr", "inv_scale_ptr", "statistic_ptr", "r_ptr", "part_ptr"), "*fp32")
BYTES = dict.fromkeys(("a_ptr", "b_ptr", "q_ptr", "q_t_ptr"), "*i8")
HALVES = dict.fromkeys(("x_ptr", "dy_ptr", "dx_ptr", "out_ptr"), "*bf16")
SIZES = dict.fromkeys(("M", "N", "K", "A_STRIDE", "B_STRIDE", "OUT_STRIDE", "X_STRIDE", "DY_STRIDE", "W_STRIDE"), "i32")
TABLE = dict.fromkeys(("w_ptrs", "counts_ptr", "sums_ptr", "q_at_ptr"), "*i64")
TABLE |= dict.fromkeys(("matrix_ptr", "first_ptr", "largest_ptr"), "*i32")
TYPES = {**FLOATS, **BYTES, **HALVES, **SIZES, **TABLE, **dict.fromkeys(("w_ptr", "weight_ptr", "scales_ptr"), "*fp32")}


def compiled(fn: Any, arch: int, constants: dict[str, Any], types: dict[str, str] | None = None, **options: Any) -> Any:
    """The kernel, with every pointer and size a multiple of 16, as the layers of real models are."""
    types = {**TYPES, **(types or {})}
    names = [name for name in fn.arg_names if name not in constants]
    return compile_for(fn, {name: types[name] for name in names}, constants, arch, tuple(names), **options)


def product(arch: int, m: int, out: str = "bf16", even_k: bool = True) -> Any:
    """The product as the table configures it; forward, gradient of x and gradient of the weight are all this."""
    tile = int8_tile(arch, m)
    return compiled(
        triton_int8.int8_matmul_kernel,
        arch,
        {
            **{"ONE_SCALE": True, "EVEN_K": even_k, "GROUP": tile.group},
            **{"BM": tile.rows, "BN": tile.columns, "BK": tile.depth},
        },
        {"out_ptr": f"*{out}"},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


TILES = {"BM": triton_training.TILE, "BN": triton_training.TILE}
COLUMNS = {"DIVIDE": True, **dict(zip(("BM", "BN"), triton_training.COLUMN_TILE, strict=True))}


MATRICES = {"BINARY": True, "CHUNK": triton_levels.CHUNK}


def backward(arch: int, k: int) -> Any:
    return compiled(triton_norm.rms_norm_backward_kernel, arch, {"BK": k}, num_warps=triton_norm._warps(k))


KERNELS: dict[str, Callable[[int], Any]] = {
    "int8_matmul, many rows, bf16": lambda arch: product(arch, 4096),
    "int8_matmul, many rows, float32": lambda arch: product(arch, 4096, "fp32"),
    "int8_matmul, many rows, K off the tile": lambda arch: product(arch, 4096, even_k=False),
    "int8_matmul, 64 rows, bf16": lambda arch: product(arch, 64),
    "quantize_rows 4096": lambda arch: norm(arch, norm=False),
    "rms_norm_backward 4096": lambda arch: backward(arch, 4096),
    "rms_norm_backward 16384": lambda arch: backward(arch, 16384),
    "transpose": lambda arch: compiled(triton_training.transpose_kernel, arch, TILES),
    "quantize_columns, largest": lambda arch: compiled(triton_training.column_largest_kernel, arch, COLUMNS),
    "quantize_columns, rounding": lambda arch: compiled(
        triton_training.column_quantize_kernel, arch, {**COLUMNS, "FLOOR": 1e-30}
    ),
    "ternary_weight": lambda arch: compiled(triton_training.weight_kernel, arch, {"BINARY": False, **TILES}),
    "binary_weight": lambda arch: compiled(triton_training.weight_kernel, arch, {"BINARY": True, **TILES}),
    "sums of matrices": lambda arch: compiled(triton_levels.sums_kernel, arch, MATRICES),
    "scales of matrices": lambda arch: compiled(triton_levels.scales_kernel, arch, {"BINARY": True, "FLOOR": 1e-5}),
    "levels of matrices": lambda arch: compiled(triton_levels.levels_kernel, arch, {**MATRICES, "BINARY": False}),
}


def rows() -> Iterator[dict[str, Any]]:
    for arch in ARCHITECTURES:
        for name, build in KERNELS.items():
            yield {"kernel": name, "arch": arch, **facts(build(arch))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    for row in rows():
        print(json.dumps(row), flush=True)
        found.append(row)
    if arguments.out:
        lines = ",\n  ".join(json.dumps(row) for row in found)
        arguments.out.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": [\n  {lines}\n ]\n}}\n')
