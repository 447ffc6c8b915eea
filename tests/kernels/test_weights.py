"""Weight quantization and gradient digits in C, against torch, float64 and exact rational sums."""

import math
from fractions import Fraction

import pytest
import torch

from bitnet.model import RMSNorm
from bitnet.quantizers import WEIGHT_QUANTIZERS, WeightScale, exact_sums
from bitnet_kernels import FORMATS, rms_norm, training_reference
from bitnet_kernels.cpu import native, weights
from bitnet_kernels.gradients import (
    LEVELS,
    _gradient_digits,
    gradient_digits,
    input_gradient,
    weight_gradient,
)
from bitnet_kernels.training_reference import MAX_INT8_K, int8_product

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

SHAPES = [(1, 1), (7, 13), (3, 257), (64, 512), (33, 1000)]


def matrix(n: int, k: int, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * std


def total(sums: torch.Tensor) -> Fraction:
    return Fraction(int(sums[0])) / 2**14 + Fraction(int(sums[1])) / 2**40


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n,k", SHAPES)
def test_sums_are_the_exact_sums_of_the_grid(n, k, threads) -> None:
    w = matrix(n, k)
    torch.set_num_threads(threads)
    sums = weights.weight_sums(w, True)
    torch.set_num_threads(1)
    # Python's integers: each weight on the grid of 2^-40, half to even, as round() rounds a Fraction.
    expected = [
        sum(round(Fraction(v) * 2**40) for v in values) for values in (w.abs().flatten().tolist(), w.flatten().tolist())
    ]
    assert [total(sums[:2]) * 2**40, total(sums[2:]) * 2**40] == expected
    assert total(exact_sums(w)) * 2**40 == expected[1]


def test_sums_of_pieces_add_up_to_the_same_scale_whatever_the_cut() -> None:
    w = matrix(60, 510, seed=1)
    for quantizer in WEIGHT_QUANTIZERS.values():
        whole = quantizer.scale(quantizer.statistics(w), w.numel())
        for pieces in (w.split(7), w.split(100, dim=1), w.t().split(33), w.flip(0).split(1)):
            added = sum(quantizer.statistics(piece.contiguous()) for piece in pieces)
            assert torch.equal(quantizer.scale(added, w.numel()).inv_scale, whole.inv_scale)
            assert torch.equal(quantizer.scale(added, w.numel()).mean, whole.mean)


def test_torch_and_c_agree_beyond_the_range_of_c() -> None:
    for bad in (2000.0, math.inf, math.nan):
        w = matrix(4, 40)
        w[1, 3] = bad
        assert weights.weight_sums(w, True) is None
        scale = WEIGHT_QUANTIZERS["binary"].scale(WEIGHT_QUANTIZERS["binary"].statistics(w), w.numel())
        if math.isfinite(bad):
            assert scale.inv_scale.item() == pytest.approx(1 / w.double().abs().mean().item(), rel=1e-6)
        else:
            assert math.isnan(scale.mean) and not scale.inv_scale > 0


@pytest.mark.parametrize("n,k", SHAPES)
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_levels_and_packed_codes_are_those_of_torch(kind, n, k) -> None:
    quantizer, w = WEIGHT_QUANTIZERS[kind], matrix(n, k, seed=2)
    w.flatten()[:4] = torch.tensor([0.0, -0.0, 5.0, -5.0])[: w.numel()]
    scale = quantizer.scale(quantizer.statistics(w), w.numel())
    q = weights.weight_levels(w, *scale, kind == "binary")
    assert torch.equal(q, quantizer.levels(w, scale).to(torch.int8))
    format, planes = ("ternary2", 4) if kind == "ternary" else ("binary1", 8)
    assert torch.equal(weights.pack_levels(q, planes), FORMATS[format].pack(q))


def test_ties_of_levels_go_to_even() -> None:
    w = torch.tensor([[0.5, 1.5, -0.5, -1.5, 0.75, 0.25]])
    q = weights.weight_levels(w, torch.tensor(1.0), torch.tensor(0.0), False)
    assert q.tolist() == [[0, 1, 0, -1, 1, 0]]
    assert torch.equal(
        q, WEIGHT_QUANTIZERS["ternary"].levels(w, WeightScale(torch.tensor(1.0), torch.tensor(0.0))).char()
    )


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("m,n", [(1, 1), (17, 33), (64, 130)])
def test_digits_put_together_are_the_gradient(m, n, digits, per_column) -> None:
    g = matrix(m, n, seed=3, std=1e-4) * torch.rand(m, 1)
    row_inv = torch.rand(m) * 30 + 1 if per_column else None
    exact = g.double() if row_inv is None else g.double() / row_inv.double()[:, None]
    if m > 1 and not per_column:
        g[1] = exact[1] = 0.0
    for threads in (1, 2):
        torch.set_num_threads(threads)
        high, low, inv_scale = gradient_digits(g, digits, row_inv, per_column)
        torch.set_num_threads(1)
        lines = exact.t() if per_column else exact
        value = high.double() if low is None else 256.0 * high.double() + low.double()
        step = lines.abs().amax(1, keepdim=True) / LEVELS[digits]
        error = (value * step - lines).abs() / step.clamp(min=1e-300)
        assert float(error.max()) <= 0.5 + 1e-2  # half a level; 32639 float32 levels are themselves off by 4e-3
        assert int(high.abs().max()) <= 127
    reference = _gradient_digits(g, digits, row_inv, per_column)
    torch.testing.assert_close(inv_scale, reference[2], rtol=3e-7, atol=0)
    again = reference[0].int() if low is None else 256 * reference[0].int() + reference[1].int()
    assert int((again - value.int()).abs().max()) <= 1  # a reciprocal apart, a tie may fall either way


@pytest.mark.parametrize("digits", [1, 2])
def test_digits_of_divided_rows(digits) -> None:
    """The largest of a row is that of its quotients, or digits would leave int8."""
    g, row_inv = matrix(5, 33, seed=3, std=1e-4), torch.tensor([0.25, 0.5, 1.0, 2.0, 30.0])
    high, low, inv_scale = gradient_digits(g, digits, row_inv)
    value = high.double() if low is None else 256.0 * high.double() + low.double()
    exact = g.double() / row_inv.double()[:, None]
    step = exact.abs().amax(1, keepdim=True) / LEVELS[digits]
    assert float(((value * step - exact).abs() / step).max()) <= 0.5 + 1e-2
    torch.testing.assert_close(inv_scale.double(), 1 / step[:, 0], rtol=1e-6, atol=0)


def test_infinite_gradients_do_not_hide() -> None:
    for bad in (math.inf, math.nan):
        g = matrix(4, 6)
        g[1, 2] = bad
        x, w = torch.ones(4, 5, dtype=torch.int8), torch.ones(6, 5, dtype=torch.int8)
        dx = input_gradient(g, w.t(), torch.tensor(1.0), 2)
        assert dx[1].isnan().all() and dx[[0, 2, 3]].isfinite().all()
        dw = weight_gradient(g, x.t(), torch.ones(4, 1), 1)
        assert dw[2].isnan().all() and dw[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "operators of a gpu"])
