"""The Triton kernels, interpreted on the CPU, equal float64 bit for bit.

With ``TRITON_INTERPRET=0`` on a machine with a GPU the same cases run there. Inline PTX is evaluated instruction by
instruction (``ptx_evaluator``). The kernels are called without the operator, with small tiles, so that edges and
several programs occur in small shapes.
"""

import os
from types import ModuleType

import numpy as np
import pytest
import torch

from bitnet_kernels import FORMATS
from bitnet_kernels.configurations import Tile
from bitnet_kernels.reference import packed_matmul_reference, rms_norm_quantize_reference
from tests.kernels.conftest import exact, random_int8, random_levels

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"  # set in tests/conftest.py, before triton is imported
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

TILES = [Tile(16, 16, 64), Tile(32, 16, 64, split_k=3), Tile(16, 32, 128, split_k=2)]
RESIDENT = ["ternary2", "binary1"]


@pytest.fixture(scope="module")
def kernels() -> tuple[ModuleType, ModuleType, str]:
    """The two modules, and the device that their tensors go to."""
    from bitnet_kernels import triton_matmul, triton_norm

    if INTERPRETED:
        from tests.kernels import ptx_evaluator

        ptx_evaluator.install()
        return triton_matmul, triton_norm, "cpu"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no CUDA device")
    return triton_matmul, triton_norm, "cuda"


