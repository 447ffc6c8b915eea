"""Integer grids against their definition, torchao, and gradients by hand."""

import pytest
import torch

from bitnet.affine import Scheme, dequantize_affine, fake_quantize_affine, grid, minmax, quantize_affine
from bitnet.errors import UserError

GRANULARITIES = ["tensor", "channel", "token", "group"]


def quantized(x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, zero_point = grid(*minmax(x, scheme), scheme)
    return quantize_affine(x, scale, zero_point, scheme), scale, zero_point


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_error_is_at_most_half_a_step(bits, symmetric, granularity) -> None:
    scheme = Scheme(bits=bits, granularity=granularity, group_size=32, symmetric=symmetric)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits)) * 3 + 0.7
    q, scale, zero_point = quantized(x, scheme)
    assert torch.equal(q, q.round()) and torch.equal(zero_point, zero_point.round())
    assert scheme.qmin <= int(q.min()) and int(q.max()) <= scheme.qmax
    back = dequantize_affine(q, scale, zero_point, scheme)
    # A zero point is rounded, so that an end of an asymmetric range may be cut by up to half a step as well.
    limit = 0.5 if symmetric else 1.0
    error = scheme.rows((back - x).double()).abs() / scale.double()
    assert float(error.max()) <= limit * (1 + 1e-5)
    again = quantize_affine(back, scale, zero_point, scheme)
    assert torch.equal(again, q)  # idempotent with the same grid
    assert torch.equal(fake_quantize_affine(x, scale, zero_point, scheme), back)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-30, 1e30])
def test_constant_rows_give_no_nan(granularity, symmetric, value) -> None:
    scheme = Scheme(bits=4, granularity=granularity, group_size=1, symmetric=symmetric)
    x = torch.full((2, 4), value)
    q, scale, zero_point = quantized(x, scheme)
    back = dequantize_affine(q, scale, zero_point, scheme)
    assert torch.isfinite(back).all()
    torch.testing.assert_close(back, x, rtol=0.04, atol=1e-6)


def test_who_shares_a_scale() -> None:
    x = torch.arange(1.0, 13.0).view(2, 6)
    scales = {g: quantized(x, Scheme(granularity=g, group_size=3))[1] for g in GRANULARITIES}
    assert scales["tensor"].shape == (1, 1) and float(scales["tensor"]) == pytest.approx(12 / 127)
    assert scales["channel"].flatten().tolist() == pytest.approx([6 / 127, 12 / 127])
    assert scales["token"].shape == (2, 1)
    assert scales["group"].flatten().tolist() == pytest.approx([3 / 127, 6 / 127, 9 / 127, 12 / 127])
    for granularity, scale in scales.items():
        assert Scheme(granularity=granularity, group_size=3).scale_shape((2, 6)) == tuple(scale.shape)


def test_asymmetric_by_hand() -> None:
    """-1 .. 2 in two bits: step 1, zero at 1."""
    scheme = Scheme(bits=2, granularity="tensor", symmetric=False)
    q, scale, zero_point = quantized(torch.tensor([[-1.0, 0.0, 0.6, 2.0]]), scheme)
    assert (float(scale), float(zero_point), q.tolist()) == (1.0, 1.0, [[0, 1, 2, 3]])


@pytest.mark.parametrize("zero", [0.0, 3.0])
def test_gradients_at_the_ends_of_the_range(zero) -> None:
    """One step outside, the ends themselves, one step outside: 0, 1, 1, 0."""
    scheme = Scheme(bits=4, granularity="tensor", symmetric=zero == 0)
    ends = torch.tensor([[scheme.qmin - 1.0, scheme.qmin, scheme.qmax, scheme.qmax + 1.0]]) - zero
    x = (ends * 0.25).requires_grad_()
    scale = torch.tensor([[0.25]], requires_grad=True)
    zero_point = torch.tensor([[zero]], requires_grad=True)
    fake_quantize_affine(x, scale, zero_point, scheme).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert float(zero_point.grad) == -0.25 * 2  # the two that were clamped
    # Inside q - z equals x / s here, so only what was clamped moves the scale.
    assert float(scale.grad) == (scheme.qmin - zero) + (scheme.qmax - zero)


def test_gradient_of_the_scale_in_closed_form() -> None:
    scheme = Scheme(bits=3, granularity="group", group_size=8, symmetric=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator)
    scale, zero_point = (t.clone() for t in grid(*minmax(x * 0.7, scheme), scheme))
    weights = torch.randn(4, 16, generator=generator)
    scale.requires_grad_()
    (fake_quantize_affine(x, scale, zero_point, scheme) * weights).sum().backward()
    steps = scale.detach()
    expected = torch.zeros_like(steps)
    for row in range(4):
        for i in range(16):
            s, z = float(steps[row, i // 8]), float(zero_point[row, i // 8])
            unclamped = round(float(x[row, i]) / s) + z
            q = min(max(unclamped, 0), 7)
            slope = (q - z) - float(x[row, i]) / s if q == unclamped else q - z
            expected[row, i // 8] += float(weights[row, i]) * slope
    torch.testing.assert_close(scale.grad, expected, rtol=1e-5, atol=1e-5)


def test_torchao_has_the_same_grid() -> None:
    """An optional oracle: int4 in groups of 32, symmetric as torchao maps it (-8 .. 7 there, so compare the scale it
    would have with our bounds)."""
    pytest.importorskip("torchao")
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine
    from torchao.quantization.quant_primitives import quantize_affine as theirs

    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(bits=4, granularity="group", group_size=32, symmetric=False)
    q, scale, zero_point = quantized(x, scheme)
    ao_scale, ao_zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, (1, 32), torch.int32, 0, 15, 1e-8)
    assert torch.equal(ao_scale.reshape(scale.shape), scale)
    assert torch.equal(ao_zero.reshape(scale.shape).float(), zero_point)
    ao_q = theirs(x, (1, 32), ao_scale, ao_zero, torch.int32, 0, 15)
    same = (ao_q.float() == q).float().mean()
    assert float(same) > 0.999  # it multiplies by 1 / scale: a tie may fall to the other side


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "bits = 1"),
        ({"bits": 9}, "bits = 9"),
        ({"granularity": "group", "group_size": 0}, "group_size = 0"),
    ],
)
def test_bad_schemes_are_refused(fields, words) -> None:
    with pytest.raises(UserError, match=words):
        Scheme(**fields)


def test_a_group_must_divide_the_row() -> None:
    with pytest.raises(UserError, match="does not divide a row of 10 inputs"):
        minmax(torch.ones(2, 10), Scheme(granularity="group", group_size=4))
