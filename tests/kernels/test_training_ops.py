"""The operators of int8 training: torch's definitions and Triton's kernels, against numpy and float64.

Every case runs on both sides: ``torch`` is what a CPU runs, ``triton`` the kernels in the interpreter, or, with
``TRITON_INTERPRET=0``, the operators on a GPU. Memory is poisoned (see conftest).
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.quantizers import quantize_binary_sign, quantize_int8_absmax, quantize_ternary_absmean
from bitnet_kernels import training_ops
from bitnet_kernels.configurations import Int8Tile
from tests.kernels.conftest import exact, random_int8

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"  # set in tests/conftest.py, before triton is imported
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

SMALL = Int8Tile(rows=16, columns=16, depth=32, warps=4, group=2)
SHAPES = [(1, 5, 7), (3, 17, 40), (16, 16, 64), (17, 33, 70), (64, 40, 96)]
NAN, INF = float("nan"), float("inf")

Run = Callable[..., Any]


def test_a_product_over_nothing_is_zero(run: Run) -> None:
    """The weight gradient of a batch without tokens."""
    a, b = torch.empty(3, 0, dtype=torch.int8), torch.empty(5, 0, dtype=torch.int8)
    assert torch.equal(run("int8_matmul", a, b, torch.ones(3)), torch.zeros(3, 5))


def _interpreted(name: str, *arguments: Any) -> Any:
    """A kernel, called as the operator on a GPU would call it; products with small tiles, to have several."""
    from bitnet_kernels import triton_int8, triton_norm, triton_training

    if name == "int8_matmul":
        return triton_int8.int8_matmul(*arguments, tile=SMALL)
    module = triton_norm if name == "rms_norm_backward" else triton_training
    return getattr(module, name)(*arguments)


def _on_gpu(name: str, *arguments: Any) -> Any:
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no CUDA device")
    given = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    results = getattr(training_ops, name)(*given)
    return results.cpu() if isinstance(results, Tensor) else tuple(r.cpu() for r in results)


@pytest.fixture(params=["torch", "triton"])
def run(request: pytest.FixtureRequest) -> Run:
    """``run(name, *arguments)``; fails where an argument is changed."""
    side: Run = lambda name, *a: getattr(training_ops, name)(*a)  # noqa: E731
    if request.param == "triton":
        side = _interpreted if INTERPRETED else _on_gpu

    def checked(name: str, *arguments: Any) -> Any:
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        results = side(name, *arguments)
        for old, new in zip(before, arguments, strict=True):
            assert not isinstance(old, Tensor) or same(old, new)
        return results

    return checked


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN like NaN, and of one dtype."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def by_numpy(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Float32 (M, K) -> int8 and inv_scale of its rows, written out in numpy."""
    values = x.float().numpy()
    absmax = np.maximum(np.abs(values).max(axis=1), np.float32(floor))
    inv = (np.float32(1) / absmax) * np.float32(127)
    return torch.from_numpy(np.rint(values * inv[:, None]).astype(np.int8)), torch.from_numpy(inv)


