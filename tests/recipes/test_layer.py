"""The layer of all post-training recipes against float64, its own integers, and the file it is saved to."""

import copy

import pytest
import torch
from torch import nn

from bitnet.affine import Scheme, dequantize_affine, fit, quantize_affine
from bitnet.codebook import Codebook, DoubleQuantized, normal_float
from bitnet.layers import ActivationScheme, FakeQuantizedLinear
from bitnet.layers.activation_quantizer import ActivationQuantizer
from bitnet.layers.grouped_product import exact_sums

GRIDS = [
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=8, granularity="channel"),
    Scheme(bits=4, granularity="group", group_size=32, symmetric=False),
    Scheme(bits=3, granularity="group", group_size=64),
    Scheme(bits=2, granularity="channel", symmetric=False),
    Codebook(bits=4, group_size=64),
]


def linear(n: int = 24, k: int = 128, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=False)


def frozen(grid, **options) -> FakeQuantizedLinear:
    return FakeQuantizedLinear.from_linear(linear(), grid=grid, state="frozen", **options)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_saved_and_loaded_integers_are_the_same(grid) -> None:
    layer = frozen(grid)
    state = layer.state_dict()
    assert torch.equal(state["weight"], layer.dense())
    new = FakeQuantizedLinear(128, 24, grid=grid)
    new.load_state_dict(state)
    assert torch.equal(new.q, layer.q) and torch.equal(new.dense(), layer.dense())
    with torch.device("meta"):
        empty = FakeQuantizedLinear(128, 24, grid=grid)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.q, layer.q) and torch.equal(empty.dense(), layer.dense())


def test_trained_scales_do_not_move_integers() -> None:
    layer = frozen(Scheme(bits=4, granularity="group", group_size=32, symmetric=False))
    before = layer.q.clone()
    layer.scale.data.mul_(1 + 0.3 * torch.rand_like(layer.scale))
    new = FakeQuantizedLinear(128, 24, grid=layer.grid)
    new.load_state_dict(layer.state_dict())
    assert torch.equal(new.q, before) and torch.equal(new.dense(), layer.dense())


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=str)
@pytest.mark.parametrize("act", [None, ActivationScheme(), ActivationScheme(bits=4, scale="tensor")], ids=str)
def test_freezing_changes_no_bit(grid, act) -> None:
    x = torch.randn(5, 128)
    layer = FakeQuantizedLinear.from_linear(linear(), grid=grid, state="latent", act=act)
    trained = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), trained)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("grid", GRIDS[:-1], ids=str)
def test_integer_forward_against_int64(grid) -> None:
    """Exact sums over each group, in float64, and the order of roundings of the formula."""
    layer = frozen(grid, act=ActivationScheme())
    x = torch.randn(7, 128)
    inv_scale = 127 / x.abs().amax(1, keepdim=True)
    x_q = (x * inv_scale).round().long()
    q, scale, zero_point = layer.parts()
    centered = (layer.grid.rows(q).long() - zero_point.long()).view(24, 128)
    groups = scale.flatten(1).expand(24, -1)
    size = 128 // groups.shape[1]
    y = torch.zeros(7, 24)
    for g in range(groups.shape[1]):
        part = slice(g * size, (g + 1) * size)
        y = y + (x_q[:, part] @ centered[:, part].t()).float() * groups[:, g]
    assert torch.equal(layer(x), y / inv_scale)


def test_sums_are_exact_at_the_largest_integers() -> None:
    for k in (512, 513, 4096):
        x, w = torch.full((1, k), 127.0), torch.full((1, k), 255.0)
        x[0, 0] = 126
        assert exact_sums(x, w).item() == float(torch.tensor(127 * 255 * (k - 1) + 126 * 255, dtype=torch.float32))


def test_gradients_are_those_of_the_dequantized_product() -> None:
    layer = FakeQuantizedLinear.from_linear(
        linear(), grid=Scheme(bits=4, granularity="group", group_size=32), state="latent", act=ActivationScheme()
    )
    x = torch.randn(6, 128, requires_grad=True)
    layer(x).square().sum().backward()
    y = layer(x).detach()
    x_q, inv_scale = layer.act.quantize(x)
    torch.testing.assert_close(x.grad, (2 * y) @ layer.dense().detach())
    torch.testing.assert_close(layer.weight.grad, (2 * y).t() @ (x_q / inv_scale))


def test_moving_average_by_hand() -> None:
    quantizer = ActivationQuantizer(ActivationScheme(scale="static", momentum=0.25))
    quantizer.observing = "average"
    batches = [torch.tensor([-1.0, 3.0]), torch.tensor([-5.0, 1.0]), torch.tensor([0.0, 9.0])]
    low, high = -1.0, 3.0
    for number, x in enumerate(batches):
        quantizer.observe(x)
        if number:
            low, high = 0.75 * low + 0.25 * float(x.min()), 0.75 * high + 0.25 * float(x.max())
        assert quantizer.limits.tolist() == pytest.approx([low, high])
    quantizer.eval()
    quantizer.observe(torch.tensor([-100.0, 100.0]))
    assert quantizer.limits.tolist() == pytest.approx([low, high])
    again = ActivationQuantizer(quantizer.scheme)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.limits, quantizer.limits)
    q, inv_scale = quantizer.quantize(torch.tensor([[1000.0, -1000.0, high]]))
    assert q.tolist()[0][:2] == [127.0, -127.0]
    assert float(inv_scale) == pytest.approx(127 / max(-low, high))


