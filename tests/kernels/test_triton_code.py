"""Machine code of the Triton kernels, compiled here for sm_80, 89, 90 and 100: no stack, matrix units, wide copies."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from bitnet_kernels.configurations import SHARED_KB, Shape, int8_shared_bytes, int8_tile, shared_bytes, table

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


SCRIPTS = ("compile_ahead", "compile_training")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the scripts of this folder print, side by side: in this process Triton interprets, and so cannot compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    running = [
        subprocess.Popen([sys.executable, "-m", f"tests.kernels.{script}"], text=True, env=env, stdout=subprocess.PIPE)
        for script in SCRIPTS
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [[json.loads(line) for line in lines.splitlines()] for lines in said]


@pytest.fixture
def compiled(printed) -> list[dict[str, Any]]:
    return printed[0]


@pytest.fixture
def training(printed) -> list[dict[str, Any]]:
    return printed[1]


def test_all_were_compiled(compiled) -> None:
    assert len([r for r in compiled if r["kernel"] == "matmul"]) == 4 * 8 + 2
    assert {r["arch"] for r in compiled if r["kernel"] == "norm"} == {80, 89, 90, 100}


@pytest.mark.skipif(
    Version(version("triton")) < Version("3.9"), reason="Triton 3.6 puts 40 bytes of one kernel for sm_100 on the stack"
)
def test_no_stack_no_spills(compiled, training) -> None:
    for row in compiled + training:
        assert row["stack"] == 0, row
        assert row["spills"] == 0, row
        assert row["registers"] <= 255, row


def test_shared_memory_fits_and_is_foreseen(compiled) -> None:
    for row in compiled:
        assert row["shared"] <= SHARED_KB[row["arch"]] * 1024, row
        if row["kernel"] == "matmul":
            planes = 8 // row["bits"]
            tile = table(Shape(row["arch"], row["m"], 4096, 14336 // planes), planes)
            assert row["shared"] <= shared_bytes(tile, planes, row["arch"]) * 1.1, row


def test_int8_matrix_units_and_copies_of_16_bytes(compiled) -> None:
    for row in compiled:
        if row["kernel"] == "matmul":
            assert row["ptx_int8_matrix"] > 0, row
            assert row["int8_matrix"] > 0, row
        assert row["copies_of_16_bytes"] > 0, row


def test_no_multiply_and_add_is_fused(compiled, training) -> None:
    """What the CPU rounds twice is rounded twice. The assembler's own steps inside a division are not in the PTX."""
    assert [r["ptx_fused_multiply_add"] for r in compiled + training] == [0] * len(compiled + training)


def test_training_kernels(training) -> None:
    """All of them for all architectures; products by the matrix unit, with copies of 16 bytes; shared memory fits."""
    assert len(training) == 4 * 15
    for row in training:
        # Where many matrices lie is read from a table, so nobody knows that they are aligned.
        assert row["copies_of_16_bytes"] > 0 or row["kernel"].endswith("of matrices"), row
        assert row["shared"] <= SHARED_KB[row["arch"]] * 1024, row
        if "int8_matmul" in row["kernel"]:
            tile = int8_tile(row["arch"], 64 if "64 rows" in row["kernel"] else 4096)
            assert row["int8_matrix"] > 0, row
            assert row["ptx_int8_matrix"] > 0, row
            assert row["shared"] <= int8_shared_bytes(tile, row["arch"]) * 1.1, row


@pytest.mark.parametrize("arch", sorted(SHARED_KB))
def test_every_tile_of_the_training_product_fits(arch: int) -> None:
    for m in (1, 64, 65, 4096):
        assert int8_shared_bytes(int8_tile(arch, m), arch) <= SHARED_KB[arch] * 1024


def test_ptx_saves_integer_work(compiled) -> None:
    for bits in (2, 1):
        by_asm = {
            r["asm"]: r
            for r in compiled
            if r["kernel"] == "matmul" and r["arch"] == 90 and r["m"] == 1 and r["bits"] == bits
        }
        assert by_asm[True]["integer"] * 2 < by_asm[False]["integer"]


@pytest.mark.parametrize("arch", sorted(SHARED_KB))
@pytest.mark.parametrize("planes", [4, 8])
def test_every_entry_of_the_table_fits(arch: int, planes: int) -> None:
    for m in (1, 7, 16, 17, 33, 64, 65, 2048):
        for n in (64, 2560, 28672):
            for k in (256, 2560, 14336):
                tile = table(Shape(arch, m, n, k // planes), planes)
                assert shared_bytes(tile, planes, arch) <= SHARED_KB[arch] * 1024
                assert tile.tokens >= 16
                assert tile.stages >= 2
