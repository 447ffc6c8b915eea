"""Inline PTX in Triton's interpreter: the few integer instructions that the kernels use, evaluated with numpy.

Triton's interpreter has no inline assembly. ``install`` puts this in its place. With ``pack=4`` an 8-bit operand has
four elements in one 32-bit register. An instruction that is not known here raises: nothing passes by accident.
"""

import re
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BINARY = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
}


def evaluate(asm: str, n_outputs: int, inputs: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Run ``asm`` on uint32 arrays: ``$0 ...`` are the outputs, the inputs follow."""
    registers = {f"${n_outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}

    def value(operand: str) -> Any:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for statement in asm.replace("{", "").replace("}", "").split(";"):
        if not statement.strip():
            continue
        opcode, _, rest = statement.strip().partition(" ")
        target, *operands = re.split(r"\s*,\s*", rest.strip())
        registers[target] = _BINARY[opcode](*map(value, operands)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(n_outputs)]


def _create_inline_asm(
    self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
) -> Any:
    n_outputs = sum("=" in c for c in constraints.split(","))
    assert n_outputs == len(types)
    assert pack == 4
    assert all(v.data.dtype.itemsize == 1 for v in values)
    shape = values[0].data.shape
    words = [np.ascontiguousarray(v.data).reshape(-1).view(np.uint32) for v in values]
    outputs = [word.view(np.int8).reshape(shape) for word in evaluate(asm, n_outputs, words)]

    class Results:
        def get_result(self, i: int) -> TensorHandle:
            return TensorHandle(outputs[i], types[i].scalar if hasattr(types[i], "scalar") else types[i])

    return Results()


def install() -> None:
    """Teach the interpreter inline assembly."""
    InterpreterBuilder.create_inline_asm = _create_inline_asm
