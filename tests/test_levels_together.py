"""All weights quantized at once, and held for a step; the kernels run in Triton's interpreter."""

import pytest
import torch

from bitnet import BitNet, Transformer
from bitnet.layers import BitLinear, low_bit_layers
from bitnet.layers.levels_together import hold_levels, release_levels
from bitnet_kernels.rms_norm import norm_and_rows

from .conftest import Recorded

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def layers(tiny_config, monkeypatch: pytest.MonkeyPatch) -> list[BitLinear]:
    monkeypatch.setattr(BitLinear, "is_on_gpu_as_a_whole", True)
    model = Transformer(tiny_config)
    BitNet().prepare(model)
    found = list(low_bit_layers(model).values())
    found[1].weight_kind = "binary"
    return found


def test_levels_are_those_of_each_layer_and_last_until_it_lets_go(layers, monkeypatch) -> None:
    with monkeypatch.context() as each:
        each.setattr(BitLinear, "is_on_gpu_as_a_whole", False)
        expected = [layer.quantized_weight() for layer in layers]
    hold_levels(layers)
    with monkeypatch.context() as nobody:
        nobody.setattr(BitLinear, "_quantize", None)
        found = [layer.quantized_weight() for layer in layers]
    for (q, inv_scale), (q_each, inv_each) in zip(found, expected, strict=True):
        assert torch.equal(q, q_each) and torch.equal(inv_scale, inv_each)
    kept = [layer.levels() for layer in layers]
    hold_levels(layers)  # within the same step
    assert all(layer.levels() is levels for layer, levels in zip(layers, kept, strict=True))
    release_levels(layers)
    for layer in layers:
        layer.weight.data.mul_(-1.0)
    assert torch.equal(layers[0].quantized_weight()[0], -found[0][0])


def test_who_is_left_out(layers) -> None:
    layers[0].warmup = 0.0  # trains in float
    layers[2].arithmetic = type(layers[2].arithmetic)(input_gradient="int8")
    layers[3].levels()  # of validation, say: nobody knows what has happened to the weight since
    before = layers[3]._levels
    hold_levels(layers)
    assert [layer._levels is not None for layer in layers[:4]] == [False, True, False, True]
    assert layers[3]._levels is not before


def test_backward_of_the_norm_clears_nothing_for_its_rows() -> None:
    """Zeros for the gradients that int8 rows do not have would be three launches for each norm."""
    x, weight = torch.randn(4, 96, requires_grad=True), torch.ones(96, requires_grad=True)
    y = norm_and_rows(x, weight, 1e-5, True)[0]
    with Recorded() as recorded:
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert recorded.names and not [name for name in recorded.names if "zeros" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_gpu(dtype: torch.dtype) -> None:
    """Its operators run on a CPU, too: gradients of float64."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    weight = (torch.rand(96) + 0.5).requires_grad_()
    y = norm_and_rows(x, weight, 1e-5, False)[0]
    grad = torch.randn(y.shape)
    y.backward(grad)
    exact, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    expected.backward(grad.double())
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert y.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=tolerance["rtol"], atol=20 * tolerance["atol"])
