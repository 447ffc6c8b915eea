"""The head's product against float64: within a float32 sum of it, for every stored dtype and odd width."""

import pytest
import torch

from bitnet_kernels import wide_matmul
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.native import Isa
from tests.kernels.test_matmul import needs


@pytest.mark.parametrize("isa", [Isa.AVX2, Isa.AVX512], ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_against_float64(dtype: torch.dtype, isa: Isa) -> None:
    needs(isa)
    torch.manual_seed(0)
    for m, n, k in ((1, 1, 1), (1, 5, 15), (1, 33, 100), (2, 9, 1000), (4, 70, 65)):
        x = torch.randn(m, k)
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8) if dtype == torch.int8 else torch.randn(n, k).half()
        scale = torch.rand(n) if dtype == torch.int8 else None
        y = native.wide_matmul(x, w, scale, isa=isa)
        expected = x.double() @ w.double().t() * (1.0 if scale is None else scale.double())
        bound = (x.double().abs() @ w.double().abs().t() * (1.0 if scale is None else scale.double())) * 2.0**-22
        assert bool(((y.double() - expected).abs() <= bound).all()), (m, n, k)


def test_the_matrix_may_be_a_view() -> None:
    needs(Isa.AVX2)
    x, w = torch.randn(2, 8), torch.randn(8, 5).half().t()
    y = wide_matmul(x, w)
    assert y is not None
    torch.testing.assert_close(y, x @ w.float().t())
    twice = torch.rand(5, 2)
    y = wide_matmul(x, torch.ones(5, 8, dtype=torch.int8), twice[:, 0])
    assert y is not None
    torch.testing.assert_close(y, x.sum(1, keepdim=True) * twice[:, 0])


@pytest.mark.parametrize(
    "w,scale,message",
    [
        (torch.ones(3, 7).half(), None, r"w \(3, 7\)"),
        (torch.ones(3, 8, dtype=torch.int8), None, "without scale"),
        (torch.ones(3, 8).half(), torch.ones(3), "with scale"),
        (torch.ones(3, 8, dtype=torch.int8), torch.ones(2), "3 values"),
        (torch.ones(3, 8, dtype=torch.int8), torch.ones(3).double(), "float32"),
        (torch.ones(3, 8).half().to("meta"), None, "on meta"),
    ],
)
def test_what_does_not_fit_is_refused(w: torch.Tensor, scale: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wide_matmul(torch.randn(1, 8), w, scale)


def test_what_has_no_kernel_gives_none() -> None:
    x = torch.randn(1, 8)
    assert wide_matmul(x, torch.randn(3, 8)) is None
    assert wide_matmul(x, torch.randn(3, 8).bfloat16()) is None
    assert native.wide_matmul(x, torch.ones(3, 8, dtype=torch.int8), torch.ones(3), isa=Isa.PORTABLE) is None
