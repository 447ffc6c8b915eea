"""Compile every Triton kernel for every architecture, without a GPU, and print what the machine code holds, as JSON.

Run as a program: kernels compiled ahead of time must be imported without the interpreter. One line a kernel.
"""

import json
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitnet_kernels import triton_matmul, triton_norm
from bitnet_kernels.configurations import Shape, table

ARCHITECTURES = (80, 89, 90, 100)
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_for(
    fn: Any, types: dict[str, str], constants: dict[str, Any], arch: int, aligned: tuple[str, ...], **options: Any
) -> Any:
    """A compiled kernel; ``aligned`` arguments are multiples of 16, as Triton finds out by itself at run time."""
    names = fn.arg_names
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=fn,
        signature={name: types[name] for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": False})


def facts(kernel: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.M)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)

    return {
        "registers": registers,
        "stack": stack,
        "spills": count("LDL|STL"),
        "shared": kernel.metadata.shared,
        "instructions": len(opcodes),
        "integer": count("LOP3|PRMT|SHF"),
        "int8_matrix": count("IMMA|IGMMA|UTCIMMA|UTC.*MMA"),
        "copies_of_16_bytes": count(r"LDGSTS.*\.128|LDG.*\.128"),
        "ptx_fused_multiply_add": kernel.asm["ptx"].count("fma.rn"),
        "ptx_int8_matrix": len(re.findall(r"(?:mma|wgmma|tcgen05)\S*(?:s8|i8)", kernel.asm["ptx"])),
    }


MATMUL_TYPES = {
    **{"x_ptr": "*i8", "w_ptr": "*u8", "x_sum_ptr": "*i32", "x_inv_ptr": "*fp32", "w_inv_ptr": "*fp32"},
    **dict.fromkeys(("M", "N", "K", "ROW_BYTES", "X_STRIDE", "BYTES_PER_PART"), "i32"),
}
NORM_TYPES = {
    **{"weight_ptr": "*fp32", "q_ptr": "*i8", "y_ptr": "*fp32", "inv_scale_ptr": "*fp32", "row_sum_ptr": "*i32"},
    **{"r_ptr": "*fp32", "K": "i32", "X_STRIDE": "i32", "eps": "fp32", "stored": "i32"},
}


def matmul(arch: int, bits: int, m: int, asm: bool) -> Any:
    """The product as the table configures it for 4096 x 14336, bf16 out."""
    tile = table(Shape(arch, m, 4096, 14336 * bits // 8), 8 // bits)
    split = tile.split_k > 1
    return compile_for(
        triton_matmul.packed_matmul_kernel,
        {**MATMUL_TYPES, "out_ptr": "*i32" if split else "*bf16"},
        {
            **{"BITS": bits, "S": 32 * bits, "SCALED": not split, "PER_ROW": not split, "SPLIT": split},
            **{"EVEN_K": True, "ASM": asm, "BR": tile.rows, "BM": tile.tokens, "BB": tile.bytes},
        },
        arch,
        ("x_ptr", "w_ptr", "out_ptr", "N", "K", "ROW_BYTES", "X_STRIDE", "BYTES_PER_PART"),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def norm(arch: int, norm: bool = True) -> Any:
    """Norm and rounding of a row of 4096; without a norm, the rounding of a row."""
    return compile_for(
        triton_norm.rms_norm_quantize_kernel,
        {**NORM_TYPES, "x_ptr": "*bf16"},
        {"NORM": norm, "FLOOR": 1e-5, "BK": 4096},
        arch,
        ("x_ptr", "weight_ptr", "q_ptr", "y_ptr", "K", "X_STRIDE"),
        num_warps=8,
    )


if __name__ == "__main__":
    for arch in ARCHITECTURES:
        for bits in (2, 1):
            for m in (1, 32, 64, 2048):
                for asm in (True, False) if arch == 90 and m == 1 else (True,):
                    row = {"kernel": "matmul", "arch": arch, "bits": bits, "m": m, "asm": asm}
                    print(json.dumps({**row, **facts(matmul(arch, bits, m, asm))}), flush=True)
        print(json.dumps({"kernel": "norm", "arch": arch, **facts(norm(arch))}), flush=True)