def test_static_ranges_cut_the_gradient_off() -> None:
    quantizer = ActivationQuantizer(ActivationScheme(bits=4, scale="static"))
    quantizer.limits.copy_(torch.tensor([-7.0, 7.0]))
    x = torch.tensor([[-8.0, -7.0, 7.0, 7.4, 7.6]], requires_grad=True)
    quantizer.fake_quantize(x, *quantizer.quantize(x)).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_output_quantizer_is_one_scale_a_token() -> None:
    layer = frozen(Scheme(bits=8), output=ActivationScheme(bits=8))
    x = torch.randn(3, 128)
    y = layer(x)
    layer.output = None
    exact = layer(x)
    step = exact.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(y, exact)
    assert float(((y - exact).abs() / step).max()) <= 0.5 + 1e-3
    torch.testing.assert_close((y / step), (y / step).round(), atol=2e-3, rtol=0)


def test_outlier_columns_are_taken_in_float() -> None:
    """With a column a thousand times larger than the rest, plain int8 activations lose the rest."""
    x = torch.randn(16, 128)
    x[:, 5] *= 1000
    exact = x.double() @ linear().weight.double().t()
    errors = {}
    for threshold in (None, 6.0):
        y = frozen(Scheme(bits=8), act=ActivationScheme(), outlier_threshold=threshold)(x)
        errors[threshold] = float((y.detach() - exact.detach()).norm())
    assert errors[6.0] < 0.4 * errors[None]
    small = x / 1e6  # nothing is large: the plain int8 product
    plain, mixed = (frozen(Scheme(bits=8), act=ActivationScheme(), outlier_threshold=t)(small) for t in (None, 6.0))
    assert torch.equal(plain, mixed)


def test_kept_weights_are_exact() -> None:
    layer = frozen(Scheme(bits=2, granularity="group", group_size=32), outliers=3)
    layer.outlier_at, layer.outlier_values = (
        torch.tensor([0, 200, 3071], dtype=torch.int32),
        torch.tensor([9.0, -8.0, 7.0]),
    )
    w = layer.dense().flatten()
    assert w[[0, 200, 3071]].tolist() == [9.0, -8.0, 7.0]
    new = FakeQuantizedLinear(128, 24, grid=layer.grid, outliers=3)
    new.load_state_dict(layer.state_dict())
    assert torch.equal(new.dense(), layer.dense())


def test_scales_are_those_of_the_file_from_the_beginning() -> None:
    """Rounding the scale to 16 bits only when saving would move integers: it does in this matrix."""
    w, scheme = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)), Scheme(bits=8, symmetric=False)
    scale, zero_point = fit(w, scheme)
    assert torch.equal(scale, scale.half().float())
    layer = FakeQuantizedLinear.from_linear(copy.deepcopy(linear()), grid=scheme, state="latent")
    assert torch.equal(layer.parts()[1], layer.parts()[1].half().float())
    exact = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 255
    late = quantize_affine(w, exact, zero_point, scheme)
    assert not torch.equal(quantize_affine(w, scale, zero_point, scheme), late)


# ---- codebooks

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""arXiv 2305.14314, appendix E."""


def test_the_levels_of_nf4_are_the_published_ones() -> None:
    levels = normal_float(4)
    torch.testing.assert_close(levels, torch.tensor(NF4), atol=3e-5, rtol=0)
    assert float(levels[7]) == 0.0
    assert normal_float(2).tolist()[1] == 0.0 and len(normal_float(3)) == 8


def test_levels_are_brought_to_a_device_once() -> None:
    """A copy from the CPU cannot be part of a CUDA graph."""
    assert Codebook().levels(torch.device("meta")) is Codebook().levels(torch.device("meta"))


def test_nf4_takes_the_nearest_level_and_errs_as_known() -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    book = Codebook(bits=4, group_size=64)
    scale = book.fit(w)
    codes = book.quantize(w, scale)
    ratio = (book.blocks.rows(w) / scale).reshape(-1, 1)
    nearest = (ratio - normal_float(4)).abs().argmin(1).view(w.shape)
    assert float((codes.long() == nearest).float().mean()) > 0.99999  # ties between float neighbours
    error = float((book.dequantize(codes, scale) - w).norm() / w.norm())
    assert error == pytest.approx(0.0918, abs=0.003)


def test_two_bits_are_better_equally_spaced_than_at_quantiles() -> None:
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    book, scheme = Codebook(bits=2), Scheme(bits=2, granularity="group", group_size=64, symmetric=False)
    normal = book.dequantize(book.quantize(w, book.fit(w)), book.fit(w))
    even = dequantize_affine(quantize_affine(w, *fit(w, scheme), scheme), *fit(w, scheme), scheme)
    assert float((normal - w).norm() / w.norm()) == pytest.approx(0.563, abs=0.01)
    assert float((even - w).norm() / w.norm()) == pytest.approx(0.457, abs=0.01)


def test_double_quantization_in_bytes() -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(3))
    scale = Codebook().fit(w)
    double = DoubleQuantized.of(scale)
    assert 4 + 8 * double.nbytes / w.numel() == pytest.approx(4.127, abs=0.0005)
    assert float(((double.scale() - scale) / scale).abs().max()) < 0.01
