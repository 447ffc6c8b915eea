"""Norm and int8 rows from one operator: the bits of the two, and gradients of float64."""

import pytest
import torch

from bitnet import BitNet, Transformer
from bitnet.layers import BitLinear, integer_products
from bitnet.layers.integer_products import Arithmetic, LowBitProduct, activation_rows
from bitnet.layers.normed_rows import fuse_norms, norm_with_rows
from bitnet.model import RMSNorm
from bitnet.quantizers import WEIGHT_QUANTIZERS


@pytest.mark.parametrize("shape", [(2, 5, 96), (1, 1, 64), (3, 257)])
def test_result_rows_and_gradients(shape) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), (torch.rand(shape[-1]) + 0.5).requires_grad_()
    y = norm_with_rows(x * 1.0, weight, 1e-5)
    norm = RMSNorm(shape[-1], 1e-5)
    norm.weight = torch.nn.Parameter(weight.detach())
    expected = norm(x.detach().requires_grad_())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    rows = activation_rows(y, 8)
    again = activation_rows(y.detach(), 8)
    assert torch.equal(rows.q, again.q) and torch.equal(rows.inv_scale, again.inv_scale)
    grad = torch.randn(shape)
    y.backward(grad)
    exact, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * w).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=2e-5)


def test_layers_take_the_rows_that_lie_there(monkeypatch) -> None:
    x, layer = torch.randn(2, 3, 96, requires_grad=True), BitLinear(96, 48, bias=False)
    y = norm_with_rows(x * 1.0, torch.ones(96), 1e-5)
    expected = layer(y.detach())
    monkeypatch.setattr(integer_products, "rms_norm_quantize", None)  # nobody may quantize again
    assert torch.equal(layer(y), expected)
    with pytest.raises(TypeError):
        layer(y * 2.0)  # another tensor has no rows


def test_nothing_lies_there_for_a_layer_that_does_not_read_it() -> None:
    x, layer = torch.randn(4, 96, requires_grad=True), BitLinear(96, 48, bias=False)
    found = []
    for layer.warmup, layer.act_bits in ((0.0, 8), (0.5, 8), (1.0, 4), (1.0, 8)):
        y = norm_with_rows(x * 1.0, torch.ones(96), 1e-5, transposed=True, reader=layer)
        found.append(hasattr(y, "_bitnet_rows"))
        torch.testing.assert_close(y, norm_with_rows(x, torch.ones(96), 1e-5), rtol=0, atol=0)
    assert found == [False, False, False, True]


def test_transposed_copies_give_the_same_gradients() -> None:
    """What a GPU keeps for int8 gradients: rows and levels a second time, as those products read them."""
    torch.manual_seed(0)
    layer, x = BitLinear(96, 48, bias=False), torch.randn(6, 96)
    layer.arithmetic = Arithmetic(forward="float", input_gradient="int8", weight_gradient="int16")
    y = norm_with_rows(x.requires_grad_() * 1.0, torch.ones(96), 1e-5, transposed=True)
    rows, levels = activation_rows(y, 8), layer.levels()
    assert rows.q_t is not None and rows.q_t.is_contiguous() and torch.equal(rows.q_t, rows.q.t())
    quantizer = WEIGHT_QUANTIZERS["ternary"]
    scale = quantizer.scale(quantizer.statistics(layer.weight), layer.weight.numel())
    q, q_t = quantizer.int8_levels_both_ways(layer.weight, scale)
    assert torch.equal(q, levels.q) and q_t.is_contiguous() and torch.equal(q_t, q.t())
    found = []
    for form in ((rows, levels._replace(q_t=q_t)), (rows._replace(q_t=None), levels)):
        inputs = y.detach().requires_grad_(), layer.weight
        out = LowBitProduct.apply(*inputs, *form, torch.float32, layer.arithmetic, None, None)
        found.append((out, *torch.autograd.grad(out.pow(2).sum(), inputs)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_norms_that_only_8_bit_layers_read(tiny_config) -> None:
    model = Transformer(tiny_config)
    assert fuse_norms(model.layers) == 0  # float linears want floats
    BitNet(act_bits=4).prepare(model)
    assert fuse_norms(model.layers) == 4  # wo and w2 keep 8 bits: the two sub-norms of two blocks
    model = Transformer(tiny_config)
    BitNet().prepare(model)
    assert fuse_norms(model.layers) == 8
    assert model.norm.training_kernel is None  # the head reads floats
    ids = torch.randint(97, (2, 7))
    plain = Transformer(tiny_config)
    plain.load_state_dict(model.state_dict())
    BitNet().prepare(plain)
    assert torch.equal(model(ids), plain(ids))  # on a CPU nothing changes
