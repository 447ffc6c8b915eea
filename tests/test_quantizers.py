"""Quantizers against hand-computed values, float64 references and the edges of the number range."""

import math

import numpy as np
import pytest
import torch

from bitnet.quantizers import (
    fake_quantize,
    quantize_binary_sign,
    quantize_int4_absmean,
    quantize_int8_absmax,
    quantize_ternary_absmean,
    straight_through,
)

ALL = [quantize_ternary_absmean, quantize_binary_sign, quantize_int8_absmax, quantize_int4_absmean]
PER_TOKEN = ALL[2:]


def test_ternary_by_hand() -> None:
    # mean|w| = 8/8 = 1, so the thresholds are +-0.5; 0.5 and 1.5 are ties and go to the even neighbour.
    w = torch.tensor([[0.5, -0.5, 0.51, -0.51], [1.5, -2.0, 2.48, 0.0]])
    q, inv_scale = quantize_ternary_absmean(w)
    assert inv_scale.item() == 1.0
    assert q.tolist() == [[0, 0, 1, -1], [1, -1, 1, 0]]


def test_binary_by_hand() -> None:
    w = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # mean 3: exactly the mean maps to -1 (paper, eq 2)
    q, inv_scale = quantize_binary_sign(w)
    assert q.tolist() == [[-1, -1, -1, 1]]
    assert inv_scale.item() == torch.tensor(1 / 3).item()


def test_int8_by_hand_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [2.0, 1.0, 0.0, 0.0, 0.0, -2.0]])
    q, inv_scale = quantize_int8_absmax(x)
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2]
    assert inv_scale.flatten().tolist() == [1.0, 63.5]
    assert q[1].tolist() == [127, 64, 0, 0, 0, -127]  # 63.5 is a tie


def test_int4_by_hand() -> None:
    # mean|x| = 1, inv_scale = sqrt(7) = 2.6458
    q, inv_scale = quantize_int4_absmean(torch.tensor([[4.0, -0.1, 0.1, 0.0, 0.8, -1.0, -1.0, 1.0]]))
    assert inv_scale.item() == pytest.approx(math.sqrt(7))
    assert q.tolist() == [[7, 0, 0, 0, 2, -3, -3, 3]]
    q, _ = quantize_int4_absmean(torch.tensor([[-8.0, *[0.0] * 7]]))
    assert q[0, 0] == -8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", ALL)
def test_scales_are_float32_and_zeros_stay_zero(quantize, dtype) -> None:
    q, inv_scale = quantize(torch.zeros(3, 8, dtype=dtype))
    assert inv_scale.dtype == q.dtype == torch.float32
    assert torch.isfinite(inv_scale).all()
    if quantize is not quantize_binary_sign:  # binary has no zero
        assert torch.equal(q, torch.zeros(3, 8))


@pytest.mark.parametrize("magnitude", [1e-38, 1e-8, 1e-5, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("quantize", ALL)
def test_integers_in_range_at_any_magnitude(quantize, magnitude) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * magnitude
    q, _ = quantize(x)
    limit = {
        quantize_ternary_absmean: (-1, 1),
        quantize_binary_sign: (-1, 1),
        quantize_int8_absmax: (-127, 127),
        quantize_int4_absmean: (-8, 7),
    }[quantize]
    assert torch.equal(q, q.round())
    assert limit[0] <= q.min() and q.max() <= limit[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantize", ALL)
def test_nan_and_infinity_never_become_an_integer(quantize, bad) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    x[1, 3] = bad
    q, inv_scale = quantize(x)
    restored = q / inv_scale
    assert not torch.isfinite(restored[1, 3])
    if quantize in PER_TOKEN:  # other tokens are untouched
        others = [0, 2, 3]
        assert torch.equal(q[others], quantize(x[others])[0])


@pytest.mark.parametrize("quantize", ALL)
def test_input_is_not_changed(quantize) -> None:
    x = torch.randn(5, 7)
    before = x.clone()
    quantize(x)
    assert torch.equal(x, before)


def test_absmean_divides_by_the_correctly_rounded_mean_whatever_the_threads() -> None:
    for seed in range(20):
        w = torch.randn(300, 257, generator=torch.Generator().manual_seed(seed))
        exact = np.float32(math.fsum(abs(v) for v in w.flatten().tolist()) / w.numel())
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert quantize_ternary_absmean(w)[1].item() == np.float32(1) / exact
        torch.set_num_threads(1)


def test_gaussian_weights_have_the_known_share_of_zeros() -> None:
    # P(|w| < 0.5 E|w|) = erf(0.5 sqrt(2/pi) / sqrt(2)) = 0.3101
    w = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(3))
    q, _ = quantize_ternary_absmean(w)
    assert (q == 0).float().mean().item() == pytest.approx(math.erf(0.5 / math.sqrt(math.pi)), abs=1e-3)


def test_absmean_must_not_be_applied_twice() -> None:
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(4))
    q, inv_scale = quantize_ternary_absmean(w)
    q2, inv_scale2 = quantize_ternary_absmean(q / inv_scale)
    assert torch.equal(q, q2)
    shrink = (inv_scale / inv_scale2).item()
    assert shrink == pytest.approx((q != 0).float().mean().item(), rel=1e-5)
    assert shrink == pytest.approx(0.69, abs=0.01)


def test_straight_through_is_exact_where_the_usual_spelling_is_not() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(5), requires_grad=True)
    exact = fake_quantize(quantize_ternary_absmean, w)
    assert exact.unique().numel() == 3
    usual = w + (exact.detach() - w).detach()
    assert usual.unique().numel() > 3
    weights = torch.randn(1024, 1024)
    (exact * weights).sum().backward()
    assert torch.equal(w.grad, weights)


def test_straight_through_gradient_is_identity_for_saturated_weights() -> None:
    """Autograd through clamp would give 0 at and beyond the bound (torch changed its rule at the bound)."""
    w = torch.tensor([5.0, -5.0, 0.01, 1.0], requires_grad=True)
    straight_through(quantize_ternary_absmean(w)[0], w).sum().backward()
    assert w.grad.tolist() == [1.0] * 4
