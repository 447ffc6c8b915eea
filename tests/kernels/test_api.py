"""api.h as Python reads it, against the C compiler that reads it, too."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.api import API, declarations, parse

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@needs_compiler
def test_structures_lie_as_the_compiler_lays_them_out(tmp_path: Path) -> None:
    structures = declarations().structures
    assert {"packed_matmul_call", "attention_args", "readers", "block", "decoder", "cache"} == set(structures)
    prints, expected = [], []
    for name, structure in structures.items():
        prints.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            at = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            prints.append(f'printf("{name}.{field} %zu %zu\\n", {at});')
            member = getattr(structure, field)
            expected.append(f"{name}.{field} {member.offset} {member.size}")
    main = tmp_path / "main.c"
    main.write_text(
        f'#include "{API}"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{chr(10).join(prints)}\n}}\n'
    )
    assert COMPILER is not None
    subprocess.run([COMPILER, str(main), "-o", str(tmp_path / "main")], check=True)
    printed = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected


def test_the_block_of_a_product_is_its_structure() -> None:
    assert native.PACKED_MATMUL.size == ctypes.sizeof(declarations().structures["packed_matmul_call"])


@needs_compiler
@pytest.mark.parametrize("source", sorted(API.parent.glob("*.c")), ids=lambda path: path.name)
def test_every_function_that_is_not_static_is_declared(source: Path, tmp_path: Path) -> None:
    assert COMPILER is not None
    command = [COMPILER, "-std=gnu11", "-Werror=missing-prototypes", "-c", str(source), "-o", str(tmp_path / "o.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


def test_every_declared_function_is_defined_and_called_with_what_it_takes() -> None:
    lib = native.library()
    if lib is None:
        pytest.skip("no C compiler")
    functions = declarations().functions
    assert len(functions) == len(re.findall(r"bitnet_\w+\(", re.sub(r"//.*", "", API.read_text())))
    for name, function in functions.items():
        assert getattr(lib, name).argtypes == list(function.parameters.values())
    with pytest.raises(AssertionError, match="bitnet_norm: y is not given"):
        native.call("bitnet_norm", None, 0, 0, None, 1e-5, 8)


def test_parse() -> None:
    found = parse(
        """// int no(int);
        #pragma once
        typedef struct { const float *x, *y; int64_t m, n; } pair;  // two
        typedef struct { pair first; int32_t last; } more;
        void one(
            const pair *p, float eps,
            int threads);
        float two(void);"""
    )
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    assert found.structures["pair"]._fields_ == [("x", pointer), ("y", pointer), ("m", int64), ("n", int64)]
    assert found.structures["more"]._fields_ == [("first", found.structures["pair"]), ("last", ctypes.c_int32)]
    assert found.functions == {
        "one": (None, {"p": pointer, "eps": ctypes.c_float, "threads": ctypes.c_int}),
        "two": (ctypes.c_float, {}),
    }
    with pytest.raises(KeyError, match="double"):
        parse("int f(double x);")