@pytest.mark.parametrize("asm", [True, False], ids=["ptx", "plain"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("format", RESIDENT)
def test_sums(kernels, format: str, tile: Tile, asm: bool) -> None:
    matmul, _, device = kernels
    for m, n, k in ((1, 5, 7), (3, 17, 300), (17, 40, 1100), (16, 16, 512)):
        x, w = random_int8(m, k, m), random_levels(format, n, k, n)
        packed = FORMATS[format].pack(w)
        before = x.clone(), packed.clone()
        y = matmul.packed_matmul(x.to(device), packed.to(device), format, n, k, tile=tile, asm=asm)
        assert y.dtype == torch.int32
        assert torch.equal(y.cpu().double(), exact(x, w)), (m, n, k)
        assert torch.equal(x, before[0])
        assert torch.equal(packed, before[1])


@pytest.mark.parametrize("format", RESIDENT)
@pytest.mark.parametrize("value", [-128, 127, 0])
def test_extreme_rows(kernels, format: str, value: int) -> None:
    matmul, _, device = kernels
    x = torch.full((2, 700), value, dtype=torch.int8)
    w = torch.ones(3, 700, dtype=torch.int8)
    w[1] = -1
    packed = FORMATS[format].pack(w)
    y = matmul.packed_matmul(x.to(device), packed.to(device), format, 3, 700, tile=TILES[1])
    assert y.tolist() == [[700 * value, -700 * value, 700 * value]] * 2


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("format", RESIDENT)
def test_epilogue(kernels, format: str, per_row: bool, split: int) -> None:
    matmul, _, device = kernels
    x, w = random_int8(5, 600, 1), random_levels(format, 21, 600, 2)
    packed = FORMATS[format].pack(w)
    x_inv, w_inv = torch.rand(5, 1) * 40 + 0.01, torch.rand(21 if per_row else 1) * 100 + 0.01
    given = [t.to(device) for t in (x, packed)]
    scales = [t.to(device) for t in (x_inv, w_inv)]
    y = matmul.packed_matmul(*given, format, 21, 600, *scales, tile=Tile(16, 16, 64, split_k=split)).cpu()
    assert torch.equal(y, (exact(x, w) / (x_inv * w_inv).double()).float())
    # The interpreter truncates to bfloat16; a device rounds.
    if device == "cuda":
        half = matmul.packed_matmul(*given, format, 21, 600, *scales, out_dtype=torch.bfloat16).cpu()
        assert torch.equal(half, y.bfloat16())


@pytest.mark.parametrize("group_size", [64, 128, 192, 256, 512])
@pytest.mark.parametrize("format", RESIDENT)
def test_group_scales(kernels, format: str, group_size: int) -> None:
    matmul, _, device = kernels
    k = 700
    x, w = random_int8(3, k, 1), random_levels(format, 20, k, 2)
    packed, scale, x_inv = FORMATS[format].pack(w), torch.randn(20, -(-k // group_size)), torch.rand(3, 1) + 0.5
    given = [t.to(device) for t in (x, packed)]
    y = matmul.packed_matmul(
        *given, format, 20, k, x_inv.to(device), None, scale.to(device), group_size, asm=device == "cuda"
    )
    assert torch.equal(y.cpu(), packed_matmul_reference(x, packed, format, k, x_inv, None, scale, group_size))


@pytest.mark.parametrize("grouped", [False, True])
def test_more_inputs_than_offsets_reach_are_taken_in_parts(kernels, grouped: bool, monkeypatch) -> None:
    matmul, _, device = kernels
    m, n, k = 37, 5, 300
    x, w = random_int8(m, k, 1), random_levels("ternary2", n, k, 2)
    scales = {"x_inv_scale": torch.rand(m, 1) + 0.5}
    scales |= {"group_scale": torch.rand(n, 3), "group_size": 128} if grouped else {"w_inv_scale": torch.rand(n) + 0.5}
    expected = packed_matmul_reference(x, FORMATS["ternary2"].pack(w), "ternary2", k, **scales)
    monkeypatch.setattr(matmul, "MOST_INPUTS", 10 * k)
    on_device = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in scales.items()}
    sums = {} if grouped else {"row_sum": x.sum(-1, dtype=torch.int32).to(device)}
    y = matmul.packed_matmul(
        x.to(device), FORMATS["ternary2"].pack(w).to(device), "ternary2", n, k, **on_device, **sums
    )
    assert torch.equal(y.cpu(), expected)


def test_known_row_sums_and_strided_activations(kernels) -> None:
    matmul, _, device = kernels
    wide, w = random_int8(6, 900, 3), random_levels("ternary2", 9, 300, 4)
    packed = FORMATS["ternary2"].pack(w).to(device)
    for x in (wide[::2, :300], wide[:, 300:600]):
        y = matmul.packed_matmul(
            x.to(device), packed, "ternary2", 9, 300, row_sum=x.sum(-1, dtype=torch.int32).to(device), tile=TILES[0]
        )
        assert torch.equal(y.cpu().double(), exact(x, w))


@pytest.mark.parametrize("k", [7, 100, 256, 700, 1300, 2560])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rounding(kernels, k: int, normed: bool) -> None:
    _, norm, device = kernels
    torch.manual_seed(k)
    x, weight = torch.randn(4 if INTERPRETED else 400, k) * 3, torch.randn(k) if normed else None
    q, inv_scale, row_sum = (
        t.cpu() for t in norm.rms_norm_quantize(x.to(device), None if weight is None else weight.to(device), 1e-5)
    )
    # The norm adds its squares in another order than torch on a CPU: undo nothing, quantize what it gives.
    y = x if weight is None else norm.rms_norm(x.to(device), weight.to(device), 1e-5).cpu()
    expected = rms_norm_quantize_reference(y, None, 0.0)
    assert torch.equal(q, expected[0])
    assert torch.equal(inv_scale, expected[1])
    assert torch.equal(row_sum, expected[2])
    if weight is not None:
        exact_norm = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        assert torch.allclose(y.double(), exact_norm, rtol=1e-6, atol=0)  # three float32 roundings and a sum


def test_ties_zeros_and_what_is_not_finite(kernels) -> None:
    _, norm, device = kernels
    x = torch.zeros(5, 8)
    x[0] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    x[2, 3], x[3, 0], x[4] = float("nan"), float("inf"), 1e30
    q, inv_scale, row_sum = (t.cpu() for t in norm.rms_norm_quantize(x.to(device), None, 0.0))
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert not q[1:4].any()
    assert q[4].tolist() == [127] * 8
    assert inv_scale.isnan().flatten().tolist() == [False, False, True, True, False]
    assert row_sum.tolist() == [127 + 2 + 2 - 2 - 2 + 126, 0, 0, 0, 127 * 8]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_the_head(kernels, dtype: torch.dtype) -> None:
    from bitnet_kernels.triton_wide import wide_matmul

    device = kernels[2]
    for m, n, k in ((1, 5, 7), (3, 40, 300), (2, 33, 600)):
        x, w = torch.randn(m, k), random_int8(n, k, k).to(dtype)
        scale = torch.rand(n) if dtype == torch.int8 else None
        y = wide_matmul(x.to(device), w.to(device), None if scale is None else scale.to(device)).cpu().double()
        expected = x.double() @ w.double().t() * (1.0 if scale is None else scale.double())
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))  # a float32 sum


def test_the_evaluator_knows_its_instructions() -> None:
    from tests.kernels.ptx_evaluator import evaluate

    word = np.array([0xE4_1B_00_FF], dtype=np.uint32)
    (out,) = evaluate("{ shr.b32 $0, $1, 2; and.b32 $0, $0, 0x03030303; }", 1, [word])
    assert int(out[0]) == 0x01_02_00_03
    with pytest.raises(KeyError):
        evaluate("popc.b32 $0, $1;", 1, [word])