def awkward(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of many magnitudes; among them ties at .5, and zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * 1000 + k)) * torch.logspace(-4, 3, m)[:, None]
    if m > 2:
        x[m // 2] = 0.0
        ties = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])[: min(8, k)]
        x[m // 2 + 1] = 0.0
        x[m // 2 + 1, : len(ties)] = ties
    return x.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("one_scale", [True, False])
def test_product(run: Run, shape: tuple[int, int, int], one_scale: bool) -> None:
    m, n, k = shape
    a, b = random_int8(m, k, m), random_int8(n, k, n)
    row_inv, inv = torch.rand(m) * 40 + 0.01, torch.tensor(17.3) if one_scale else None
    y = run("int8_matmul", a, b, row_inv, inv)
    scales = row_inv.numpy() * (np.float32(17.3) if one_scale else np.float32(1))
    assert same(y, torch.from_numpy(exact(a, b).numpy().astype(np.float32) / scales[:, None]))
    assert same(run("int8_matmul", a, b, torch.ones(m)), exact(a, b).float())


@pytest.mark.parametrize("value", [-128, 127, 0])
def test_product_of_extremes(run: Run, value: int) -> None:
    a = torch.full((3, 200), value, dtype=torch.int8)
    b = torch.tensor([[-128], [127], [1], [0]], dtype=torch.int8).expand(4, 200)
    y = run("int8_matmul", a, b, torch.ones(3), torch.ones(1))
    assert y.tolist() == [[200.0 * value * other for other in (-128, 127, 1, 0)]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_in_half_precision(run: Run, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    a, b, row_inv = random_int8(5, 48, 1), random_int8(18, 48, 2), torch.rand(5) * 900 + 100
    y = run("int8_matmul", a, b, row_inv, torch.tensor(3.0), dtype)
    expected = exact(a, b).float() / (row_inv * 3.0)[:, None]
    if dtype == torch.bfloat16 and INTERPRETED and request.node.callspec.params["run"] == "triton":
        expected = (expected.view(torch.int32) & -65536).view(torch.float32)  # the interpreter truncates
    assert same(y, expected.to(dtype))


def test_product_of_strided_rows_and_of_scales_that_are_not_finite(run: Run) -> None:
    wide, b = random_int8(6, 128, 3), random_int8(9, 64, 4)
    row_inv = torch.tensor([1.0, NAN, 2.0])
    y = run("int8_matmul", wide[::2, 32:96], b, row_inv, torch.tensor(0.5))
    expected = exact(wide[::2, 32:96], b).float() / (row_inv * 0.5)[:, None]
    assert y[1].isnan().all()
    assert same(y, expected)
    assert same(
        run("int8_matmul", wide.t()[:6, :6], wide[:, :6], torch.ones(6)), exact(wide.t()[:6], wide[:, :6]).float()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 7), (3, 65), (16, 64), (17, 130), (64, 33)])
def test_rows(run: Run, m: int, k: int, dtype: torch.dtype) -> None:
    x = awkward(m, k, dtype)
    q, inv_scale, q_t = run("quantize_rows", x, True, 1e-5)
    expected, expected_inv = by_numpy(x, 1e-5)
    assert same(q, expected)
    assert same(inv_scale, expected_inv)
    assert same(q_t, expected.t())
    assert q_t.is_contiguous()
    trained, trained_inv = quantize_int8_absmax(x)
    assert torch.equal(q.float(), trained)
    assert torch.equal(inv_scale, trained_inv.view(-1))
    assert run("quantize_rows", x, False, 1e-5)[2].numel() == 0


def test_ties_go_to_even(run: Run) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    expected = [127, 0, 2, 2, 0, -2, -2, 126]
    assert run("quantize_rows", x, False, 1e-5)[0].tolist() == [expected]
    assert run("quantize_columns", x.t().contiguous(), None, 1e-5)[0].tolist() == [expected]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_told_by_the_scale(run: Run, bad: float) -> None:
    x = torch.randn(4, 70)
    x[1, 68] = bad
    q, inv_scale, q_t = run("quantize_rows", x, True, 1e-5)
    assert inv_scale.isnan().tolist() == [False, True, False, False]
    assert not q[1].any()
    assert same(q_t, q.t())
    assert same(q[2:], by_numpy(x[2:], 1e-5)[0])
    q_t, inv_scale = run("quantize_columns", x, None, 1e-5)
    assert inv_scale.isnan().nonzero().tolist() == [[68]]
    assert not q_t[68].any()
    assert same(q_t[:68], by_numpy(x.t()[:68], 1e-5)[0])
    q_t, inv_scale = run("quantize_columns", torch.ones(4, 3), torch.tensor([1.0, NAN, 1.0, 1.0]), 1e-5)
    assert inv_scale.isnan().all()
    assert not q_t.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, n", [(1, 7), (3, 65), (16, 64), (17, 130), (64, 33), (130, 5)])
def test_columns(run: Run, m: int, n: int, dtype: torch.dtype) -> None:
    x = awkward(n, m, dtype).t()  # strided: columns of many magnitudes
    q_t, inv_scale = run("quantize_columns", x, None, 1e-5)
    assert same(q_t, by_numpy(x.t(), 1e-5)[0])
    assert same(inv_scale, by_numpy(x.t(), 1e-5)[1])
    row_inv = torch.rand(m) * 30 + 0.1
    q_t, inv_scale = run("quantize_columns", x.contiguous(), row_inv, 1e-5)
    divided = torch.from_numpy(x.float().numpy() / row_inv.numpy()[:, None])
    assert same(q_t, by_numpy(divided.t(), 1e-5)[0])
    assert same(inv_scale, by_numpy(divided.t(), 1e-5)[1])
    assert q_t.is_contiguous()


def test_small_gradients_are_not_lost(run: Run) -> None:
    """Below the floor of activations: integers up to 127 all the same; below the floor of gradients, zeros."""
    x = torch.randn(5, 40) * 1e-12
    for results in (run("quantize_rows", x, False, 1e-30)[:2], run("quantize_columns", x.t(), None, 1e-30)):
        assert same(results[0], by_numpy(x, 1e-30)[0])
        assert same(results[1], by_numpy(x, 1e-30)[1])
        assert results[0].abs().amax(1).tolist() == [127] * 5
    assert not run("quantize_columns", x * 1e-22, None, 1e-30)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, k", [(1, 7), (17, 130), (65, 64)])
def test_weights(run: Run, n: int, k: int, dtype: torch.dtype) -> None:
    w = torch.randn(n, k).to(dtype)
    q, inv_scale = quantize_ternary_absmean(w)
    signs, _ = quantize_binary_sign(w)
    mean = w.mean(dtype=torch.float64).float()
    for expected, found in ((q, run("ternary_weight", w, inv_scale)), (signs, run("binary_weight", w, mean))):
        assert same(found[0], expected.to(torch.int8))
        assert same(found[1], expected.to(torch.int8).t())
        assert found[1].is_contiguous()


@pytest.mark.filterwarnings("ignore:.*encountered in multiply")  # numpy, of the interpreter
def test_weights_at_the_edges(run: Run) -> None:
    w = torch.tensor([[0.5, -0.5, 0.50001, -0.50001, 1.5, -7.0, 1e38, 0.0, NAN, -INF]])
    assert run("ternary_weight", w, torch.tensor(1.0))[0].tolist() == [[0, 0, 1, -1, 1, -1, 1, 0, 0, -1]]
    assert run("ternary_weight", w, torch.tensor(1e10))[0].tolist() == [[1, -1, 1, -1, 1, -1, 1, 0, 0, -1]]
    assert not run("ternary_weight", w, torch.tensor(NAN))[0].any()
    assert run("ternary_weight", w, torch.tensor(0.0))[0].tolist() == [[0] * 10]
    assert run("binary_weight", w[:, :8], torch.tensor(0.5))[0].tolist() == [[-1, -1, 1, -1, 1, -1, 1, -1]]
    for mean in (NAN, INF, -INF):
        assert not run("binary_weight", w, torch.tensor(mean))[0].any()


@pytest.mark.parametrize("m, k", [(1, 7), (3, 65), (17, 130)])
def test_norm(run: Run, m: int, k: int) -> None:
    x, weight = awkward(m, k), torch.randn(k)
    y, q, inv_scale, rstd, q_t = run("norm_quantize", x, weight, 1e-5, True)
    r = 1 / (x.double().pow(2).mean(-1) + 1e-5).sqrt()
    assert torch.allclose(rstd.double(), r, rtol=1e-6, atol=0)  # a float32 sum, a root and a quotient
    assert same(y, weight * (x * rstd[:, None]))
    for found, expected in zip((q, inv_scale, q_t), run("quantize_rows", y, True, 1e-5), strict=True):
        assert same(found, expected)
    assert run("norm_quantize", x, weight, 1e-5, False)[4].numel() == 0
    x[0, k // 2] = NAN
    _, q, inv_scale, _, _ = run("norm_quantize", x, weight, 1e-5, False)
    assert inv_scale.isnan().nonzero().tolist() == [[0]]
    assert not q[0].any()


def test_norm_equals_the_one_that_serves() -> None:
    """Of the kernels: the same bits with and without y, so a model that is served rounds as it was trained."""
    from bitnet_kernels import triton_norm

    device = "cpu" if INTERPRETED else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 and no CUDA device")
    x, weight = awkward(5, 100, torch.bfloat16).to(device), torch.randn(100, device=device)
    y, q, inv_scale, _ = triton_norm.norm_quantize(x, weight, 1e-5)
    assert y.dtype == torch.float32
    served = triton_norm.rms_norm_quantize(x, weight, 1e-5)
    assert torch.equal(q, served[0])
    assert torch.equal(inv_scale, served[1].view(-1))
    assert torch.equal(y, triton_norm.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 7), (3, 65), (17, 130)])
def test_norm_backward(run: Run, m: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # seven truncated products can miss the bound, so what is drawn must not depend on other tests
    x, dy = (torch.randn(m, k) * 3).to(dtype), torch.randn(m, k).to(dtype)
    weight = torch.randn(k).to(dtype)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    r = 1 / (x64.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    (x64 * r * w64).backward(dy.double())
    dx, dweight = run("rms_norm_backward", dy, x, weight, r.detach().float().view(-1))
    assert (dx.dtype, dweight.dtype) == (dtype, dtype)
    # float32: a few roundings and two sums; bfloat16: results are rounded (the interpreter truncates), and x * rstd is.
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for found, expected in ((dx, x64.grad), (dweight, w64.grad)):
        assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    "name, more",
    [
        ("quantize_rows", (True, 1e-5)),
        ("quantize_columns", (None, 1e-5)),
        ("ternary_weight", (torch.tensor(2.0),)),
        ("binary_weight", (torch.tensor(0.1),)),
        ("norm_quantize", (torch.ones(30), 1e-5, True)),
    ],
)
def test_rows_of_a_wider_matrix(run: Run, name: str, more: tuple[Any, ...]) -> None:
    x = awkward(5, 40)[:, 3:33]
    for strided, dense in zip(run(name, x, *more), run(name, x.contiguous(), *more), strict=True):
        assert same(strided, dense)


def test_norm_backward_of_wider_matrices(run: Run) -> None:
    x, dy = awkward(5, 40)[:, 3:33], torch.randn(5, 50)[:, 20:]
    more = torch.randn(30), torch.rand(5)
    for strided, dense in zip(
        run("rms_norm_backward", dy, x, *more),
        run("rms_norm_backward", dy.contiguous(), x.contiguous(), *more),
        strict=True,
    ):
        assert same(strided, dense)


def test_three_products_of_a_layer(run: Run) -> None:
    """The gradients of a layer in int8 are those of its exact backward, to within the rounding of dy."""
    m, n, k = 33, 20, 50
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n) * 1e-7
    x_q, x_inv, x_q_t = run("quantize_rows", x, True, 1e-5)
    w_inv = quantize_ternary_absmean(w)[1]
    w_q, w_q_t = run("ternary_weight", w, w_inv)
    y = run("int8_matmul", x_q, w_q, x_inv, w_inv)
    assert same(y, exact(x_q, w_q).float() / (x_inv * w_inv)[:, None])
    dy_q, dy_inv, _ = run("quantize_rows", dy, False, training_ops.GRADIENT_FLOOR)
    dx = run("int8_matmul", dy_q, w_q_t, dy_inv, w_inv)
    dy_q_t, column_inv = run("quantize_columns", dy, x_inv, training_ops.GRADIENT_FLOOR)
    dw = run("int8_matmul", dy_q_t, x_q_t, column_inv)
    expected_dx = dy.double() @ (w_q.double() / w_inv.double())
    expected_dw = dy.double().t() @ (x_q.double() / x_inv.double()[:, None])
    for found, expected in ((dx, expected_dx), (dw, expected_dw)):
        assert float((found.double() - expected).norm() / expected.norm()) < 0.01
