"""RMSNorm + int8 in one kernel equals the norm of the model followed by the quantizer of training, bit for bit."""

import pytest
import torch
from torch import Tensor

from bitnet.model import RMSNorm
from bitnet.quantizers import quantize_int8_absmax
from bitnet_kernels import rms_norm_quantize
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.native import Isa
from tests.kernels.test_matmul import needs

WIDTHS = (1, 7, 63, 64, 100, 256, 1000, 1024, 2816, 4099, 14336, 32767, 32768, 50_000)


def by_torch(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if weight is not None:
        norm = RMSNorm(x.shape[-1], eps)
        norm.weight.data = weight
        x = norm(x).detach()
    q, inv_scale = quantize_int8_absmax(x)
    return q.view(-1, x.shape[-1]), inv_scale.view(-1, 1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("k", WIDTHS)
def test_equals_training(k: int, normed: bool) -> None:
    torch.manual_seed(k)
    for shape in ((1, k), (2, 3, k)):
        for magnitude in (1e-3, 1.0, 300.0):
            x = torch.randn(shape) * magnitude
            weight = torch.randn(k) if normed else None
            before = x.clone()
            q, inv_scale, row_sum = rms_norm_quantize(x, weight, 1e-5)
            expected, expected_inv = by_torch(x, weight, 1e-5)
            assert torch.equal(q.float(), expected)
            assert torch.equal(inv_scale, expected_inv)
            assert torch.equal(row_sum.double(), expected.double().sum(-1))
            assert torch.equal(x, before)


@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name)
def test_every_instruction_set(isa: Isa) -> None:
    needs(isa)
    torch.manual_seed(0)
    x, weight = torch.randn(9, 1300), torch.randn(1300)
    q, inv_scale, _ = native.norm_quantize(x, weight, 1e-5, None, isa=isa)
    expected, expected_inv = by_torch(x, weight, 1e-5)
    assert torch.equal(q.float(), expected)
    assert torch.equal(inv_scale, expected_inv)


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, inv_scale, _ = rms_norm_quantize(x, None)
    assert float(inv_scale) == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_zero_tiny_and_huge_rows() -> None:
    x = torch.stack([torch.zeros(96), torch.full((96,), 1e-30), torch.linspace(-1e30, 1e30, 96), torch.randn(96)])
    q, inv_scale, _ = rms_norm_quantize(x, None)
    assert not q[:2].any()
    assert torch.isfinite(inv_scale).all()
    assert q[2, 0] == -127
    assert q[2, -1] == 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normed", [True, False])
def test_what_is_not_finite_never_becomes_an_integer(bad: float, normed: bool) -> None:
    x = torch.randn(3, 200)
    x[1, 77] = bad
    q, inv_scale, row_sum = rms_norm_quantize(x, torch.ones(200) if normed else None, 1e-5)
    assert inv_scale.isnan().flatten().tolist() == [False, True, False]
    assert not q[1].any()
    assert row_sum[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 300).to(dtype), torch.randn(300).to(dtype)
    q, inv_scale, _ = rms_norm_quantize(x, weight, 1e-5)
    expected, expected_inv = by_torch(x, weight, 1e-5)
    assert torch.equal(q.float(), expected)
    assert torch.equal(inv_scale, expected_inv)


def test_what_is_not_supported_raises() -> None:
    with pytest.raises(ValueError, match="floating point"):
        rms_norm_quantize(torch.zeros(2, 3, dtype=torch.int32), None)
    with pytest.raises(ValueError, match=r"must be \(3,\)"):
        rms_norm_quantize(torch.zeros(2, 3), torch.ones(4))
