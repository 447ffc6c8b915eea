"""GPTQ and SpQR against rounding to nearest, and against a plain float64 version of the algorithm."""

import copy

import pytest
import torch

from bitnet.affine import Scheme, dequantize_affine, fit, quantize_affine
from bitnet.errors import UserError
from bitnet.layers import FakeQuantizedLinear
from bitnet.recipes import GPTQ, RTN, SpQR
from bitnet.recipes.calibration import Chain, linears, second_moments
from bitnet.recipes.gptq import few_bit_scales, inverse_factor, quantize_columns
from tests.recipes.conftest import random_model, token_batches


def correlated(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) @ torch.randn(k, k, generator=generator)


@pytest.mark.parametrize("group_size", [32, 0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_that_of_rounding(bits, group_size) -> None:
    x, w = correlated(400, 128, 0), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    errors = []
    for recipe in (RTN(bits=bits, group_size=group_size), GPTQ(bits=bits, group_size=group_size)):
        linear = torch.nn.Linear(128, 48, bias=False)
        linear.weight.data = w.clone()
        layer = recipe.layer("w", linear)
        if isinstance(recipe, GPTQ):
            recipe.quantize(layer, w, 2 / 400 * x.t() @ x)
        errors.append(float(((layer.dense() - w) @ x.t()).norm()))
    assert errors[1] < 0.85 * errors[0]


def test_columns_against_a_plain_float64_version() -> None:
    """Optimal brain surgeon, a column at a time, inverting the shrinking Hessian anew at every step."""
    w, x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)), correlated(200, 40, 3)
    hessian = 2 * x.t() @ x
    scheme = Scheme(bits=3, granularity="channel", symmetric=False)
    scale, zero_point = fit(w, scheme)
    q, *_ = quantize_columns(
        w, inverse_factor(hessian.clone(), 0.01), scheme, lambda columns, group: (scale, zero_point)
    )
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
    rest, expected = w.double().clone(), torch.zeros(6, 40)
    for j in range(40):
        inverse = torch.linalg.inv(h[j:, j:])
        expected[:, j : j + 1] = quantize_affine(rest[:, j : j + 1].float(), scale, zero_point, scheme)
        value = dequantize_affine(expected[:, j : j + 1], scale, zero_point, scheme).double()
        rest[:, j:] -= (rest[:, j : j + 1] - value) / inverse[0, 0] * inverse[0]
    assert float((q == expected).float().mean()) > 0.99


@pytest.mark.parametrize("group_size", [96, 192, 256])
def test_groups_that_are_no_multiple_of_a_step(group_size) -> None:
    """Each group has the grid of its own weights as they are by then, and errors go on over its borders."""
    k = 2 * group_size
    w, x = torch.randn(5, k, generator=torch.Generator().manual_seed(5)), correlated(3 * k, k, 6)
    factor = inverse_factor(2 * x.t() @ x, 0.01)
    scheme = Scheme(bits=3, granularity="group", group_size=group_size, symmetric=False)
    channel = Scheme(bits=3, granularity="channel", symmetric=False)
    q, scale, _, _ = quantize_columns(w, factor, scheme, lambda columns, group: fit(columns, channel))
    rest, expected = w.double(), torch.zeros(5, k)
    for j in range(k):
        if j % group_size == 0:
            grid = fit(rest[:, j : j + group_size].float(), channel)
        column = rest[:, j : j + 1].float()
        expected[:, j : j + 1] = quantize_affine(column, *grid, channel)
        error = (column - dequantize_affine(expected[:, j : j + 1], *grid, channel)) / factor[j, j]
        rest[:, j + 1 :] -= (error @ factor[j : j + 1, j + 1 :]).double()
    assert scale.shape == (5, 2, 1) and (q == expected).float().mean() > 0.99  # ties of float32 sums aside


def test_a_damping_that_does_not_help_is_named() -> None:
    with pytest.raises(UserError, match="damping = 1e-12: the moments of the inputs cannot be inverted so; raise it"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1e-12)


def test_moments_of_the_inputs() -> None:
    model, data = random_model(), token_batches()
    chain = Chain(model, data)
    moments = second_moments(chain, chain.blocks[0], chain.embedded())
    assert set(moments) == set(linears(chain.blocks[0]))
    x = torch.cat([model.layers[0].attention_norm(h).flatten(0, 1) for h in chain.embedded()]).double()
    for name in ("attention.wq", "attention.wk", "attention.wv"):
        torch.testing.assert_close(moments[name].double(), 2 / len(x) * x.t() @ x, rtol=1e-4, atol=1e-4)


def test_a_dead_input_does_no_harm() -> None:
    x = correlated(100, 32, 4)
    x[:, 7] = 0
    factor = inverse_factor(2 * x.t() @ x, 0.01)
    assert torch.isfinite(factor).all()


def test_spqr_keeps_what_matters_most() -> None:
    x, w = correlated(400, 128, 5), torch.randn(48, 128, generator=torch.Generator().manual_seed(6))
    w[3, 17], w[40, 90] = 40.0, -35.0
    hessian = 2 / 400 * x.t() @ x
    errors = {}
    for recipe in (GPTQ(bits=3, group_size=16), SpQR(bits=3)):
        linear = torch.nn.Linear(128, 48, bias=False)
        linear.weight.data = w.clone()
        layer = recipe.layer("w", linear)
        recipe.quantize(layer, w, hessian)
        errors[type(recipe).__name__] = float(((layer.dense() - w) @ x.t()).norm())
    assert isinstance(layer, FakeQuantizedLinear) and layer.outlier_at.numel() == round(0.01 * 48 * 128)
    assert {3 * 128 + 17, 40 * 128 + 90} <= set(layer.outlier_at.tolist())
    assert errors["SpQR"] < 0.95 * errors["GPTQ"]
    # Eight values at most for the sixteen rows that share a range, in each group of inputs.
    scales = layer.scale.view(3, 16, 8)
    assert all(len(scales[i, :, g].unique()) <= 8 for i in range(3) for g in range(8))


def test_few_bit_scales_by_hand() -> None:
    scale = torch.tensor([[1.0], [2.0], [8.0], [5.4]])
    assert few_bit_scales(scale, 3, 4).flatten().tolist() == [1.0, 2.0, 8.0, 5.0]


def test_a_whole_model_computes_less_wrong() -> None:
    model, data = random_model(), token_batches(8)
    exact = model(data[0]).detach()
    errors = []
    for recipe in (RTN(bits=3, group_size=32), GPTQ(bits=3, group_size=32)):
        copied = copy.deepcopy(model)
        recipe.prepare(copied, data)
        errors.append(float((copied(data[0]) - exact).norm()))
    assert errors[1] < errors[0]
