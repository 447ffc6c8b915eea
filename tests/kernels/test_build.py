"""Building the CPU kernels: once, atomically, into the cache; without a compiler the same numbers and one warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_kernels.cpu import build

ROOT = Path(__file__).parents[2]
PRODUCT = """
import warnings
warnings.simplefilter("always")
import torch
from bitnet_kernels import pack_ternary2, packed_matmul, rms_norm_quantize

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = torch.randn(5, 300, generator=generator)
w = torch.randint(-1, 2, (40, 300), dtype=torch.int8, generator=generator)
for _ in range(2):
    q, inv_scale, row_sum = rms_norm_quantize(x, torch.ones(300), 1e-5)
    y = packed_matmul(
        q, pack_ternary2(w), n=40, k=300, x_inv_scale=inv_scale, w_inv_scale=torch.ones(1), row_sum=row_sum
    )
print(y.double().sum().item().hex(), y.double().abs().max().item().hex())
"""


def shared_cache() -> Path:
    """The one of all tests, where the library lies ready."""
    return Path(os.environ["BITNET_CACHE"])


def run(cache: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "BITNET_CACHE": str(cache), "PYTHONPATH": str(ROOT / "kernels"), **changes}
    return subprocess.run([sys.executable, "-c", PRODUCT], env=env, capture_output=True, text=True)


def test_processes_that_start_together_build_one_library(tmp_path: Path) -> None:
    env = {**os.environ, "BITNET_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", PRODUCT]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate()[0] for process in started}
    assert [p.returncode for p in started] == [0, 0, 0]
    assert len(outputs) == 1
    (library,) = (tmp_path / "kernels").iterdir()
    assert library.suffix == ".so"
    before = library.stat().st_mtime_ns
    assert run(tmp_path).stdout in outputs
    assert library.stat().st_mtime_ns == before  # built once, used again


@pytest.mark.parametrize("missing", ["compiler", "writable cache"])
def test_without_a_compiler_torch_computes_the_same(missing: str, tmp_path: Path) -> None:
    expected = run(shared_cache())
    blocked = tmp_path / "file"
    blocked.write_text("")
    changes = {"PATH": str(tmp_path), "CC": ""} if missing == "compiler" else {"BITNET_CACHE": str(blocked)}
    done = run(tmp_path / "none", **changes)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout == expected.stdout
    warnings = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert len(warnings) == 1
    assert "the CPU kernels cannot be compiled" in warnings[0]
    assert "Install a C compiler" in done.stderr
    assert ("no C compiler found" in warnings[0]) == (missing == "compiler")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "badcc"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.c:1: error: no such thing" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("BITNET_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.CannotCompile, match=r"badcc: x\.c:1: error: no such thing"):
        build.load_library()
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_an_unknown_instruction_set_is_named() -> None:
    done = run(shared_cache(), BITNET_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "BITNET_CPU_ISA=avx1024: must be one of torch, portable, neon, avx2, avx512, amx" in done.stderr