@pytest.mark.parametrize("digits,tolerance", [(1, 2e-2), (2, 1e-4)])
def test_gradients_against_float64(digits, tolerance, on_gpu) -> None:
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(65, 47, generator=generator) * 1e-5  # far below the 1e-5 at which activations are clamped
    w = torch.randint(-1, 2, (47, 70), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (65, 70), dtype=torch.int8, generator=generator)
    x_inv, w_inv = torch.rand(65, 1, generator=generator) * 9 + 1, torch.tensor(37.0)
    dx = input_gradient(g, w.t(), w_inv, digits, on_gpu)
    dw = weight_gradient(g, x.t(), x_inv, digits, on_gpu)
    for found, exact in ((dx, g.double() @ w.double() / 37.0), (dw, (g.double() / x_inv.double()).T @ x.double())):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("vnni", [True, False])
def test_int8_products_are_exact_and_too_long_ones_refused(monkeypatch, vnni) -> None:
    if not vnni:
        monkeypatch.setattr(training_reference, "cpu_multiplies_int8_exactly", lambda: False)
    a = torch.full((3, 4096), -128, dtype=torch.int8)
    assert torch.equal(int8_product(a, a.t()).long(), torch.full((3, 3), 4096 * 128 * 128))
    with pytest.raises(ValueError, match=str(MAX_INT8_K)):
        int8_product(torch.zeros(1, MAX_INT8_K + 1, dtype=torch.int8), torch.zeros(MAX_INT8_K + 1, 1, dtype=torch.int8))


@pytest.mark.parametrize("isa", [native.Isa.PORTABLE, native.Isa.AVX2, native.Isa.AVX512])
def test_every_instruction_set_has_the_same_bits(monkeypatch, isa) -> None:
    """What training runs in C, at each instruction set against torch: sums, levels, codes, digits, norms."""
    if isa > native.best_isa():
        pytest.skip(f"this machine has no {isa.name}")
    monkeypatch.setattr(native, "best_isa", lambda: isa)
    w, x, g = matrix(33, 1000), matrix(21, 300, seed=5, std=1.0), matrix(21, 300, seed=6, std=1e-3)
    for kind, quantizer in WEIGHT_QUANTIZERS.items():
        sums = weights.weight_sums(w, True)
        assert total(sums[:2]) == total(exact_sums(w.abs())) and total(sums[2:]) == total(exact_sums(w))
        scale = quantizer.scale(sums, w.numel())
        q = weights.weight_levels(w, *scale, kind == "binary")
        assert torch.equal(q, quantizer.levels(w, scale).char())
        format, planes = ("ternary2", 4) if kind == "ternary" else ("binary1", 8)
        assert torch.equal(FORMATS[format].unpack(weights.pack_levels(q, planes), 33, 1000), q)
    for per_column in (False, True):
        high, low, _ = gradient_digits(g, 2, None, per_column)
        expected = _gradient_digits(g, 2, None, per_column)
        assert int(((256 * high.int() + low.int()) - (256 * expected[0].int() + expected[1].int())).abs().max()) <= 1
    norm, grad = RMSNorm(300, 1e-5), torch.randn(21, 300)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(300) + 0.5)
    x.requires_grad_()
    norm(x).backward(grad)
    exact_x, exact_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = exact_x * (exact_x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * exact_w
    y.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(norm.weight.grad.double(), exact_w.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 4099), (5, 96), (3, 2, 30)])
def test_norm_while_training_has_the_bits_of_torch(monkeypatch, shape) -> None:
    norm, x = RMSNorm(shape[-1], 1e-5), torch.randn(shape)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1]) + 0.5)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours = norm(x)
        monkeypatch.setattr(rms_norm, "takes", lambda *_: False)
        assert torch.equal(ours, norm(x))
        monkeypatch.undo()
    torch.set_num_threads(1)
