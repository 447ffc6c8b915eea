"""The NEON and portable paths of an ARM machine, cross-compiled and run under emulation, where the tools for it exist.

A small C program (neon_main.c) is linked with the kernels; it reads cases from a file and writes what they return.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from bitnet_kernels import FORMATS
from bitnet_kernels.cpu.build import FLAGS, SOURCES
from tests.kernels.conftest import exact, random_int8, random_levels

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(
    not COMPILER or not EMULATOR,
    reason="needs aarch64-linux-gnu-gcc and qemu-aarch64 (gcc-aarch64-linux-gnu, qemu-user)",
)
PORTABLE, NEON = 0, 1
CASES = [(m, n, k) for m in (1, 3, 17) for n, k in ((1, 7), (5, 256), (33, 300), (32, 1100))]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("neon") / "kernels"
    main = Path(__file__).with_name("neon_main.c")
    sources = [str(p) for p in sorted(SOURCES.glob("*.c"))]
    command = [COMPILER, *FLAGS, "-Wall", "-Wno-unknown-pragmas", "-static", f"-I{SOURCES}", str(main), *sources]
    done = subprocess.run([*command, "-lm", "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return out


def test_the_emulated_machine_has_dot_products(program: Path) -> None:
    assert subprocess.run([EMULATOR, "-cpu", "max", str(program)]).returncode == NEON
    assert subprocess.run([EMULATOR, "-cpu", "cortex-a53", str(program)]).returncode == PORTABLE


@pytest.mark.parametrize("isa", [PORTABLE, NEON], ids=["PORTABLE", "NEON"])
@pytest.mark.parametrize("format", ["ternary2", "binary1"])
def test_sums(program: Path, tmp_path: Path, format: str, isa: int) -> None:
    planes = FORMATS[format].planes
    file, result = tmp_path / "cases", tmp_path / "results"
    expected = []
    with file.open("wb") as f:
        for i, (m, n, k) in enumerate(CASES):
            x, w = random_int8(m, k, i), random_levels(format, n, k, i)
            packed = FORMATS[format].pack(w)
            f.write(struct.pack("<6q", m, n, k, packed.shape[1], planes, isa))
            f.write(x.numpy().tobytes() + packed.numpy().tobytes())
            expected.append(exact(x, w).to(torch.int32).numpy().tobytes())
    done = subprocess.run([EMULATOR, "-cpu", "max", str(program), str(file), str(result)])
    assert done.returncode == 0
    assert result.read_bytes() == b"".join(expected)
